"""How much faster is training without groups? SPO's 4.35 (arXiv 2509.13232) is one draw; here are many.

    python -m tools.stragglers            results/stragglers.png and stragglers.json, in seconds
    python -m tools.stragglers --train    also runs with and without --oversample; goes on after a kill

48 trajectories are in flight, and a step needs 24. GRPO's come in 6 groups of 8, and a group is done when its
slowest is. So GRPO waits for the third fastest group (486 s in the paper's draw), and SPO for the first 24 of
all (112 s). The paper does not say how its seconds are distributed. They look like two kinds: fast ones, here
uniform in 60 to 135 s, and stragglers, uniform in 400 to 560 s, each with probability p.

What the ratio does not count: the 24 that are not there yet are dropped, and these are the long ones. So the
policy hardly learns from long answers. sppo.py's --oversample lets them finish, and trains on each.

The runs of --train tell what that gains. Their model is the built-in one, taught to add a row of dots after
its answer, whose length is log-normal. "speed" has the learning rate 0, so that lengths stay what they are.
The runs with and without --oversample take turns, since machines are noisy.
"""
import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np

from cli import clear_errors, say
from tools.race import metrics_of
from tools.race_results import pyplot, save

DRAWS = 4000
RESULTS = Path(__file__).resolve().parent.parent / "results"
SETTINGS = {"waiting for all": [], "oversampling": ["--oversample", 1.5]}  # name: options
RUNS = {"speed": (3, 10, 0), "learning": (3, 40, 1.5e-4)}  # seeds, steps, learning rate
PROMPTS = 64  # per step


def two_kinds(p, shape, random):
    """Seconds of trajectories, stragglers with probability p."""
    return np.where(random.random(shape) < p, random.uniform(400, 560, shape), random.uniform(60, 135, shape))


def log_normal(sigma, shape, random):
    """Seconds whose logarithm is Gaussian, with a median of 100 s."""
    return 100 * np.exp(sigma * random.standard_normal(shape))


