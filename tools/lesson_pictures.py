"""Draws the pictures of tools/lesson.py. They read in black and white, and on a phone."""
import numpy as np

from tools.race_figures import pyplot, save

WIDTH = 5.0  # inches
INK, PRAISE, BLAME, QUIET, MINUS = "#222222", "#e8850c", "#08519c", "#bbbbbb", "\N{MINUS SIGN}"
# How two tokens are shown.
NAMES = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "<|end|>": "\N{BLACK SQUARE}"}


def draw(data, folder):
    """Writes all pictures as PNG and SVG into a folder."""
    plt = pyplot()
    plt.rcParams.update({"svg.hashsalt": "lesson", "svg.fonttype": "none", "hatch.linewidth": 0.6,
                         "axes.axisbelow": True, "figure.constrained_layout.use": True, "figure.dpi": 120,
                         "font.size": 7.5, "axes.labelsize": 8.5, "axes.titlesize": 8.5,
                         "axes.titlelocation": "left", "xtick.labelsize": 8, "ytick.labelsize": 8,
                         "legend.fontsize": 8,
                         "font.sans-serif": ["DejaVu Sans"], "font.monospace": ["DejaVu Sans Mono"]})
    save(plt, {"praise": draw_praise(plt, data["groups"]), "critic": draw_critic(plt, data["critic"]),
               "clock": draw_clock(plt, data), "clipping": draw_clipping(plt, data["ratios"]),
               "step": draw_step(plt)}, folder)


# ---- who is praised for what -------------------------------------------------------------------------------

def cells(plt, axes, y, widths, shares, texts, **font):
    """A row of boxes with texts: white for a share of 0, orange up to 1, blue down to -1. Returns where the
    boxes end, and the colour of each text."""
    ends = np.cumsum(widths)
    rgb = [plt.matplotlib.colors.to_rgb(PRAISE if share > 0 else BLAME) for share in shares]
    axes.broken_barh(list(zip(ends - widths, widths, strict=True)), (y, 1), edgecolor=QUIET, linewidth=0.3,
                     facecolors=[[1 - abs(share) * (1 - part) for part in face]
                                 for share, face in zip(shares, rgb, strict=True)])
    inks = ["white" if share < -0.6 else INK for share in shares]
    for end, width, text, ink in zip(ends, widths, texts, inks, strict=True):
        axes.text(end - width / 2, y + 0.53, text, ha="center", va="center", fontsize=7, color=ink, **font)
    return ends, inks


def signed(number, form="+.2f"):
    return format(number, form).replace("-", MINUS)


def bare(axes, rewards, title, pad):
    """Axes without lines, whose rows are the responses, the first on top."""
    axes.set(ylim=(len(rewards), -0.1), yticks=[i + 0.5 for i in range(len(rewards))], xticks=[],
             yticklabels=[f"{i} {'right' if r else 'wrong'}" for i, r in enumerate(rewards, 1)])
    axes.set_title(title, pad=pad)
    axes.tick_params(length=0, labelsize=7)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_praise(plt, groups):
    """One number for each response, for two groups of them; and PPO's for each token, for the first."""
    figure, (mixed, tokens, equal) = plt.subplots(3, 1, figsize=(WIDTH, 5.8))
    names = [name for name in groups["mixed"]["advantages"] if name != "PPO"]
    most = {name: max(np.abs(row).max() for group in ("mixed", "equal")
                      for row in groups[group]["advantages"][name]) or 1 for name in (*names, "PPO")}
    for axes, name in ((mixed, "mixed"), (equal, "equal")):
        group = groups[name]
        question = group["problem"].partition(". Please")[0].replace("-", MINUS)
        about = "one number for each" if name == "mixed" else "all agree"
        bare(axes, group["rewards"], f"{question} (it is {group['answer']}): {about}", 15)
        axes.set(xlim=(0, len(names)))
        for x, algorithm in enumerate(names):
            axes.text(x + 0.5, -0.15, algorithm, ha="center", va="bottom", weight="bold")
        for y in range(len(group["rewards"])):
            row = [group["advantages"][algorithm][y] for algorithm in names]
            cells(plt, axes, y, np.ones(len(names)), [a / most[n] for a, n in zip(row, names, strict=True)],
                  [signed(advantage) if abs(advantage) > 5e-3 else "" for advantage in row])
    group = groups["mixed"]
    bare(tokens, group["rewards"], "PPO, the same responses: one number for each token", 14)
    words = [[NAMES.get(word, word) for word in row] for row in group["tokens"]]
    end = max(sum(len(word) + 0.35 for word in row) for row in words)
    for y, (row, advantages) in enumerate(zip(words, group["advantages"]["PPO"], strict=True)):
        widths = np.array([len(word) + 0.35 for word in row])
        ends, inks = cells(plt, tokens, y, widths, [a / most["PPO"] for a in advantages], row,
                           family="monospace")
        below = [i for i, advantage in enumerate(advantages) if advantage < 0]  # underlined
        tokens.hlines([y + 0.92] * len(below), (ends - widths + 0.3)[below], (ends - 0.3)[below],
                      colors=[inks[i] for i in below], linewidth=0.8)
        for place, advantage in ((2, advantages[0]), (6.4, advantages[-1])):
            tokens.text(end + place, y + 0.53, signed(advantage), ha="center", va="center", fontsize=7)
    for place, name in ((2, "first"), (6.4, "last")):
        tokens.text(end + place, -0.15, name, ha="center", va="bottom")
    tokens.set(xlim=(0, end + 8.6))
    return figure


