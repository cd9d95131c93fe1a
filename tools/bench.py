"""Where the seconds of a step go, and how that compares.

    python -m tools.bench step --model M        one training step by phase, with sppo.py's options
    python -m tools.bench step --shape NAME     the same with random weights of a published shape: no download
    python -m tools.bench generate --model M    sampling through rollout.py beside plain vllm.LLM.generate
    python -m tools.bench sync --model M        handing new weights to the engine beside copying as many bytes
    python -m tools.bench stragglers            --oversample beside waiting for all responses
    python -m tools.bench trl --model M         grpo.py and sppo.py beside TRL's GRPOTrainer (pip install trl)

Machines are noisy. What is compared takes turns on the same machine, and the ratio is what counts.
`stragglers` and `trl` are in tools/bench_runs.py.
"""
import importlib.util
import json
import math
import random
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import sppo
from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, option, say
from data import check_model, load_problems, load_tokenizer, render
from engines import VLLMEngine, stop_tokens
from machine import compute_dtype, init_distributed
from policy import Policy
from reward import Verifier
from rollout import sample_and_verify
from sharded import micro_batches
from tools.bench_runs import need, stragglers, trl
from tools.shapes import SHAPES, shape_of

# ---- measuring ---------------------------------------------------------------------------------------------


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


def matmul_rate(device, dtype, seconds=1.0, sizes=None):
    """Operations per second of large square products [n, n] @ [n, n]: the median of the fastest size."""
    best = 0.0
    for n in sizes or ((1024, 2048) if device.type == "cpu" else (4096, 8192)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates, start = [], time.time()
        while len(rates) < 3 or time.time() - start < seconds:
            begun = now(device)
            a @ b
            rates.append(2 * n**3 / (now(device) - begun))
        best = max(best, statistics.median(rates[1:]))
    return best


def products_rate(lm, tokens, device, dtype):
    """Operations per second of the three products that training makes of each weight [out, in] and `tokens`
    states: forward, gradient of the input, gradient of the weight. No update of this model can be faster."""
    shapes = [tuple(m.weight.shape) for m in lm.modules() if isinstance(m, torch.nn.Linear)]
    seconds = {}
    for out, into in set(shapes):
        sizes = (tokens, into), (tokens, out), (out, into)
        x, g, w = (torch.randn(*size, device=device).to(dtype) for size in sizes)
        times = []
        for _ in range(3):
            begun = now(device)
            _ = x @ w.T, g @ w, g.T @ x
            times.append(now(device) - begun)
        seconds[out, into] = min(times)
    return sum(6 * tokens * out * into for out, into in shapes) / sum(seconds[shape] for shape in shapes)


# ---- one step by phase -------------------------------------------------------------------------------------

@dataclass
class StepConfig(sppo.TrainConfig):
    shape: str | None = option(None, f"random weights of one of {', '.join(SHAPES)}", group="bench step")
    response_lengths: str | None = option(None, "N, or MEDIAN:SIGMA (log-normal): tokens of each response")

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
        self.tokens = []  # of each step: all tokens, the same with padding, tokens of responses
        self.memory = []  # after each step
        self.rates = []  # of matrix products, before each step: a shared machine changes its speed
        self.dtype, start_step = getattr(torch, run.config.dtype), run.clock.start_step

        def measured_start():
            if run.config.response_lengths and not self.rates:  # before the first step
                set_lengths(run.engine, run.config.response_lengths, run.config.seed)
            self.measure_rate()
            start_step()
        run.clock.start_step = measured_start

    def measure_rate(self):
        self.rates.append(matmul_rate(self.run.device, self.dtype))

    def advantages(self, batch):
        lengths, c = [len(p) + len(r) for p, r in batch.sequences], self.run.config
        padded = torch.tensor(0)
        for start in range(0, len(lengths), c.minibatch):
            part = lengths[start : start + c.minibatch]
            padded += sum(len(rows) * max(part[row] for row in rows)
                          for rows in micro_batches(part, c.micro_batch_tokens) if rows)
        dist.all_reduce(padded)  # each rank counted its own rows
        self.tokens.append((sum(lengths), int(padded), int(batch.lengths.sum())))
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
    """Trains for a few steps with sppo.py's loop, and prints where the time went. Returns `report_step`'s."""
    arguments = ["--output", "runs/bench-step", "--eval-every", "0", "--save-every", "0", "--steps", "3",
                 *arguments]
    config = StepConfig.parse(__doc__, arguments)
    if config.shape in SHAPES:  # parsed again, for the defaults of a real model and not of the built-in one
        folder = f"{config.output}/random-weights"
        config = StepConfig.parse(__doc__, ["--model", folder, "--dataset", "chain", *arguments])
        random_model(config.shape, config.model)
    baselines = []

    def make_baseline(run):
        baselines.append(MeasuredSPPO(run))
        return baselines[0]
    sppo.train(config, make_baseline)
    baselines[0].measure_rate()
    return report_step(config, baselines[0])


def report_step(config, measured):
    """Prints the phases of the mean step, and the update's speed beside that of matrix products.
    Returns (seconds by phase, GiB held after each step, GiB at most)."""
    policy, device = measured.run.policy, measured.run.device
    text = (Path(config.output) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()][1:]
    lm = policy.module.lm
    tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    in_products = policy.size - (0 if tied else lm.get_input_embeddings().weight.numel())
    most_tokens = min(config.micro_batch_tokens, measured.tokens[-1][0])
    products = products_rate(lm, most_tokens, device, measured.dtype)
    warm = slice(1 if len(lines) > 1 else 0, None)  # the first step allocates, compiles and fills caches
    lines, rates = lines[warm], measured.rates[warm]
    rate = statistics.mean(rates)
    tokens, padded, generated = map(statistics.mean, zip(*measured.tokens[warm], strict=True))
    names = ("rollout", "reward", "logprobs", "update", "critic", "sync", "step")
    seconds = {name: statistics.mean(m.get(f"time/{name}", 0.0) for m in lines) for name in names}
    say(f"\n{config.shape or config.model}, {policy.size / 1e6:,.1f}M parameters, {config.dtype}; "
        f"{config.prompts_per_step} prompts a step, {tokens:,.0f} tokens with {generated:,.0f} of responses; "
        f"mean of {len(lines)} steps after the first\n")
    for name in names[:-1]:
        say(f"  {name:<10} {seconds[name]:>8.2f} s  {100 * seconds[name] / seconds['step']:>5.1f} %")
    say(f"  {'step':<10} {seconds['step']:>8.2f} s\n")
    main_four = sum(seconds[name] for name in ("rollout", "logprobs", "update", "critic"))
    say("  neither generation, log-probabilities, update nor critic: "
        f"{100 * (1 - main_four / seconds['step']):.1f} % of the step")
    say(f"  rollout {generated / seconds['rollout']:,.0f} tokens/s; "
        f"update {tokens / seconds['update']:,.0f} tokens/s")
    speed = 6 * in_products * tokens / seconds["update"]  # 6: forward and backward make 2 + 4 operations
    say(f"  update {speed / 1e12:.3f} TFLOP/s (6 x parameters x tokens), matrix products alone "
        f"{rate / 1e12:.3f} ({', '.join(f'{r / 1e12:.3f}' for r in rates)} before, between and after): "
        f"{100 * speed / rate:.0f} %")
    say(f"  the products of this model's own shapes, and nothing else, make {products / 1e12:.3f}: "
        f"{100 * products / rate:.0f} %")
    say(f"  padding {100 * (1 - tokens / padded):.1f} % of the update's tokens")
    held = measured.memory
    say(f"  memory: peak {memory(device, peak=True):.1f} GiB; {held[0]:.2f} after step 1, "
        f"{held[len(held) // 2]:.2f} halfway, {held[-1]:.2f} after step {len(held)}")
    return seconds, held, memory(device, peak=True)


# ---- parts beside what they are made of --------------------------------------------------------------------

@dataclass
class PartConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "a Hugging Face name or folder")
    dataset: str = option("chain", "where prompts come from")
    prompts: int = option(64, "prompts", positive=True)
    tokens: int = option(128, "new tokens per prompt", positive=True)
    rounds: int = option(5, "turns of each", positive=True)
    dtype: str = option("auto", "compute type, as sppo.py's")

    def check(self):
        super().check()
        need("vllm")


