"""A reward of one's own: a Python function that must pass tests.

    python sppo.py --model ... --dataset code.jsonl --reward examples/code_reward.py:reward \\
        --suffix "Write it as a Python code block."

Each row has a prompt and, as its answer, assertions, one a line:

    {"prompt": "Write a function add(a, b) that adds two numbers.",
     "answer": "assert add(1, 2) == 3\\nassert add(-1, 1) == 0"}

The reward is 1 if all of them hold, else 0. The last code block of the response is run with them, in a Python
process of its own.

What this protects from: code that never ends (limits on processor time and on the clock), that eats the
machine (limits on memory, on the size of files, on open files and on processes), that leaves files about (it
runs in an empty folder, which is removed), and that ends before the tests do (they end by printing a secret).

What it does not protect from: the code runs as you. It can read and delete your files and use the network.
Code that looks for the secret finds it, and can print it without passing the tests. The limit on processes
does not hold for root. So train in a container without network, and look at responses that earn 1.
"""
import re
import resource
import secrets
import subprocess
import sys
import tempfile

SECONDS = 2  # of processor time, and twice as many on the clock


def limit():
    """In the child, before its code runs. Each limit is hard: the code cannot lift it."""
    for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, 1 << 30),
                       (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NOFILE, 32),
                       (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))


def reward(response: str, answer: str) -> float:
    """response: the policy's text; answer: assertions. 1.0 if the last code block passes them, else 0.0."""
    text = response.rpartition("</think>")[2]  # what follows the reasoning; all of it, if there is none
    blocks = re.findall(r"```(?:python)?\s*\n(.*?)```", text, re.DOTALL)
    if not blocks:
        return 0.0
    secret = secrets.token_hex(8)  # shows that the tests ran: code that calls exit() has no error either
    program = f"{blocks[-1]}\n{answer}\nprint({secret!r})\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        try:  # -I: no modules from the folder or the user's own packages; -: the program comes from `input`
            subprocess.run(
                [sys.executable, "-I", "-"], input=program.encode(errors="replace"), cwd=folder, env={},
                stdout=output, stderr=subprocess.DEVNULL, timeout=2 * SECONDS, preexec_fn=limit)
        except subprocess.TimeoutExpired:
            return 0.0
        output.seek(0)
        return float(output.read().endswith(f"{secret}\n".encode()))
