"""How often the verdict is wrong on labelled pairs, beside plain math-verify, and how fast it is.

    python -m tools.verdicts FILE.jsonl

Each line has a `response`, a `gold` answer, and the `reward` that is due, 1 or 0.
"""
import argparse
import json
import multiprocessing
import time
from pathlib import Path

from cli import say
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


def main(path):
    pairs = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    responses, golds = [[pair[name] for pair in pairs] for name in ("response", "gold")]
    verifier = Verifier()  # with two workers
    verifier.score(["\\boxed{\\sqrt{2}}"] * 2, ["\\frac12"] * 2)  # both workers are up
    start = time.perf_counter()
    ours = verifier.score(responses, golds)
    seconds = time.perf_counter() - start
    for name, rewards in (("reward.py", ours), ("math-verify", plain(pairs))):
        wrong = [(p, reward) for p, reward in zip(pairs, rewards, strict=True) if reward != p["reward"]]
        paid, right = sum(reward for _, reward in wrong), sum(pair["reward"] for pair in pairs)
        say(f"{name:<12} pays {paid:.0f} of {len(pairs) - right:.0f} wrong answers, refuses "
            f"{len(wrong) - paid:.0f} of {right:.0f} right ones")
        for pair, reward in wrong if name == "reward.py" else []:
            say(f"  {reward:.0f}: {pair['response']!r}, gold {pair['gold']!r}")
    say(f"reward.py: {len(pairs) / seconds:.0f} verdicts a second on two workers")
    verifier.close()


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("path", metavar="FILE.jsonl")
    main(parser.parse_args().path)
