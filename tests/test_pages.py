"""README and docs: links lead somewhere, commands and options exist, quoted code is the code, numbers agree."""
import ast
import re
import shlex

import pytest
from conftest import ROOT

PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]}
OTHERS = {  # options of programs that are not ours
    "torchrun": {"nproc-per-node", "nnodes", "standalone", "shutdown-timeout", "rdzv-backend", "rdzv-endpoint", "rdzv-id"},
    "uv": {"excludes", "extra-index-url", "index-strategy"}}
FILES = [path for folder in (ROOT, ROOT / "tools", ROOT / "examples") for path in sorted(folder.glob("*.py"))]
SOURCE = "\n".join(path.read_text() for path in FILES)


CLASSES = {node.name: node for path in FILES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
SCRIPTS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES
           if '__name__ == "__main__"' in path.read_text()}


def fields_of(name):
    """The options of a dataclass of options and of those that it inherits from. Read, not imported: an example may need
    a library that is not installed."""
    names = set()
    for field in (node for node in CLASSES[name].body if isinstance(node, ast.AnnAssign)):
        option = field.target.id.replace("_", "-")
        names |= {option, f"no-{option}"} if ast.unparse(field.annotation) == "bool" else {option}
    bases = [ast.unparse(base).rpartition(".")[2] for base in CLASSES[name].bases]
    return names.union(*(fields_of(base) for base in bases if base in CLASSES))


def options_of(path):
    """The options of a script of ours."""
    text = path.read_text()
    return {"help", *re.findall(r'add_argument\(\s*"--([a-z-]+)', text)}.union(
        *(fields_of(name) for name in re.findall(r"(\w+)\.parse\(__doc__", text)))


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


def links(page, text):
    """(its words, path in the repository, anchor) of each link and picture in a text of a page."""
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
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


def options_in(text):
    return set(re.findall(r"(?:^|[\s{])--([a-z][a-z-]+)", text))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    for words, file, anchor in links(page, PAGES[page]):
        assert (ROOT / file).exists(), f"{words}: {file}"
        if anchor:
            assert anchor in anchors(PAGES[file]), f"{words}: {file}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_those_of_the_scripts(page):
    for code in code_of(page):
        found = re.search(r"(?:^|[\s/])(?:python|torchrun)\s(.*?)(?:-m )?([\w/]+\.py|tools\.\w+)(?:\s(.*))?$", code)
        if found and " - " not in code:
            before, name, words = found.groups(default="")
            name = name.removesuffix(".py").replace("/", ".")
            assert not name.startswith(("tools.", "examples.")) or name in SCRIPTS, code
            if name in SCRIPTS:  # else it is the reader's own
                words = shlex.split(words.replace("'", ""), comments=True)
                words = words[: words.index("--")] if "--" in words else words  # the rest is for scripts that train
                known = options_of(SCRIPTS[name])
                assert options_in(" ".join(words)) <= known, (code, options_in(" ".join(words)) - known)
            assert options_in(before) <= OTHERS["torchrun"], code
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"make {target}"


@pytest.mark.parametrize("page", PAGES)
def test_options_files_and_metrics_that_are_named_exist(page):
    known = set.union(*OTHERS.values(), *map(options_of, SCRIPTS.values()))
    for span in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", PAGES[page])):
        assert options_in(span) <= known, span
        if re.fullmatch(r"[a-z\d_./-]+\.(py|md|txt|sh|toml|png|svg|json|jsonl)", span):
            # A file of the repository, or one that a run writes, whose name the code must have.
            assert (ROOT / span).exists() or f'{span.split("/")[-1]}"' in SOURCE, span
        if found := re.fullmatch(r"(policy|critic|rollout|reward|tracker|group|time)/(\w+)", span):
            assert re.sub(r"_(1|10)$", "_", found[2]) in SOURCE, span


def stripped(text):
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_quoted_code_is_the_code(page):
    """The lines of each Python block stand in one file, in this order; `...` stands for lines left out."""
    for block in re.findall(r"(?ms)^ *```python\n(.*?)^ *```", PAGES[page]):
        parts = stripped(block).split("\n...\n")

        def has_all(text, parts=parts):
            places, start = [], 0
            for part in parts:
                places.append(text.find(f"\n{part}\n", start))
                start = places[-1]
            return -1 not in places
        assert any(has_all(stripped(path.read_text())) for path in FILES), block


def numbers(text):
    return re.findall(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?", text)


def test_numbers_in_tables_of_the_readme_stand_where_their_cell_links_to():
    for row in re.findall(r"(?m)^\|.*\|$", PAGES["README.md"]):
        for cell in row.strip("|").split(" | "):
            for _, page, anchor in links("README.md", cell):
                if anchor:
                    there = numbers(section(page, anchor))
                    told = numbers(re.sub(r"\]\([^)]*\)", "]", cell))
                    assert set(told) <= set(there), f"{set(told) - set(there)} of {cell!r} not in {page}#{anchor}"


def test_measured_numbers_of_the_readme_stand_in_the_docs():
    """Those with a decimal point or a unit, in sentences; not numbers of papers or versions."""
    text = re.sub(r"(?m)^(    .*|\|.*)$", "", PAGES["README.md"])  # neither code nor tables
    text = re.sub(r"\]\([^)]*\)|arXiv [\d.]+|\bv?\d+\.\d+\.\d+\b", "", text)
    docs = "\n".join(text for page, text in PAGES.items() if page != "README.md")
    docs += "".join(path.read_text() for path in (ROOT / "results").glob("*.md"))
    measure = r"(?<![\w.])(?:\d+(?:,\d{3})*(?:\.\d+)? ?(?:GB|%|s\b|seconds|minutes|hours|k\b|M\b)|\d+\.\d+)"
    for number in re.findall(measure, text):
        assert number in re.findall(measure, docs), f"{number} stands in the README only"


def test_the_readme_shows_lines_of_the_committed_demo():
    shown = re.findall(r"(?m)^    (step +\d+/\d+  .*)$", PAGES["README.md"])
    printed = (ROOT / "results/demo.txt").read_text().splitlines()
    assert shown and set(shown) <= {line.rstrip() for line in printed}
