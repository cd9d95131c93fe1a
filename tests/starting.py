"""Run by test_policy.py under torchrun: starts a policy and a critic from folder A on rank 0 and from folder B elsewhere, where
no weights are. Writes each rank's gathered weights, buffers, and the most bytes that its tensors held at once."""
import sys

import torch
import torch.distributed as dist

from critic import ValueModel
from machine import init_distributed
from policy import Policy
from sharded import ShardedModel, mesh_of_ranks
from tools.plan import LiveBytes

output, with_weights, without, replicas, offload = *sys.argv[1:4], int(sys.argv[4]), "all" if sys.argv[5] == "offload" else "none"
device = init_distributed()
folder = without if dist.get_rank() else with_weights
options = dict(lr=1e-3, dtype="float32", replicas=replicas, offload=offload)


class Noted(torch.optim.AdamW):  # it is made when the weights are loaded, and before its moments are
    def __init__(self, *arguments, **named):
        loading.append(memory.peak)
        super().__init__(*arguments, **named)


loading, torch.optim.AdamW = [], Noted
with LiveBytes() as memory:
    policy = Policy(folder, device, temperature=1.0, **options)
peak = loading[0]
critic = ShardedModel(ValueModel(folder), device, **options)
lm, backbone = policy.module.lm, critic.module.backbone
groups = mesh_of_ranks("cpu", replicas).get_all_groups()
torch.save({"waits": [group._get_backend(device).options._timeout.total_seconds() for group in groups],
            "ranks": [dist.get_process_group_ranks(group) for group in groups], "peak": peak, "size": 4 * policy.size, "save_dtype": policy.save_dtype,
            "tied": lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
            "weights": dict(policy.weights()), "buffers": dict(lm.named_buffers()),
            "critic": {name: p.detach().full_tensor() for name, p in backbone.named_parameters()},
            "head": [p.detach().full_tensor() for p in critic.module.head.parameters()],
            "critic_buffers": dict(backbone.named_buffers())}, f"{output}/{dist.get_rank()}.pt")
dist.destroy_process_group()