# ---- what the critic knows ---------------------------------------------------------------------------------

def draw_critic(plt, measured):
    """V(prompt) against the share of right responses; below it, how many prompts have which V."""
    figure, rows = plt.subplots(2, len(measured), figsize=(WIDTH, 3), sharex=True, sharey="row",
                                squeeze=False, height_ratios=(3, 1))
    edges = np.linspace(0, 1, 11)
    for above, below, at in zip(*rows, measured, strict=True):
        value, share = np.array(at["value"]), np.array(at["share"])
        above.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
        spread = np.random.default_rng(0).uniform(-0.025, 0.025, len(share))  # or equal points would be one
        above.plot(value, share + spread, "o", color=INK, markersize=2.5, alpha=0.5, markeredgewidth=0,
                   label="a prompt")
        places = np.digitize(value, edges[1:-1])
        alike = [places == k for k in range(10) if (places == k).any()]
        above.plot([value[those].mean() for those in alike], [share[those].mean() for those in alike], "s-",
                   color=PRAISE, markeredgecolor=INK, markersize=5, label="mean of prompts with similar V")
        above.set(xlim=(-0.05, 1.05), ylim=(-0.08, 1.08), aspect="equal", title=f"after step {at['step']}")
        below.hist(value, edges, color="#888888", edgecolor="white")
        below.set(xlabel="V(prompt)", xticks=(0, 0.5, 1))
    rows[0][0].set_ylabel("share of 8 responses\nthat are right")
    rows[1][0].set_ylabel("prompts")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


# ---- a step's clock and memory -----------------------------------------------------------------------------

PHASES = {"rollout": "engine", "reward": "verifier", "logprobs": "policy", "update": "policy",
          "critic": "critic", "sync": "engine"}
HELD = {  # colour and pattern
    "weights": ("#222222", ""), "gradients": ("#7f7f7f", ""), "optimizer": ("#c9c9c9", ""),
    "gathered": (PRAISE, ""), "activations": ("#ffd9a8", "////"), "other model": ("#9ecae1", 4 * "\\"),
    "vLLM": (BLAME, "xx")}
BEHIND = dict(facecolor="white", edgecolor="none", pad=1)  # a text on a pattern


def draw_clock(plt, data):
    """Seconds of a step by who computes, and GiB of one GPU in each phase."""
    figure, (clock, memory) = plt.subplots(2, 1, figsize=(WIDTH, 5.2))
    draw_seconds(clock, data["seconds"])
    clock.set(xlabel=f"seconds of a step of {data['responses']} responses",
              title="Time: the built-in model on a CPU")
    plan = data["plan"]
    draw_gib(memory, plan["phases"], plan["gpu_memory"])
    memory.set_title(f"Memory: {plan['shape'].rpartition('/')[2]} on {plan['gpus']} GPUs, planned", pad=14)
    return figure


