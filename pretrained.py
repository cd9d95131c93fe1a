"""A Hugging Face checkpoint becomes a model that can be trained: checked before anything is loaded, with an attention that
is causal and nothing else, read from disk by one rank and dealt out to all.
"""
import glob
import math
import os

import torch
import torch.distributed as dist
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig

from data import InputError, load_tokenizer

# ---- checking -------------------------------------------------------------------------------------------------------

def check_found(model):
    """Raises InputError if `model` is neither a folder with a config.json nor on the hub."""
    if not os.path.isfile(f"{model}/config.json"):
        try:  # one request; transformers would try for half a minute
            if not isinstance(try_to_load_from_cache(model, "config.json"), str):
                get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=10)
        except Exception as error:
            raise InputError(f"{model}: is neither a folder with a config.json nor a model on the hub that can be read "
                             f"from here ({str(error).strip().splitlines()[0]})") from None


def check_model(model, tokens, trust_remote_code=False, options="--max-prompt-tokens or --max-response-tokens"):
    """Raises InputError for what can be seen to be wrong with a model (hub name or folder) without loading its weights.
    `tokens`: the longest sequence that it will have to read; `options`: what sets them."""
    check_found(model)
    if os.path.isfile(f"{model}/config.json") and not glob.glob(f"{glob.escape(model)}/*.safetensors"):
        raise InputError(f"{model}: has no .safetensors file; weights in other formats can run code when they are read, so "
                         "convert them first (transformers' save_pretrained writes safetensors)")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    except Exception as error:  # transformers and its validators raise many kinds; each is about this file
        raise InputError(f"{model}: its config.json cannot be used ({str(error).splitlines()[0]})") from None
    tokenizer = load_tokenizer(model, trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{model}: its tokenizer has {len(tokenizer)} tokens and its weights only {config.vocab_size}; "
                         "the two do not belong together")
    context = getattr(config, "max_position_embeddings", None)
    if context and tokens > context:
        raise InputError(f"{model}: reads at most {context} tokens, and is asked to read {tokens}; lower {options}")


# ---- attention ------------------------------------------------------------------------------------------------------

def fused_attention(module, query, key, value, attention_mask, scaling, **_):
    """PyTorch's causal attention, which never holds the scores. query [b, heads, L, d], key and value [b, key-value heads,
    L, d] -> [b, L, heads, d], None."""
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def causal_attention(module, query, key, value, attention_mask, scaling, **_):
    """`fused_attention`; but on a CPU its backward is slow in bfloat16, and short sequences afford their scores."""
    b, heads, length, size = query.shape
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or length > 1024:
        return fused_attention(module, query, key, value, attention_mask, scaling)
    shared = heads // key.shape[1]  # neighbouring heads that have one key and value: their queries are rows of one product
    rows = (query * scaling).reshape(-1, shared * length, size)
    future = query.new_full((length, length), -math.inf).triu(1).repeat(shared, 1)
    scores = torch.baddbmm(future, rows, key.reshape(-1, length, size).transpose(1, 2))
    out = scores.softmax(-1) @ value.reshape(-1, length, size)
    return out.view(b, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)
AttentionMaskInterface.register("causal", lambda *_, **__: None)


def attention_of(model, trust_remote_code):
    """The attention for `from_pretrained`: `causal_attention`, unless some layers only see a window of the past."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return "sdpa" if windowed or {*(getattr(config, "layer_types", None) or ())} - {"full_attention"} else "causal"


# ---- reading and dealing out ----------------------------------------------------------------------------------------

def load(kind, model, trust_remote_code):
    """The model of class `kind` (AutoModel, ...) with the checkpoint's weights and dtype on rank 0, which alone reads them;
    elsewhere its structure without memory behind it (`meta`), until `Trained` deals out the weights."""
    options = dict(attn_implementation=attention_of(model, trust_remote_code), trust_remote_code=trust_remote_code)
    if dist.get_rank() == 0:
        return kind.from_pretrained(model, dtype="auto", use_safetensors=True, **options)
    with torch.device("meta"):
        return kind.from_config(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), **options)


def deal_out(module, device):
    """Gives all ranks rank 0's parameters (as float32) and buffers, in full, on `device`; what is sharded already stays.
    Buffers too, saved or not: rotary frequencies are computed when a model is made, and `meta` computes nothing."""
    new = {}  # tied weights, one tensor under two names, stay tied
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None and not isinstance(old, DTensor):
                    if old not in new:
                        dtype = torch.float32 if old.is_floating_point() else old.dtype
                        full = torch.empty(old.shape, dtype=dtype, device=device)
                        if dist.get_rank() == 0:
                            full.copy_(old.detach())
                        dist.broadcast(full, 0)
                        new[old] = nn.Parameter(full, old.requires_grad) if isinstance(old, nn.Parameter) else full
                    tensors[name] = new[old]
