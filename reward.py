"""Verification: is a response's final answer equal to the gold answer? 1 or 0. Or a reward of your own.

The last `\\boxed{}` after any `</think>` is the answer. equality.py compares it with the gold answer.

A policy will sooner or later write `\\boxed{9^{9^{9^9}}}`, on which sympy never returns. So `Verifier` runs
every comparison in a process that a timer ends. A reward of your own runs there too.

This file, equality.py and notation.py need nothing of the others: copy the three.

    verifier = Verifier(workers=2, timeout=1.0)
    verifier.score(["So it is \\boxed{1/2}.", "I give up."], ["0.5", "0.5"])      # [1.0, 0.0]
    verifier.close()
"""
import contextlib
import hashlib
import inspect
import json
import logging
import os
import queue
import re
import select
import signal
import subprocess
import sys
import types
from concurrent.futures import Future, ThreadPoolExecutor

from equality import equal, equal_at_once, plain_number, verifiable

MAX_ANSWER_CHARS = 1000  # MATH-500's longest gold answer has 53; past this an answer is an attack or a loop
MAX_WORKER_BYTES = 4 << 30  # data of a worker: an answer must not eat the machine
PATIENCE = 10  # wall-clock limit: this many times the limit of processor time
GRACE = 5  # seconds after twice that limit, until a worker is ended whose reward has stopped its own timers
IMPORT_SECONDS = 300  # until a worker must have imported everything, on the clock
WORKER = "SPPO_VERIFIER_WORKER"  # set in the environment of a worker
WARM_UP = (r"x^{2}+3", "1.5", r"\sqrt{2}", r"\{1,2\}", "(1,2)", "x=1", "1<x<2", r"2\sin(x)", "y=2x+1", "f(x)",
           r"5\text{ m}")
WARM_UP_GOLD = r"\frac{1}{2}\text{ cm}"
START = ("import importlib, sys; sys.path.insert(0, sys.argv[1]); "
         "importlib.import_module(sys.argv[2])._work(float(sys.argv[3]), sys.argv[4])")


# ---- which part of a response is its answer ----------------------------------------------------------------

# A box with its opening brace, or with the number or command that stands in it without one; other braces.
_BRACES = re.compile(r"\\\\?(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:(\{)|(-?\d(?:[\d.,/]*\d)?|"
                     r"\\[a-zA-Z]+(?:\{[^{}]*\}|\s*\d)*))?|\\[{}\\]|[{}]")
_NUMBER = re.compile(r"(?:(?<![\w)\]}])[-−–])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
                     r"(?:[eE][-+]?\d+|/\d+)?")


def _boxes(text):
    """(start, end, content) of every outermost complete box that is not empty, in one pass with a stack."""
    stack, boxes = [], []
    for token in _BRACES.finditer(text):
        if token[2]:
            boxes.append((token.start(), token.end(), token[2]))
        elif token[1] or token[0] == "{":
            stack.append(token)
        elif token[0] == "}" and stack:
            opening = stack.pop()
            content = text[opening.end() : token.start()].strip()
            if opening[1] and content:
                while boxes and boxes[-1][0] > opening.start():
                    boxes.pop()  # it stood inside this one
                boxes.append((opening.start(), token.end(), content))
    return boxes


def _joined(between):
    """Whether two boxes with this text between them are one answer, a list: it has no more than a few letters
    besides "and" and LaTeX, or it is short and has an "or" or the like."""
    words = re.sub(r"\\(?:text|mbox|mathrm|textbf)\b|\\[a-zA-Z]+|<\w+>", " ", between).lower()
    letters = re.sub(r"\b(?:and|or)\b|[\W\d_]", "", words)
    guess = re.search(r"\b(?:or|maybe|alternatively)\b", words)
    return len(between) <= 60 and (len(letters) <= 4 or guess is not None)


def last_boxed(text):
    """The content of the last `\\boxed{}` in `text`, or None. Boxes that stand together or are joined by "or"
    are one answer, a list: `\\boxed{26} or \\boxed{27}` does not answer 27."""
    contents, next_start = [], None
    for start, end, content in reversed(_boxes(text)):
        if contents and not _joined(text[end:next_start]):
            break
        if content not in contents:
            contents.insert(0, content)
        next_start = start
    return ", ".join(contents) if contents else None


def decode(ids, tokenizer, prompt=()):
    """The text of a response, without padding and end marks. `<think>` and `</think>` stay, even where they
    are special tokens: the verdict depends on them. So it begins with `<think>` if the `prompt` (token ids)
    ends within a thought, as DeepSeek-R1's does."""
    thinking = {tokenizer.convert_tokens_to_ids(token) for token in ("<think>", "</think>")}
    special = set(tokenizer.all_special_ids) - thinking
    opened = "<think>" in tokenizer.decode(prompt[-16:]).rpartition("</think>")[2]
    return "<think>" * opened + tokenizer.decode([i for i in ids if i not in special])


