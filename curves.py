"""The curves of runs: what one looks at first, from their metrics.jsonl, in one picture.

    python -m tools.curves runs/sppo               runs/sppo/curves.png, which a run also draws when it ends
    python -m tools.curves runs/sppo runs/grpo     both in one picture, curves.png here, over sampled tokens:
                                                   a step of GRPO samples eight times as many as one of SPPO

What a healthy run looks like: reward and accuracy rise together; skill gets above 0 within some steps, since
then the critic knows more than a constant; few tokens are clipped, and KL stays small; responses do not all
become longer or shorter at once. docs/running.md says of each metric what to look for.
"""
import itertools
import json
from pathlib import Path

from cli import InputError

PANELS = (  # title, and its lines: (label, metric); the first is drawn solid, the second dashed
    ("reward and accuracy", (("reward", "reward"), ("held-out accuracy", "eval_accuracy"))),
    ("does the critic know more than a constant?", (("skill", "critic/skill"), ("AUC", "critic/auc"))),
    ("tokens of a response", (("mean", "response_tokens"), ("held-out", "eval_response_tokens"))),
    ("share of tokens that are clipped", (("clip", "policy/clip_fraction"),
                                          ("dual clip", "policy/dual_clip_fraction"))),
    ("KL of a step, per token", (("KL", "policy/kl"),)),
    ("seconds of a step", (("all", "time/step"),)))
PHASES = ("rollout", "reward", "logprobs", "critic", "update", "sync")  # of one run: stacked, in their order


def read(run):
    """The lines of a run's metrics.jsonl, as dictionaries. run: its folder."""
    path = Path(run, "metrics.jsonl")
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        steps = [json.loads(line) for line in lines if line.endswith(b"\n")]  # the last may be half written
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the --output folder of a run") from None
    if len(steps) < 2:
        raise InputError(f"{path}: has no training step yet; wait for the first")
    return steps


def series(steps, metric, over="step"):
    """([steps], [values]) of a metric, where it has a value; with over="tokens", against the tokens of
    responses that were sampled so far."""
    # SPO's first samples are counted as responses. They are about as long as those of step 1.
    tokens = itertools.accumulate(
        line.get("rollout/generated_tokens", 0)
        + line.get("tracker/init_samples", 0) * line.get("response_tokens", 0) for line in steps)
    have = [(line["step"] if over == "step" else sampled, line[metric])
            for line, sampled in zip(steps, tokens, strict=True) if line.get(metric) is not None]
    return [list(column) for column in zip(*have, strict=True)] or [[], []]


def smoothed(values, window):
    """The mean of each value and up to `window` - 1 before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw(runs, file=None):
    """Draws the curves of one run, or of several over each other. Returns the picture's path.

    runs: their folders. file: the PNG, by default curves.png, in the folder of a single run or else here.
    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot, which would open windows and take longer to import
    from matplotlib.ticker import EngFormatter
    data = {str(run): read(run) for run in runs}
    over = "step" if len(data) == 1 else "tokens"
    file = Path(file or (Path(runs[0], "curves.png") if len(runs) == 1 else "curves.png"))
    figure = Figure(figsize=(13, 6.5))
    for axes, (title, metrics) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        axes.set_title(title, fontsize=10)
        for number, (run, steps) in enumerate(data.items()):
            if title == "seconds of a step" and len(data) == 1:
                stacked(axes, steps)
                continue
            for (label, metric), style in zip(metrics, ("-", "--"), strict=False):
                x, y = series(steps, metric, over)
                if not x:
                    continue
                colour = f"C{number if len(data) > 1 else int(style == '--')}"
                evaluated = metric.startswith("eval_")  # on some steps only: as it is, with marks
                if not evaluated:
                    axes.plot(x, y, style, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(x, y if evaluated else smoothed(y, 1 + len(x) // 20), style, color=colour,
                          marker="." if evaluated else None,
                          label=f"{run}: {label}" if len(data) > 1 else label)
        if "critic" in title:
            axes.axhline(0, color="grey", linewidth=0.5)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", color="grey", transform=axes.transAxes)
        axes.set_xlabel("step" if over == "step" else "response tokens sampled", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if over == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter())
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.2)
    figure.suptitle(", ".join(data), fontsize=11)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.07, top=0.9, wspace=0.15, hspace=0.3)
    figure.savefig(file, dpi=110)
    return file


def stacked(axes, steps):
    """Seconds of a step by phase, one above the other."""
    x = [line["step"] for line in steps if "time/step" in line]
    y = [[line.get(f"time/{phase}", 0) for line in steps if "time/step" in line] for phase in PHASES]
    axes.stackplot(x, y, labels=PHASES, alpha=0.8)
