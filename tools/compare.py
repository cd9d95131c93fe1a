"""Two evaluations side by side, or the rewards of one against plain math-verify.

    python -m tools.compare a.jsonl b.jsonl          paired differences B - A, and the problems that flipped
    python -m tools.compare --recheck a.jsonl        score its responses again with nothing but math-verify

The files are those that eval.py writes.
"""
import argparse
import multiprocessing
from collections import Counter
from itertools import groupby

import numpy as np
from tqdm import tqdm

from cli import InputError, clear_errors, say
from eval import bootstrap_interval, label, read_rollouts

# ---- two evaluations --------------------------------------------------------------------------------------

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
    questions = {(benchmark, problem): r["question"] for (benchmark, problem, _), r in a.items()}
    both = sorted(mean_a.keys() & mean_b.keys())
    for (benchmark, problem, _), r in b.items():
        if r["question"] != questions.get((benchmark, problem), r["question"]):
            raise InputError(f"{first} and {second}: have different problems under the same number; they "
                             "cannot be compared")
    if not both:
        raise InputError(f"{first} and {second}: have no problem in common; compare evaluations of the same "
                         "benchmarks")
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


# ---- one evaluation, scored again -------------------------------------------------------------------------

def plain_math_verify(text, gold):
    """1.0 if math-verify finds `text` equal to the gold answer, without anything of reward.py around it."""
    from math_verify import parse, verify
    parsed = [parse(part, raise_on_error=True) for part in (f"\\boxed{{{gold}}}", text)]
    return float(verify(*parsed, raise_on_error=True))


def last_box(record):
    """The response's text from its last \\boxed on; empty if it has none or was cut off."""
    start = record["response"].rfind("\\boxed")
    return record["response"][start:] if record["finished"] and start >= 0 else ""


def recheck(path):
    """Prints how often math-verify over the text's last box agrees with the rewards, and where not."""
    _, records = read_rollouts(path)
    counts, differing, pool = Counter(), [], None
    for r in tqdm(records.values(), unit="response", disable=None):
        if not last_box(r):
            counts["rewarded without a box" if r["reward"] else "without a box or unfinished"] += 1
            continue
        # In another process, since math-verify may never return.
        pool = pool or multiprocessing.get_context("fork").Pool(1)
        try:
            reward = pool.apply_async(plain_math_verify, (last_box(r), r["gold"])).get(timeout=15)
        except Exception as error:  # whatever it raises: without a verdict there is nothing to compare
            counts[f"math-verify failed ({type(error).__name__})"] += 1
            if isinstance(error, multiprocessing.TimeoutError):
                pool.terminate()
                pool = None
            continue
        if r["reward"] == reward:
            counts["agree, right" if reward else "agree, wrong"] += 1
        else:
            counts["differ"] += 1
            differing.append(r)
    if pool:
        pool.terminate()
    say(f"{path}: {len(records):,} responses, scored again by math-verify over the last box")
    for name, count in sorted(counts.items()):
        say(f"{count:>8,}  {name}")
    for r in differing:
        say(f"  {r['benchmark']} {r['problem']}/{r['sample']}: ours {r['reward']:.0f}; gold {r['gold']!r}, "
            f"answer {r['answer']!r}, last box {last_box(r)[:80]!r}")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="files of responses that eval.py wrote")
    parser.add_argument("--recheck", action="store_true", help="score the responses of one file again")
    given = parser.parse_args(arguments)
    with clear_errors():
        if len(given.files) != (1 if given.recheck else 2):
            raise InputError("tools.compare takes two files of responses, or one with --recheck, and was "
                             f"given {len(given.files)}")
        (recheck if given.recheck else compare)(*given.files)


if __name__ == "__main__":
    main()