def extract_answer(response, mode="boxed"):
    """The final answer of a response, or None. `mode="any"` takes the last number where there is no box.
    Thinking is no answer, nor is anything after a `<think>` without end. (A prompt may open one.)"""
    thinking = r"(?s)<think>.*?(?:</think>|$)" if "<think>" in response else "^(?s:.*?)</think>"
    conclusion = re.split(thinking, response)[-1]
    answer = last_boxed(conclusion)
    if answer is None and mode == "any":
        return next(reversed(_NUMBER.findall(conclusion)), None)
    return answer


# ---- is it right? ------------------------------------------------------------------------------------------

def verify(response, answer, mode="boxed"):
    """1.0 if the response's final answer equals `answer`, else 0.0. In this process and without a deadline:
    for trusted text. `Verifier` is for the output of a policy."""
    candidate = extract_answer(response, mode)
    return float(bool(candidate) and len(candidate) <= MAX_ANSWER_CHARS and equal(candidate, answer))


class Failed(float):
    """The reward of a response whose verification failed: 0. `why` tells the reason."""
    why = ""


class Verifier:
    """Verifies in `workers` processes; a comparison that takes more than `timeout` seconds of
    processor time scores 0.

    reward: "FILE.py:FUNCTION", a function (response, answer) -> a number in [0, 1], in place of `verify`. The
    file is read once: what is edited later does not count. `code` is its name with a mark of its content.
    mode: as in `extract_answer`. The processes are fresh Python interpreters that import this file, so they
    inherit neither CUDA nor threads. `timeouts`, `crashes` and `errors` (a reward that raised, or that was no
    number in [0, 1]) count the responses that it gave up on; their reward is 0.
    """

    def __init__(self, workers=2, timeout=1.0, mode="boxed", reward=None):
        if WORKER in os.environ:  # or each worker would start workers without end
            raise RuntimeError("a worker of Verifier imported a script that makes a Verifier at once; put "
                               "what that script runs under `if __name__ == '__main__':`")
        self.timeout, self.mode, self.reward, self._source = timeout, mode, reward, None
        if reward and os.path.isfile(path := reward.rpartition(":")[0]):
            with open(path, encoding="latin-1", newline="") as file:  # any bytes, which it gives back
                self._source = file.read()
        mark = hashlib.sha1((self._source or "").encode("latin-1")).hexdigest()
        self.code = reward and f"{reward} ({mark[:8]})"
        self.timeouts = self.crashes = self.errors = 0
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")  # each waits for a process
        self._idle = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # a worker takes seconds to start, and starts when it is first needed

    def _start(self):
        folder, name = os.path.split(os.path.abspath(__file__))
        worker = subprocess.Popen(  # in its own session: Ctrl-C is for the trainer, and so are the GPUs
            [sys.executable, "-c", START, folder, name.removesuffix(".py"), str(self.timeout),
             self.reward or ""], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True, env={**os.environ, WORKER: "1", "CUDA_VISIBLE_DEVICES": ""})
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(self._source), file=worker.stdin, flush=True)
        verdict = json.loads(worker.stdout.readline() or '"it ended while it was imported"')
        if verdict != "ready":
            worker.kill()
            raise ValueError(f"--reward {self.reward}: cannot be used: {verdict}; give FILE.py:FUNCTION")
        return worker

    def check(self):
        """Starts a worker. Raises ValueError if a reward of one's own cannot be imported."""
        self._idle.put(self._idle.get() or self._start())

    def submit(self, response, answer) -> Future:
        """Starts verifying, and returns at once: `.result()` of the Future is the
        reward, and waits for it. An empty response has reward 0."""
        if self.reward and response:
            return self._threads.submit(self._ask, "reward", response, answer)
        candidate = None if self.reward else extract_answer(response, self.mode)
        if not candidate or len(candidate) > MAX_ANSWER_CHARS:
            return self._threads.submit(float, 0)
        return self._compare(candidate, answer)

    def score(self, responses, answers) -> list[float]:
        """The reward of each response, in order."""
        futures = [self.submit(*pair) for pair in zip(responses, answers, strict=True)]
        return [future.result() for future in futures]

    def equal(self, answer, gold) -> bool:
        """The function `equal`, in a worker. An answer that cannot be compared is unequal."""
        return self._compare(answer, gold).result() > 0

    def unverifiable(self, answers) -> list[int]:
        """Positions of the gold answers that cannot be read or compared, so that hardly a response could earn
        a reward. With a reward of one's own there are none."""
        # Plain numbers need no check, and no worker, which takes seconds to start.
        asked = {a: self._threads.submit(self._ask, "verifiable", a) for a in set(answers)
                 if not self.reward and plain_number(a) is None}
        return [i for i, a in enumerate(answers) if a in asked and not asked[a].result()]

    def _compare(self, answer, gold):
        known = equal_at_once(answer, gold)
        if known is not None:
            return self._threads.submit(float, known)
        return self._threads.submit(self._ask, "equal", answer, gold)

    def _ask(self, *request):
        worker, verdict, broken = self._idle.get(), "crash", True
        with contextlib.suppress(OSError, ValueError):  # it has been killed, or its reply was cut short
            worker = worker or self._start()
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()
            replied = select.poll()
            replied.register(worker.stdout, select.POLLIN)
            if not replied.poll(1000 * (2 * PATIENCE * self.timeout + GRACE)):
                verdict = "timeout"  # the reward has stopped the timers that should end it
                worker.send_signal(signal.SIGUSR1)
                worker.wait()
                raise OSError
            verdict = json.loads(worker.stdout.readline())
            if request[0] == "reward" and verdict not in ("timeout", "crash"):
                worker.stdout.readline()  # that its child has ended
            broken = verdict == "crash"
        if worker and broken:
            worker.kill()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # so that its child ends too
            worker.wait()
        self._idle.put(None if broken else worker)  # the next comparison starts another
        if isinstance(verdict, float):
            return verdict
        self.timeouts += verdict == "timeout"
        self.crashes += verdict == "crash"
        self.errors += verdict not in ("timeout", "crash")
        if self.reward and self.timeouts + self.crashes + self.errors == 1:
            why = {"timeout": f"it took more than {self.timeout:g} s", "crash": "its process died"}
            print(f"{self.reward}: {why.get(verdict, verdict)}; the reward is 0 (see reward/timeouts, "
                  "reward/crashes, reward/errors)", file=sys.stderr)
        failed = Failed(0)
        failed.why = verdict
        return failed

    def close(self):
        self._threads.shutdown()
        while not self._idle.empty():
            if worker := self._idle.get():
                worker.stdin.close()
                worker.wait()


