"""A model under FSDP with its optimiser, and the policy: the causal LM that is trained.

Three ideas carry this file:

1. Every rank knows the whole batch (token ids are small). `micro_batches` cuts it into shares and budgets without a
   word between ranks, and so that all of them run equally many: FSDP's collectives would hang otherwise.
2. The loss divides by token counts of the *whole* mini-batch, so neither the cut nor the number of ranks changes it.
3. Log-probabilities of a 152k vocabulary are computed in chunks, and again in the backward: never all logits at once.
"""
import contextlib
import ctypes
import functools
import math
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM

from data import InputError
from pretrained import deal_out, load

OUTPUT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")  # Gemma, Cohere, ...
CHUNK_ELEMENTS = 1 << 26  # logits in flight: 256 MiB in float32, 440 tokens of a 152k vocabulary
BUCKET_ELEMENTS = 1 << 27  # weights that are gathered at once, or one parameter that has more: 256 MiB in bfloat16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Diverged(Exception):
    """Training has produced nothing but infinities for a while."""


# ---- processes ------------------------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def init_distributed() -> torch.device:
    """Joins torchrun's process group; without torchrun, one process is a world of one. Returns this rank's device."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "cpu:gloo"
        with contextlib.suppress(AttributeError, OSError):  # glibc keeps large tensors' memory, or each faults it in again
            for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
                ctypes.CDLL(None).mallopt(option, 2**31 - 1)
    # Ranks wait for the slowest rollout, which may take many minutes.
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def micro_batches(lengths, budget):
    """Cuts rows into micro-batches of at most `budget` tokens, padding included, and deals them to the ranks.

    lengths: tokens of every row of the mini-batch, the same list on every rank.
    Returns this rank's list of lists of row numbers. All ranks get equally many lists; some may be empty. Rows are
    sorted by length, so that little padding is left; in a micro-batch that is an eighth full, none is padded by more than
    a fifth. A row longer than the budget gets a micro-batch of its own.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    shares = []
    for r in range(world):
        batches = []
        for row in by_length[r::world]:
            rows = batches[-1] if batches else []
            longest = lengths[rows[0]] if rows else budget + 1
            few = longest * len(rows) < budget // 8  # cutting has a price: each micro-batch gathers the weights anew
            if longest * (len(rows) + 1) <= budget and (few or lengths[row] >= 0.8 * longest):
                rows.append(row)
            else:
                batches.append([row])
        shares.append(batches)
    most = max(map(len, shares))
    return shares[rank] + [[]] * (most - len(shares[rank]))


# ---- compiling ------------------------------------------------------------------------------------------------------

@functools.cache
def compiled(function):
    """`function`, compiled once for tensors of all lengths."""
    return torch.compile(function, dynamic=True)


def compile_block(block):
    """torch.compile for all of a transformer block but its attention: of that, Inductor makes slow code on a CPU, where
    softmax and the rotation of queries and keys have no whole vectors (measured in README)."""
    for name, part in block.named_children():
        if "attn" in name or "attention" in name:
            part.forward = torch.compiler.disable(part.forward)
    block.forward = torch.compile(block.forward, dynamic=True)  # lengths differ from batch to batch


# ---- log-probabilities ----------------------------------------------------------------------------------------------

