"""Where the seconds of a step go, and how that compares.

    python bench.py step --model M            one training step by phase, with sppo.py's options: real lengths, real loop
    python bench.py step --shape NAME         the same on random weights of a published shape: nothing is downloaded
    python bench.py generate --model M        sampling through rollout.py beside plain vllm.LLM.generate
    python bench.py sync --model M            handing the engine new weights beside copying their bytes
    python bench.py stragglers                --oversample beside waiting for all, where lengths have a long tail
    python bench.py trl --model M             grpo.py and sppo.py beside TRL's GRPOTrainer (pip install trl)

Machines are noisy: what is compared runs side by side, in turns, and the ratio is what counts.
"""
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
from typing import Literal

import sppo
from cli import CommandLine, clear_errors, option, say

# isort: split
import torch
import torch.distributed as dist

from data import BUILTIN_MODEL, InputError, load_problems, load_tokenizer, render
from plan import SHAPES, shape_of
from policy import init_distributed, micro_batches
from race import metrics_of
from reward import Verifier
from rollout import make_engine, sample_and_verify, stop_tokens

ROOT = Path(__file__).resolve().parent


def matmul_rate(device, dtype, seconds=1.0):
    """Operations per second of large square products [n, n] @ [n, n]: the median of the fastest size."""
    best = 0.0
    for n in (2048, 3072, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates, start = [], time.time()
        while len(rates) < 3 or time.time() - start < seconds:
            begun = now(device)
            a @ b
            rates.append(2 * n**3 / (now(device) - begun))
        best = max(best, statistics.median(rates[1:]))
    return best


def products_rate(lm, tokens, device, dtype):
    """Operations per second of the three products that training makes of each weight [out, in] and `tokens` states:
    forward, gradient of the input, gradient of the weight. No update of this model can be faster."""
    shapes = [tuple(m.weight.shape) for m in lm.modules() if isinstance(m, torch.nn.Linear)]
    seconds = {}
    for out, into in set(shapes):
        x, g, w = (torch.randn(*size, device=device).to(dtype) for size in ((tokens, into), (tokens, out), (out, into)))
        times = []
        for _ in range(3):
            begun = now(device)
            _ = x @ w.T, g @ w, g.T @ x
            times.append(now(device) - begun)
        seconds[out, into] = min(times)
    return sum(6 * tokens * out * into for out, into in shapes) / sum(seconds[shape] for shape in shapes)


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device, peak=False):
    """GiB that the GPU's tensors hold, or this process; with `peak`, that they have held at most."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    return int(re.search(rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def random_model(shape, folder):
    """A Hugging Face folder with random weights of a published shape, and the built-in tokenizer."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape_of(shape))
    model.bfloat16().save_pretrained(folder)
    load_tokenizer(BUILTIN_MODEL).save_pretrained(folder)


# ---- one step by phase ----------------------------------------------------------------------------------------------

@dataclass
class StepConfig(sppo.Config):
    shape: str | None = option(None, f"random weights of one of {', '.join(SHAPES)}")
    response_lengths: str | None = option(None, "N, or MEDIAN:SIGMA (log-normal): lengths to which all is sampled")

    def check(self):
        if self.shape and self.shape not in SHAPES:
            raise InputError(f"--shape {self.shape}: is none of {', '.join(SHAPES)}")
        if self.response_lengths and self.oversample:
            raise InputError("--response-lengths and --oversample: what is gone on with would be given another length; choose")
        super().check()


