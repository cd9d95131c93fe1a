"""A model under FSDP2 with its optimiser: what the policy and the critics have in common.

Three ideas carry this file.

1. Every rank knows the whole batch (token ids are small). So `micro_batches` needs no communication: each
   rank computes the micro-batches of all. All ranks run equally many, or FSDP's collectives would hang.
2. The loss is divided by a count over the *whole* mini-batch (tokens, or prompts for SPPO's critic). So the
   gradient depends neither on the micro-batches nor on the number of ranks.
3. Only rank 0 reads the checkpoint. It sends the weights to the others a block at a time, so that no GPU ever
   holds a whole model.

One optimiser step reads like plain PyTorch:

    for rows in model.micro_batches(lengths):
        loss, metrics = ...                 # of these rows; the losses of all micro-batches and ranks add up
        model.backward(loss, metrics)
    metrics = model.step()
"""
import contextlib
import functools
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from cli import InputError
from log import progress
from machine import ANOTHER_MODEL, TIMEOUT, first_line, use_all_cores

# ---- from rank 0 to all ------------------------------------------------------------------------------------

def broadcast_from_rank_0(module, device):
    """Gives all ranks rank 0's parameters (as float32) and buffers, in full, on `device`; skips what is
    sharded already. Buffers that no checkpoint has are sent too: rotary frequencies are computed when a model
    is made, which a model on `meta` cannot do."""
    from torch.distributed.tensor import DTensor  # here: it takes a second, and --help should not wait for it
    new = {}  # old tensor -> new one: tied weights, one tensor under two names, stay tied
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None or isinstance(old, DTensor):
                    continue
                if old not in new:
                    dtype = torch.float32 if old.is_floating_point() else old.dtype
                    full = torch.empty(old.shape, dtype=dtype, device=device)
                    if dist.get_rank() == 0:
                        full.copy_(old.detach())
                    dist.broadcast(full, 0)
                    parameter = isinstance(old, nn.Parameter)
                    new[old] = nn.Parameter(full, old.requires_grad) if parameter else full
                tensors[name] = new[old]


# ---- from sequences to tensors -----------------------------------------------------------------------------

def micro_batches(lengths, budget):
    """Cuts rows into micro-batches of at most `budget` tokens, padding included, and
    distributes them to the ranks.

    lengths: tokens of every row of the mini-batch, the same list on every rank.
    Returns this rank's list of lists of row numbers. All ranks get equally many lists; some may be empty.
    Rows are sorted by length, so that little padding is left. A row longer than the budget gets a
    micro-batch of its own.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def belongs(row, batch):
        """Whether a row is added to this micro-batch. A new one starts where rows become a fifth
        shorter, to avoid padding. But one that is nearly empty is filled up, because each micro-batch gathers
        all weights anew."""
        longest = lengths[batch[0]]
        fits, few = longest * (len(batch) + 1) <= budget, longest * len(batch) < budget // 8
        return fits and (few or lengths[row] >= 0.8 * longest)

    shares = []  # of all ranks: each rank computes them by itself, without communication
    for r in range(world):
        batches = []
        for row in by_length[r::world]:
            if batches and belongs(row, batches[-1]):
                batches[-1].append(row)
            else:
                batches.append([row])
        shares.append(batches)
    most = max(map(len, shares))
    return shares[rank] + [[]] * (most - len(shares[rank]))


def pad(sequences, device):
    """b (prompt ids, response ids) pairs as tensors: ids [b, L], padded on the right; scored [mask.sum()];
    mask [b, T], T the longest response. Without pairs, ids has one dummy row, of which no token is scored.

    `scored` are the positions in ids.flatten() whose outputs predict the response's tokens, from the
    prompt's last token on. They are positions and not a mask, since selecting by a mask makes the
    host wait for the GPU.
    """
    lengths = [len(r) for _, r in sequences]
    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths)[:, None]
    rows = sequences or [([0, 0], [])]  # a rank without rows runs the model too, for its collectives
    ids = pad_sequence([torch.tensor(p + r) for p, r in rows], batch_first=True)
    width = ids.shape[1]
    scored = torch.cat([torch.arange(len(r)) + i * width + len(p) - 1 for i, (p, r) in enumerate(rows)])
    return ids.to(device), scored.to(device), mask.to(device)


def unflatten(flat, mask):
    """[mask.sum()] -> [b, T], 0 outside the mask: the inverse of `pad`'s `scored`."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def rows_like(part, rows, whole):
    """Rows of `whole` [B, T] as wide and on the same device as part [b, t]; of `whole`
    [B], just the rows [b]."""
    return (whole[rows, : part.shape[1]] if whole.dim() == 2 else whole[rows]).to(part.device)


def mean_of(dicts, prefix=""):
    """The mean of each metric over dictionaries with the same keys; `prefix` goes before each name. No
    dictionaries give no metrics."""
    keys = dicts[0] if dicts else ()
    return {f"{prefix}{key}": sum(d[key] for d in dicts) / len(dicts) for key in keys}


# ---- training ----------------------------------------------------------------------------------------------

