"""How many seconds each phase of a step takes, computed without a GPU: shapes and lengths over rates.

    python -m tools.plan deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --time
    python -m tools.plan --time --check-run runs/sppo     this machine's rates, and that run beside the plan

Each number can be checked by hand. P is the parameters that every token is multiplied with.

    decoding   A step writes one token of every running response. Its products read the weights (2 P bytes)
               and make 2 P operations a token: the slower counts. Then attention reads the cache of keys and
               values. A constant is added for what the host does.
    waiting    Responses start in order, while the cache has room. When it is full, the last one gives way,
               and what it had is read again later. The longest responses decide how many steps there are.
    logprobs   2 P operations a token, and 2 x layers x width x length^2 for the attention of a response.
    update     4 times that: forward, backward (twice as much), and the forward again, to save memory.
    critic     Both, over prompts (SPPO) or over whole responses (PPO).
    sharding   Each micro-batch gathers the weights; that of an update does so twice, and sums the gradients.
    sync       The weights travel to all cards, and are copied once.

Left out are verification, evaluation and checkpoints. No phase overlaps with another. All prompts
have the same length, since they are short: those of DAPO-17k have 100 tokens. Responses to one prompt do not
share its keys and values. The model is dense: of a mixture of experts, all would be counted.
"""
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from cli import CommandLine, InputError, option, say
from data import load_problems, load_tokenizer, render
from engines import make_engine
from machine import init_distributed
from policy import Policy
from sharded import micro_batches
from sppo import TrainConfig
from tools.bench import now, products_rate
from tools.shapes import engine_needs, shape_of

GIB = 2**30


@dataclass
class TimeConfig(CommandLine):
    model: str = option("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "the policy: a folder or a hub name")
    critic_model: str | None = option(None, "model that the critic starts from [the policy's]")
    check_run: str | None = option(None, "the folder of a run on this machine, to compare the plan with")
    gpus: int = option(4, "cards, each with an engine and a share of the weights", positive=True)
    prompts_per_step: int = option(512, "as in training", positive=True)
    minibatch: int = option(32, "as in training", positive=True)
    group_size: int = option(8, "GRPO's responses per prompt", positive=True)
    prompt_tokens: int = option(100, "of each prompt", positive=True)
    max_response_tokens: int = option(8192, "where responses are cut", positive=True)
    median: float = option(4000, "tokens of a response, log-normal before the cut: assumed", positive=True)
    sigma: float = option(0.8, "standard deviation of the logarithm of its tokens: assumed", positive=True)
    micro_batch_tokens: int = option(TrainConfig.micro_batch_tokens, "as in training", positive=True)
    checkpoint_activations: bool = option(TrainConfig.checkpoint_activations, "as in training")
    offload_between: bool = option(False, "as in training")
    gpu_memory: float = option(79.0, "GiB of a card", positive=True)
    vllm_memory: float = option(0.35, "vLLM's share of it", positive=True)
    max_num_seqs: int = option(512, "responses that vLLM runs at once", positive=True)
    products: float = option(445, "TFLOP/s that products reach: 45 % of an H100's 989", positive=True)
    bandwidth: float = option(2.35, "TB/s that memory reaches: 70 % of an H100's 3.35", positive=True)
    link: float = option(360, "GB/s between cards: 80 % of NVLink's 450", positive=True)
    host: float = option(20, "GB/s between card and host memory, as an H200 made it", positive=True)
    step_ms: float = option(2, "ms of a decode step besides: assumed")


@dataclass
class Size:
    """What a model costs."""
    parameters: int  # all
    layers: int  # those that every token is multiplied with, but for the output layer's
    head: int  # the output layer's: only responses need it
    attention: int  # operations of a forward over a sequence, for each unit of its squared length
    cache: float  # bytes of a token's keys and values
    width: int = 2  # bytes of a number while it computes


def size_of(shape, width=2):
    """The Size of a dense model with the Hugging Face config `shape`."""
    with torch.device("meta"):  # tensors with a shape, and no memory
        lm = AutoModelForCausalLM.from_config(shape)
    parameters, head = lm.num_parameters(), lm.get_output_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in lm.modules() if isinstance(m, torch.nn.Linear))
    per_head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    # Scores, and the sums over values: 2 operations each for all pairs of tokens, of which causal is half.
    attention = 2 * shape.num_hidden_layers * shape.num_attention_heads * per_head
    cache = engine_needs(shape, parameters, 1)[1] * width / 2
    return Size(parameters, linear - head, head, attention, cache, width)


