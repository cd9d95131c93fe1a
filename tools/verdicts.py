"""How often the verdict is wrong on labelled pairs, beside plain math-verify, and how fast it is.

    python -m tools.verdicts FILE.jsonl            # both, on labelled pairs
    python -m tools.verdicts FILE.jsonl --speed    # wrong answers a second, and maj@16 of 500 problems

Each line has a `response`, a `gold` answer, and the `reward` that is due, 1 or 0. For --speed, gold answers
that are no plain numbers get another digit.
"""
import argparse
import json
import multiprocessing
import os
import random
import re
import time
from pathlib import Path

from cli import say
from equality import plain_number
from eval import per_problem
from reward import Verifier


def plain_math_verify(text, gold):
    """1.0 if math-verify finds `text` equal to the gold answer, without anything of reward.py around it."""
    from math_verify import parse, verify
    parsed = [parse(part, raise_on_error=True) for part in (f"\\boxed{{{gold}}}", text)]
    return float(verify(*parsed, raise_on_error=True))


def plain(pairs):
    """The rewards of plain math-verify, in a process of its own, since it may hang."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rewards = []
        for pair in pairs:
            try:
                arguments = pair["response"], pair["gold"]
                rewards.append(pool.apply_async(plain_math_verify, arguments).get(timeout=15))
            except Exception:  # math-verify raises many kinds
                rewards.append(0.0)
    return rewards


def measure_speed(golds, verifier):
    """Prints how long wrong expressions take, and `eval.py`'s majority of 4 right and 12 wrong answers to 500
    problems."""
    def other_digit(gold):
        where = rng.choice([match.start() for match in re.finditer(r"\d", gold)])
        return gold[:where] + rng.choice("123456789".replace(gold[where], "")) + gold[where + 1 :]

    rng = random.Random(0)
    golds = sorted({gold for gold in golds if re.search(r"\d", gold) and plain_number(gold) is None})
    wrong = [(f"\\boxed{{{other_digit(gold)}}}", gold) for gold in golds * 4]
    start = time.perf_counter()
    verifier.score(*zip(*wrong, strict=True))
    seconds = time.perf_counter() - start
    say(f"{len(wrong)} wrong expressions: {len(wrong) / seconds:.0f} a second on two workers")
    records = [{"problem": i, "sample": j, "gold": golds[i % len(golds)], "reward": float(j < 4), "tokens": 1,
                "finished": True} for i in range(500) for j in range(16)]
    for record in records:
        record["answer"] = record["gold"] if record["reward"] else other_digit(record["gold"])
    start = time.perf_counter()
    per_problem(records, verifier.equal)
    seconds = time.perf_counter() - start
    say(f"maj@16 of 500 problems, no plain numbers: {seconds:.0f} s (load {os.getloadavg()[0]:.1f})")


def main(path, speed_only):
    pairs = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    responses, golds = [[pair[name] for pair in pairs] for name in ("response", "gold")]
    verifier = Verifier()  # with two workers
    verifier.score(["\\boxed{\\sqrt{2}}"] * 2, ["\\frac12"] * 2)  # both workers are up
    if speed_only:
        measure_speed(golds, verifier)
        return verifier.close()
    ours = verifier.score(responses, golds)
    for name, rewards in (("reward.py", ours), ("math-verify", plain(pairs))):
        wrong = [(p, reward) for p, reward in zip(pairs, rewards, strict=True) if reward != p["reward"]]
        paid, right = sum(reward for _, reward in wrong), sum(pair["reward"] for pair in pairs)
        say(f"{name:<12} pays {paid:.0f} of {len(pairs) - right:.0f} wrong answers, refuses "
            f"{len(wrong) - paid:.0f} of {right:.0f} right ones")
        for pair, reward in wrong if name == "reward.py" else []:
            say(f"  {reward:.0f}: {pair['response']!r}, gold {pair['gold']!r}")
    verifier.close()


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("path", metavar="FILE.jsonl")
    parser.add_argument("--speed", dest="speed_only", action="store_true")
    main(**vars(parser.parse_args()))
