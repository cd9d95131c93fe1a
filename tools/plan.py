"""What each GPU will hold, before there is one: python policy.py --plan MODEL --gpus 4

No formulas: the code that trains is run as it is, on `fake` tensors, which have a shape and no memory behind them, in a
`fake` process group, whose other ranks do not exist; and the bytes that its tensors would hold are counted. So the plan
follows whatever is changed in policy.py. What vLLM takes is arithmetic. Not seen: the inside of kernels, CUDA's context,
NCCL's buffers and what the allocator cannot use, for all of which RESERVED is set aside. With --oversample the critic reads
prompts while vLLM is awake, which is in no phase of the plan.
"""
import contextlib
import functools
import os
import weakref
from dataclasses import dataclass, fields
from typing import ClassVar, Literal
from unittest.mock import patch

from cli import CommandLine, clear_errors, option, say  # before torch: it quiets what loads after it

# isort: split
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AttentionInterface, AutoConfig, Qwen2Config, Qwen3Config

import critic
import policy
import ppo
import pretrained
from data import InputError
from rollout import Response
from run import Batch
from sppo import Config as Training
from sppo import policy_step

GIB = 2**30
RESERVED = 4.0  # GiB; a guess, to be corrected by what a run says after its first step
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, whether embedding and output are one
    "Qwen/Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True), "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151936, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, False)}


@dataclass
class Config(CommandLine):
    plan: str = option("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "the policy: a folder, a hub name, or a shape that is known")
    critic_model: str | None = option(None, "the critic (default: as the policy)")
    algorithm: Literal["sppo", "ppo", "grpo"] = option("sppo", "critic on prompts; on whole responses; or none (also spo)")
    gpus: int = option(4, "ranks that share all weights")
    gpu_memory: float = option(79.0, "GiB of a GPU; one of 80 GB has 79")
    micro_batch_tokens: int = option(Training.micro_batch_tokens, "as in training")
    max_prompt_tokens: int = option(Training.max_prompt_tokens, "as in training")
    max_response_tokens: int = option(Training.max_response_tokens, "as in training")
    vllm_memory: float = option(Training.vllm_memory, "as in training")
    tensor_parallel: int = option(Training.tensor_parallel, "as in training")
    replicas: int = option(Training.replicas, "as in training")
    checkpoint_activations: bool = option(Training.checkpoint_activations, "as in training")
    trust_remote_code: bool = option(False, "as in training")

    BUILTIN: ClassVar[dict] = {}

    def check(self):
        for field in fields(self):
            if field.type in (int, float) and not getattr(self, field.name) > 0:
                raise InputError(f"--{field.name.replace('_', '-')} {getattr(self, field.name)}: must be greater than 0")
        for name in ("replicas", "tensor_parallel"):
            if self.gpus % getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} does not divide --gpus {self.gpus}")


def shape_of(model, trust_remote_code=False):
    """The Hugging Face config of a model: a published shape of the table, a folder, or a hub name."""
    if model in SHAPES:
        hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[model]
        kind, more = (Qwen3Config, dict(head_dim=128)) if "Qwen3" in model else (Qwen2Config, {})
        return kind(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                    num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, dtype=torch.bfloat16,
                    max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **more)
    pretrained.check_found(model)
    return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()


