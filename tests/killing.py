"""Run by test_survival.py: trains, kills the training at random instants, resumes each time, and says what the kills hit.

    python killing.py FOLDER KILLS OPTIONS...

The child processes are forked from one that has imported everything, which saves seconds for each of them.
"""
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401 - the parts that a run imports late
from tqdm import tqdm

import sppo

folder, kills, options = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
last = int(options[options.index("--steps") + 1])


def start():
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # or all children share one, and who is killed while it prints holds it for ever
        sys.argv = ["sppo.py", *options, "--output", str(folder), "--resume"]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            sppo.train(sppo.TrainConfig.parse(""), sppo.SPPO)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def alive(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def partial():
    """When the checkpoints that are being written, or were when their run was killed, were changed last."""
    with contextlib.suppress(FileNotFoundError):  # one that has just got its name
        return [path.stat().st_ctime for path in folder.glob("checkpoints/partial-*")]
    return []


def saved():
    """The last step that has a checkpoint."""
    return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=0)


def caught_saving(child, begun, delay):
    """Stops the child `delay` seconds after a save has begun. If the save had ended by then, the child goes on."""
    while alive(child) and not any(changed > begun for changed in partial()):
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGSTOP)
    if any(changed > begun for changed in partial()):
        return True
    os.kill(child, signal.SIGCONT)
    return False


rng = random.Random(int(os.environ.get("TEST_SEED", 0)))
report = {"kills": 0, "while saving": 0, "steps": []}
while report["kills"] < kills:
    begun, at_first, child = time.time(), saved(), start()
    most = last - 3 - (kills - report["kills"])  # steps are left for the other kills
    if report["kills"] % 3 == 0:  # every third in the midst of a save
        delay = rng.uniform(0, 0.02)
        while alive(child) and not caught_saving(child, begun, delay) and saved() < most:
            delay /= 2  # a fast disk
        until_first_save = time.time() - begun  # machines differ, and so do their minutes
    else:  # at any time of the start, or of the steps after one more save or two
        saves = rng.choice((0, 1, 2))
        while alive(child) and saved() < min(at_first + saves, most):
            time.sleep(0.002)
        until = time.time() + rng.uniform(0, 0.2 if saves else 1) * until_first_save
        while time.time() < until and saved() < most:
            time.sleep(0.002)
    if not alive(child):
        sys.exit(f"the run ended by itself: {report}")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    report["kills"] += 1
    report["while saving"] += any(changed > begun for changed in partial())
    report["steps"].append(saved())
code = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
print(json.dumps(report))
sys.exit(code)