@functools.cache
def mesh_of_ranks(kind, replicas):
    """The ranks as FSDP2 shards over them, on devices of this kind. All models share it: each new one of
    several replicas would make process groups, with buffers of their own.

    The model is sharded over the neighbouring ranks of a replica, and copied across replicas if there are
    several (HSDP): then weights are gathered within a node, and only gradients travel between nodes.
    """
    world = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(kind, (world,))
    ranks = [[*range(first, first + world // replicas)] for first in range(0, world, world // replicas)]
    # init_device_mesh would make groups that wait for ten minutes only.
    groups = [dist.new_subgroups_by_enumeration([*map(list, rows)], timeout=TIMEOUT)[0]
              for rows in (zip(*ranks, strict=True), ranks)]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("copy", "shard"))


class ShardedModel:
    """A module sharded over all ranks, with AdamW. Subclasses define a forward that takes a list of b items,
    which may be empty: every rank must run the module, or the others would wait for it.

    Weights, gradients and optimiser state are float32 shards; compute is in `dtype`. With `offload="all"`
    they are in host memory; with "between", they are there except inside `with model.on_device():`.
    """

    def __init__(self, module, device, *, lr, weight_decay=0.01, max_grad_norm=1.0,
                 dtype="bfloat16", micro_batch_tokens=18432, checkpoint_activations=True, offload="none",
                 replicas=1):
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        self.device, self.max_grad_norm, self.micro_batch_tokens = device, max_grad_norm, micro_batch_tokens
        self.dtype, self.offload = getattr(torch, dtype), offload
        self.is_on_device, self.on_host = True, {}  # with offload="between", the weights move
        backbone = next(m for m in module.modules() if hasattr(m, "_no_split_modules"))
        if offload == "all" and device.type == "cuda":
            use_all_cores()
        mesh = mesh_of_ranks(device.type, replicas)
        precision = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        where = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload == "all" else OffloadPolicy()
        # One transformer block at a time, and then the rest: a whole model in float32 might not fit on a GPU.
        # `_no_split_modules` is transformers' list of layer classes that must not be cut: its blocks.
        names = set(backbone._no_split_modules or ())
        blocks = [part for part in module.modules() if type(part).__name__ in names]
        # Evaluation mode, without dropout and whatever else is random: pi_old and pi must agree.
        self.module = module.eval()
        for part in blocks if checkpoint_activations else ():  # transformers' own switch needs training mode
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
        for part in [*blocks, module]:
            broadcast_from_rank_0(part, device)
            fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=where)
        self.backbone = backbone.base_model
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        # Adam's moments are made here. The first step would put them between activations, and memory around
        # them could not be given to vLLM.
        for p in self.module.parameters():
            self.optimizer.state[p].update(step=torch.zeros((), device=p.device),
                                           exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        self.size = sum(p.numel() for p in module.parameters())
        self.num_updates, self.skipped_in_a_row = 0, 0  # optimiser steps
        self.totals = {}  # loss and metrics of the mini-batch so far, on this rank
        if offload == "between":
            self._move("cpu")

    # ---- where the weights are ----

    def _move(self, device, optimizer=True):
        """Moves parameters (and optimiser state) to `device`. FSDP2 allows this, and the parameters stay the
        same objects, so that the optimiser still knows them.

        Host memory is pinned and kept: a GPU copies to it two to four times as fast as to newly made memory.
        """
        on_gpu = self.device.type == "cuda"

        def moved(tensor, key):
            if device != "cpu":
                return tensor.to(device, non_blocking=True)
            if key not in self.on_host:
                self.on_host[key] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
            return self.on_host[key].copy_(tensor, non_blocking=True).detach()  # the same memory

        with torch.no_grad():
            # As Module.to does. Other tensors than parameters are small.
            self.module._apply(lambda t: moved(t, id(t)) if isinstance(t, nn.Parameter) else t.to(device))
            for parameter, state in self.optimizer.state.items() if optimizer else ():
                state.update({name: moved(t, (id(parameter), name)) for name, t in state.items()})
        if device == "cpu" and on_gpu:
            torch.cuda.synchronize()
        self.is_on_device = device != "cpu"

    @contextlib.contextmanager
    def on_device(self, optimizer=True):
        """With offload="between", the model is on the device inside this `with`, and on the host before and
        after. Otherwise nothing happens. optimizer: move the optimiser state too, which `step` needs."""
        if self.offload != "between" or self.is_on_device:
            yield
            return
        self._move(self.device, optimizer)
        yield
        self._move("cpu", optimizer)

    # ---- one optimiser step ----

    def micro_batches(self, lengths):
        """Yields this rank's micro-batches of a mini-batch, lists of row numbers, as the function
        `micro_batches` above cuts them."""
        batches = micro_batches(lengths, self.micro_batch_tokens)
        for i, rows in enumerate(batches, 1):
            # HSDP adds up the gradients of all replicas once, in the backward of the last micro-batch.
            self.module.set_requires_all_reduce(i == len(batches))
            yield rows
            progress.add(len(rows), sum(lengths[row] for row in rows))

    def backward(self, loss, metrics):
        """Adds the gradient of one micro-batch. Losses and metrics of all micro-batches and ranks are added
        up, so each must already be divided by the whole mini-batch's count."""
        (loss * dist.get_world_size()).backward()  # FSDP averages gradients over ranks; the sum is wanted
        for name, value in {"loss": loss, **metrics}.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.detach().double()

    def step(self):
        """One AdamW step with the gradients since the last one. Returns the metrics, summed over ranks.

        An update that is not finite is skipped: nothing of it reaches the weights or the optimiser. After ten
        in a row, training has failed: this raises InputError.
        """
        values = torch.stack(list(self.totals.values())).cpu()
        dist.all_reduce(values)
        metrics = dict(zip(self.totals, values.tolist(), strict=True))
        self.totals = {}
        bound = self.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), bound).full_tensor().item()
        skip = not (math.isfinite(norm) and math.isfinite(metrics["loss"]))  # the same on every rank
        if not skip:
            self.num_updates += 1
            if self.offload == "all" and self.device.type == "cuda":
                use_all_cores()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        if self.skipped_in_a_row == 10:
            raise InputError(f"ten updates in a row were not finite (loss {metrics['loss']}, norm {norm}); "
                             "continue from a checkpoint with --resume and a lower --lr or --critic-lr")
        rate = self.optimizer.param_groups[0]["lr"]
        return {**metrics, "grad_norm": norm, "lr": rate, "skipped": float(skip)}

    # ---- without gradient ----

    @torch.no_grad()
    def infer(self, forward, items, lengths, shape):
        """forward(items) as a tensor of this shape, [B] or [B, T], on the CPU, the same on every rank.

        The ranks share the work. forward: takes a list of items, returns [b] or [b, up to T]. lengths: tokens
        of each item.
        """
        result = torch.zeros(shape)
        with self.on_device(optimizer=False):
            for rows in self.micro_batches(lengths):
                part = forward([items[row] for row in rows]).cpu().float()
                if part.dim() == 1:
                    result[rows] = part
                else:
                    result[rows, : part.shape[1]] = part  # 0 beyond the longest of these
        dist.all_reduce(result)  # each row was written by one rank and is 0 on the others
        return result

    def check_rows(self, model, longest):
        """Raises InputError unless what the model computes of a row is the same each time, and does not
        depend on the rows beside it. Dropout breaks the first. LongRoPE breaks the second: its frequencies
        depend on the longest row. model: its name. longest: tokens of the longest row that it will read."""
        ids, states = [3 + i % 50 for i in range(longest)], []
        row = torch.tensor(ids[:32])  # hidden states of this one are compared
        forward = self.backbone.forward

        def noted(*arguments, **options):  # no hook: vLLM makes some of transformers' classes skip them
            out = forward(*arguments, **options)
            states.append(out.last_hidden_state[0, : len(row)].float())
            return out
        self.backbone.forward = noted
        try:
            with torch.no_grad(), self.on_device(optimizer=False):
                for beside in ([], [torch.tensor(ids)], []):
                    rows = pad_sequence([row, *beside], batch_first=True).to(self.device)
                    self.module(rows, torch.arange(len(row) - 1, device=self.device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each architecture has its own way to fail
            raise InputError(f"{model}: it cannot be run here ({type(error).__name__}: {first_line(error)}); "
                             f"{ANOTHER_MODEL}") from error
        finally:
            self.backbone.forward = forward
        alone, beside, again = states
        exact = self.dtype == torch.float32  # in bfloat16, other shapes are rounded otherwise
        for other, bound, what in ((again, 1e-3, "is not the same when it is read again"),
                                   (beside, 1e-3 if exact else 0.1, "depends on the rows beside it")):
            change = ((other - alone).norm(dim=-1) / alone.norm(dim=-1)).mean().item()
            if not change <= bound:
                raise InputError(f"{model}: a row {what} (its hidden states change by {change:.1%}), and so "
                                 f"could not be trained on; {ANOTHER_MODEL}")

    # ---- checkpoints and the engine ----

    def state_dict(self):
        """Weights and Adam's moments, sharded, and counters. They are no copies: checkpoint.py
        writes or fills them."""
        self.module.reshard()  # after a forward without backward, the outermost parameters are still gathered
        state = {"updates": self.num_updates, "skipped_in_a_row": self.skipped_in_a_row}
        for name, parameter in self.module.named_parameters():
            state[f"{name}/weight"] = parameter.detach()
            state |= {f"{name}/{key}": moment for key, moment in self.optimizer.state[parameter].items()}
        return state

    def load_state_dict(self, state):
        """Restores what `state_dict` returned. checkpoint.py has filled the sharded tensors, which are the
        model's own. Adam's step counts are not sharded, so they are copied here."""
        for name, parameter in self.module.named_parameters():
            self.optimizer.state[parameter]["step"].copy_(state[f"{name}/step"])
        self.num_updates, self.skipped_in_a_row = state["updates"], state["skipped_in_a_row"]
