"""Run by test_rollout.py: samples from an engine before and after the policy's weights change, and prints what it saw."""
import json
import shutil
import sys

import torch
import torch.distributed as dist

from cli import BUILTIN_MODEL
from data import load_problems, load_tokenizer, render
from engines import make_engine
from eval import EvalConfig
from machine import init_distributed
from policy import Policy

device = init_distributed()
torch.manual_seed(0)
model = f"{sys.argv[2]}/model"  # one that asks for another distribution than its own, as chat models do
shutil.copytree(BUILTIN_MODEL, model)
with open(f"{model}/generation_config.json", "w") as file:
    json.dump({"do_sample": True, "repetition_penalty": 1.3, "top_k": 3}, file)
tokenizer = load_tokenizer(BUILTIN_MODEL)
prompts = [render(p.messages, tokenizer) for p in load_problems("chain:24")]
config = EvalConfig(engine=sys.argv[1], dtype="float32", vllm_memory=0.5)
engine = make_engine(config, model, tokenizer, device, max_tokens=128)
policy = Policy(BUILTIN_MODEL, device, temperature=0.8, lr=1e-3, dtype="float32", checkpoint_activations=False)


def sample(temperature=0.8, max_tokens=60, **options):
    responses = [None] * len(prompts)
    for i, response in engine.generate(prompts, temperature=temperature, max_tokens=max_tokens, **options):
        responses[i] = response
    return responses


def gap(responses):
    """The largest difference between the engine's and the trainer's log-probability of any sampled token."""
    ours = policy.logprobs([(p, r.ids) for p, r in zip(prompts, responses, strict=True)])
    return max(abs(ours[i, t].item() - r.logprobs[t]) for i, r in enumerate(responses) for t in range(len(r.ids)))


report = {"name": engine.name, "stop": tokenizer.eos_token_id}
engine.sync(policy.weights())
report["gaps"] = [gap(sample())]
for _ in range(2):  # as in training: change, sync, sample, again and again
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    stale = gap(sample())
    engine.sync(policy.weights())
    report["gaps"].append(gap(sample()))
report["stale"] = stale
report["ends"] = [(r.ids[-1], r.finished, len(r.ids) == len(r.logprobs)) for r in sample()]
report["short"] = [(len(r.ids), r.finished) for r in sample(max_tokens=4)]
report["greedy"] = [[r.ids for r in sample(temperature=0.0)] for _ in range(2)]
mixed = sample(temperature=[0.0] * 12 + [1.9] * 12)
report["mixed"] = [r.ids for r in mixed]
report["seeded"] = [[r.ids for r in sample(seeds=list(range(24)))] for _ in range(2)]

if sys.argv[1] == "vllm":  # the other engine cannot pause
    first = dict(engine.generate(prompts, temperature=0.8, max_tokens=60, pause_after=6, wait_for=[4, 22]))
    rest = [i for i, r in first.items() if r.paused]
    limits = [len(first[i].ids) + 2 if i % 2 else 60 for i in rest]
    second = dict(engine.generate([prompts[i] for i in rest], temperature=0.8, max_tokens=limits,
                                  partial=[first[i] for i in rest]))
    whole = [second[rest.index(i)] if i in rest else first[i] for i in range(24)]
    report["ended"] = [i for i, r in first.items() if not r.paused]
    report["paused"] = [(len(first[i].ids), len(whole[i].ids), whole[i].ids[: len(first[i].ids)] == first[i].ids,
                         whole[i].paused) for i in rest]
    report["whole"] = gap(whole)
    report["limits"] = [(limit, len(second[j].ids), second[j].finished) for j, limit in enumerate(limits)]
prompts = [(p * 9)[-120:] for p in prompts + prompts[::-1]]  # more tokens than one pass can prefill
report["many"] = [len(r.ids) for r in sample(max_tokens=3, seeds=list(range(len(prompts))))]
print(json.dumps(report))
engine.close()
if dist.is_initialized():
    dist.destroy_process_group()
