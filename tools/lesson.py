"""Pictures of what SPPO and its relatives do, drawn from one real run of the built-in model.

    python -m tools.lesson              trains three times, half an hour in all, and draws
    python -m tools.lesson --redraw     draws again what docs/pictures/lesson.json holds
    python -m tools.lesson -- --steps 20 ...     what follows -- is given to the run

The run is SPPO's. PPO's critic and SPO's tracker learn from the same responses, but change nothing. So in
the end one batch can be shown with the advantages of all algorithms, each with a baseline that was trained.
All pictures show the first seed. The others, and runs of another model, tell only how well V knows the
prompts (arXiv 2604.08865, figure 7).
After a kill, the same command continues with the seeds that had not ended; their runs are in runs/lesson.
"""
import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from data import BOXED_SUFFIX
from grpo import group_advantages, remax_advantages, rloo_advantages
from ppo import PPO, PPOConfig
from spo import SPO, SPOConfig, normalize
from sppo import SPPO, sequence_advantages, train
from tools.race_results import pyplot, save

GROUP = 8  # responses to a prompt where algorithms are compared, as in GRPO
HELD_OUT = 200  # prompts on which V is compared with the chance of success, as in the paper


@dataclass
class LessonConfig(CommandLine):
    output: str = option("docs/pictures", "folder for the pictures and lesson.json")
    redraw: bool = option(False, "draw what --output holds, and train nothing")
    responses: int = option(64, "responses that measure a prompt's chance of success", positive=True)
    seeds: int = option(3, "runs; all but the first only measure how well V knows the prompts", positive=True)


@dataclass
class RunConfig(PPOConfig):
    """PPO's options, and the one that SPO adds."""
    init_samples: int = option(0, "as spo.py's: its tracker starts from 1/2")


# ---- the run -----------------------------------------------------------------------------------------------

class Measured(SPPO):
    """SPPO, which compares V with the chance of success after the first step, half of them, and the last.
    `measured` becomes a part of lesson.json."""

    def __init__(self, run, responses):
        super().__init__(run)
        self.responses, self.step, self.measured = responses, 0, {"critic": []}
        end_step = run.clock.end_step

        def ended():  # between two steps the engine is awake
            end_step()
            self.after_step()
        run.clock.end_step = ended

    def after_step(self):
        self.step += 1
        steps, run = self.run.config.steps, self.run
        if self.step in (1, (steps + 1) // 2, steps):
            share = run.sampler.sample(run.held_out, self.responses).rewards.view(
                len(run.held_out), -1).mean(1).numpy()
            value = self.logits_of(run.held_out).sigmoid().numpy()
            self.measured["critic"].append({
                "step": self.step, "r": correlation(value, share),
                "rho": correlation(ranks(value), ranks(share)),
                "share": rounded(share), "value": rounded(value)})

    def logits_of(self, problems):
        return self.critic.logits(self.critic.encode(problems))


class Together(Measured):
    """SPPO trains the policy. PPO's critic and SPO's tracker look on, and learn from the same batches."""

    def __init__(self, run, responses):
        super().__init__(run, responses)
        self.ppo, self.spo = PPO(run), SPO(run)

    def advantages(self, batch):
        self.ppo.advantages(batch)
        self.spo.advantages(batch)
        return super().advantages(batch)

    def update(self, batch):
        self.ppo.update(batch)
        self.spo.update(batch)
        return super().update(batch)

    def after_step(self):
        super().after_step()
        if self.step == (self.run.config.steps + 1) // 2:
            self.measured["groups"] = {"step": self.step, **self.praise()}

    def praise(self):
        """One batch, and the advantage that each algorithm gives. Of it, a group whose rewards differ, and
        one in which all agree."""
        problems = random.Random(0).sample(self.run.problems, len(self.run.held_out))
        batch = self.run.sampler.sample(problems, GROUP, greedy=True)
        advantages = {
            "SPPO": sequence_advantages(batch.rewards, self.logits_of(batch.problems)),
            "SPO": normalize(batch.rewards - torch.tensor(self.spo.expect(batch.problems))),
            "GRPO": group_advantages(batch.rewards, GROUP), "RLOO": rloo_advantages(batch.rewards, GROUP),
            "ReMax": remax_advantages(batch.rewards, batch.greedy_rewards.repeat_interleave(GROUP)),
            "PPO": self.ppo.advantages(batch)}
        longest = batch.lengths.view(-1, GROUP).amax(1).tolist()
        shares, greedy = batch.rewards.view(-1, GROUP).mean(1).tolist(), batch.greedy_rewards.tolist()

        def group(badness):
            """What is drawn of the best prompt, the shortest of several."""
            number = min(range(len(problems)), key=lambda i: (badness(i), longest[i]))
            rows = range(number * GROUP, (number + 1) * GROUP)
            problem, responses = batch.problems[rows[0]], [batch.responses[i] for i in rows]
            return {"problem": problem.messages[-1]["content"], "answer": problem.answer,
                    "tokens": [[self.run.tokenizer.decode(token) for token in r.ids] for r in responses],
                    "rewards": batch.rewards[rows].tolist(), "greedy": greedy[number],
                    "advantages": {name: [rounded(row[: len(r.ids)] if row.dim() else row)
                                          for row, r in zip(advantages[name][rows], responses, strict=True)]
                                   for name in advantages}}
        # The first is drawn token by token, so it should be short.
        return {"mixed": group(lambda i: (shares[i] in (0, 1), longest[i] > 24, abs(shares[i] - 0.5))),
                "equal": group(lambda i: shares[i] != greedy[i])}


def rounded(values):
    return np.round(np.asarray(values, dtype=float), 4).tolist()


def correlation(x, y):
    """Pearson's r, or None where one of the two does not vary."""
    return round(float(np.corrcoef(x, y)[0, 1]), 3) if np.ptp(x) > 0 and np.ptp(y) > 0 else None


def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks. The r of ranks is Spearman's rho."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def lesson(c, extra):
    """Trains once for each seed, and returns what lesson.json holds."""
    runs = [one_run(seed, c.responses, extra) for seed in range(c.seeds)]
    knows = [[{key: at[key] for key in ("step", "r", "rho")} for at in run["critic"]] for run in runs]
    return {**runs[0], "knows": knows, "extra": extra, "measured_with": c.responses}


def one_run(seed, responses, extra):
    """Trains, and returns what was measured: `Together.measured`. A run that has ended with the same options
    is only read."""
    own = "--output", "runs/lesson", "--dataset", SPOConfig.BUILTIN["dataset"]  # whose prompts come back
    config = RunConfig.parse("", [*own, "--eval-problems", str(HELD_OUT), "--seed", str(seed), *extra])
    config.output, config.eval_every, baselines = f"{config.output}/{seed}", config.steps, []
    file, options = Path(config.output, "measured.json"), {"responses": responses, "extra": extra}
    if file.exists() and options.items() <= (kept := json.loads(file.read_text())).items():
        say(f"From {file} (to train it anew, delete it).")
        return kept["measured"]
    shutil.rmtree(Path(config.output, "model"), ignore_errors=True)  # of an earlier lesson
    Path(config.output, "metrics.jsonl").unlink(missing_ok=True)
    builtin = Path(config.model).resolve() == Path(BUILTIN_MODEL)
    kind = Together if seed == 0 and builtin else Measured
    train(config, lambda run: baselines.append(kind(run, responses)) or baselines[0])
    if baselines[0].step < config.steps:
        raise InputError("the run was stopped before its last step, so nothing can be drawn; run it again")
    file.write_text(json.dumps({**options, "measured": baselines[0].measured}))
    return baselines[0].measured


# ---- the pictures: they read in black and white, and on a phone --------------------------------------------

WIDTH = 5.0  # inches
INK, PRAISE, BLAME, QUIET, MINUS = "#222222", "#e8850c", "#08519c", "#bbbbbb", "\N{MINUS SIGN}"
# How two tokens are shown.
NAMES = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "<|end|>": "\N{BLACK SQUARE}"}


