"""Verification: is a response's final answer mathematically equal to the gold answer? 1 or 0.

The last `\\boxed{}` after any `</think>` is the answer, and math-verify (sympy underneath) compares it with
the gold one. A policy will sooner or later write `\\boxed{9^{9^{9^9}}}`, on which sympy never returns, not
even to math-verify's own alarm. So `Verifier` runs every comparison in a process that a timer ends.

This file needs nothing of the others: copy it, or paste all of it into a script of yours.

    verifier = Verifier(workers=2, timeout=1.0)
    verifier.score(["So it is \\boxed{1/2}.", "I give up."], ["0.5", "0.5"])      # [1.0, 0.0]
    verifier.close()
"""
import contextlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

MAX_ANSWER_CHARS = 1000  # MATH-500's longest gold answer has 53; past this an answer is an attack or a loop
MAX_WORKER_BYTES = 4 << 30  # address space of a worker: an answer must not eat the machine
PATIENCE = 10  # wall-clock limit: this many times the limit of processor time
WORKER = "SPPO_VERIFIER_WORKER"  # set in the environment of a worker
START = ("import importlib, sys; sys.path.insert(0, sys.argv[1]); "
         "importlib.import_module(sys.argv[2])._work(float(sys.argv[3]))")

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}\\]|[{}]")
# What may stand between two boxes that together are one answer: `\boxed{3} and \boxed{4}`.
_SEPARATOR = re.compile(r"(?:\s|[$,;.&{}]|\\[()\[\],;!]|\\text|\\quad|\\(?:lor|vee|cup)\b|\bor\b|\band\b)*")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


# ---- which part of a response is its answer ----------------------------------------------------------------

def _boxes(text):
    """(start, end, content) of every outermost complete `\\boxed{...}`, in one pass with a stack."""
    stack, boxes = [], []
    for token in _BRACES.finditer(text):
        if token[0].startswith("\\boxed"):
            stack.append(token)
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            opening = stack.pop()
            if opening:
                while boxes and boxes[-1][0] > opening.start():
                    boxes.pop()  # it stood inside this one
                boxes.append((opening.start(), token.end(), text[opening.end() : token.start()].strip()))
    return boxes


def last_boxed(text):
    """The content of the last `\\boxed{}` in `text`, or None. Boxes joined by commas or "or" are one answer,
    a list: `\\boxed{26} or \\boxed{27}` does not answer 27."""
    contents, next_start = [], None
    for start, end, content in reversed(_boxes(text)):
        if contents and not _SEPARATOR.fullmatch(text, end, next_start):
            break
        if content not in contents:
            contents.insert(0, content)
        next_start = start
    return ", ".join(contents) if contents else None


def extract_answer(response, mode="boxed"):
    """The final answer of a response, or None. `mode="any"` takes the last number where there is no box."""
    conclusion = response.rpartition("</think>")[2]
    answer = last_boxed(conclusion)
    if answer is None and mode == "any":
        return next(reversed(_NUMBER.findall(conclusion)), None)
    return answer


# ---- is it equal to the gold answer? -----------------------------------------------------------------------

def _parse(answer):
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse  # takes 1 s: only in workers
    # math-verify reads `a \lor b` as b alone: a list of candidates must stay a list.
    answer = re.sub(r"\\(?:lor|vee)\b", r"\\text{ or }", answer)
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(f"\\boxed{{{answer}}}", targets, parsing_timeout=None)  # the deadline is the Verifier's


def equal(answer, gold):
    """Mathematical equality of two answers. It may never return: call it in a process that may be killed."""
    from math_verify import verify as math_verify
    return math_verify(_parse(gold), _parse(answer), timeout_seconds=None)


def _is_integer(answer):
    return answer.isascii() and answer.isdigit() and len(answer) <= 100


def verifiable(gold):
    """Whether math-verify understands a gold answer, and does not only compare it letter by letter."""
    text = re.sub(r"\\[{}]", "", gold)
    if text.count("{") != text.count("}"):  # cut off: math-verify reads what is left of it as another number
        return False
    equal("0", gold)  # some can be parsed, but no comparison with them ends before the deadline
    return any(not isinstance(part, str) for part in _parse(gold))


def verify(response, answer, mode="boxed"):
    """1.0 if the response's final answer equals `answer`, else 0.0. In this process and without a deadline:
    for trusted text. `Verifier` is for the output of a policy."""
    candidate = extract_answer(response, mode)
    if not candidate or len(candidate) > MAX_ANSWER_CHARS:
        return 0.0
    return float(equal(candidate, answer))