def start_part(arguments):
    """(config, device, problems, their prompts as token ids, a vLLM engine) for `generate` and `sync`."""
    c = PartConfig.parse(__doc__, arguments)
    c.check()
    tokenizer, problems = load_tokenizer(c.model), load_problems(c.dataset)[: c.prompts]
    prompts = [render(p.messages, tokenizer) for p in problems]
    max_tokens = max(map(len, prompts)) + c.tokens
    check_model(c.model, max_tokens, options="--tokens")
    device = init_distributed()
    c.dtype = compute_dtype(c.dtype, device)
    engine = VLLMEngine(c.model, device, stop=stop_tokens(c.model, tokenizer), dtype=c.dtype,
                        max_tokens=max_tokens)
    return c, device, problems, prompts, engine


def generate(arguments):
    """Prints and returns the tokens a second of plain vLLM, and of rollout.py with verification, in turns."""
    c, device, problems, prompts, engine = start_part(arguments)
    tokenizer, verifier = load_tokenizer(c.model), Verifier(2, 1.0)
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


def sync(arguments):
    """Prints the time of handing the weights to the engine, and that of copying as many bytes, in turns."""
    c, device, *_, engine = start_part(arguments)
    policy = Policy(c.model, device, temperature=1.0, lr=1e-6, dtype=c.dtype)
    times = {"sync": [], "gather": [], "copy": []}
    for _ in range(c.rounds + 1):
        begun = now(device)
        engine.sync(policy.weights())
        times["sync"].append(now(device) - begun)
        begun = now(device)
        weights = [tensor for _, tensor in policy.weights()]
        times["gather"].append(now(device) - begun)
        into = [torch.empty_like(tensor) for tensor in weights]
        for _ in range(2):  # the second counts: memory is taken when it is first written
            begun = now(device)
            for a, b in zip(into, weights, strict=True):
                a.copy_(b)
            copied = now(device) - begun
        times["copy"].append(copied)
    size = sum(t.numel() * t.element_size() for t in weights)
    ms = {name: 1000 * statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    say(f"{size / 1e6:,.0f} MB of weights: sync {ms['sync']:.0f} ms, of which cast and gather "
        f"{ms['gather']:.0f} ms; copying as many bytes {ms['copy']:.0f} ms; ratio "
        f"{ms['sync'] / ms['copy']:.1f}")
    engine.close()


COMMANDS = {"step": step, "generate": generate, "sync": sync, "stragglers": stragglers, "trl": trl}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        sys.exit(__doc__)
    with clear_errors():
        COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main()