# ---- the phases --------------------------------------------------------------------------------------------

def response_lengths(count, median, sigma, limit):
    """`count` log-normal lengths, cut at `limit`, always in the same order. They are not drawn: each stands
    for one of `count` equal parts of the distribution, so that its tail is the same for every count."""
    normal = statistics.NormalDist(math.log(median), sigma)
    lengths = np.exp([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    return np.random.default_rng(0).permutation(lengths.round().clip(1, limit).astype(int))


def decode(lengths, prompt, size, rates, room, places):
    """(seconds, decode steps) in which one engine writes responses of `lengths` [B] tokens.

    prompt: tokens of each prompt. room: tokens of the cache. places: responses that may run at once.
    """
    if prompt + lengths.max() > room:
        raise InputError(f"--vllm-memory: leaves room for {max(0, room):,} tokens, and the longest response "
                         f"and its prompt have {prompt + lengths.max():,}; give vLLM more")
    weights, seconds, steps = size.layers + size.head, 0.0, 0
    written, cached = np.zeros_like(lengths), np.zeros(len(lengths), bool)
    while (left := lengths - written).any():
        held = np.where(left > 0, prompt + written, 0)
        running = (left > 0) & (held.cumsum() <= room) & ((left > 0).cumsum() <= places)
        tokens, n = held[running].sum(), running.sum()
        # The same responses run for k steps: until one ends, or the cache is full.
        k = min(left[running].min(), (room - tokens) // n + 1)
        read = held[running & ~cached].sum()  # prompts, and what those that gave way had written
        products = max(size.width * weights / rates.bandwidth, 2 * weights * n / rates.products)
        attention = size.cache * (k * tokens + n * k * (k - 1) / 2) / rates.bandwidth
        seconds += 2 * size.layers * read / rates.products + k * (products + rates.step) + attention
        written[running] += k
        cached, steps = running, steps + k
    return seconds, int(steps)


def padded(tokens, minibatch, gpus, budget):
    """(tokens of each row with its padding, number of micro-batches) on the card that gets the longest rows,
    when sequences of `tokens` [B] are cut into mini-batches: by the function that training uses."""
    widths, count = [], 0
    for start in range(0, len(tokens), minibatch):
        rows = sorted(tokens[start : start + minibatch], reverse=True)[::gpus]
        parts = micro_batches(rows, budget)
        widths += [rows[part[0]] for part in parts for _ in part]
        count += len(parts)
    return np.array(widths, float), count


def operations(size, tokens, scored, passes, head_passes):
    """Of `passes` forwards over sequences of `tokens` [B], `scored` of which meet the output layer."""
    layers = 2 * size.layers * tokens.sum() + size.attention * (tokens**2).sum()
    return passes * layers + head_passes * 2 * size.head * scored


def phases(c, rates, policy, critic, reads, lengths, room):
    """({phase: seconds}, decode steps) of a step that samples responses of `lengths` [B] tokens.

    policy, critic: Sizes. reads: what the critic reads, "prompts" or "responses"; None without one. The
    process group must be of one process.
    """
    prompts, whole = np.full(c.prompts_per_step, c.prompt_tokens), c.prompt_tokens + lengths
    updates = math.ceil(c.prompts_per_step / c.minibatch)

    def travel(size, micro, number_bytes):
        return micro * number_bytes * size.parameters * (c.gpus - 1) / c.gpus / rates.link

    def infer(size, tokens, scored=0):
        tokens, micro = padded(tokens, len(tokens), c.gpus, c.micro_batch_tokens)
        return operations(size, tokens, scored / c.gpus, 1, 1) / rates.training + travel(size, micro, 2)

    def train(size, tokens, scored=0):
        tokens, micro = padded(tokens, math.ceil(len(tokens) / updates), c.gpus, c.micro_batch_tokens)
        # The output layer is always computed again in the backward, other layers where that saves memory.
        work = operations(size, tokens, scored / c.gpus, 3 + c.checkpoint_activations, 4) / rates.training
        # AdamW reads a weight, its gradient and two moments, and writes three of them: 7 numbers of 4 bytes.
        adam = updates * 28 * size.parameters / c.gpus / rates.bandwidth
        return work + travel(size, micro, 2 * 2 + 4) + adam

    engines = [decode(lengths[i :: c.gpus], c.prompt_tokens, policy, rates, room, c.max_num_seqs)
               for i in range(c.gpus)]
    read = whole if reads == "responses" else prompts
    plan = {"rollout": max(engines)[0],
            "logprobs": infer(policy, whole, lengths.sum()) if updates > 1 else 0.0,
            "update": train(policy, whole, lengths.sum()),
            "critic": infer(critic, read) + train(critic, read) if reads else 0.0,
            "sync": travel(policy, 1, 2) + 2 * 2 * policy.parameters / rates.bandwidth}
    if c.offload_between:  # there and back: weights (4 bytes) to infer, all (12) to train. Weights for sync
        moved = 2 * (4 + 12) * (policy.parameters + critic.parameters * bool(reads)) + 4 * policy.parameters
        plan["moves"] = moved / c.gpus / rates.host
    return plan, max(steps for _, steps in engines)


# ---- the papers' step --------------------------------------------------------------------------------------

def report(c):
    """Prints the plan of a TimeConfig."""
    c.check()
    if c.check_run:
        return check_run(c.check_run)
    if not dist.is_initialized():
        init_distributed()  # a world of one, for `micro_batches`
    policy, critic = (size_of(shape_of(model)) for model in (c.model, c.critic_model or c.model))
    rates = SimpleNamespace(products=c.products * 1e12, training=c.products * 1e12, link=c.link * 1e9,
                            bandwidth=c.bandwidth * 1e12, host=c.host * 1e9, step=c.step_ms / 1e3)
    room = int((c.vllm_memory * c.gpu_memory * GIB - 2 * policy.parameters) / policy.cache)
    kinds = {"SPPO": ("prompts", 1), "GRPO": (None, c.group_size), "PPO": ("responses", 1)}

    def row(name, values):
        say(f"| {name} | {' | '.join(values)} |")

    def plan(c):
        plans, totals = {}, {}
        for name, (reads, samples) in kinds.items():
            lengths = response_lengths(c.prompts_per_step * samples, c.median, c.sigma, c.max_response_tokens)
            plans[name] = phases(c, rates, policy, critic, reads, lengths, room)
            totals[name] = sum(plans[name][0].values())
        cut = f"{100 * (lengths == c.max_response_tokens).mean():.0f} %"
        return plans, totals, (f"{c.median:,.0f}", f"{c.sigma}", f"{lengths.mean():,.0f}", cut)
    plans, totals, (median, sigma, mean, cut) = plan(c)
    say(f"{c.model}, {policy.parameters / 1e9:.2f}B parameters; critic {critic.parameters / 1e9:.2f}B; "
        f"{c.gpus} cards; {c.prompts_per_step} prompts a step, mini-batch {c.minibatch}; GRPO {c.group_size} "
        f"each.\nResponses: median {median}, sigma {sigma}, mean {mean} tokens, {cut} cut at "
        f"{c.max_response_tokens:,}. The cache of an engine holds {room:,} tokens.\n")
    row("seconds", kinds)
    row("---", ["---"] * 3)
    for phase in plans["SPPO"][0]:
        row(phase, [f"{plan[phase]:,.1f}" for plan, _ in plans.values()])
    row("step", [f"{total:,.0f}" for total in totals.values()])
    row("of SPPO's step", [f"{total / totals['SPPO']:.2f}" for total in totals.values()])
    row("decode steps", [f"{steps:,}" for _, steps in plans.values()])
    say("\nSeconds of a step with responses of other lengths:\n")
    row("median", ["sigma", "mean", "cut", *kinds, "GRPO / SPPO"])
    row("---", ["---"] * 7)
    for median in (2000, 4000, 8000):
        for sigma in (0.5, 0.8, 1.1):
            _, totals, (name, *values) = plan(replace(c, median=median, sigma=sigma))
            values += [f"{total:,.0f}" for total in totals.values()]
            row(name, [*values, f"{totals['GRPO'] / totals['SPPO']:.2f}"])


# ---- this machine's steps ----------------------------------------------------------------------------------

def lengths_like(count, mean, longest, cut):
    """`count` log-normal lengths with this mean, whose last one, or a share `cut` of which, is `longest`."""
    z, low, high = statistics.NormalDist().inv_cdf(1 - max(cut, 0.5 / count)), 0.0, 5.0
    for _ in range(40):  # the larger sigma, the smaller the mean of lengths that have the same longest one
        sigma = (low + high) / 2
        lengths = response_lengths(count, longest / math.exp(sigma * z), sigma or 1e-9, longest)
        low, high = (sigma, high) if lengths.mean() > mean else (low, sigma)
    return lengths


def measure(run, size, device, prompts):
    """This machine's rates: of the model's products alone, of a forward and backward of the policy over
    `prompts`, of reading memory; and what a decode step that writes one response takes besides reading
    weights, in seconds. Returns (rates, the engine): to close it ends the process group."""
    def seconds(function, rounds):
        function()  # warms up
        begun = now(device)
        for _ in range(rounds):
            function()
        return (now(device) - begun) / rounds

    policy = Policy(run.model, device, temperature=1.0, lr=0.0, dtype=run.dtype,
                    checkpoint_activations=run.checkpoint_activations)
    tokens = np.array([2.0 * len(prompt) for prompt in prompts])
    work = operations(size, tokens, tokens.sum() / 2, 3 + run.checkpoint_activations, 4)

    def train():
        logprobs, _ = policy.forward([(prompt, prompt) for prompt in prompts])
        policy.backward(logprobs.sum(), {})
    training = work / seconds(train, 2)
    products = products_rate(policy.module.lm, int(tokens.sum()), device, getattr(torch, run.dtype))
    numbers = torch.ones(2**27, device=device)  # 512 MiB: more than caches hold
    bandwidth = 2**29 / seconds(numbers.sum, 5)
    engine = make_engine(run, run.model, load_tokenizer(run.model), device, len(prompts[0]) + 64)
    engine.stop = []
    step = seconds(lambda: list(engine.generate([prompts[0]], temperature=1.0, max_tokens=64)), 2) / 64
    rates = SimpleNamespace(products=products, training=training, bandwidth=bandwidth, link=math.inf,
                            step=max(0.0, step - size.width * (size.layers + size.head) / bandwidth))
    return rates, engine


def check_run(folder):
    """Prints the phases of a run's mean step after the first, as planned with this machine's rates and as
    measured. The run was one of sppo.py, grpo.py or ppo.py on one process."""
    try:
        run = SimpleNamespace(**json.loads((Path(folder) / "config.json").read_text()))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: holds no run ({error}); give the --output of sppo.py") from None
    lines = [line for line in lines if line["step"] > 1]  # the first step allocates, and fills caches
    if not lines:
        raise InputError(f"{folder}: has no step after the first; train for two steps or more")
    device, tokenizer = init_distributed(), load_tokenizer(run.model)
    size = size_of(shape_of(run.model), 4 if run.dtype == "float32" else 2)
    prompts = [render(p.messages, tokenizer) for p in load_problems(run.dataset)[:256]]
    samples = getattr(run, "group_size", 1)
    reads = None if samples > 1 else "responses" if hasattr(run, "value_loss") else "prompts"
    c = TimeConfig(gpus=1, prompt_tokens=round(statistics.mean(map(len, prompts))), **{
        name: getattr(run, name) for name in ("prompts_per_step", "minibatch", "micro_batch_tokens",
                                              "checkpoint_activations")})
    rates, engine = measure(run, size, device, prompts[:8])
    say(f"Products alone {rates.products / 1e9:,.1f} GFLOP/s, forward and backward "
        f"{rates.training / 1e9:,.1f}; memory {rates.bandwidth / 1e9:.1f} GB/s; a decode step "
        f"{1e3 * rates.step:.1f} ms besides.\n\n"
        "| phase | planned, s | measured, s | planned / measured |\n| --- | --- | --- | --- |")
    plans = []
    for line in lines:
        lengths = lengths_like(c.prompts_per_step * samples, line["response_tokens"], line["rollout/longest"],
                               line["truncated"])
        plans.append(phases(c, rates, size, size, reads, lengths, 10**9)[0])
        plans[-1]["update"] *= 1 - line.get("group/all_equal", 0)  # groups without gradient are left out
    for phase in plans[0]:
        planned = statistics.mean(plan[phase] for plan in plans)
        measured = statistics.mean(line[f"time/{phase}"] for line in lines)
        say(f"| {phase} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |")
    engine.close()
