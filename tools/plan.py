"""What each GPU will hold during training, computed without one.

    python -m tools.plan deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --gpus 4
    python -m tools.plan --gpus 1 --gpu-memory 24 Qwen/Qwen2.5-0.5B

There are no formulas for training here. The code that trains runs as it is, on "fake" tensors, which have a
shape but no memory, in a "fake" process group, whose other ranks do not exist. What is counted is the bytes
that its tensors would hold. So the plan follows every change of the code. What vLLM takes is arithmetic.

Not seen are the inside of kernels, CUDA's context, NCCL's buffers, and memory that the allocator cannot use.
RESERVED is set aside for them.
"""
import contextlib
import functools
import gc
import os
import weakref
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, Qwen2Config, Qwen3Config

import critic
import policy
import ppo
import sharded
from cli import CommandLine, InputError, clear_errors, option, say
from engines import GIB, RESERVED, Response
from machine import transformers
from rollout import Batch
from sppo import TrainConfig, policy_step

DEFAULTS = TrainConfig.defaults()

@dataclass
class PlanConfig(CommandLine):
    model: str = option("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "the policy: a folder or a hub name")
    critic_model: str | None = option(None, "model that the critic starts from [the policy's]")
    algorithm: Literal["sppo", "ppo", "grpo"] = option(
        "sppo", "a critic that reads prompts; one that reads whole responses; or none (also spo)")
    gpus: int = option(4, "ranks, over which all weights are sharded", positive=True)
    gpu_memory: float = option(79.0, "GiB of a GPU; one of 80 GB has 79", positive=True)
    micro_batch_tokens: int = option(DEFAULTS["micro_batch_tokens"], "as in training", positive=True)
    max_prompt_tokens: int = option(DEFAULTS["max_prompt_tokens"], "as in training", positive=True)
    max_response_tokens: int = option(DEFAULTS["max_response_tokens"], "as in training", positive=True)
    vllm_memory: float | None = option(None, "as in training [auto: what the models leave]", positive=True)
    tensor_parallel: int = option(DEFAULTS["tensor_parallel"], "as in training", positive=True)
    replicas: int = option(DEFAULTS["replicas"], "as in training", positive=True)
    checkpoint_activations: bool = option(DEFAULTS["checkpoint_activations"], "as in training")
    trust_remote_code: bool = option(False, "as in training")

    def check(self):
        super().check()
        for name, size in (("--replicas", self.replicas), ("--tensor-parallel", self.tensor_parallel)):
            if self.gpus % size:
                raise InputError(f"{name} {size} does not divide --gpus {self.gpus}")


# ---- models ------------------------------------------------------------------------------------------------

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, are embedding and output tied?
    "Qwen/Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151936, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, False)}


def shape_of(model, trust_remote_code=False):
    """The Hugging Face config of a model: one of SHAPES, a folder, or a hub name."""
    if model not in SHAPES:
        try:
            return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
        except Exception as error:  # transformers raises many kinds; each is about this model
            raise InputError(f"{model}: is neither a folder with a config.json nor a model on the hub that "
                             f"can be read from here ({str(error).strip().splitlines()[0]})") from None
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[model]
    config, more = (Qwen3Config, dict(head_dim=128)) if "Qwen3" in model else (Qwen2Config, {})
    return config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, dtype=torch.bfloat16,
        tie_word_embeddings=tied, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **more)


# ---- counting ---------------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes that tensors made within it hold at once: `live` now, `peak` at most.

    It does not ask the process or the GPU, whose numbers depend on the allocator.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}  # {storage: its bytes}

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):  # so FSDP frees the memory of a gathered layer, and takes it again
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._holds(storage._cdata, size)
        self.patch = patch.object(torch.UntypedStorage, "resize_", resized)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # A loss or a norm is asked for as a number, and a fake tensor has none.
            return 1.0 if args[0].is_floating_point() else 1
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, what this rank holds
                storage = local.untyped_storage()
                if storage._cdata not in self.sizes:
                    self._holds(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _holds(self, key, size):
        self.live += size - self.sizes.get(key, 0)
        self.peak, self.sizes[key] = max(self.peak, self.live), size

    def _freed(self, key):
        self.live -= self.sizes.pop(key)

    def during(self, action):
        """The bytes at the peak of `action()` beyond those before it."""
        gc.collect()  # what stands in cycles goes at any time; then the plan and a real step would differ
        gc.disable()
        before, self.peak = self.live, self.live
        action()
        gc.enable()
        return self.peak - before


@dataclass
class Count:
    """Bytes of one model on one GPU. Gradients take as many as weights, and Adam's moments twice as many."""
    weights: int
    infer: int  # at most, beside the weights: gathered layers and activations
    update: int  # at most, beside weights, gradients and moments


def count(kind, shape, tokens, fake=True, **options):
    """Counts what a model of the config `shape` holds on one rank of the process group.

    kind: "policy", or a critic that reads "prompts" or "responses". Micro-batches are one row of `tokens`
    tokens; each rank gets two, so that the second meets the gradients of the first. options: as
    ShardedModel's. With fake=False the steps are really taken.
    """
    rows, device = 2 * dist.get_world_size(), torch.device("cpu")
    response = Response([0] * (tokens - 1), [0.0] * (tokens - 1), True)
    batch = Batch([None] * rows, [[0]] * rows, [response] * rows, torch.ones(rows))
    batch.old_logprobs = batch.rollout_logprobs
    # Made before anything is fake, and kept: it computes with the numbers of the ranks.
    sharded.mesh_of_ranks(device.type, options.get("replicas", 1))
    options = dict(lr=1e-6, micro_batch_tokens=tokens, **options)

    def structure(auto, *_):
        return getattr(transformers(), auto).from_config(
            shape, attn_implementation="causal", dtype=torch.bfloat16)

    with contextlib.ExitStack() as stack:
        for module, name, value in ((policy, "load", structure), (critic, "load", structure),
                                    (policy, "check_output_layer", lambda *_: None),
                                    (critic, "load_tokenizer", lambda *_: None)):
            stack.enter_context(patch.object(module, name, value))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        memory = stack.enter_context(LiveBytes())
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):  # made here, or its views would be taken for new tensors
                setattr(batch, name, value.clone())
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
            values = torch.zeros_like(batch.rollout_logprobs)
            update = functools.partial(model.update, batch, values, values)
        weights = sum(4 * p.to_local().numel() for p in model.module.parameters())
        return Count(weights, memory.during(infer), memory.during(update) - weights)


