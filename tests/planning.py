"""Run by test_plan.py: bytes planned (on fake tensors) and really held, of small models and their steps, in
bfloat16 with checkpointed activations, for each --offload."""
import json

import torch
import torch.distributed as dist
from transformers import Qwen2Config

from machine import init_distributed
from tools.plan import SETTINGS, count, fake_world

CASES = [("policy", "wide", 100, "none"), ("policy", "deep", 200, "none"), ("responses", "deep", 200, "none"),
         *(("policy", "wide", 100, offload) for offload in SETTINGS[1:]),
         ("prompts", "wide", 100, "none")]


def small(hidden, layers, vocabulary, tied):
    return Qwen2Config(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                       num_attention_heads=4, num_key_value_heads=2, vocab_size=vocabulary,
                       tie_word_embeddings=tied, dtype=torch.bfloat16)


SHAPES = {"wide": small(128, 2, 500, True), "deep": small(64, 3, 2000, False)}


def counts(fake):
    return {case: count(case[0], SHAPES[case[1]], case[2], fake, offload=case[3]) for case in CASES}


init_distributed()
real = counts(fake=False)
dist.destroy_process_group()
fake_world(1)
planned = counts(fake=True)
print(json.dumps([(case, vars(planned[case]), vars(real[case])) for case in CASES]))