# ---- counting -------------------------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes that tensors made within it hold at once. Not the process's memory, which depends on its allocator.
    `gathered`: those of them that FSDP gathers layers into."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.gathered = self.gathered_at_peak = 0
        self.sizes, self.of_fsdp, self.gathering = {}, set(), False

    def __enter__(self):
        resize, unshard, wait = torch.UntypedStorage.resize_, FSDPParamGroup.unshard, FSDPParamGroup.wait_for_unshard

        def resized(storage, size):  # so FSDP frees, and takes again, what it has gathered layers into
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._holds(storage._cdata, size)

        def noted(action):
            def gather(*arguments, **named):
                self.gathering = True
                action(*arguments, **named)
                self.gathering = False
            return gather
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        self.patches.enter_context(patch.multiple(FSDPParamGroup, unshard=noted(unshard), wait_for_unshard=noted(wait)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1  # a number that nobody has: a loss, a norm
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a DTensor, what this rank has
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = 0
                    if self.gathering:
                        self.of_fsdp.add(storage._cdata)
                    self._holds(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _holds(self, which, size):
        grown, self.sizes[which] = size - self.sizes[which], size
        self.live += grown
        self.gathered += grown * (which in self.of_fsdp)
        if self.live > self.peak:
            self.peak, self.gathered_at_peak = self.live, self.gathered

    def _freed(self, which):
        self._holds(which, 0)
        del self.sizes[which]
        self.of_fsdp.discard(which)

    def during(self, action):
        """(bytes at the peak of `action()` beyond those before it, gathered layers among them)"""
        before, self.peak = self.live, self.live
        action()
        return self.peak - before, self.gathered_at_peak


@dataclass
class Count:
    """Bytes of one model on one GPU. Of `infer` and `update`: (all that comes and goes, gathered layers among it); of
    `update` without the gradients."""
    weights: int
    gradients: int
    optimizer: int
    infer: tuple[int, int]
    update: tuple[int, int]


def mesh(*arguments, **named):
    """init_device_mesh, which computes with the ranks' numbers: they must not be fake."""
    with _disable_current_modes():
        return init_device_mesh(*arguments, **named)


def count(kind, shape, tokens, device=torch.device("cpu"), fake=True, **options):  # noqa: B008
    """Counts what a model of the config `shape` holds on one rank of the process group; `kind`: "policy", "prompts" or
    "responses", the critics that read these. Micro-batches are one row of `tokens` tokens, of which each rank gets two, so
    that one meets the other's gradients. `options`: as Trained's. With fake=False it is done, and not only as if."""
    rows = 2 * dist.get_world_size()
    batch = Batch([None] * rows, [[0]] * rows, [Response([0] * (tokens - 1), [0.0] * (tokens - 1), True)] * rows,
                  torch.ones(rows))
    batch.old_logprobs, values = batch.rollout_logprobs, torch.zeros(batch.mask.shape)
    options = dict(lr=1e-6, micro_batch_tokens=tokens, **options)

    def structure(auto, *_):
        return auto.from_config(shape, attn_implementation="causal", dtype=torch.bfloat16)

    with contextlib.ExitStack() as stack:
        for where, name, value in ((policy, "load", structure), (critic, "load", structure), (policy, "init_device_mesh", mesh),
                                   (critic, "load_tokenizer", lambda *_: None)):
            stack.enter_context(patch.object(where, name, value))
        # On a GPU it is always the fused one.
        stack.enter_context(patch.dict(AttentionInterface._global_mapping, causal=pretrained.fused_attention))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        memory = stack.enter_context(LiveBytes())
        if kind == "policy":
            model = policy.Policy(None, device, temperature=0.6, **options)
            infer = functools.partial(model.logprobs, batch.sequences)
            update = functools.partial(policy_step, model, batch, slice(0, rows), batch.rewards, Training())
        elif kind == "prompts":
            model = critic.PromptCritic(None, device, minibatch=rows, **options)
            prompts = [[0] * tokens] * rows
            infer, update = functools.partial(model.logits, prompts), functools.partial(model.update, prompts, batch.rewards)
        else:
            model = ppo.TokenCritic(None, device, kind="mse", clip=0.2, minibatch=rows, **options)
            infer = functools.partial(model.values, batch.sequences)
            update = functools.partial(model.update, batch, values, values)
        model.state_dict()  # makes Adam's moments
        weights = sum(4 * p.to_local().numel() for p in model.module.parameters())
        inferring, (most, gathered) = memory.during(infer), memory.during(update)
        return Count(weights, weights, 2 * weights, inferring, (most - weights, gathered))


# ---- the plan -------------------------------------------------------------------------------------------------------

SETTINGS = "", "--offload", "--offload-between"
COLUMNS = "weights", "gradients", "optimizer", "gathered", "activations", "other model", "vLLM"


def phases(ours, its, setting, engine, sleeps=True):
    """{phase: bytes by column} on one GPU; `ours` and `its`: the Counts of policy and critic (None: there is none);
    `engine`: what vLLM takes while it is awake, and if it never `sleeps`, always."""
    there = [model for model in (ours, its) if model]
    plan = {"rollout": dict.fromkeys(COLUMNS, 0)}
    if not setting:
        plan["rollout"].update(weights=sum(m.weights for m in there), optimizer=sum(m.optimizer for m in there))
    for name, model, updates in (("log-probs", ours, False), ("update policy", ours, True), ("update critic", its, True)):
        if model:
            most, gathered = model.update if updates else model.infer
            plan[name] = {**dict.fromkeys(COLUMNS, 0), "gathered": gathered, "activations": most - gathered}
            if setting != "--offload":
                plan[name]["weights"] = model.weights
            if setting != "--offload" and updates:
                plan[name].update(gradients=model.gradients, optimizer=model.optimizer)
            if not setting:
                plan[name]["optimizer"] = model.optimizer
                plan[name]["other model"] = sum(m.weights + m.optimizer for m in there if m is not model)
    for name, held in plan.items():
        held["vLLM"] = engine if name == "rollout" or not sleeps else 0
    return plan


def peak(plan):
    return max(sum(held.values()) for held in plan.values())


def largest_budget(plans, capacity):
    """The tokens of a micro-batch at which some phase reaches `capacity` bytes, rounded down to 256, from the plans {tokens:
    plan} at two numbers of tokens: between them, and beyond, memory is linear. 0 if none fits."""
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


def report(c):
    """Prints the plan of a Config."""
    c.check()
    shapes = {"policy": shape_of(c.plan, c.trust_remote_code)}
    if c.algorithm != "grpo":
        name = c.critic_model or c.plan
        shapes["prompts" if c.algorithm == "sppo" else "responses"] = shape_of(name, c.trust_remote_code)
    fake_world(c.gpus)
    longest = max(c.micro_batch_tokens, c.max_prompt_tokens + c.max_response_tokens)  # a row is never cut
    options = dict(replicas=c.replicas, checkpoint_activations=c.checkpoint_activations)
    counts = {tokens: [count(kind, shape, tokens, **options) for kind, shape in shapes.items()] + [None]
              for tokens in (longest // 2, longest)}
    ours, its = counts[longest][:2]
    engine, capacity, whole = c.vllm_memory * c.gpu_memory * GIB, (c.gpu_memory - RESERVED) * GIB, c.gpu_memory * GIB
    sizes = [m.weights / 4 * c.gpus / c.replicas / 1e9 for m in (ours, its) if m]
    shape = shapes["policy"]
    weights = 2e9 * sizes[0] / c.tensor_parallel
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head / c.tensor_parallel
    say(f"{c.algorithm}: policy {c.plan}, {sizes[0]:.2f}B parameters; "
        + (f"critic {c.critic_model or c.plan}, {sizes[1]:.2f}B; " if its else "no critic; ")
        + f"{c.gpus} GPUs of {c.gpu_memory:g} GiB, {RESERVED:g} of them set aside.\n"
        f"GiB a GPU, with micro-batches of {longest:,} tokens; "
        f"vLLM has {engine / GIB:.1f}: weights {weights / GIB:.1f}, and a cache of at most "
        f"{max(0, int((engine - weights) / per_token)):,} tokens.\n")
    for setting in SETTINGS:
        say(f"{setting or 'as it is':<18}" + "".join(f"{column:>13}" for column in (*COLUMNS, "total")))
        for name, held in phases(ours, its, setting, engine).items():
            say(f"  {name:<16}" + "".join(f"{b / GIB:>13.1f}" for b in (*held.values(), sum(held.values()))))
    say("\n| | peak, GiB | of the GPU | largest micro-batch, tokens | largest --vllm-memory |\n| --- | --- | --- | --- | --- |")
    for setting in SETTINGS:
        for sleeps in (True, False):
            plans = {tokens: phases(*two[:2], setting, engine, sleeps) for tokens, two in counts.items()}
            most, budget = peak(plans[longest]), largest_budget(plans, capacity)
            resting = sum(plans[longest]["rollout"].values()) - engine
            share = (capacity - (resting if sleeps else peak(plans[longest]) - engine)) / whole
            fits = f"{budget:,}" if budget >= c.max_prompt_tokens + c.max_response_tokens else "none holds the longest row"
            say(f"| {setting or 'as it is'}{'' if sleeps else ', vLLM never asleep'} | {most / GIB:.1f} | "
                f"{100 * most / whole:.0f} % | {fits} | {max(0, int(100 * share) / 100):.2f} |")


def training_peak(config, kind, gpus):
    """Bytes that a GPU holds at most while `config`, of a training script, trains; vLLM's not counted. For a process of its
    own. `kind`: of the critic, as in `count`, or None."""
    fake_world(gpus)
    tokens = max(config.micro_batch_tokens, config.max_prompt_tokens + config.max_response_tokens)
    options = dict(replicas=config.replicas, checkpoint_activations=config.checkpoint_activations, dtype=config.dtype)
    ours = count("policy", shape_of(config.model, config.trust_remote_code), tokens, **options)
    its = kind and count(kind, shape_of(config.critic_model or config.model, config.trust_remote_code), tokens, **options)
    setting = "--offload" if config.offload else "--offload-between" if config.offload_between else ""
    return peak(phases(ours, its, setting, engine=0))


def main(arguments=None):
    with clear_errors():
        report(Config.parse(__doc__, arguments))