class Verifier:
    """Verifies in `workers` processes; a comparison that takes more than `timeout` seconds of
    processor time scores 0.

    The processes are fresh Python interpreters that import this file, so they inherit neither CUDA nor
    threads. `timeouts` and `crashes` count the responses that it gave up on. mode: as in `extract_answer`.
    """

    def __init__(self, workers=2, timeout=1.0, mode="boxed"):
        if WORKER in os.environ:  # or each worker would start workers without end
            raise RuntimeError("a worker of Verifier imported a script that makes a Verifier at once; put "
                               "what that script runs under `if __name__ == '__main__':`")
        self.timeout, self.mode, self.timeouts, self.crashes = timeout, mode, 0, 0
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")  # each waits for a process
        self._idle = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # a worker takes a second to start, and starts when it is first needed

    def _start(self):
        folder, name = os.path.split(os.path.abspath(__file__))
        return subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches only the trainer
            [sys.executable, "-c", START, folder, name.removesuffix(".py"), str(self.timeout)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, WORKER: "1"})

    def submit(self, response, answer) -> Future:
        """Starts verifying, and returns at once: `.result()` of the Future is the
        reward, and waits for it."""
        candidate = extract_answer(response, self.mode)
        if not candidate or len(candidate) > MAX_ANSWER_CHARS:
            return self._threads.submit(float, 0)
        if _is_integer(candidate) and _is_integer(answer):  # nothing that would take time or could do harm
            return self._threads.submit(float, int(candidate) == int(answer))
        return self._threads.submit(self._ask, candidate, answer)

    def score(self, responses, answers) -> list[float]:
        """The reward of each response, in order."""
        futures = [self.submit(*pair) for pair in zip(responses, answers, strict=True)]
        return [future.result() for future in futures]

    def equal(self, answer, gold) -> bool:
        """The function `equal`, in a worker. An answer that cannot be compared is unequal."""
        return self._threads.submit(self._ask, answer, gold).result() > 0

    def unverifiable(self, answers) -> list[int]:
        """Positions of the gold answers that cannot be parsed or compared, so that no response
        could earn a reward."""
        # Each is asked once, and plain numbers need no check.
        asked = {a: self._threads.submit(self._ask, None, a) for a in set(answers) if not _is_integer(a)}
        return [i for i, a in enumerate(answers) if a in asked and not asked[a].result()]

    def _ask(self, candidate, answer):
        worker, verdict = self._idle.get() or self._start(), ""
        with contextlib.suppress(OSError):  # it has been killed while it was idle
            worker.stdin.write(json.dumps([candidate, answer]) + "\n")
            worker.stdin.flush()
            verdict = worker.stdout.readline().strip()
        if not verdict:  # killed from outside
            worker.kill()
            worker.wait()
            worker, verdict = None, "crash"  # the next comparison starts another
        self._idle.put(worker)
        self.timeouts += verdict == "timeout"
        self.crashes += verdict == "crash"
        return float(verdict == "equal")

    def close(self):
        self._threads.shutdown()
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.stdin.close()
                worker.wait()


# ---- a worker: a process that forks a child for each comparison, which a timer ends ------------------------

def _work(timeout):
    """Reads pairs of answers from stdin and writes a verdict for each to stdout.

    `timeout` limits the time that a comparison computes. A limit on the clock's time would take rewards of
    right answers on a busy machine. A comparison that waits for ever is ended after PATIENCE times as long.
    """
    import resource
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when to stop; a worker ends with its pipe
    logging.disable(logging.WARNING)  # math-verify warns that we switched its own alarm off
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no verdict
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    equal("\\frac{1}{2}", "0.5")  # imports everything: a fork takes milliseconds, a new import of sympy 1 s
    named = {0: "equal", 1: "different", -signal.SIGPROF: "timeout", -signal.SIGALRM: "timeout"}
    for line in sys.stdin:
        candidate, gold = json.loads(line)
        child = os.fork()
        if not child:
            # Nothing here handles the signals of these timers. So the system ends this process at once.
            signal.setitimer(signal.ITIMER_PROF, timeout)
            signal.setitimer(signal.ITIMER_REAL, timeout * PATIENCE)
            try:
                good = verifiable(gold) if candidate is None else equal(candidate, gold)
            except Exception:  # sympy raises many kinds on hostile text: that is no right answer
                good = False
            os._exit(0 if good else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # the trainer was killed; then stdin ends too
            print(named.get(code, "crash"), file=verdicts, flush=True)