def draw_seconds(axes, seconds):
    lanes, whole, start = ["engine", "verifier", "critic", "policy"], sum(seconds.values()), 0
    for phase, who in PHASES.items():
        y, end = lanes.index(who), start + seconds[phase]
        axes.barh(y, seconds[phase], left=start, height=0.62, color=BLAME if who == "engine" else INK,
                  edgecolor="white", linewidth=0.8)
        text = f"{phase} {seconds[phase]:.2f} s"
        if seconds[phase] > 0.2 * whole:
            axes.text((start + end) / 2, y, text, color="white", ha="center", va="center")
        else:  # above the bar, towards the side where there is room
            late = end > 0.7 * whole
            axes.text(end if late else start, y - 0.45, text, ha="right" if late else "left", va="center")
        start = end
    sampled = seconds["rollout"] + seconds["reward"]
    for y, left, width, hatch, text in (
            (1, 0, seconds["rollout"], "--", "as responses end"),
            (0, sampled, whole - sampled - seconds["sync"], "////", "on a GPU: asleep")):
        axes.barh(y, width, left=left, height=0.62, color="white", edgecolor=QUIET, linewidth=0.8,
                  hatch=hatch)
        axes.text(left + width / 2, y, text, ha="center", va="center", bbox=BEHIND)
    axes.set(yticks=range(4), yticklabels=lanes, ylim=(3.5, -0.7), xlim=(0, whole * 1.01))
    axes.grid(axis="y", visible=False)


def draw_gib(axes, phases, capacity):
    places, left = np.arange(len(phases)), np.zeros(len(phases))
    for column, (face, hatch) in HELD.items():
        sizes = np.array([held[column] for held in phases.values()])
        axes.barh(places, sizes, left=left, height=0.7, color=face, hatch=hatch, edgecolor="white",
                  linewidth=0.5, label=column)
        left += sizes
    for y, total in enumerate(left):
        axes.text(total + 1, y, f"{total:.0f}", va="center")
    axes.axvline(capacity, color=INK, linestyle=":", linewidth=1.2)
    axes.text(capacity, -0.62, "the GPU", ha="right", va="bottom")
    axes.set(yticks=places, yticklabels=list(phases), ylim=(len(phases) - 0.4, -0.6),
             xlim=(0, capacity * 1.02), xlabel="GiB on one GPU")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.42, -0.24), columnspacing=1)


# ---- clipping ----------------------------------------------------------------------------------------------

def draw_clipping(plt, ratios):
    """The objective against the ratio, for each sign of A; below it, how many tokens had which ratio."""
    figure, rows = plt.subplots(2, 2, figsize=(WIDTH, 3.9), sharex=True, sharey="row", height_ratios=(3, 2))
    low, high, dual = 1 - ratios["clip_low"], 1 + ratios["clip_high"], ratios["dual_clip"]
    r, edges, dashes = np.linspace(0, 4, 401), np.array(ratios["edges"]), (0, (2, 1))
    for (above, below), a, name in zip(rows.T, (1, -1), ("up", "down"), strict=True):
        once = np.minimum(r * a, r.clip(low, high) * a)  # clipped, without the dual clip
        objective = np.maximum(once, dual * a) if a < 0 and dual else once
        bounds = [high] if a > 0 else [low, dual] if dual else [low]
        flat = r > high if a > 0 else (r < low) | (r > (dual or np.inf))
        above.plot(r, once, color=INK, linewidth=0.8, linestyle=":")
        above.plot(r, np.where(flat, np.nan, objective), color=INK, linewidth=2.2)
        above.plot(r, np.where(flat, objective, np.nan), color=PRAISE, linewidth=2.2, linestyle=dashes)
        above.axvline(1, color=QUIET, linewidth=0.8)
        above.set_title("A > 0: better than expected" if a > 0 else "A < 0: worse than expected")
        counts = np.array(ratios[name])
        below.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#888888", log=True)
        for bound in bounds:
            below.axvline(bound, color=PRAISE, linewidth=1.2, linestyle=dashes)
        clipped = ratios["clipped"][name] + (ratios["clipped"]["dual"] if a < 0 else 0)
        share = clipped / max(1, counts.sum())
        below.text(0.98, 0.95, f"{share:.2%} of {counts.sum():,} tokens\nhave no gradient",
                   transform=below.transAxes, ha="right", va="top", bbox=BEHIND)
        below.set(xlabel="ratio", xlim=(0, 4), xticks=range(5))
    # Room for the texts: three powers of ten above the higher of the two.
    rows[1][0].set_ylim(0.6, 1000 * max(1, *ratios["up"], *ratios["down"]))
    rows[0][0].text(2.6, high - 0.12, "clipped: no gradient", ha="center", va="top")
    if dual:
        rows[0][1].text(dual + 0.03, 0.12 - dual, "dual clip", va="bottom")
    rows[0][0].set_ylabel(f"objective, for A = 1 and {MINUS}1")
    rows[1][0].set_ylabel("tokens of the run")
    return figure


