"""What each GPU will hold during training, computed without one.

    python -m tools.plan deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --gpus 4
    python -m tools.plan MODEL --critic-model SMALLER --gpus 8 --algorithm sppo
    python -m tools.plan MODEL --time       seconds instead, with options of its own: tools/plan_time.py

There are no formulas for training here. The code that trains runs as it is, on "fake" tensors, which have a
shape but no memory, in a "fake" process group, whose other ranks do not exist. What is counted is the bytes
that its tensors would hold. So the plan follows every change of the code. What vLLM takes is arithmetic.

Not seen are the inside of kernels, CUDA's context, NCCL's buffers, and memory that the allocator cannot use.
RESERVED is set aside for them. With --oversample the critic reads prompts while vLLM is awake, which no
phase here shows.
"""
import contextlib
import functools
import os
import sys
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

import critic
import machine
import policy
import ppo
import sharded
from cli import CommandLine, InputError, clear_errors, option, say
from engines import Response
from rollout import Batch
from sppo import TrainConfig, policy_step
from tools import plan_time
from tools.live_bytes import LiveBytes
from tools.shapes import engine_needs, shape_of

GIB = 2**30
RESERVED = 4.0  # GiB: a guess, which has not been compared with a GPU yet


@dataclass
class PlanConfig(CommandLine):
    model: str = option("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "the policy: a folder or a hub name")
    critic_model: str | None = option(None, "model that the critic starts from [the policy's]")
    algorithm: Literal["sppo", "ppo", "grpo"] = option(
        "sppo", "a critic that reads prompts; one that reads whole responses; or none (also spo)")
    gpus: int = option(4, "ranks, over which all weights are sharded", positive=True)
    gpu_memory: float = option(79.0, "GiB of a GPU; one of 80 GB has 79", positive=True)
    micro_batch_tokens: int = option(TrainConfig.micro_batch_tokens, "as in training", positive=True)
    max_prompt_tokens: int = option(TrainConfig.max_prompt_tokens, "as in training", positive=True)
    max_response_tokens: int = option(TrainConfig.max_response_tokens, "as in training", positive=True)
    vllm_memory: float = option(0.5, "as in training", positive=True)
    tensor_parallel: int = option(TrainConfig.tensor_parallel, "as in training", positive=True)
    replicas: int = option(TrainConfig.replicas, "as in training", positive=True)
    checkpoint_activations: bool = option(TrainConfig.checkpoint_activations, "as in training")
    trust_remote_code: bool = option(False, "as in training")

    def check(self):
        super().check()
        for name, size in (("--replicas", self.replicas), ("--tensor-parallel", self.tensor_parallel)):
            if self.gpus % size:
                raise InputError(f"{name} {size} does not divide --gpus {self.gpus}")


# ---- counting ---------------------------------------------------------------------------------------------

@dataclass
class Count:
    """Bytes of one model on one GPU. `infer` and `update`: (all that is there for a time, the gathered layers
    among it); for `update` without the gradients."""
    weights: int
    gradients: int
    optimizer: int
    infer: tuple[int, int]
    update: tuple[int, int]


def real_mesh(*arguments, **named):
    """init_device_mesh, which computes with the numbers of the ranks: they must not be fake."""
    with _disable_current_modes():
        return init_device_mesh(*arguments, **named)


def count(kind, shape, tokens, device=torch.device("cpu"), fake=True, **options):  # noqa: B008
    """Counts what a model of the config `shape` holds on one rank of the process group.

    kind: "policy", or a critic that reads "prompts" or "responses". Micro-batches are one row of `tokens`
    tokens; each rank gets two, so that the second meets the gradients of the first. options: as
    ShardedModel's. With fake=False the steps are really taken.
    """
    rows = 2 * dist.get_world_size()
    response = Response([0] * (tokens - 1), [0.0] * (tokens - 1), True)
    batch = Batch([None] * rows, [[0]] * rows, [response] * rows, torch.ones(rows))
    batch.old_logprobs, values = batch.rollout_logprobs, torch.zeros(batch.mask.shape)
    options = dict(lr=1e-6, micro_batch_tokens=tokens, **options)

    def structure(auto, *_):
        return getattr(machine.transformers(), auto).from_config(
            shape, attn_implementation="causal", dtype=torch.bfloat16)

    with contextlib.ExitStack() as stack:
        for module, name, value in ((policy, "load", structure), (critic, "load", structure),
                                    (sharded, "init_device_mesh", real_mesh),
                                    (critic, "load_tokenizer", lambda *_: None)):
            stack.enter_context(patch.object(module, name, value))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        memory = stack.enter_context(LiveBytes())
        if kind == "policy":
            model = policy.Policy(None, device, temperature=0.6, **options)
            infer = functools.partial(model.logprobs, batch.sequences)
            update = functools.partial(policy_step, model, batch, range(rows), batch.rewards, TrainConfig())
        elif kind == "prompts":
            model = critic.PromptCritic(None, device, minibatch=rows, **options)
            prompts = [[0] * tokens] * rows
            infer = functools.partial(model.logits, prompts)
            update = functools.partial(model.update, prompts, batch.rewards)
        else:
            model = ppo.TokenCritic(None, device, kind="mse", clip=0.2, minibatch=rows, **options)
            infer = functools.partial(model.values, batch.sequences)
            update = functools.partial(model.update, batch, values, values)
        weights = sum(4 * p.to_local().numel() for p in model.module.parameters())
        inferring, (most, gathered) = memory.during(infer), memory.during(update)
        return Count(weights, weights, 2 * weights, inferring, (most - weights, gathered))


# ---- the plan ---------------------------------------------------------------------------------------------

SETTINGS = "", "--offload", "--offload-between"
COLUMNS = "weights", "gradients", "optimizer", "gathered", "activations", "other model", "vLLM"


def phases(of_policy, of_critic, setting, engine, sleeps=True):
    """{phase: bytes by column} on one GPU, from the Counts of policy and critic (None: there is none).

    engine: the bytes that vLLM takes while it is awake; if it never `sleeps`, in every phase.
    """
    models = [model for model in (of_policy, of_critic) if model]
    plan = {"rollout": dict.fromkeys(COLUMNS, 0)}
    if not setting:
        plan["rollout"].update(weights=sum(m.weights for m in models),
                               optimizer=sum(m.optimizer for m in models))
    for name, model, updates in (("log-probs", of_policy, False), ("update policy", of_policy, True),
                                 ("update critic", of_critic, True)):
        if model:
            most, gathered = model.update if updates else model.infer
            plan[name] = {**dict.fromkeys(COLUMNS, 0), "gathered": gathered, "activations": most - gathered}
            if setting != "--offload":
                plan[name]["weights"] = model.weights
            if setting != "--offload" and updates:
                plan[name].update(gradients=model.gradients, optimizer=model.optimizer)
            if not setting:
                plan[name]["optimizer"] = model.optimizer
                plan[name]["other model"] = sum(m.weights + m.optimizer for m in models if m is not model)
    for name, held in plan.items():
        held["vLLM"] = engine if name == "rollout" or not sleeps else 0
    return plan


def peak(plan):
    """The bytes of the phase that holds the most."""
    return max(sum(held.values()) for held in plan.values())


def largest_budget(plans, capacity):
    """The most tokens in a micro-batch, rounded down to 256, with which no phase holds more than `capacity`
    bytes; 0 if there are none. plans: {tokens: plan} at two numbers of tokens, in which memory is linear."""
    (few, low), (many, high) = sorted(plans.items())
    limits = []
    for name in low.keys() - {"rollout"}:
        a, b = sum(low[name].values()), sum(high[name].values())
        limits.append(few + (capacity - a) * (many - few) / (b - a))
    return max(0, int(min(limits)) // 256 * 256)


def fake_world(gpus):
    """Makes this process one rank of `gpus` that do not exist, without a GPU even where there is one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    sharded.mesh_of_ranks.cache_clear()  # meshes of the world before, if this process was in one


# ---- what is printed --------------------------------------------------------------------------------------

def report(c):
    """Prints the plan of a PlanConfig."""
    c.check()
    critic_model = None if c.algorithm == "grpo" else c.critic_model or c.model
    shapes = {"policy": shape_of(c.model, c.trust_remote_code)}
    if critic_model:
        reads = "prompts" if c.algorithm == "sppo" else "responses"
        shapes[reads] = shape_of(critic_model, c.trust_remote_code)
    fake_world(c.gpus)
    row = c.max_prompt_tokens + c.max_response_tokens
    tokens = max(c.micro_batch_tokens, row)  # a row longer than the budget is a micro-batch of its own
    options = dict(replicas=c.replicas, checkpoint_activations=c.checkpoint_activations)
    counts = {n: [count(kind, shape, n, **options) for kind, shape in shapes.items()] + [None]
              for n in (tokens // 2, tokens)}
    of_policy, of_critic = counts[tokens][:2]

    def parameters(model):
        return model.weights / 4 * c.gpus / c.replicas

    engine = c.vllm_memory * c.gpu_memory * GIB
    weights, per_token = engine_needs(shapes["policy"], parameters(of_policy), c.tensor_parallel)
    cache = max(0, int((engine - weights) / per_token))
    theirs = f"critic {critic_model}, {parameters(of_critic) / 1e9:.2f}B" if of_critic else "no critic"
    say(f"{c.algorithm}: policy {c.model}, {parameters(of_policy) / 1e9:.2f}B parameters; {theirs}; "
        f"{c.gpus} GPUs of {c.gpu_memory:g} GiB, {RESERVED:g} of them set aside.\n"
        f"GiB a GPU, with micro-batches of {tokens:,} tokens; vLLM has {engine / GIB:.1f}: weights "
        f"{weights / GIB:.1f}, and a cache of at most {cache:,} tokens.\n")
    for setting in SETTINGS:
        say(f"{setting or 'as it is':<18}" + "".join(f"{column:>13}" for column in (*COLUMNS, "total")))
        for name, held in phases(of_policy, of_critic, setting, engine).items():
            say(f"  {name:<16}" + "".join(f"{b / GIB:>13.1f}" for b in (*held.values(), sum(held.values()))))
    say("\n| | peak, GiB | of the GPU | largest micro-batch, tokens | largest --vllm-memory |\n"
        "| --- | --- | --- | --- | --- |")
    capacity, whole = (c.gpu_memory - RESERVED) * GIB, c.gpu_memory * GIB
    for setting in SETTINGS:
        for sleeps in (True, False):
            plans = {n: phases(*two[:2], setting, engine, sleeps) for n, two in counts.items()}
            most, budget = peak(plans[tokens]), largest_budget(plans, capacity)
            # While vLLM is awake, this much is there beside it.
            beside = sum(plans[tokens]["rollout"].values()) if sleeps else most
            share = max(0, int(100 * (capacity - beside + engine) / whole) / 100)
            fits = f"{budget:,}" if budget >= row else "none holds the longest row"
            say(f"| {setting or 'as it is'}{'' if sleeps else ', vLLM never asleep'} | {most / GIB:.1f} | "
                f"{100 * most / whole:.0f} % | {fits} | {share:.2f} |")
    moved = moved_between(of_policy, of_critic)
    say(f"\n--offload-between moves {moved / GIB:.0f} GiB a step between each GPU and the host: "
        f"{moved / 2e10:.0f} s at 20 GB/s, as an H200 read memory that is not pinned.")


def moved_between(of_policy, of_critic):
    """Bytes that --offload-between moves in a step of several mini-batches. Each model comes and goes twice:
    to compute without gradient, and with Adam's moments to learn. The policy's weights also go to vLLM."""
    there_and_back = sum(4 * m.weights + 2 * m.optimizer for m in (of_policy, of_critic) if m)
    return there_and_back + of_policy.weights


def main(arguments=None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--model")  # the model may stand first, without its option's name
    with clear_errors():
        if "--time" in arguments:
            arguments.remove("--time")
            plan_time.report(plan_time.TimeConfig.parse(plan_time.__doc__, arguments))
        else:
            report(PlanConfig.parse(__doc__, arguments))


if __name__ == "__main__":
    main()