class Measured(sppo.SPPO):
    """SPPO, which also notes what the phases had to do. With --response-lengths, the engine keeps to them."""

    def __init__(self, run):
        super().__init__(run)
        self.seen, self.held, c = [], [], run.config  # per step: tokens, with padding, of responses; and memory after it
        self.rates, start_step = [], run.clock.start_step

        def measured_start():  # before every step, since a shared machine is not equally fast for long
            self.rates.append(matmul_rate(run.device, getattr(torch, c.dtype)))
            start_step()
        run.clock.start_step = measured_start
        if c.response_lengths:
            median, _, sigma = c.response_lengths.partition(":")
            rng, generate, run.engine.stop = random.Random(c.seed), run.engine.generate, []

            def with_lengths(prompts, max_tokens, **options):
                lengths = [round(min(max_tokens, max(1, rng.lognormvariate(math.log(float(median)), float(sigma or 0)))))
                           for _ in prompts]
                return generate(prompts, max_tokens=lengths, **options)
            run.engine.generate = with_lengths

    def advantages(self, batch):
        lengths = [len(p) + len(r) for p, r in batch.sequences]
        size, c = self.run.config.minibatch, self.run.config
        padded = sum(len(rows) * max(lengths[i : i + size][row] for row in rows) for i in range(0, len(lengths), size)
                     for rows in micro_batches(lengths[i : i + size], c.micro_batch_tokens) if rows)
        padded = torch.tensor(padded)
        dist.all_reduce(padded)  # each rank counted its own rows
        self.seen.append((sum(lengths), int(padded), int(batch.lengths.sum())))
        return super().advantages(batch)

    def update(self, batch):
        metrics = super().update(batch)
        self.held.append(memory(self.run.device))
        return metrics


def step(arguments):
    arguments = ["--output", "runs/bench-step", "--eval-every", "0", "--save-every", "0", "--steps", "3", *arguments]
    config = StepConfig.parse(__doc__, arguments)
    shutil.rmtree(config.output, ignore_errors=True)
    if config.shape in SHAPES:  # with the defaults of a real model, not of the built-in one
        config = StepConfig.parse(__doc__, ["--model", f"{config.output}/random-weights", "--dataset", "chain", *arguments])
        random_model(config.shape, config.model)
    dtype = getattr(torch, config.dtype)
    it = None

    def make(run):
        nonlocal it
        it = Measured(run)
        return it
    sppo.train(config, make)
    run = it.run
    it.rates.append(matmul_rate(run.device, dtype))
    lm = run.policy.module.lm
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    size = run.policy.size - (0 if tied else lm.get_input_embeddings().weight.numel())
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()][1:]
    products = products_rate(lm, min(config.micro_batch_tokens, int(it.seen[-1][0])), run.device, dtype)
    warm = slice(1, None) if len(lines) > 1 else slice(None)  # the first step allocates, compiles and warms caches
    lines, seen, rates = lines[warm], it.seen[warm], it.rates[warm]
    rate = statistics.mean(rates)
    tokens, padded, generated = (statistics.mean(column) for column in zip(*seen, strict=True))

    def seconds(phase):
        return statistics.mean(m.get(f"time/{phase}", 0.0) for m in lines)
    whole, update = seconds("step"), seconds("update")
    say(f"\n{config.shape or config.model}, {run.policy.size / 1e6:,.1f}M parameters, {config.dtype}; "
        f"{config.prompts_per_step} prompts a step, {tokens:,.0f} tokens with {generated:,.0f} of responses; "
        f"mean of {len(lines)} steps after the first\n")
    for phase in ("rollout", "reward", "logprobs", "update", "critic", "sync"):
        say(f"  {phase:<10} {seconds(phase):>8.2f} s  {100 * seconds(phase) / whole:>5.1f} %")
    main_four = sum(seconds(phase) for phase in ("rollout", "logprobs", "update", "critic"))
    say(f"  {'step':<10} {whole:>8.2f} s\n")
    say(f"  neither generation, log-probabilities, update nor critic: {100 * (1 - main_four / whole):.1f} % of the step")
    say(f"  rollout {generated / seconds('rollout'):,.0f} tokens/s; update {tokens / update:,.0f} tokens/s")
    say(f"  update {6 * size * tokens / update / 1e12:.3f} TFLOP/s (6 x parameters x tokens), matrix products alone "
        f"{rate / 1e12:.3f} ({', '.join(f'{r / 1e12:.3f}' for r in rates)} before, between and after): "
        f"{100 * 6 * size * tokens / update / rate:.0f} %")
    say(f"  the products of this model's own shapes, and nothing else, make {products / 1e12:.3f}: "
        f"{100 * products / rate:.0f} %")
    say(f"  padding {100 * (1 - tokens / padded):.1f} % of the update's tokens")
    say(f"  memory: peak {memory(run.device, peak=True):.1f} GiB; {it.held[0]:.2f} after step 1, "
        f"{it.held[len(it.held) // 2]:.2f} halfway, {it.held[-1]:.2f} after step {len(it.held)}")