# ---- one step ----------------------------------------------------------------------------------------------

BOXES = {  # who: what, and where
    "prompts": ("of this step", 0, 0), "engine": ("writes a response\nto each", 1.5, 0),
    "verifier": ("reads the answer:\nR = 1 or 0", 3, 0),
    "critic": ("reads the prompt:\nV, from 0 to 1", 0, -1.15),
    "policy": (f"A = R {MINUS} V,\nclipped steps", 1.5, -1.15)}
ARROWS = (  # what goes from where to where
    ("", (0.52, 0), (0.98, 0)), ("text", (2.02, 0), (2.48, 0)), ("prompt", (0, -0.35), (0, -0.8)),
    ("responses", (1.3, -0.35), (1.3, -0.8)), ("new weights", (1.7, -0.8), (1.7, -0.35)),
    ("V", (0.52, -1.15), (0.98, -1.15)), ("R", (2.9, -0.35), (2.02, -1.05)))
PARTS = (  # of docs/one-step.md
    "1 sample,\nverify", "2 old log-\nprobs", "3 advan-\ntage", "4 policy\nlearns", "5 critic\nlearns",
    "6 new\nweights")
LANES = {  # who does what in each part
    "engine": ("works", *["asleep"] * 4, "receives"), "verifier": ("works",),
    "critic": ("", "", "works", "", "works"), "policy": ("", "works", "", "works", "", "gives")}


def draw_step(plt):
    """What goes from one to the next in a step; below, who works and who sleeps."""
    figure, (flow, lanes) = plt.subplots(2, 1, figsize=(WIDTH, 4.3), height_ratios=(1.15, 1))
    for who, (what, x, y) in BOXES.items():
        flow.add_patch(plt.Rectangle((x - 0.5, y - 0.33), 1, 0.66, edgecolor=INK, linewidth=1.2,
                                     facecolor="#f0f0f0" if who == "prompts" else "white"))
        flow.text(x, y + 0.17, who, ha="center", va="center", weight="bold", fontsize=9)
        flow.text(x, y - 0.11, what, ha="center", va="center")
    for what, (x, y), (to_x, to_y) in ARROWS:
        flow.annotate("", (to_x, to_y), (x, y), arrowprops=dict(
            arrowstyle="-|>", color=INK, linewidth=1.2, shrinkA=0, shrinkB=0))
        left = what == "responses"  # beside an arrow that goes up or down, above one that does not
        aside = (-0.06 if left else 0.08, 0) if y != to_y else (0, 0.1)
        flow.text((x + to_x) / 2 + aside[0], (y + to_y) / 2 + aside[1], what, va="center",
                  ha="center" if y == to_y else "right" if left else "left")
    flow.text(3, -1.15, "R also trains\nthe critic.", ha="center", va="center")
    flow.set(xlim=(-0.55, 3.55), ylim=(-1.55, 0.4))
    flow.axis("off")
    looks = {"works": dict(facecolor=INK), "asleep": dict(facecolor="white", edgecolor=QUIET, hatch="////")}
    for y, parts in enumerate(LANES.values()):
        for x, part in enumerate(parts):
            if part:
                lanes.add_patch(plt.Rectangle((x + 0.02, y + 0.14), 0.96, 0.72, linewidth=0,
                                              **looks.get(part, dict(facecolor="#777777"))))
                asleep = part == "asleep"
                lanes.text(x + 0.5, y + 0.5, part, ha="center", va="center", bbox=BEHIND if asleep else None,
                           color=INK if asleep else "white")
    lanes.set(xlim=(0, 6), ylim=(4, -0.02), yticks=[y + 0.5 for y in range(4)], yticklabels=list(LANES),
              xticks=[x + 0.5 for x in range(6)], xticklabels=PARTS)
    lanes.tick_params(length=0)
    lanes.grid(False)
    lanes.spines[:].set_visible(False)
    return figure