def fake_world(gpus):
    """Makes this process one rank of `gpus` that do not exist, without a GPU even where there is one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    sharded.mesh_of_ranks.cache_clear()  # meshes of the world before, if this process was in one


# ---- the plan ---------------------------------------------------------------------------------------------

SETTINGS = "none", "between", "all"  # of --offload
COLUMNS = "weights", "gradients", "optimizer", "layers", "other model", "vLLM"


def phases(of_policy, of_critic, offload, engine):
    """{phase: bytes by column} on one GPU, from the Counts of policy and critic (None: there is none).
    layers: activations, and the layers that FSDP has gathered. engine: what vLLM takes while it is awake."""
    models = [model for model in (of_policy, of_critic) if model]
    everything = sum(model.weights for model in models)
    plan = {"rollout": dict.fromkeys(COLUMNS, 0) | {"vLLM": engine}}
    if offload == "none":
        plan["rollout"].update(weights=everything, optimizer=2 * everything)
    for name, model, updates in (("log-probs", of_policy, False), ("update policy", of_policy, True),
                                 ("update critic", of_critic, True)):
        if model:
            held = dict.fromkeys(COLUMNS, 0) | {"layers": model.update if updates else model.infer}
            if offload != "all":
                held.update(weights=model.weights, gradients=updates * model.weights)
                held["optimizer"] = 2 * model.weights if updates or offload == "none" else 0
            if offload == "none":
                held["other model"] = 3 * (everything - model.weights)
            plan[name] = held
    return plan


def largest_budget(plans, capacity):
    """The most tokens in a micro-batch, rounded down to 256, with which no phase holds more than `capacity`
    bytes; 0 if there are none. plans: {tokens: plan} at two numbers of tokens, in which memory is linear."""
    (few, low), (many, high) = sorted(plans.items())
    limits = []
    for name in low.keys() - {"rollout"}:
        a, b = sum(low[name].values()), sum(high[name].values())
        limits.append(few + (capacity - a) * (many - few) / (b - a))
    return max(0, int(min(limits)) // 256 * 256)


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

    shape, whole, capacity = shapes["policy"], c.gpu_memory * GIB, c.gpu_memory * GIB - RESERVED
    weights = 2 * parameters(of_policy) / c.tensor_parallel
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 4 * shape.num_hidden_layers * shape.num_key_value_heads * head  # bfloat16, a key and a value
    theirs = f"critic {critic_model}, {parameters(of_critic) / 1e9:.2f}B" if of_critic else "no critic"
    say(f"{c.algorithm}: policy {c.model}, {parameters(of_policy) / 1e9:.2f}B parameters; {theirs}; "
        f"{c.gpus} GPUs of {c.gpu_memory:g} GiB, {RESERVED / GIB:g} of them set aside.\n"
        f"GiB a GPU, with micro-batches of {tokens:,} tokens; vLLM's weights are {weights / GIB:.1f}, and "
        "the rest is its cache. Layers: activations, and what FSDP has gathered.\n")
    rows = []
    for setting in SETTINGS:
        beside = sum(phases(of_policy, of_critic, setting, 0)["rollout"].values())
        share = max(0, int(100 * (capacity - beside) / whole) / 100)
        engine = (share if c.vllm_memory is None else c.vllm_memory) * whole
        cache = max(0, int((engine - weights) * c.tensor_parallel / per_token))
        plans = {n: phases(*two[:2], setting, engine) for n, two in counts.items()}
        totals = {name: sum(held.values()) for name, held in plans[tokens].items()}
        say(f"{'--offload ' + setting:<18}" + "".join(f"{column:>13}" for column in (*COLUMNS, "total")))
        for name, held in plans[tokens].items():
            say(f"  {name:<16}" + "".join(f"{b / GIB:>13.1f}" for b in (*held.values(), totals[name])))
        budget = largest_budget(plans, capacity)
        fits = f"{budget:,}" if budget >= row else "none holds the longest row"
        most = max(totals.values())
        rows.append(f"| {setting} | {most / GIB:.1f} | {100 * most / whole:.0f} % | {fits} | {share:.2f} | "
                    f"{cache:,} |")
    say("\n| --offload | peak, GiB | of the GPU | largest micro-batch, tokens | largest --vllm-memory (auto) "
        "| vLLM's cache, tokens |\n| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows))
    # Each model comes and goes twice: to compute without gradient, and with Adam's moments to learn. The
    # policy's weights also go to vLLM.
    moved = of_policy.weights + sum(8 * model.weights for model in (of_policy, of_critic) if model)
    say(f"\n--offload between moves {moved / GIB:.0f} GiB a step between each GPU and the host.")


def main(arguments=None):
    with clear_errors():
        report(PlanConfig.parse(__doc__, arguments, positional="model"))


if __name__ == "__main__":
    main()