def in_groups(seconds, wanted):
    """When `wanted` trajectories of whole groups are done [...], and which. seconds [..., groups, size]."""
    ends = seconds.max(-1)  # [..., groups]
    last = np.sort(ends, -1)[..., -(-wanted // seconds.shape[-1]) - 1]
    return last, np.broadcast_to((ends <= last[..., None])[..., None], seconds.shape)


def one_by_one(seconds, wanted):
    """The same without groups."""
    last = np.sort(seconds.reshape(*seconds.shape[:-2], -1), -1)[..., wanted - 1]
    return last, seconds <= last[..., None, None]


def ratio(seconds, wanted):
    """How many times as long groups take: [...]."""
    return in_groups(seconds, wanted)[0] / one_by_one(seconds, wanted)[0]


def band(axes, x, rows, style, label, colour):
    """The median over draws, and a band from the 10th to the 90th percentile."""
    low, median, high = np.percentile(rows, (10, 50, 90), axis=1)
    axes.plot(x, median, style, color=colour, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def draw(plt):
    random, shares, blue, orange = np.random.default_rng(0), np.linspace(0, 0.6, 25), "#08519c", "#d94801"
    figure, ((by_p, by_sigma), (by_size, learned)) = plt.subplots(2, 2, figsize=(8, 6))
    for axes, values, lengths in ((by_p, shares, two_kinds), (by_sigma, np.linspace(0, 2, 21), log_normal)):
        draws = [lengths(value, (DRAWS, 6, 8), random) for value in values]
        band(axes, values, [ratio(x, 24) for x in draws], "-", "3 of 6 groups of 8", blue)
        band(axes, values, [x.max((1, 2)) / one_by_one(x, 24)[0] for x in draws], "--", "all 48", orange)
        axes.axhline(4.35, color="#444444", linewidth=0.8, linestyle=":")
    by_p.set(title="two kinds of length", xlabel="p, share of stragglers",
             ylabel="seconds / those of the first 24")
    by_p.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.28, 0))
    by_sigma.set(title="log-normal lengths", xlabel="σ of the logarithm", ylim=(0, 12))
    by_sigma.text(0, 4.5, "the paper: 4.35", fontsize=7)

    sizes = (1, 2, 4, 8, 12, 24)
    for p, flying, style, colour in ((0.05, 48, "o-", "#6baed6"), (0.15, 48, "s--", blue),
                                     (0.3, 48, "^-.", orange), (0.15, 96, "x:", "#444444")):
        draws = [two_kinds(p, (DRAWS, flying // size, size), random) for size in sizes]
        by_size.plot([np.median(ratio(x, 24)) for x in draws], style, color=colour,
                     label=f"p = {p}, {flying} in flight")
    by_size.set_xticks(range(len(sizes)), map(str, sizes))
    by_size.set(title="group size (medians)", xlabel="trajectories in a group", ylim=(0, 8),
                ylabel="seconds / those of the first 24")
    by_size.legend(fontsize=8)

    draws = [two_kinds(p, (DRAWS, 6, 8), random) for p in shares]
    for label, style, colour, which in (
            ("--oversample: each, when it is done", "-", "#444444", lambda x: x > 0),
            ("3 of 6 groups of 8", "--", blue, lambda x: in_groups(x, 24)[1]),
            ("the first 24, as in the paper", "-.", orange, lambda x: one_by_one(x, 24)[1])):
        learned.plot(shares, [(x[which(x)] > 300).mean() for x in draws], style, color=colour, label=label)
    learned.set(title="what is learned from", xlabel="p, share of stragglers",
                ylabel="share of stragglers in it")
    learned.legend(fontsize=8)
    return figure


def make_rambling(folder):
    """Writes the model whose lengths have a long tail: its rows have 16 dots in the median, at most 1,000."""
    from transformers import Qwen2ForCausalLM

    from builtin.make import FOLDER, LR, chain, make_tokenizer, teach

    def example(random):
        question, answer = chain(random)
        return question, answer + "." * min(1000, int(random.lognormvariate(math.log(16), 1.4)))
    model = Qwen2ForCausalLM.from_pretrained(FOLDER, max_position_embeddings=1200)
    tokenizer = make_tokenizer()
    teach(model, tokenizer, [dict(steps=200, batch=32, weight_decay=0.0, example=example)], LR / 3)
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def train(runs="runs/stragglers"):
    """What each seed reached: {kind of run and setting: {measure: [its value for each seed]}}."""
    model, found = Path(runs, "model"), {}
    if not model.exists():
        make_rambling(model)
    for kind, (seeds, steps, lr) in RUNS.items():
        for seed, (name, options) in itertools.product(range(seeds), SETTINGS.items()):
            lines = metrics_of(Path(runs, f"{kind}-{name.replace(' ', '-')}-{seed}"), [
                "sppo.py", "--model", model, "--engine", "vllm", "--dtype", "float32", "--temperature", 1,
                "--steps", steps, "--prompts-per-step", PROMPTS, "--minibatch", PROMPTS // 2,
                "--lr", lr, "--critic-lr", 1e-3, "--clip-high", 0.28, "--old-logprobs", "rollout",
                "--max-prompt-tokens", 64, "--max-response-tokens", 1050, "--no-checkpoint-activations",
                "--save-every", 0, "--eval-every", steps, "--seed", seed, *options], ranks=2)
            reached = {"responses/s": round(steps * PROMPTS / lines[-1]["seconds"], 1),
                       "accuracy": round(lines[-1]["eval_accuracy"], 3),
                       "tokens": round(statistics.mean(m["response_tokens"] for m in lines[1:]), 1)}
            for measure, value in reached.items():
                found.setdefault(f"{kind}, {name}", {}).setdefault(measure, []).append(value)
            say(f"{kind}, {name}, seed {seed}: {reached}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", action="store_true",
                        help="twelve runs on two ranks; those that learn take 25 minutes")
    file, given = RESULTS / "stragglers.json", parser.parse_args()
    results = json.loads(file.read_text()) if file.exists() else {}
    if given.train:
        with clear_errors():
            results["runs"] = train()
    random, ratios = np.random.default_rng(1), {}  # {p: the 10th, 50th and 90th percentile}
    for p in (0.05, 0.1, 0.15, 0.3, 0.5):
        draws = ratio(two_kinds(p, (20_000, 6, 8), random), 24)
        ratios[p] = np.percentile(draws, (10, 50, 90)).round(2).tolist()
        low, median, high = ratios[p]
        print(f"p = {p:4}: groups take {median:.1f} times as long [{low:.1f}, {high:.1f}]")
    file.write_text(json.dumps({**results, "ratios": ratios}) + "\n")
    plt = pyplot()
    save(plt, {"stragglers": draw(plt)}, RESULTS)


if __name__ == "__main__":
    main()