class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[targets], and its entropy, without the [N, V] logits.

    hidden [N, H], weight [V, H], targets [N] -> logprobs [N], entropy [N] (a metric: no gradient flows through it).
    """

    @staticmethod
    def scaled(logits, temperature):
        # Not in place: Inductor (2.13) fails on a float32 `div_` here.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    @staticmethod
    def chosen(logits, targets, temperature):
        """[n, V], [n] -> log-probabilities of the targets [n], entropies [n]."""
        every = ChunkedLogProbs.scaled(logits, temperature).log_softmax(-1)
        return every.gather(-1, targets[:, None])[:, 0], -torch.linalg.vecdot(every, every.exp())

    @staticmethod
    def weighted_softmax(logits, factors, temperature):
        """[n, V], [n] -> each row's probabilities by its factor [n, V], rounded to the logits' type."""
        probabilities = ChunkedLogProbs.scaled(logits, temperature).softmax(-1)
        return torch.mul(probabilities, factors[:, None], out=torch.empty_like(probabilities, dtype=logits.dtype))

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, compile=False):
        ctx.temperature, ctx.rows = temperature, max(1, CHUNK_ELEMENTS // weight.shape[0])
        ctx.compiled = compiled if compile else lambda function: function
        parts = [ctx.compiled(ChunkedLogProbs.chosen)(h @ weight.T, target.clone(), temperature)  # views compile anew
                 for h, target in zip(hidden.split(ctx.rows), targets.split(ctx.rows), strict=True)]
        logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, logprobs)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logprobs = ctx.saved_tensors
        grad_hidden, grad_weight, grad = torch.empty_like(hidden), torch.zeros_like(weight), grad / ctx.temperature
        # d logprob[target] / d logits = (onehot(target) - softmax) / temperature
        of_target = (grad * (1 - logprobs.exp())).to(hidden.dtype)
        for i in range(0, len(hidden), ctx.rows):
            chunk = slice(i, i + ctx.rows)
            d_logits = ctx.compiled(ChunkedLogProbs.weighted_softmax)(hidden[chunk] @ weight.T, -grad[chunk], ctx.temperature)
            d_logits.scatter_(-1, targets[chunk, None], of_target[chunk, None])
            grad_hidden[chunk] = d_logits @ weight
            grad_weight.addmm_(d_logits.T, hidden[chunk])  # rounds to the weight's type once a chunk
        return grad_hidden, grad_weight, None, None, None


class LogProbModel(nn.Module):
    """A causal LM that answers with the log-probabilities of given tokens. The output layer is applied in here, inside
    the forward that FSDP knows of, so that its weight is gathered when it is needed."""

    def __init__(self, lm, compile=False):
        super().__init__()
        self.lm, self.compile_logprobs = lm, compile

    def forward(self, ids, scored, temperature):
        """ids [b, L] right-padded; scored [n]: places in ids.flatten(), whose next token is predicted -> logprobs, entropy [n].
        No attention mask: nothing attends to padding that stands on its right, and the fast causal kernel applies."""
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weight = self.lm.get_output_embeddings().weight
        return ChunkedLogProbs.apply(hidden.flatten(0, 1)[scored], weight, ids.flatten()[scored + 1], temperature,
                                     self.compile_logprobs)


def pad(sequences, device):
    """(prompt ids, response ids) pairs as tensors: ids [b, L] right-padded; `scored` [mask.sum()], the places in ids.flatten()
    from which the response's tokens were chosen (the prompt's last token is the first); mask [b, T], T the longest response.
    Places and not a mask: to select by a mask, the host waits for the GPU to count it."""
    sequences = sequences or [([0, 0], [])]  # for a rank that only keeps others company
    length = max(len(p) + len(r) for p, r in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros(len(sequences), max(len(r) for _, r in sequences), dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[i, : len(response)] = True
    scored = torch.cat([torch.arange(len(r)) + i * length + len(p) - 1 for i, (p, r) in enumerate(sequences)])
    return ids.to(device), scored.to(device), mask.to(device)


def unflatten(flat, mask):
    """[mask.sum()] -> [b, T], 0 outside the mask, whose places `pad`'s `scored` names row by row."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


# ---- training -------------------------------------------------------------------------------------------------------

