"""Where the seconds of a step go, and how that compares.

    python -m tools.bench step --model M        one training step by phase, with sppo.py's options
    python -m tools.bench step --shape NAME     the same with random weights of a published shape: no download
    python -m tools.bench generate --model M    sampling through rollout.py beside plain vllm.LLM.generate
    python -m tools.bench trl --model M         grpo.py beside TRL's GRPOTrainer (pip install trl)

Machines are noisy. What is compared takes turns on the same machine, and the ratio is what counts.
"""
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import sppo
from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from data import load_problems, render
from engines import VLLMEngine, stop_tokens
from machine import check_model, compute_dtype, init_distributed, load_tokenizer
from reward import Verifier, verify
from rollout import sample_and_verify
from tools.plan import SHAPES, shape_of
from tools.race import GROUP, metrics_of


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()  # kernels run behind the host's back
    return time.perf_counter()


def memory(device, peak=False):
    """GiB that the tensors on a GPU hold, or this process without one; with `peak`, held at most."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    line = rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+)"
    return int(re.search(line, Path("/proc/self/status").read_text())[1]) / 2**20


def matmul_rate(device, dtype):
    """Operations per second of large square products [n, n] @ [n, n]: the median of ten."""
    n, rates = 2048 if device.type == "cpu" else 8192, []
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(11):
        begun = now(device)
        a @ b
        rates.append(2 * n**3 / (now(device) - begun))
    return statistics.median(rates[1:])


# ---- one step by phase -------------------------------------------------------------------------------------

@dataclass
class StepConfig(sppo.TrainConfig):
    shape: str | None = option(None, f"random weights of one of {', '.join(SHAPES)}", group="bench step")
    response_lengths: str | None = option(None, "N, or MEDIAN:SIGMA (log-normal): tokens of each response")
    hold_to: float = option(0.0, "GiB that torch may take of the GPU, as if it were a smaller one (0: all)")

    def check(self):
        if self.shape and self.shape not in SHAPES:
            raise InputError(f"--shape {self.shape}: is none of {', '.join(SHAPES)}")
        if self.response_lengths and self.oversample:
            raise InputError("--response-lengths and --oversample: a response that is continued would get "
                             "another length; choose")
        if self.response_lengths and (self.engine == "transformers" or not importlib.util.find_spec("vllm")):
            raise InputError("--response-lengths needs vLLM: transformers writes a batch to one length")
        super().check()


class MeasuredSPPO(sppo.SPPO):
    """SPPO that also notes what the phases had to do. With --response-lengths, the engine keeps to them."""

    def __init__(self, run):
        super().__init__(run)
        self.tokens = []  # of prompts and responses, in each step
        self.memory = []  # after each step

    def next_problems(self, first, count):
        c = self.run.config
        if first == 0 and c.response_lengths:  # the engine is made after the baseline
            set_lengths(self.run.engine, c.response_lengths, c.seed)
        if first == 0 and c.hold_to and self.run.device.type == "cuda":
            hold_to(c.hold_to)
        return super().next_problems(first, count)

    def advantages(self, batch):
        self.tokens.append((sum(map(len, batch.prompts)), int(batch.lengths.sum())))
        return super().advantages(batch)

    def update(self, batch):
        metrics = super().update(batch)
        self.memory.append(memory(self.run.device))
        return metrics


def set_lengths(engine, lengths, seed):
    """Makes the engine write responses of these lengths: it stops at no token, and each has its limit."""
    median, _, sigma = lengths.partition(":")
    rng, generate, engine.stop = random.Random(seed), engine.generate, []

    def with_lengths(prompts, max_tokens, **options):
        drawn = [rng.lognormvariate(math.log(float(median)), float(sigma or 0)) for _ in prompts]
        return generate(prompts, max_tokens=[round(min(max_tokens, max(1, n))) for n in drawn], **options)
    engine.generate = with_lengths


def hold_to(gib):
    """Lets torch take so much of the GPU, as if it were a smaller one. For torch, vLLM's memory is taken even
    while vLLM sleeps and has given it back, so it comes on top."""
    from vllm.device_allocator.cumem import CuMemAllocator
    taken = gib * 2**30 + CuMemAllocator.get_instance().get_current_usage()
    torch.cuda.set_per_process_memory_fraction(min(1.0, taken / torch.cuda.mem_get_info()[1]))


def random_model(shape, folder):
    """Writes a Hugging Face folder with random weights of a published shape, and the built-in tokenizer."""
    from transformers import AutoModelForCausalLM
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape_of(shape))
    model.bfloat16().save_pretrained(folder)
    load_tokenizer(BUILTIN_MODEL).save_pretrained(folder)


def step(arguments):
    """Trains for a few steps with sppo.py's loop, and prints where the time of the mean step went.
    Returns (seconds by phase, GiB held after each step, GiB at most)."""
    arguments = ["--output", "runs/bench-step", "--eval-every", "0", "--save-every", "0", "--steps", "3",
                 *arguments]
    c = StepConfig.parse(__doc__, arguments)
    if c.shape in SHAPES:  # parsed again, for the defaults of a real model and not of the built-in one
        folder = f"{c.output}/random-weights"
        c = StepConfig.parse(__doc__, ["--model", folder, "--dataset", "chain", *arguments])
        random_model(c.shape, c.model)
    baselines = []
    shutil.rmtree(Path(c.output, "model"), ignore_errors=True)  # of an earlier measurement
    Path(c.output, "metrics.jsonl").unlink(missing_ok=True)
    sppo.train(c, lambda run: baselines.append(MeasuredSPPO(run)) or baselines[0])
    measured, policy, device = baselines[0], baselines[0].run.policy, baselines[0].run.device
    lines = [json.loads(text) for text in (Path(c.output) / "metrics.jsonl").read_text().splitlines()][1:]
    warm = slice(1 if len(lines) > 1 else 0, None)  # the first step allocates, compiles and fills caches
    read, written = map(statistics.mean, zip(*measured.tokens[warm], strict=True))
    names = ("rollout", "reward", "logprobs", "update", "critic", "sync", "step")
    seconds = {name: statistics.mean(m.get(f"time/{name}", 0.0) for m in lines[warm]) for name in names}
    say(f"\n{c.shape or c.model}, {policy.size / 1e6:,.1f}M parameters, {c.dtype}; {c.prompts_per_step} "
        f"prompts per step, {read:,.0f} tokens of prompts, {written:,.0f} of responses; mean of "
        f"{len(lines[warm])} steps after the first\n")
    for name in names:
        say(f"  {name:<10} {seconds[name]:>8.2f} s  {100 * seconds[name] / seconds['step']:>5.1f} %")
    lm = policy.module.lm
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    in_products = policy.size - (0 if tied else lm.get_input_embeddings().weight.numel())
    # Forward and backward make 2 + 4 operations with each weight and token.
    speed = 6 * in_products * (read + written) / seconds["update"]
    rate = matmul_rate(device, getattr(torch, c.dtype))
    held, peak = measured.memory, memory(device, peak=True)
    say(f"\n  rollout {written / seconds['rollout']:,.0f} tokens/s; "
        f"update {(read + written) / seconds['update']:,.0f} tokens/s\n"
        f"  update {speed / 1e12:.3f} TFLOP/s (6 x parameters x tokens): {100 * speed / rate:.0f} % of the "
        f"{rate / 1e12:.3f} of large matrix products\n"
        f"  memory: peak {peak:.1f} GiB; {held[0]:.2f} after step 1, {held[-1]:.2f} after step {len(held)}")
    return seconds, held, peak


# ---- sampling beside plain vLLM ----------------------------------------------------------------------------

@dataclass
class GenerateConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "a Hugging Face name or folder")
    dataset: str = option("chain", "where prompts come from")
    prompts: int = option(64, "prompts", positive=True)
    tokens: int = option(128, "new tokens per prompt", positive=True)
    rounds: int = option(5, "turns of each", positive=True)
    dtype: str = option("auto", "compute type, as sppo.py's")


def need(package):
    if not importlib.util.find_spec(package):
        raise InputError(f"this benchmark needs {package}: `pip install {package}`")


def generate(arguments):
    """Prints and returns the tokens a second of plain vLLM, and of rollout.py with verification, in turns."""
    c = GenerateConfig.parse(__doc__, arguments)
    c.check()
    need("vllm")
    tokenizer, problems = load_tokenizer(c.model), load_problems(c.dataset)[: c.prompts]
    prompts = [render(p.messages, tokenizer) for p in problems]
    max_tokens = max(map(len, prompts)) + c.tokens
    check_model(c.model, max_tokens, options="--tokens")
    device, verifier = init_distributed(), Verifier(2, 1.0)
    engine = VLLMEngine(c.model, device, stop=stop_tokens(c.model, tokenizer),
                        dtype=compute_dtype(c.dtype, device), max_tokens=max_tokens)
    params = engine.SamplingParams(temperature=1.0, max_tokens=c.tokens, stop_token_ids=engine.stop,
                                   ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False)

    def plain():
        outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def verified():
        done = list(sample_and_verify(engine, verifier, tokenizer, prompts, [p.answer for p in problems],
                                      temperature=1.0, max_tokens=c.tokens))
        for *_, reward in done:
            reward.result()
        return sum(len(response.ids) for _, response, _, _ in done)
    rates = {plain: [], verified: []}
    for turn in range(c.rounds + 1):
        for sample, values in rates.items():
            begun = now(device)
            count = sample()
            if turn:  # the first warms up
                values.append(count / (now(device) - begun))
    for name, values in zip(("LLM.generate", "rollout.py, verified"), rates.values(), strict=True):
        say(f"{name:<22} {statistics.median(values):>10,.0f} tokens/s  (turns: "
            f"{' '.join(f'{value:,.0f}' for value in values)})")
    say(f"ratio {statistics.median(rates[verified]) / statistics.median(rates[plain]):.3f}")
    verifier.close()
    engine.close()
    return tuple(map(statistics.median, rates.values()))


# ---- beside TRL --------------------------------------------------------------------------------------------

@dataclass
class TRLConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "a chat model: a Hugging Face name or folder")
    dataset: str = option("chain", "a dataset whose answers are numbers")
    output: str = option("runs/bench-trl", "folder of the runs")
    prompts: int = option(8, "prompts per step", positive=True)
    tokens: int = option(64, "new tokens at most", positive=True)
    steps: int = option(5, "steps of grpo.py before TRL, of TRL, and of grpo.py after it", positive=True)
    threads: int = option(os.cpu_count(), "threads of each", positive=True)


def trl_run(c):
    """Seconds of each step of TRL's GRPOTrainer, as its users run it without a GPU."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    torch.set_num_threads(c.threads)
    starts, seconds = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            starts.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - starts[-1])

    def reward(completions, answer, **_):
        return [verify(completion[0]["content"], gold, "any")
                for completion, gold in zip(completions, answer, strict=True)]
    problems = [{"prompt": list(p.messages), "answer": p.answer} for p in load_problems(c.dataset)]
    trainer = GRPOTrainer(
        model=c.model, reward_funcs=reward, callbacks=[Watch()], train_dataset=Dataset.from_list(problems),
        args=GRPOConfig(
            output_dir=f"{c.output}/trl", per_device_train_batch_size=c.prompts * GROUP,
            num_generations=GROUP, max_completion_length=c.tokens, learning_rate=1e-5,
            lr_scheduler_type="constant", beta=0.0, temperature=1.0, max_steps=c.steps, bf16=True,
            use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True))
    trainer.train()
    return seconds


