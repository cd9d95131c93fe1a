"""README and docs: what they name exists, the commands that they print are understood, their numbers stand elsewhere too."""
import dataclasses
import importlib
import re
import shlex

import pytest
from conftest import ROOT

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]}
CONFIGS = {  # script: its dataclasses of options
    "sppo.py": ["sppo.TrainConfig"], "grpo.py": ["grpo.GRPOConfig"], "ppo.py": ["ppo.PPOConfig"], "spo.py": ["spo.SPOConfig"],
    "eval.py": ["eval.EvalConfig"], "tools.plan": ["tools.plan.PlanConfig", "tools.plan_time.TimeConfig"], "tools.lesson": ["tools.lesson.LessonConfig"],
    "tools.race": ["tools.race.RaceConfig"], "tools.gpu": ["tools.gpu.GPUConfig"], "tools.board": ["tools.board.BoardConfig"],
    "tools.bench": ["tools.bench.StepConfig", "tools.bench.PartConfig", "tools.bench_runs.StragglerConfig",
                    "tools.bench_runs.TRLConfig"]}
OTHERS = {  # options of programs that are not ours
    "torchrun": {"nproc-per-node", "nnodes", "standalone", "shutdown-timeout", "rdzv-backend", "rdzv-endpoint", "rdzv-id"},
    "tools.compare": {"recheck"}, "tools.plan": {"time"}, "everywhere": {"help", "logdir", "loss-mean", "excludes", "extra-index-url", "index-strategy"}}
SOURCE = "".join(path.read_text() for folder in (ROOT, ROOT / "tools") for path in sorted(folder.glob("*.py")))


def options_of(script):
    names = set(OTHERS.get(script, ()))
    for config in CONFIGS.get(script, ()):
        module, _, name = config.rpartition(".")
        for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
            option = field.name.replace("_", "-")
            names |= {option, f"no-{option}"} if field.type is bool else {option}
    return names


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page, anchor):
    """The text below a heading, up to the next of its level or a higher one."""
    lines, level = [], 0
    for line in PAGES[page].splitlines():
        marks = re.match(r"#+ ", line)
        if level and marks and len(marks[0]) <= level:
            break
        if level:
            lines.append(line)
        elif marks and anchors(line) == {anchor}:
            level = len(marks[0])
    return "\n".join(lines)


def links(page):
    """(its words, path in the repository, anchor) of each link and picture of a page."""
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", PAGES[page]):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            yield words, str(file.resolve().relative_to(ROOT)), anchor


def code_of(page):
    """What stands in code: the lines of blocks, continued ones joined, and spans."""
    text = PAGES[page].replace("\\\n", " ")
    fenced = re.findall(r"(?ms)^```\w*\n(.*?)^```", text)
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    return [*"\n".join(fenced).splitlines(), *re.findall(r"(?m)^    (.*)$", text), *spans]


def commands_of(page):
    """(script, words after it) of each command of ours."""
    for code in code_of(page):
        found = re.search(r"(?:^|[\s/])(python|torchrun)\s(.*?)(?:-m )?(\w+\.py|tools\.\w+)(?:\s(.*))?$", code)
        if found and " - " not in code:
            yield found[1], found[2], found[3], shlex.split((found[4] or "").replace("'", ""), comments=True)


def test_the_readme_fits_into_150_lines():
    assert PAGES["README.md"].count("\n") <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for words, file, anchor in links(page):
        assert (ROOT / file).exists(), f"{words}: {file}"
        if anchor:
            assert anchor in anchors(PAGES[file]), f"{words}: {file}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_those_of_the_scripts(page):
    for program, before, script, words in commands_of(page):
        if script.startswith("tools."):
            assert (ROOT / script.replace(".", "/")).with_suffix(".py").exists(), script
        elif script not in CONFIGS:  # of the reader's own
            continue
        if "--" in words:  # what follows is for the scripts that train
            words = words[: words.index("--")]
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options_of(script) | {"help"}, (script, given - options_of(script))
        own = set(re.findall(r"--([a-z][a-z-]+)", before))
        assert own <= OTHERS.get(program, set()), (program, own)
    for code in code_of(page):
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"make {target}"
        for file, words in re.findall(r"pytest.* (tests/\w+\.py)(?: -k (\w+))?", code):
            assert f"{words}" in (ROOT / file).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_options_files_and_metrics_that_are_named_exist(page):
    known = set.union(*OTHERS.values(), *(options_of(script) for script in CONFIGS))
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", PAGES[page]))
    for span in spans:
        for option in re.findall(r"(?:^|\s)--([a-z][a-z-]+)", span):
            assert option in known, f"--{option}"
        if re.fullmatch(r"[a-z\d_./-]+\.(py|md|txt|sh|toml|png|svg|json|jsonl)", span):
            # A file of the repository, or one that a run writes, whose name the code must have.
            assert (ROOT / span).exists() or f'{span.split("/")[-1]}"' in SOURCE, span
        if found := re.fullmatch(r"(policy|critic|rollout|reward|tracker|group|time)/(\w+)", span):
            name = re.sub(r"_(1|10)$", "_", found[2])
            assert name in SOURCE, span


def numbers(text):
    return re.findall(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?", text)


def test_what_was_found_here_stands_where_the_link_leads():
    """Each number of the right column of the README's claims."""
    table = section("README.md", "what-the-papers-claim-and-what-was-found-here")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 5
    checked = 0
    for *_, here in rows:
        told = re.sub(r"\]\([^)]*\)", "]", here)
        if not numbers(told):
            continue
        (_, target), = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", here)
        page, _, anchor = target.partition("#")
        there = section(page, anchor)
        for number in numbers(told):
            assert number in numbers(there), f"{number} of {here!r} is not in {target}"
            checked += 1
    assert checked > 5


def test_measured_numbers_of_the_readme_stand_in_the_docs():
    """Those with a decimal point or a unit, in sentences; not the papers' claims, nor numbers of papers."""
    text = re.sub(r"(?m)^(    .*|\|.*)$", "", PAGES["README.md"])  # neither code nor tables
    text = re.sub(r"\]\([^)]*\)|arXiv [\d.]+|\bv?\d+\.\d+\.\d+\b", "", text)
    docs = "\n".join(text for page, text in PAGES.items() if page != "README.md")
    docs += "".join(path.read_text() for path in (ROOT / "results").glob("*.md"))
    measure = r"(?<![\w.])(?:\d+(?:,\d{3})*(?:\.\d+)? ?(?:GB|%|s\b|seconds|minutes|hours|k\b|M\b)|\d+\.\d+)"
    assert re.findall(measure, text)
    for number in re.findall(measure, text):
        assert number in re.findall(measure, docs), f"{number} stands in the README only"


def test_the_readme_shows_lines_of_the_committed_demo():
    shown = re.findall(r"(?m)^    (step +\d+/\d+  .*)$", PAGES["README.md"])
    printed = (ROOT / "results/demo.txt").read_text().splitlines()
    assert len(shown) >= 4 and set(shown) <= {line.rstrip() for line in printed}
