"""This machine: its ranks, its device, its kernels, and how a model is loaded onto it.

Nothing here knows about training: sharded.py shards what `load` returns, and trains it.
"""
import functools
import importlib.util
import itertools
import os
import re
import shutil
import sysconfig
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError

from cli import InputError, is_main

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # data.py says in one sentence what is wrong

# Ranks wait for the slowest rollout, which may take many minutes; the default of 10 would end the run.
TIMEOUT = timedelta(hours=2)

# ---- processes ---------------------------------------------------------------------------------------------

def init_distributed() -> torch.device:
    """Joins torchrun's process group, or makes a group of one process without torchrun. Returns
    this rank's device."""
    if "RANK" not in os.environ:  # port 0: one that nobody uses
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        # Memory that can grow in place leaves no gaps too small to use. Without the second setting, pinned
        # host memory (--offload) is rounded up to a power of two. Both must be set before CUDA starts. (vLLM
        # 0.32 turns the first off for what its sleep mode manages, and knows this name only.)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", os.environ.get(
            "PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:1"))
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    elif torch.version.cuda and shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise InputError(f"nvidia-smi is here, but torch {torch.__version__} finds no GPU: the driver is "
                         f"probably too old for CUDA {torch.version.cuda}; update it, or set "
                         "CUDA_VISIBLE_DEVICES= to use the CPU")
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    return device


def check_ranks(**sizes):
    """Raises InputError unless each of these numbers of ranks divides the number of all ranks."""
    for name, size in sizes.items():
        if dist.get_world_size() % size:
            option = f"--{name.replace('_', '-')} {size}"
            raise InputError(f"{option} does not divide the {dist.get_world_size()} ranks")


def from_rank_0(compute):
    """What `compute()` returns on rank 0, on every rank: for what ranks could see differently, or what is
    better done once. An InputError is raised on every rank too."""
    found = [None, None]
    if is_main():
        try:
            found[0] = compute()
        except InputError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1]:
        raise InputError(found[1])
    return found[0]


def use_all_cores():
    """Gives this process its share of the machine's cores. vLLM 0.32 has set one thread, or torchrun has, but
    with --offload all, AdamW steps on the CPU."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def seed_torch(seed, deterministic):
    """Seeds torch; `deterministic` also makes it choose kernels that give the same numbers each time."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's matrix products need it for this
        torch.use_deterministic_algorithms(True, warn_only=True)


def compute_dtype(name, device):
    """"auto" is bfloat16 where the device computes in it, and float32 elsewhere. Other names
    are returned as they are.

    A CPU that has no more than AVX2 emulates bfloat16, and is several times slower in it than in float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    has = torch.cpu.get_capabilities()
    native = has.get("avx512_bf16") or has.get("amx_bf16")
    # A user can limit torch to less than the processor has, with ATEN_CPU_CAPABILITY.
    return "bfloat16" if native and "AVX512" in torch.backends.cpu.get_cpu_capability() else "float32"


def compiles():
    """Whether kernels can be made for this machine's GPU. Triton wants a C compiler and Python's headers."""
    return (torch.cuda.is_available() and any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
            and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))


ANOTHER_MODEL = "choose another model (docs/running.md says which families were tried)"


def first_line(error):
    """What an exception of a library says, shortened: a message of ours is one line."""
    return str(error).strip().partition("\n")[0]


# ---- loading -----------------------------------------------------------------------------------------------

def causal_attention(module, query, key, value, attention_mask, scaling, **_):
    """PyTorch's fused causal attention, without a mask: query [b, heads, L, d], key and value
    [b, key-value heads, L, d] -> [b, L, heads, d], None.

    With padding on the right, no token of a response can see padding, so no mask is needed. A mask would hold
    L x L numbers, and the fast kernels take none.
    """
    length, added = query.shape[2], -query.shape[2] % 256
    if added and query.is_cuda and query.dtype == torch.bfloat16:
        # On an H100 or H200, torch takes cuDNN's attention: twice as fast as its other kernels, but it
        # prepares a plan for each new shape, in 0.1 s. So let there be few: lengths are multiples of 256.
        query, key, value = (F.pad(x, (0, 0, 0, added)) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out[:, :, :length].transpose(1, 2).contiguous(), None


@functools.cache
def transformers():
    """The library, with our attention. It is imported at its first use: --help need not wait for it."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register("causal", causal_attention)
    transformers.AttentionMaskInterface.register("causal", lambda *_, **__: None)
    return transformers


def attention_of(config):
    """The attention for a model's config: "causal", unless some layers see only a window of the past."""
    config = config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    other_layers = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    return "sdpa" if windowed or other_layers else "causal"


def skeleton(auto, model, trust_remote_code, tied=True):
    """The model as transformers' class `auto` ("AutoModel", ...), without memory (device `meta`). Raises
    InputError if transformers has no such model, or not with an attention of ours. tied: False where the
    checkpoint has an output layer of its own, whatever config.json says."""
    config = transformers().AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for part in () if tied else (config, config.get_text_config()):
        part.tie_word_embeddings = False
    try:
        with torch.device("meta"):
            module = getattr(transformers(), auto).from_config(
                config, attn_implementation=attention_of(config), trust_remote_code=trust_remote_code)
        causal = [part.is_causal for part in module.modules() if hasattr(part, "is_causal")]
        if causal and not any(causal):
            raise ValueError("it is an encoder, whose tokens see later ones")
        return module
    except Exception as error:  # each architecture has its own way to say that it cannot
        why = f"{type(error).__name__}: {first_line(error).partition('. ')[0]}"
        raise InputError(f"{model}: a model of type {config.model_type} cannot be trained here ({why[:200]});"
                         f" {ANOTHER_MODEL}") from None