class Trained:
    """A module sharded by FSDP2, with AdamW: what the policy and the critics have in common.

    Weights, gradients and optimiser state are float32 shards; compute is in `dtype`. With `offload_between` they are on the
    host, but for those of one model at a time: the one that is being optimised, until another is or the policy's weights are
    asked for; or, without its optimiser, the one that infers.
    """

    resident = None  # that model

    def __init__(self, module, device, *, lr, weight_decay=0.01, warmup_steps=0, max_grad_norm=1.0, dtype="bfloat16",
                 micro_batch_tokens=16384, checkpoint_activations=True, offload=False, offload_between=False,
                 replicas=1, compile=False):
        self.device, self.max_grad_norm, self.micro_batch_tokens = device, max_grad_norm, micro_batch_tokens
        self.offload_between = offload_between
        self.dtype = getattr(torch, dtype)
        backbone = next(m for m in module.modules() if hasattr(m, "_no_split_modules"))
        if checkpoint_activations:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        options = dict(
            # Sharded within a replica's neighbouring ranks, and copied across replicas (HSDP) if there are several: then
            # weights are gathered within a node, and only gradients cross between nodes.
            mesh=init_device_mesh(device.type, (replicas, dist.get_world_size() // replicas), mesh_dim_names=("copy", "shard"))
            if replicas > 1 else init_device_mesh(device.type, (dist.get_world_size(),)),
            mp_policy=MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy())
        blocks = set(backbone._no_split_modules or ())
        for part in [*(m for m in module.modules() if type(m).__name__ in blocks), module]:
            if compile and type(part).__name__ in blocks:
                compile_block(part)
            deal_out(part, device)  # one block at a time, and then the rest: a whole model in float32 might not fit
            fully_shard(part, **options)
        # Training mode, or transformers would not checkpoint activations; but no dropout: pi_old and pi must agree.
        self.module = module.train()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.0
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.size = sum(p.numel() for p in module.parameters())
        self.lr, self.warmup_steps, self.updates, self.skipped_in_a_row = lr, warmup_steps, 0, 0
        if offload_between:
            self.move("cpu")

    def move(self, device):
        """Takes parameters and optimiser state to `device`. FSDP's modules are made to be moved; the optimiser knows the
        same parameters afterwards."""
        self.module.to(device)
        for state in self.optimizer.state.values():
            state.update({name: tensor.to(device) for name, tensor in state.items()})

    @classmethod
    def to_host(cls):
        """With offload_between, frees the device of the model that is there."""
        if Trained.resident:
            Trained.resident.move("cpu")
        Trained.resident = None

    def to_device(self):
        """With offload_between, takes this model to the device, after the one that is there has left."""
        if self.offload_between and Trained.resident is not self:
            self.to_host()
            self.move(self.device)
            Trained.resident = self

    def optimize(self, lengths, loss_of):
        """One optimiser step. `loss_of(rows) -> (loss, metrics)` of one micro-batch, whose sums over all micro-batches
        and ranks are the loss and the metrics of the mini-batch; `rows` may be empty. Returns the summed metrics.

        An update that is not finite is skipped: nothing of it reaches the weights or the optimiser. After ten in a row
        this raises Diverged."""
        self.to_device()
        totals = {}
        for rows in micro_batches(lengths, self.micro_batch_tokens):
            loss, metrics = loss_of(rows)
            (loss * dist.get_world_size()).backward()  # FSDP averages gradients over ranks; the sum is wanted
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        values = torch.tensor(list(totals.values()), dtype=torch.float64)
        dist.all_reduce(values)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).full_tensor().item()
        totals = dict(zip(totals, values.tolist(), strict=True))
        skip = not (math.isfinite(norm) and math.isfinite(totals["loss"]))  # the same on every rank
        if not skip:
            self.updates += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, self.updates / max(1, self.warmup_steps))
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        if self.skipped_in_a_row == 10:
            raise Diverged(f"ten updates in a row were not finite (loss {totals['loss']}, gradient norm {norm})")
        return {**totals, "grad_norm": norm, "skipped": float(skip)}

    @torch.no_grad()
    def infer(self, lengths, width, score):
        """`score(rows)` [b, up to `width`] of all rows, as [B, width] on the CPU, the same on every rank; they share the
        work. `rows` may be empty, as in `optimize`."""
        result, visits = torch.zeros(len(lengths), width), self.offload_between and Trained.resident is not self
        if visits:
            self.to_host()
            self.module.to(self.device)
        for rows in micro_batches(lengths, self.micro_batch_tokens):
            part = score(rows)
            if rows:
                result[rows, : part.shape[1]] = part.cpu().float()
        if visits:
            self.module.to("cpu")
        dist.all_reduce(result)  # each row was written by one rank
        return result

    def state_dict(self):
        """Weights and Adam's moments, sharded, and counters: the tensors themselves, for checkpoint.py to write or fill."""
        self.module.reshard()  # after a forward without backward, the outermost parameters are still gathered
        state = {}
        for name, parameter in self.module.named_parameters():
            moments = self.optimizer.state[parameter]
            if not moments:  # before the first step
                moments.update(step=torch.zeros((), device=parameter.device), exp_avg=torch.zeros_like(parameter),
                               exp_avg_sq=torch.zeros_like(parameter))
            state[name] = {"weight": parameter.detach(), **moments}
        return {"parameters": state, "updates": self.updates, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state):
        """What `state_dict` gave. Its sharded tensors are ours, and filled already."""
        for name, parameter in self.module.named_parameters():
            self.optimizer.state[parameter]["step"].copy_(state["parameters"][name]["step"])
        self.updates, self.skipped_in_a_row = state["updates"], state["skipped_in_a_row"]