# ---- parts beside what they are made of -----------------------------------------------------------------------------

@dataclass
class PartConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "a Hugging Face name or folder")
    dataset: str = option("chain", "where prompts come from")
    prompts: int = option(64, "prompts")
    tokens: int = option(128, "new tokens per prompt")
    rounds: int = option(5, "turns of each")
    dtype: str = option("bfloat16", "compute type")
    BUILTIN = {}


def start(c):
    device, tokenizer = init_distributed(), load_tokenizer(c.model)
    problems = load_problems(c.dataset)[: c.prompts]
    engine = make_engine("vllm", c.model, device, stop=stop_tokens(c.model, tokenizer), max_tokens=1024 + c.tokens,
                         dtype=c.dtype)
    return device, tokenizer, problems, [render(p.messages, tokenizer) for p in problems], engine


def generate(arguments):
    c = PartConfig.parse(__doc__, arguments)
    device, tokenizer, problems, prompts, engine = start(c)
    verifier, spent = Verifier(2, 1.0), {"LLM.generate": [], "rollout.py, verified": []}
    params = engine.SamplingParams(temperature=1.0, max_tokens=c.tokens, stop_token_ids=engine.stop, ignore_eos=True,
                                   logprobs=0, flat_logprobs=True, detokenize=False)
    for turn in range(c.rounds + 1):
        for name, times in spent.items():
            begun = now(device)
            if name == "LLM.generate":
                count = sum(len(o.outputs[0].token_ids) for o in engine.llm.generate(
                    [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False))
            else:
                done = list(sample_and_verify(engine, verifier, tokenizer, prompts, [p.answer for p in problems],
                                              temperature=1.0, max_tokens=c.tokens))
                _ = [reward.result() for *_, reward in done]
                count = sum(len(r.ids) for _, r, _, _ in done)
            if turn:  # the first warms up
                times.append(count / (now(device) - begun))
    rates = {name: statistics.median(times) for name, times in spent.items()}
    for name, rate in rates.items():
        say(f"{name:<22} {rate:>10,.0f} tokens/s  (turns: {' '.join(f'{r:,.0f}' for r in spent[name])})")
    say(f"ratio {rates['rollout.py, verified'] / rates['LLM.generate']:.3f}")
    verifier.close()
    engine.close()


def sync(arguments):
    from policy import Policy
    c = PartConfig.parse(__doc__, arguments)
    device, *_, engine = start(c)
    policy = Policy(c.model, device, temperature=1.0, lr=1e-6, dtype=c.dtype)
    times = {"sync": [], "copy": [], "cast": []}
    for _ in range(c.rounds + 1):
        begun = now(device)
        engine.sync(policy.weights())
        times["sync"].append(now(device) - begun)
        begun = now(device)
        weights = [tensor for _, tensor in policy.weights()]
        times["cast"].append(now(device) - begun)
        into = [torch.empty_like(tensor) for tensor in weights]
        for a, b in zip(into, weights, strict=True):
            a.copy_(b)
        begun = now(device)
        for a, b in zip(into, weights, strict=True):
            a.copy_(b)
        times["copy"].append(now(device) - begun)
    size = sum(t.numel() * t.element_size() for t in weights)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    say(f"{size / 1e6:,.0f} MB of weights: sync {1000 * medians['sync']:.0f} ms, of which cast and gather "
        f"{1000 * medians['cast']:.0f} ms; copying as many bytes {1000 * medians['copy']:.0f} ms; "
        f"ratio {medians['sync'] / medians['copy']:.1f}")
    engine.close()


# ---- stragglers -----------------------------------------------------------------------------------------------------

@dataclass
class StragglerConfig(CommandLine):
    output: str = option("runs/bench-stragglers", "folder of the runs")
    seeds: int = option(3, "runs of each")
    steps: int = option(40, "training steps of each run")
    prompts: int = option(64, "prompts a step")
    oversample: float = option(1.5, "as sppo.py's --oversample")
    max_staleness: tuple[int, ...] = option((16, 4), "as sppo.py's; each is tried")
    ranks: int = option(2, "processes, each with one thread and an engine of its own")
    engine: Literal["vllm", "transformers"] = option("vllm", "what samples")
    lr: float = option(1.5e-4, "learning rate; with 0 nothing is learned, and lengths stay what they are")
    BUILTIN = {}


def stragglers(arguments):
    c = StragglerConfig.parse(__doc__, arguments)
    model = Path(c.output) / "model"
    if not (model / "model.safetensors").exists():
        say(f"Making a model whose lengths have a long tail, in {model}")
        sys.path.insert(0, str(ROOT / "builtin"))
        from make import make_rambling
        make_rambling(model, median=16, sigma=1.4, most=1000)  # a reasoning model's lengths, on a task that can be learned
    settings = {"waiting": [], **{f"at most {age} steps old": ["--oversample", c.oversample, "--max-staleness", age]
                                  for age in c.max_staleness}}
    runs = {name: [] for name in settings}
    for seed in range(c.seeds):
        for name, options in settings.items():  # in turns
            lines = metrics_of(Path(c.output) / f"{c.engine}-{name.replace(' ', '-')}-lr{c.lr:g}-{seed}", [
                "sppo.py", "--model", model, "--engine", c.engine, "--temperature", 1, "--max-prompt-tokens", 64,
                "--max-response-tokens", 1050, "--dtype", "float32", "--no-checkpoint-activations", "--lr", c.lr,
                "--critic-lr", 1e-3, "--warmup-steps", 0, "--clip-high", 0.28, "--save-every", 0, "--eval-every", c.steps,
                "--prompts-per-step", c.prompts, "--minibatch", c.prompts // 2, "--steps", c.steps,
                "--old-logprobs", "rollout", "--seed", seed, *options], ranks=c.ranks)
            runs[name].append(lines)
            say(f"  seed {seed}  {name:<24} {lines[-1]['seconds']:6.1f} s  accuracy {lines[0]['eval_accuracy']:.3f} -> "
                f"{lines[-1]['eval_accuracy']:.3f}")
    say(f"\n{c.steps} steps of {c.prompts} responses, {c.seeds} seeds: mean [lowest, highest]\n")
    say(f"{'':<22}{'responses/s':>20}{'sampling, s a step':>20}{'decodings a step':>20}{'places idle':>19}{'accuracy':>22}"
        f"{'tokens trained on':>20}")
    means = {}
    for name, all_lines in runs.items():
        columns = [  # where a rank waits for the others, it is in time/reward
            [c.steps * c.prompts / lines[-1]["seconds"] for lines in all_lines],
            [statistics.mean(m["time/rollout"] + m["time/reward"] for m in lines[1:]) for lines in all_lines],
            [statistics.mean(m["rollout/longest"] for m in lines[1:]) for lines in all_lines],
            [statistics.mean(m["rollout/idle"] for m in lines[1:]) for lines in all_lines],
            [lines[-1]["eval_accuracy"] for lines in all_lines],
            [statistics.mean(m["response_tokens"] for m in lines[1:]) for lines in all_lines]]
        means[name] = [statistics.mean(x) for x in columns]
        say(f"{name:<22}" + "".join(f"{f'{statistics.mean(x):.{d}f} [{min(x):.{d}f}, {max(x):.{d}f}]':>{w}}" for x, w, d in
                                    zip(columns, (20, 20, 20, 19, 22, 20), (1, 2, 0, 2, 3, 1), strict=True)))
    for name, values in list(means.items())[1:]:
        say(f"\n{name}: {values[0] / means['waiting'][0]:.2f} x the responses trained on per second, in 1 / "
            f"{means['waiting'][2] / values[2]:.1f} of the decodings")


# ---- beside TRL -----------------------------------------------------------------------------------------------------

@dataclass
class TrlConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "a chat model: a Hugging Face name or folder")
    dataset: str = option("chain", "a dataset whose answers are numbers")
    output: str = option("runs/bench-trl", "folder of the runs")
    prompts: int = option(8, "prompts a step, of grpo.py and TRL; sppo.py has as many as these have samples")
    group_size: int = option(8, "samples per prompt")
    tokens: int = option(64, "new tokens at most")
    lr: float = option(1e-5, "learning rate")
    steps: int = option(3, "steps of grpo.py, before TRL and after it")
    trl_steps: int = option(6, "steps of TRL")
    sppo_steps: int = option(20, "steps of sppo.py")
    threads: int = option(os.cpu_count(), "threads of each")
    BUILTIN = {}