# ---- a worker: a process that forks a child, which compares until a timer ends it --------------------------

def _load(reward, source):
    """The function of "FILE.py:FUNCTION", of which `source` is the file's content."""
    path, _, name = reward.rpartition(":")
    if not path:
        raise ValueError("it names no function")
    if source is None:
        raise FileNotFoundError(f"there is no file {path!r}")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # it may import its neighbours,
    for ours in (__name__, "equality", "notation"):
        sys.modules.pop(ours, None)  # also one of the same name as a file of ours
    path = os.path.abspath(path)
    module = sys.modules["reward_of_ones_own"] = types.ModuleType("reward_of_ones_own")
    module.__file__ = path
    exec(compile(source.encode("latin-1"), path, "exec", dont_inherit=True), module.__dict__)
    if not (function := getattr(module, name, None)):
        raise AttributeError(f"{path} has no function {name!r}")
    inspect.signature(function).bind("response", "answer")  # raises TypeError if it takes others
    return function


def _work(timeout, reward):
    """Reads requests from stdin and writes a verdict for each to stdout: a number, or what went wrong.

    A child does one comparison after another, since it learns: the parser is slow where it meets a form for
    the first time. But a reward of one's own gets a new child each time, which no response has changed.
    """
    import resource
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when to stop; a worker ends with its pipe
    logging.disable(logging.WARNING)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no verdict
    verdict, functions, child = "ready", {"equal": equal, "verifiable": verifiable}, 0

    def end(*_):  # the trainer has waited for too long
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        os._exit(1)
    source = json.loads(sys.stdin.readline() or "null")
    signal.alarm(IMPORT_SECONDS)
    try:
        if reward:
            functions["reward"] = _load(reward, source)
        for form in () if reward else WARM_UP:  # imports everything, and meets the common forms
            equal(form, WARM_UP_GOLD)
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    with contextlib.suppress(BrokenPipeError):  # the trainer was killed; then stdin ends too
        print(json.dumps(verdict), file=replies, flush=True)
        signal.signal(signal.SIGUSR1, end)
        while True:
            child = os.fork()
            if not child:
                signal.signal(signal.SIGUSR1, signal.SIG_DFL)
                os.setpgid(0, 0)  # a group of its own, with what it starts
                return _serve(functions, timeout, replies)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
            if code == 0:
                return
            verdict = "timeout" if -code in (signal.SIGPROF, signal.SIGALRM) else "crash"
            print(json.dumps(verdict), file=replies, flush=True)


def _serve(functions, timeout, replies):
    """Answers requests until stdin ends, or one request to a reward of one's own.

    `timeout` limits the time that a comparison computes. A limit on the clock's time would take rewards of
    right answers on a busy machine. A comparison that waits for ever is ended after PATIENCE times as long.
    """
    while line := sys.stdin.readline():
        name, *arguments = json.loads(line)
        # Nothing here handles the signals of these timers. So the system ends this process at once.
        signal.setitimer(signal.ITIMER_PROF, timeout)
        signal.setitimer(signal.ITIMER_REAL, timeout * PATIENCE)
        try:
            verdict = functions[name](*arguments)
            if isinstance(verdict, str) or not 0 <= float(verdict) <= 1:
                raise ValueError(f"it returned {verdict!r}, and not a number from 0 to 1")
            verdict = float(verdict)
        except BaseException as error:  # sympy raises many kinds on hostile text: that is no right answer
            verdict = f"{type(error).__name__}: {error}" if name == "reward" else 0.0
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(verdict), file=replies, flush=True)
        if name == "reward":
            os._exit(1)
    os._exit(0)
