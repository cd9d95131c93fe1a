"""Which families of models train here: two steps of a tiny one of each, at learning rate 0.

    python -m tests.families [--engine vllm] [--ranks 2] [FAMILY ...]       writes results/families.md

Every model is built from transformers' own config class (2 layers, hidden 64, random weights), with the
tokenizer of the built-in model. "Trains" means that the run ended well. Its gap is the mean difference of
trainer's and engine's log-probabilities, and its saved gap that between the model that was loaded and the one
that was saved; in float32, both should be rounding. What is refused has the run's one sentence.
"""
import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import torch

from cli import BUILTIN_MODEL, clear_errors
from machine import checkpoint_tensors, transformers
from sppo import SPPO, TrainConfig, train

SIZES = dict(vocab_size=265, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=512, eos_token_id=257, pad_token_id=256)
EXPERTS = SIZES | dict(moe_intermediate_size=32, num_experts_per_tok=2, num_experts=4, num_local_experts=4,
                       n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, head_dim=32,
                       first_k_dense_replace=1)
HEAD, NO_WINDOW = dict(head_dim=32), dict(sliding_window=None)
WINDOW = HEAD | dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
GPT = dict(n_positions=512, n_embd=64, n_layer=2, n_head=2)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 16, long_factor=[4.0] * 16,
            original_max_position_embeddings=64)
FAMILIES = {  # name: config class, and what differs from SIZES
    "Qwen2": ("Qwen2Config", {}), "Qwen3": ("Qwen3Config", HEAD), "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", NO_WINDOW), "Mistral, window": ("MistralConfig", WINDOW),
    "Gemma 2": ("Gemma2Config", HEAD), "Gemma 3": ("Gemma3TextConfig", WINDOW),
    "Gemma 4": ("Gemma4TextConfig", WINDOW | dict(vocab_size_per_layer_input=265,
                                                  hidden_size_per_layer_input=16)),
    "Phi-3": ("Phi3Config", NO_WINDOW),
    "Phi-3, LongRoPE": ("Phi3Config", NO_WINDOW | dict(
        max_position_embeddings=4096, original_max_position_embeddings=64, rope_parameters=LONG)),
    "OLMo 2": ("Olmo2Config", {}), "SmolLM3": ("SmolLM3Config", {}),
    "Granite": ("GraniteConfig", dict(logits_scaling=8.0)), "GPT-2": ("GPT2Config", GPT),
    "OPT": ("OPTConfig", dict(ffn_dim=96, word_embed_proj_dim=64)), "Seed-OSS": ("SeedOssConfig", HEAD),
    "Qwen2-MoE": ("Qwen2MoeConfig", EXPERTS | dict(shared_expert_intermediate_size=32)),
    "Qwen3-MoE": ("Qwen3MoeConfig", EXPERTS), "Mixtral": ("MixtralConfig", EXPERTS),
    "GLM-4-MoE": ("Glm4MoeConfig", EXPERTS),
    "DeepSeek-V3": ("DeepseekV3Config", EXPERTS | dict(
        topk_method="noaux_tc", num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=32,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32)),
    "GPT-OSS": ("GptOssConfig", EXPERTS | WINDOW), "Falcon": ("FalconConfig", {}),
    "Bloom": ("BloomConfig", {}), "MPT": ("MptConfig", dict(d_model=64, n_heads=2, n_layers=2)),
    "Mamba-2": ("Mamba2Config", dict(num_heads=2, n_groups=1, state_size=16)),
    "LFM2-MoE": ("Lfm2MoeConfig", EXPERTS | dict(layer_types=["conv", "full_attention"]))}
OPTIONS = ("--steps 2 --lr 0 --critic-lr 0 --dataset chain:64 --prompts-per-step 8 --minibatch 4 "
           "--eval-every 0 --save-every 0 --max-prompt-tokens 64 --max-response-tokens 64 "
           "--temperature 1 --dtype float32")


def build(name, folder):
    """Writes a model of this family, its weights and buffers large enough that a lost one would show."""
    library, (kind, different) = transformers(), FAMILIES[name]
    torch.manual_seed(0)
    model = library.AutoModelForCausalLM.from_config(getattr(library, kind)(**SIZES | different))
    for _, tensor in checkpoint_tensors(model):
        if tensor.is_floating_point():
            tensor.data += 0.1 * torch.randn_like(tensor)
    model.generation_config = library.GenerationConfig(eos_token_id=257)
    model.save_pretrained(folder)
    library.AutoTokenizer.from_pretrained(BUILTIN_MODEL).save_pretrained(folder)


def run(rank, place, printed, options):
    """A rank of sppo.py, in a process that was forked: importing the libraries takes longer than the run."""
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), stream)
    with clear_errors():
        train(TrainConfig.parse(None, options), SPPO)


@torch.no_grad()
def difference(*folders):
    """The mean difference between the log-probabilities of the models in two folders."""
    ids = torch.arange(3, 103).view(2, 50)
    models = [transformers().AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
    one, other = [lm(input_ids=ids, use_cache=False).logits.log_softmax(-1) for lm in models]
    return (one - other).abs().mean().item()


def attempt(name, engine, ranks=1):
    """The family's row of the table."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        build(name, folder)
        printed = Path(folder, "printed")
        printed.touch()
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                 "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        free.close()
        options = f"--model {folder} --output {folder}/run --engine {engine} {OPTIONS}".split()
        context = multiprocessing.get_context("fork")
        started = [context.Process(target=run, args=(rank, place, printed, options)) for rank in range(ranks)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        text = printed.read_text().replace(folder, "the model")
        if not any(process.exitcode for process in started):
            lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
            gap = max(line.get("policy/rollout_gap", 0.0) for line in lines)
            return name, "trains", f"{gap:.0e}", f"{difference(folder, f'{folder}/run/model'):.0e}"
    sentence = next((line for line in text.splitlines() if line.startswith("error: ")), None)
    if "Traceback" in text or not sentence:
        return name, "**fails**", text.strip().splitlines()[-1], ""
    return name, "refused", sentence.removeprefix("error: the model: ").partition("; ")[0], ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=[*FAMILIES], metavar="FAMILY")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--output", default="results/families.md")
    c = parser.parse_args()
    torch.set_num_threads(1)  # models this small only wait for more, and a fork would not have them
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in ("eval", "torch.distributed.fsdp", "torch.distributed.checkpoint", "vllm.v1.engine.core"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    rows = [("family", "", "gap, or why", "saved gap"), ("---",) * 4]
    for name in c.families:
        rows.append(attempt(name, c.engine, c.ranks))
        print(*rows[-1], sep="  ", flush=True)
    Path(c.output).write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