def draw(data, folder):
    """Writes all pictures as PNG and SVG into a folder."""
    plt = pyplot()
    plt.rcParams.update({"svg.hashsalt": "lesson", "svg.fonttype": "none", "hatch.linewidth": 0.6,
                         "axes.axisbelow": True, "figure.dpi": 120, "font.size": 7.5, "axes.labelsize": 8.5,
                         "axes.titlesize": 8.5, "axes.titlelocation": "left", "legend.fontsize": 8,
                         "xtick.labelsize": 8, "ytick.labelsize": 8,
                         # One font each, since an SVG repeats the list for each text.
                         "font.sans-serif": ["DejaVu Sans"], "font.monospace": ["DejaVu Sans Mono"]})
    praise = {"praise": draw_praise(plt, data["groups"])} if "groups" in data else {}
    save(plt, {**praise, "critic": draw_critic(plt, data["critic"], data["measured_with"])}, folder)


def draw_praise(plt, groups):
    """One number for each response, for two groups of them; and PPO's for each token, for the first."""
    figure, panels = plt.subplots(3, 1, figsize=(WIDTH, 4.9), height_ratios=(8, 8, 1))
    colours = plt.matplotlib.colors.LinearSegmentedColormap.from_list("", [BLAME, "white", PRAISE], 63)
    names = [name for name in groups["mixed"]["advantages"] if name != "PPO"]
    most = max(np.abs(np.hstack(rows)).max() for group in (groups["mixed"], groups["equal"])
               for rows in group["advantages"].values())
    scale = plt.Normalize(-most, most)

    def cells(axes, y, widths, values, texts, **font):
        """A row of coloured boxes with texts. Returns where the last one ends."""
        ends = np.cumsum(widths)
        axes.broken_barh(list(zip(ends - widths, widths, strict=True)), (y, 1), edgecolor=QUIET,
                         linewidth=0.3, facecolors=colours(scale(values)))
        for end, width, value, text in zip(ends, widths, values, texts, strict=True):
            axes.text(end - width / 2, y + 0.53, text, ha="center", va="center", fontsize=7,
                      color="white" if value < -0.6 * most else INK, **font)
        return ends[-1]

    def signed(number):
        return f"{number:+.2f}".replace("-", MINUS) if abs(number) >= 0.005 else "0"

    def bare(axes, rows, title, end, columns):
        axes.set(xlim=(0, end), ylim=(len(rows), -0.1), yticks=np.arange(len(rows)) + 0.5, yticklabels=rows,
                 xticks=list(columns.values()), xticklabels=list(columns))
        axes.set_title(title, pad=15)
        axes.tick_params(length=0, labelsize=7.5, labeltop=True, pad=1, labelbottom=False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    columns = {name: place + 0.5 for place, name in enumerate(names)}
    mixed, equal, rights = groups["mixed"], groups["equal"], ("wrong", "right")
    labels = [f"{i} {rights[int(r)]}" for i, r in enumerate(mixed["rewards"], 1)]
    for axes, group, rows, why in (
            (panels[0], mixed, labels, "some right, some wrong"),
            (panels[2], equal, [f"all {rights[int(equal['rewards'][0])]}"], "all alike")):
        for y in range(len(rows)):
            row = [group["advantages"][name][y] for name in names]
            cells(axes, y, np.ones(len(names)), row, map(signed, row))
        question = group["problem"].removesuffix(BOXED_SUFFIX).strip().removeprefix("Compute ")
        question = question.removesuffix(" from left to right.").rstrip("?").replace("-", MINUS)
        bare(axes, rows, f"{question}, eight responses, {why}", len(names), columns)
    words = [[NAMES.get(word, word) for word in row] for row in mixed["tokens"]]
    last = 0
    for y, (row, values) in enumerate(zip(words, mixed["advantages"]["PPO"], strict=True)):
        widths = np.array([len(word) + 0.35 for word in row])
        last = max(last, cells(panels[1], y, widths, values, row, family="monospace"))
    for y, values in enumerate(mixed["advantages"]["PPO"]):
        for place, value in ((2, values[0]), (6.4, values[-1])):
            panels[1].text(last + place, y + 0.53, signed(value), ha="center", va="center", fontsize=7)
    bare(panels[1], labels, "PPO, the same responses: a number for each token", last + 8.6,
         {"first token": last + 1.4, "last": last + 6.4})
    figure.colorbar(plt.cm.ScalarMappable(scale, colours), ax=panels, location="bottom", shrink=0.6,
                    aspect=40, label="advantage: blue makes a response less likely, orange more likely")
    return figure


def draw_critic(plt, measured, responses):
    """V(prompt) against the share of right responses; below it, how many prompts have which of the two."""
    figure, rows = plt.subplots(2, len(measured), figsize=(WIDTH, 3), sharex=True, sharey="row",
                                squeeze=False, height_ratios=(3, 1))
    edges = np.linspace(0, 1, 11)
    for above, below, at in zip(*rows, measured, strict=True):
        value, share = np.array(at["value"]), np.array(at["share"])
        above.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
        spread = np.random.default_rng(0).uniform(-0.025, 0.025, len(share))  # or equal points would be one
        above.plot(value, share + spread, "o", color=INK, markersize=2.5, alpha=0.4, markeredgewidth=0,
                   label="a prompt")
        places = np.digitize(value, edges[1:-1])
        alike = [places == k for k in range(10) if (places == k).any()]
        above.plot([value[those].mean() for those in alike], [share[those].mean() for those in alike], "s-",
                   color=PRAISE, markeredgecolor=INK, markersize=5, label="mean of prompts with similar V")
        knows = "" if at["r"] is None else f"\nr {at['r']:.2f}, \N{GREEK SMALL LETTER RHO} {at['rho']:.2f}"
        above.set(xlim=(-0.05, 1.05), ylim=(-0.08, 1.08),
                  title=f"after step {at['step']}{knows}")
        below.hist(value, edges, color="#bbbbbb", label="V(prompt)")
        below.hist(share, edges, histtype="step", color=BLAME, label="share right")
        below.set(xlabel="V(prompt), or share", xticks=(0, 0.5, 1))
    rows[0][0].set_ylabel(f"share of {responses} responses\nthat are right")
    rows[1][0].set_ylabel("prompts")
    labels = [axes.get_legend_handles_labels() for axes in (rows[0][0], rows[1][0])]
    figure.legend(*map(sum, zip(*labels, strict=True), ([], [])), loc="outside upper center", ncols=2)
    return figure


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    c = LessonConfig.parse(__doc__, arguments[:cut])
    with clear_errors():
        c.check()
        folder, file = Path(c.output), Path(c.output) / "lesson.json"
        if c.redraw and not file.exists():
            raise InputError(f"{file}: there is nothing to draw; run the lesson first (without --redraw)")
        data = json.loads(file.read_text()) if c.redraw else lesson(c, arguments[cut + 1 :])
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, ensure_ascii=False) + "\n")
        draw(data, folder)
        say(f"The pictures are in {folder}.")


if __name__ == "__main__":
    main()
