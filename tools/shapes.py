"""Shapes of published models, and what vLLM needs to hold one: what plans and benchmarks share."""
import torch
from transformers import AutoConfig, Qwen2Config, Qwen3Config

from cli import InputError

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


def engine_needs(shape, parameters, tensor_parallel):
    """vLLM in bfloat16 on each of `tensor_parallel` GPUs: (bytes of weights, of a token in its cache)."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head  # a key and a value
    return 2 * parameters / tensor_parallel, per_token / tensor_parallel