def trl(arguments):
    """Runs grpo.py, TRL and grpo.py again, and prints TRL's time for a step over grpo.py's."""
    c = TRLConfig.parse(__doc__, arguments)
    c.check()
    need("trl")

    def ours(name):
        folder = Path(c.output) / name
        shutil.rmtree(folder, ignore_errors=True)  # or it might be of a day when the machine was busier
        lines = metrics_of(folder, [
            "grpo.py", "--model", c.model, "--dataset", c.dataset, "--answer", "any", "--temperature", 1,
            "--lr", 1e-5, "--dtype", "bfloat16", "--max-prompt-tokens", 256,
            "--max-response-tokens", c.tokens, "--steps", c.steps,
            "--no-checkpoint-activations", "--save-every", 0, "--eval-every", 0,
            "--prompts-per-step", c.prompts, "--minibatch", c.prompts, "--group-size", GROUP],
            threads=c.threads)
        return [m["time/step"] for m in lines if m["step"]]

    def said(name, seconds):
        later = seconds[1:] or seconds
        say(f"{name:<18} {statistics.median(later):>7.1f} s a step [{min(later):.1f}, {max(later):.1f}]")
        return statistics.median(later)
    say(f"{c.model}: {c.prompts * GROUP} samples a step, at most {c.tokens} tokens, bfloat16, "
        f"{c.threads} threads; seconds a step are median and range after the first\n")
    before = said("grpo.py", ours("grpo-1"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory is free again at its end
        theirs = said("TRL GRPOTrainer", pool.apply(trl_run, (c,)))
    after = said("grpo.py again", ours("grpo-2"))
    say(f"\none step of TRL takes {theirs / ((before + after) / 2):.2f} x the time of one of grpo.py")


COMMANDS = {"step": step, "generate": generate, "trl": trl}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        sys.exit(__doc__)
    with clear_errors():
        COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main()