def gathered(parameters, device, dtype):
    """(name, full tensor) of each (name, parameter) that FSDP has sharded. One collective gathers a bucket of them."""
    buckets, room = [], 0
    for name, p in parameters:
        if p.numel() > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        room -= p.numel()
        buckets[-1].append((name, p.detach()))
    for bucket in buckets:
        mesh = bucket[0][1].device_mesh
        ranks = mesh.size(mesh.ndim - 1)  # of one replica
        if ranks == 1:  # nothing to gather, so nothing to copy together
            yield from ((name, p.to_local().to(device, dtype)) for name, p in bucket)
            continue
        # Each rank has as many rows of a parameter, but for the last ones, which may have fewer or none.
        sizes = [math.ceil(p.shape[0] / ranks) * (p.numel() // p.shape[0]) for _, p in bucket]
        mine = torch.empty(sum(sizes), dtype=dtype, device=device)
        for (_, p), part in zip(bucket, mine.split(sizes), strict=True):
            part[: p.to_local().numel()].copy_(p.to_local().flatten())
        every = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(every, mine, group=mesh.get_group(mesh.ndim - 1))
        for (name, p), parts in zip(bucket, zip(*(shard.split(sizes) for shard in every), strict=True), strict=True):
            yield name, torch.cat(parts)[: p.numel()].view(p.shape)


class Policy(Trained):
    """The causal LM `model` (hub name or folder), sampled at `temperature`: so its log-probabilities are, too."""

    def __init__(self, model, device, *, temperature, trust_remote_code=False, compile=False, **options):
        lm = load(AutoModelForCausalLM, model, trust_remote_code)
        head = lm.get_output_embeddings()
        if head.bias is not None or any(getattr(lm.config, key, None) for key in OUTPUT_SCALES):
            raise InputError(f"{model}: its output layer has a bias, a scale or soft-capping, which policy.py's "
                             "chunked log-probabilities do not compute; use a model without (Qwen, Llama, Mistral)")
        if lm.generation_config is not None:
            lm.generation_config.do_sample = True  # with a temperature and without this, it could not be saved
        saved = [lm.dtype]  # the checkpoint's, which rank 0 knows
        dist.broadcast_object_list(saved)
        self.save_dtype, self.temperature = saved[0], temperature
        super().__init__(LogProbModel(lm, compile), device, compile=compile, **options)

    def score(self, sequences):
        """Log-probabilities and entropies of responses under the current weights, with gradient.

        sequences: list of (prompt ids, response ids); may be empty.
        Returns logprobs, entropy [b, T], T the longest response here; 0 beyond a response's end.
        """
        ids, scored, mask = pad(sequences, self.device)
        return tuple(unflatten(flat, mask) for flat in self.module(ids, scored, self.temperature))

    def logprobs(self, sequences):
        """Log-probabilities [B, T] of all responses, without gradient, on the CPU, the same on every rank."""
        return self.infer([len(p) + len(r) for p, r in sequences], max(len(r) for _, r in sequences),
                          lambda rows: self.score([sequences[row] for row in rows])[0])

    def weights(self, dtype=None):
        """Iterator of (Hugging Face name, full tensor) of every parameter, gathered a bucket at a time: a large model is never
        there in full."""
        self.to_host()  # at once, and not when the first is asked for: the engine wakes before
        self.module.reshard()  # after a forward without backward, the outermost parameters are still gathered
        return gathered(self.module.lm.named_parameters(), self.device, dtype or self.dtype)

    def save(self, folder):
        """Writes a Hugging Face folder that transformers and vLLM load. All ranks must call it."""
        state = {name: tensor.cpu() for name, tensor in self.weights(self.save_dtype) if dist.get_rank() == 0}
        if dist.get_rank() == 0:
            self.module.lm.config.dtype = self.save_dtype
            self.module.lm.save_pretrained(folder, state_dict=state)


if __name__ == "__main__":
    from plan import main  # python policy.py --plan MODEL: what each GPU will hold
    main()
