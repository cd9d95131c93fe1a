"""Two evaluations side by side.

    python -m tools.compare a.jsonl b.jsonl          paired differences B - A, and the problems that flipped

The files are those that eval.py writes.
"""
import argparse
from collections import Counter
from itertools import groupby

import numpy as np

from cli import InputError, clear_errors, say
from eval import bootstrap_interval, label, read_rollouts


def averages(records):
    """{(benchmark, problem): the mean reward of its samples}"""
    rewards = {}
    for (benchmark, problem, _), record in records.items():
        rewards.setdefault((benchmark, problem), []).append(record["reward"])
    return {key: float(np.mean(values)) for key, values in rewards.items()}


def read_both(first, second):
    """The records of the two files. Warns of what makes a comparison doubtful."""
    (settings_a, a), (settings_b, b) = read_rollouts(first), read_rollouts(second)
    for name, value in settings_a.items():
        if name not in ("model", "weights") and value != settings_b.get(name):
            say(f"warning: {name} differs: {value} in A, {settings_b.get(name)} in B")
    for path, records in ((first, a), (second, b)):
        samples = Counter((benchmark, problem) for benchmark, problem, _ in records)
        if len(set(samples.values())) > 1:
            say(f"warning: {path} is incomplete: its evaluation was stopped. Run the same command again")
    return a, b


def compare(first, second):
    """Prints each benchmark's difference B - A, over the problems that both have, and what flipped."""
    a, b = read_both(first, second)
    mean_a, mean_b = averages(a), averages(b)
    both = sorted(mean_a.keys() & mean_b.keys())
    questions = {key[:2]: r["question"] for key, r in a.items()}
    if not both:
        raise InputError(f"{first} and {second}: have no problem in common; compare evaluations of the same "
                         "benchmarks")
    if any(r["question"] != questions.get(key[:2], r["question"]) for key, r in b.items()):
        raise InputError(f"{first} and {second}: have different problems under the same number; they "
                         "cannot be compared")
    common, shared = {*both}, {benchmark for benchmark, _ in both}
    for path, mean in ((first, mean_a), (second, mean_b)):
        if alone := sum(key[0] in shared and key not in common for key in mean):
            say(f"warning: {alone} problems of these benchmarks are in {path} alone, and are left out. If "
                "the other evaluation was stopped, it has the short responses: run its command again")
    say(f"A {first}\nB {second}\n")
    say(f"{'benchmark':<20} problems       A       B   B - A  95 % interval, paired")
    differences = []
    for benchmark, keys in groupby(both, key=lambda key: key[0]):
        x, y = np.array([(mean_a[key], mean_b[key]) for key in keys]).T
        differences.append(y - x)
        low, high = bootstrap_interval(y - x)
        means = f"{100 * x.mean():>8.1f}{100 * y.mean():>8.1f}{100 * (y - x).mean():>+8.1f}"
        say(f"{label(benchmark)[:20]:<20} {len(x):>8}{means}  [{100 * low:+.1f}, {100 * high:+.1f}]")
    if len(differences) > 1:
        low, high = bootstrap_interval(differences)
        say(f"{'mean':<20} {len(both):>8}{'':16}{100 * np.mean([d.mean() for d in differences]):>+8.1f}"
            f"  [{100 * low:+.1f}, {100 * high:+.1f}]")
    flipped = [key for key in both if (mean_a[key] >= 0.5) != (mean_b[key] >= 0.5)]
    for better, title in ((True, "wrong in A, right in B"), (False, "right in A, wrong in B")):
        keys = [key for key in flipped if (mean_b[key] > mean_a[key]) == better]
        say(f"\n{title} (at least half of the samples): {len(keys)}")
        for key in keys:
            say(f"  {label(key[0])} {key[1]:>5}  {mean_a[key]:.2f} -> {mean_b[key]:.2f}  "
                + " ".join(questions[key].split())[:90])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("first", metavar="a.jsonl")
    parser.add_argument("second", metavar="b.jsonl")
    with clear_errors():
        compare(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