def trl_run(c):
    """[(seconds, mean reward)] of each step of TRL's GRPOTrainer, as its users run it without a GPU."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward import verify
    torch.set_num_threads(c.threads)
    steps, begun = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begun.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            steps.append(time.perf_counter() - begun[-1])

    def reward(completions, answer, **_):
        scores = [verify(completion[0]["content"], gold, "any") for completion, gold in zip(completions, answer, strict=True)]
        rewards.append(statistics.mean(scores))
        return scores
    rewards = []
    trainer = GRPOTrainer(
        model=c.model, reward_funcs=reward, callbacks=[Watch()],
        train_dataset=Dataset.from_list([{"prompt": list(p.messages), "answer": p.answer} for p in load_problems(c.dataset)]),
        args=GRPOConfig(
            output_dir=f"{c.output}/trl", per_device_train_batch_size=c.prompts * c.group_size, num_generations=c.group_size,
            max_completion_length=c.tokens, learning_rate=c.lr, lr_scheduler_type="constant", beta=0.0, temperature=1.0,
            max_steps=c.trl_steps, bf16=True, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True))
    trainer.train()
    return list(zip(steps, rewards, strict=True))


def trl(arguments):
    c = TrlConfig.parse(__doc__, arguments)

    def ours(script, name, *options):
        shutil.rmtree(Path(c.output) / name, ignore_errors=True)  # side by side in time, or it is no comparison
        lines = metrics_of(Path(c.output) / name, [
            script, "--model", c.model, "--dataset", c.dataset, "--answer", "any", "--temperature", 1, "--lr", c.lr,
            "--max-prompt-tokens", 256, "--max-response-tokens", c.tokens, "--no-checkpoint-activations", "--compile",
            "--warmup-steps", 0, "--save-every", 0, "--eval-every", 0, *options], threads=c.threads)
        return [(m["time/step"], m["reward"]) for m in lines if m["step"]]

    group = ["--prompts-per-step", c.prompts, "--minibatch", c.prompts, "--group-size", c.group_size, "--steps", c.steps]
    samples = c.prompts * c.group_size
    say(f"{c.model}: {samples} samples a step, at most {c.tokens} tokens, bfloat16, {c.threads} threads; seconds a step are "
        "median and range after the first\n")

    def ran(name, steps):
        """Says at once what is known of a run, as the next may take long. Returns its seconds a step."""
        times, spent, by_minute = [seconds for seconds, _ in steps], 0.0, {}
        for seconds, reward in steps:
            spent += seconds
            by_minute.setdefault(int(spent // 60), []).append(reward)
        median = statistics.median(times[1:])
        say(f"{name:<18} {median:>7.1f} s a step [{min(times[1:]):.1f}, {max(times[1:]):.1f}]; "
            f"{sum(times):.0f} s in all; mean reward by minute  "
            + "  ".join(f"{minute}: {statistics.mean(r):.2f}" for minute, r in by_minute.items()))
        return median

    before = ran("grpo.py", ours("grpo.py", "grpo-1", *group))
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, whose gigabytes end with it
        theirs = ran("TRL GRPOTrainer", pool.apply(trl_run, (c,)))
    after = ran("grpo.py again", ours("grpo.py", "grpo-2", *group))
    ran(f"sppo.py, {samples} x 1", ours("sppo.py", "sppo", "--prompts-per-step", samples, "--minibatch", samples,
                                        "--steps", c.sppo_steps, "--critic-lr", 2 * c.lr))
    say(f"\none step of TRL takes {theirs / ((before + after) / 2):.2f} x the time of one of grpo.py")


BENCHMARKS = {"step": step, "generate": generate, "sync": sync, "stragglers": stragglers, "trl": trl}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        sys.exit(__doc__)
    with clear_errors():
        BENCHMARKS[sys.argv[1]](sys.argv[2:])