def load(auto, model, trust_remote_code):
    """The same with the checkpoint's weights and dtype on rank 0. On other ranks it has no memory until
    `ShardedModel` distributes the weights. Raises InputError if weights and model do not belong together."""
    module, problem, tied = None, None, True
    if dist.get_rank() == 0:
        found = {"missing_keys": (), "unexpected_keys": ()}
        try:
            module, found = getattr(transformers(), auto).from_pretrained(
                model, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code,
                output_loading_info=True, attn_implementation=attention_of(
                    transformers().AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)))
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read ({first_line(error)})"
        if found["missing_keys"]:  # transformers has made random ones
            problem = f"lacks {min(found['missing_keys'])}"
        elif found["unexpected_keys"] and auto == "AutoModelForCausalLM":  # a critic needs no output layer
            problem = f"has {min(found['unexpected_keys'])}, which {type(module).__name__} does not"
        head = module and module.get_output_embeddings()
        if head is not None and head.weight is not module.get_input_embeddings().weight:
            tied = False
            module.config.tie_word_embeddings = module.config.get_text_config().tie_word_embeddings = False
    problem, tied = from_rank_0(lambda: (problem, tied))
    if problem:
        raise InputError(f"{model}: its checkpoint {problem}; give one that belongs to its config.json")
    if module is None:
        module = skeleton(auto, model, trust_remote_code, tied)
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, [(name, *tensor.shape) for name, tensor in checkpoint_tensors(module)])
    if names.count(names[0]) < len(names):  # or ranks would wait for each other's broadcasts for ever
        raise InputError(f"{model}: ranks see different weights under this name; give one that all nodes see")
    if compiles() and importlib.util.find_spec("liger_kernel"):
        # Norms, rotary embedding and SwiGLU become one kernel each, if this library knows the model: updates
        # take a sixth less time. (policy.py has its own loss.) transformers' Trainer calls this name too.
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance
        _apply_liger_kernel_to_instance(model=module, fused_linear_cross_entropy=False)
    return module


def load_tokenizer(model, trust_remote_code=False):
    """The tokenizer of a Hugging Face name or folder. Raises InputError if there is none that can be read."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: its tokenizer cannot be loaded ({first_line(error)})") from None
    text = "The plan counts 3 pears\nand 14 figs"
    read = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    if read.strip() != text:  # transformers 5 loads some tokenizers as another kind than they are
        raise InputError(f"{model}: its tokenizer, as transformers loads it, reads {text!r} as {read!r}; "
                         "correct the tokenizer_class in its tokenizer_config.json")
    return tokenizer


def check_model(model, tokens, trust_remote_code=False, options="--max-prompt-tokens, --max-response-tokens",
                tensor_parallel=1):
    """Checks a model (hub name or folder) without loading its weights. Raises
    InputError if it cannot be used.

    tokens: the longest sequence that the model will have to read; options: the options that set this length.
    """
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # transformers and its validators raise many kinds; each is about this file
        raise InputError(f"{model}: is no folder with a usable config.json and no model on the hub within "
                         f"reach ({first_line(error)})") from None
    names = ("model.safetensors", "model.safetensors.index.json")  # not those of an adapter (LoRA)
    if Path(model).is_dir() and not any(Path(model, name).is_file() for name in names):
        raise InputError(f"{model}: has no model.safetensors, and other formats can run code when they are "
                         "read; convert it with transformers' save_pretrained")
    tokenizer = load_tokenizer(model, trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{model}: its tokenizer has {len(tokenizer)} tokens and its weights only "
                         f"{config.vocab_size}; give a folder in which the two belong together")
    if (heads := getattr(config, "num_attention_heads", 0)) % tensor_parallel:
        raise InputError(f"{model}: its {heads} attention heads cannot be shared among --tensor-parallel "
                         f"{tensor_parallel}; give a divisor of {heads}")
    context = getattr(config, "max_position_embeddings", None)
    if context and tokens > context:
        raise InputError(f"{model}: reads at most {context} tokens, not {tokens}; lower {options}")


# ---- what a checkpoint holds -------------------------------------------------------------------------------

def checkpoint_tensors(module):
    """Yields (name in memory, tensor): the parameters, tied ones once, and the buffers that checkpoints hold,
    such as the correction bias of a mixture's router."""
    yield from module.named_parameters()
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def checkpoint_names(module, tensors):
    """Yields (name in a checkpoint, tensor) for an iterator of (name in memory, tensor). module: the model,
    or its skeleton.

    transformers loads the experts of a mixture as one tensor, for example, where the checkpoint, and so vLLM,
    has one for each. Such tensors are converted a layer at a time. All others are passed on one by one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion
    if all(isinstance(c, PrefixChange) for c in get_model_conversion_mapping(module, add_legacy=False)):
        yield from tensors  # (of prefixes, vLLM knows both forms)
        return
    for _, part in itertools.groupby(tensors, lambda pair: re.match(r"\D*\d+\.|", pair[0])[0]):
        yield from revert_weight_conversion(module, dict(part)).items()
