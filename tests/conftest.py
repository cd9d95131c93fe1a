import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
THREADS = os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")  # models this small only wait for more
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or every process that a test starts compiles sympy anew
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or idle threads of one test keep the cores from another
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make or ship what they need
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or each vLLM compiles, for seconds, a line that counts logits


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([  # what cannot be imported is passed over
    "eval", "grpo", "ppo", "spo", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2", "vllm.entrypoints.llm", "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker", "vllm.v1.core.sched.scheduler",
    "vllm.v1.attention.backends.cpu_attn", "vllm.model_executor.models.qwen2", "tests.frozen"])


@contextlib.contextmanager
def started(*arguments, ranks=0):
    """Starts `python ARGUMENTS` as a user would, on `ranks` processes as torchrun would place them if it is not 0. They
    are forked from one that has imported everything: imports are most of a short run. Yields the processes and the files
    of what they print, (stdout, stderr); what still runs afterwards is killed."""
    arguments, places = [str(argument) for argument in arguments], [{}]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        processes = [forks.Process(target=become, args=(arguments, environment() | place, [str(file) for file in files]))
                     for place in places]
        for process in processes:
            process.start()
        try:
            yield processes, files
        finally:
            for process in processes:
                process.kill()
                process.join()


def run(*arguments, ranks=0, timeout=600):
    """The same, and waits for it: what it printed, and its exit code."""
    with started(*arguments, ranks=ranks) as (processes, files):
        until = time.monotonic() + timeout
        while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(arguments, timeout)
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], 1)
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return types.SimpleNamespace(args=arguments, returncode=code, **{file.name: file.read_text() for file in files})


def wait_for(pattern, file, process, timeout=600):
    """Waits until `pattern` is found in `file`, into which `process` writes."""
    until = time.monotonic() + timeout
    while not re.search(pattern, file.read_text(), re.M):
        assert process.is_alive() and time.monotonic() < until, file.with_name("stderr").read_text()
        time.sleep(0.02)


def torchrun(*arguments, ranks, timeout=600):
    """The same through torchrun itself, whose processes import everything anew."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def become(arguments, variables, outputs):
    from tqdm import tqdm
    tqdm.set_lock(threading.RLock())  # or all forks share one, and who is killed while it prints would hold it for ever
    os.setsid()
    for number, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


def environment():
    """A user's: without this process's own place in its world of one. With one thread, as models this small are faster."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    others = {name: value for name, value in os.environ.items() if name not in ours}
    return {**others, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS}


def complaint(main, arguments, capsys):
    """The one sentence with which `main(arguments)` refuses them, called in this process, which saves seconds."""
    from cli import clear_errors
    with pytest.raises(SystemExit) as end, clear_errors():
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    return error


def some_problems(file, count):
    """Writes the first `count` problems of the built-in task into a file, each once. Returns the file."""
    rows = dict.fromkeys((ROOT / "builtin/chain.jsonl").read_text().splitlines())
    file.write_text("\n".join([*rows][:count]))
    return file


def metrics(folder):
    """What a run wrote: a dictionary a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def seeds():
    """Each test draws the same numbers every time, on its own or after others; with TEST_SEED=1 it draws others."""
    import torch
    seed = int(os.environ.get("TEST_SEED", 0))
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def world_of_one():
    """Tests that call the parts directly need the process group that a run would have."""
    from machine import init_distributed
    yield init_distributed()
    import torch.distributed as dist
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def device(world_of_one):
    return world_of_one
