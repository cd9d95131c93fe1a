"""Run by test_policy.py, also under torchrun: writes loss, metrics and gradients of one mini-batch, for each of some
micro-batch budgets. With a budget of 150, advantages are per token."""
import os
import random
import sys

import torch
import torch.distributed as dist

import policy as policies
from cli import BUILTIN_MODEL
from engines import Response
from machine import init_distributed
from rollout import Batch
from sharded import micro_batches
from sppo import TrainConfig, policy_step

output, compile, replicas, *budgets = sys.argv[1], *map(int, sys.argv[2:])
device = init_distributed()
policies.compiles = lambda: bool(compile)  # it is for GPUs
if compile:
    import torch._inductor.config
    torch._dynamo.config.disable, os.environ["TORCHDYNAMO_DISABLE"] = False, "0"  # which conftest.py turns off
    torch._inductor.config.compile_threads = 1  # or processes are started, which import torch anew
    # A cache of its own: in a shared one torch 2.13 takes code that was written for AVX2 and compiles it for AVX-512, and
    # then it writes beyond the ends of its tensors.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{output}.cache"
between_replicas, all_reduce = [], dist.all_reduce


def counted(tensor, *arguments, group=None, **named):
    if group is not None:  # of FSDP; ours are over all ranks
        between_replicas.append(group)
    return all_reduce(tensor, *arguments, group=group, **named)


dist.all_reduce = counted
# Five long responses, each a micro-batch of its own, and some short ones: two ranks get different numbers of them.
lengths = [90, 1, 85, 9, 80, 3, 75, 14, 70, 7, 2]
results = {}
for budget in budgets:
    rng = random.Random(0)
    policy = policies.Policy(BUILTIN_MODEL, device, temperature=0.7, lr=1e-3, dtype="float32", micro_batch_tokens=budget,
                    checkpoint_activations=budget == 100, replicas=replicas)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 12))] for _ in lengths]
    responses = [Response([rng.randrange(256) for _ in range(n)], [-rng.random() for _ in range(n)], True) for n in lengths]
    batch = Batch([None] * len(lengths), prompts, responses, torch.zeros(len(lengths)))
    generator = torch.Generator().manual_seed(0)
    batch.old_logprobs = policy.logprobs(batch.sequences) + 0.3 * torch.randn(batch.mask.shape, generator=generator)
    advantages = torch.randn(batch.mask.shape if budget == 150 else len(lengths), generator=generator)

    gradients = {}
    policy.optimizer.step = lambda policy=policy, gradients=gradients: gradients.update(
        (name, p.grad.full_tensor()) for name, p in policy.module.named_parameters())
    policy.max_grad_norm = 1e9
    between_replicas.clear()
    metrics = policy_step(policy, batch, range(len(lengths)), advantages, TrainConfig(loss_mean="token"))
    mine = torch.tensor([sum(map(bool, micro_batches([len(p) + len(r) for p, r in batch.sequences], budget)))])
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    results[budget] = {"metrics": metrics, "gradients": gradients, "micro_batches": [int(c) for c in counts],
                       "between_replicas": len(between_replicas),
                       "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] if compile else 0}
if dist.get_rank() == 0:
    torch.save(results, output)
dist.destroy_process_group()
