import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for more
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make or ship what they need


def run(*arguments, ranks=0, timeout=600):
    """Runs a command as a user would: `python ...`, or `torchrun --nproc-per-node ranks ...`."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=timeout)


def environment():
    """A user's: without this process's own place in its world of one. With one thread, as models this small are faster."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    others = {name: value for name, value in os.environ.items() if name not in ours}
    return {**others, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def complaint(main, arguments, capsys):
    """The one sentence with which `main(arguments)` refuses them, called in this process, which saves seconds."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    return error


def metrics(folder):
    """What a run wrote: a dictionary a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session", autouse=True)
def world_of_one():
    """Tests that call the parts directly need the process group that a run would have."""
    from policy import init_distributed
    yield init_distributed()
    import torch.distributed as dist
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def device(world_of_one):
    return world_of_one
