"""The policy: a causal language model that is trained, and the log-probabilities of its responses.

The loss needs log pi(y_t | s, y_<t) of every token of every response, with gradient. The logits of one token
are 152,000 numbers, and a response may have 8,192 tokens: 5 GB in float32 for a single response, and several
times that in the backward. So `ChunkedLogProbs` computes the logits in chunks, keeps only the log-probability
of the token that was sampled, and computes the chunks again in the backward.
"""
import functools
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from cli import InputError
from machine import ANOTHER_MODEL, checkpoint_tensors, compiles, first_line, from_rank_0, load, skeleton
from sharded import ShardedModel, pad, unflatten

# What Gemma, Cohere and others do to their logits, which `ChunkedLogProbs` does not.
OUTPUT_SCALES = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling",
                 "lm_head_multiplier")
CHUNK_ELEMENTS = 1 << 26  # logits in flight: 256 MiB in float32, 440 tokens of a 152k vocabulary


# ---- log-probabilities -------------------------------------------------------------------------------------

@functools.cache
def compiled(function):
    """`function`, compiled once for tensors of all lengths. A GPU takes longer to read and write logits
    several times than to compute them. Compiled, it passes over them once."""
    return torch.compile(function, dynamic=True)


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[targets], and its entropy, without the [N, V] logits.

    hidden [N, H], weight [V, H], targets [N] -> logprobs [N], entropy [N] (a metric: no gradient flows
    through it; 0 without `with_entropy`). With `compile`, passes over a chunk of logits become one kernel.
    """

    @staticmethod
    def logits(hidden, weight):
        """hidden @ weight.T [n, V]. A GPU adds up in float32, and there the sums are not rounded to bfloat16.
        vLLM's are not either (engines.py). On a CPU, torch.mm has no out_dtype."""
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden @ weight.T

    @staticmethod
    def scaled(logits, temperature):
        # In float32: a softmax over 152,000 bfloat16 numbers is too inaccurate. (Not in place:
        # Inductor 2.13 fails on it.)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if temperature == 1 else logits / temperature

    @staticmethod
    def chosen(logits, targets, temperature, with_entropy):
        """[n, V], [n] -> log-probabilities of the targets [n], entropies [n]."""
        logprobs = ChunkedLogProbs.scaled(logits, temperature).log_softmax(-1)
        of_targets = logprobs.gather(-1, targets[:, None])[:, 0]
        if not with_entropy:  # it is another pass over the logits, for a metric
            return of_targets, torch.zeros_like(of_targets)
        return of_targets, -torch.linalg.vecdot(logprobs, logprobs.exp())

    @staticmethod
    def weighted_softmax(logits, factors, temperature, dtype):
        """[n, V], [n] -> each row's probabilities times its factor [n, V], rounded to `dtype`."""
        probabilities = ChunkedLogProbs.scaled(logits, temperature).softmax(-1)
        rounded = torch.empty_like(probabilities, dtype=dtype)
        return torch.mul(probabilities, factors[:, None], out=rounded)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, compile=False, with_entropy=True):
        ctx.temperature, ctx.rows = temperature, max(1, CHUNK_ELEMENTS // weight.shape[0])
        ctx.compiled = compiled if compile else lambda function: function
        chosen = ctx.compiled(ChunkedLogProbs.chosen)
        parts = [chosen(ChunkedLogProbs.logits(h, weight), target.clone(),  # a view is compiled anew
                        temperature, with_entropy)
                 for h, target in zip(hidden.split(ctx.rows), targets.split(ctx.rows), strict=True)]
        logprobs, entropies = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, logprobs)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):
        """d logprob[target] / d logits = (onehot(target) - softmax) / temperature, chunk by chunk. A row of
        logits gets -grad * p everywhere, and then grad * (1 - p) at the target."""
        hidden, weight, targets, logprobs = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # In float32: added up in bfloat16, chunk by chunk, it would be four times as far off as one rounding.
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        grad = grad / ctx.temperature
        of_target = (grad * (1 - logprobs.exp())).to(hidden.dtype)  # in bfloat16, 1 - p would round to 0
        weighted_softmax = ctx.compiled(ChunkedLogProbs.weighted_softmax)
        for i in range(0, len(hidden), ctx.rows):
            chunk = slice(i, i + ctx.rows)
            logits = ChunkedLogProbs.logits(hidden[chunk], weight)  # [n, V]
            d_logits = weighted_softmax(logits, -grad[chunk], ctx.temperature, hidden.dtype)
            d_logits.scatter_(-1, targets[chunk, None], of_target[chunk, None])
            grad_hidden[chunk] = d_logits @ weight
            if grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(d_logits.T, hidden[chunk])
            elif hidden.is_cuda:  # torch 2.10 and later add to float32 within the product
                torch.addmm(grad_weight, d_logits.T, hidden[chunk], out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight += d_logits.T @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


class LogProbModel(nn.Module):
    """A causal LM whose forward returns the log-probabilities of given tokens. It applies the output layer
    itself, since FSDP gathers that layer's weight only for this forward."""

    def __init__(self, lm, compile=False):
        super().__init__()
        self.lm, self.compile = lm, compile

    def forward(self, ids, scored, temperature=1.0):
        """ids [b, L] right-padded; scored [n]: positions in ids.flatten() whose next token is scored
        -> logprobs [n], entropy [n], which is 0 without gradient: then nobody reads it. No attention mask: a
        response's tokens see no padding on their right."""
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [b, L, H]
        weight = self.lm.get_output_embeddings().weight
        hidden, targets = hidden.flatten(0, 1)[scored], ids.flatten()[scored + 1]
        return ChunkedLogProbs.apply(hidden, weight, targets, temperature, self.compile,
                                     torch.is_grad_enabled())


# ---- the policy --------------------------------------------------------------------------------------------

def check_output_layer(model, trust_remote_code=False):
    """Raises InputError unless a model's log-probabilities are those that are computed here. Loads no
    weights."""
    lm = skeleton("AutoModelForCausalLM", model, trust_remote_code)
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    scales = [key for key in OUTPUT_SCALES if getattr(config, key, None) not in (None, 0, 1)]
    if head is None or head.bias is not None or scales:
        raise InputError(f"{model}: its output layer has {scales[0] if scales else 'a bias'}, which is not "
                         f"computed here; {ANOTHER_MODEL}")


class Policy(ShardedModel):
    """The causal LM `model` (hub name or folder), sampled at `temperature`.

    Its log-probabilities are those at this temperature too (logits / temperature): the ratio compares the
    distributions that responses are really drawn from.
    """

    def __init__(self, model, device, *, temperature, trust_remote_code=False, **options):
        check_output_layer(model, trust_remote_code)
        lm = load("AutoModelForCausalLM", model, trust_remote_code)
        if lm.generation_config is not None:
            lm.generation_config = savable(lm.generation_config)
        self.model, self.temperature = model, temperature
        self.save_dtype = from_rank_0(lambda: lm.dtype)  # the checkpoint's: other ranks have not read it
        super().__init__(LogProbModel(lm, compiles()), device, **options)

    def forward(self, sequences):
        """Log-probabilities and entropies of responses under the current weights, with gradient.

        sequences: list of (prompt ids, response ids); may be empty.
        Returns logprobs, entropy [b, T], T the longest response here; 0 beyond a response's end.
        """
        ids, scored, mask = pad(sequences, self.device)
        return tuple(unflatten(flat, mask) for flat in self.module(ids, scored, self.temperature))

    def logprobs(self, sequences):
        """Log-probabilities [B, T] of all responses, without gradient, on the CPU, the same on every rank."""
        width = max(len(response) for _, response in sequences)
        return self.infer(lambda rows: self.forward(rows)[0], sequences,
                          [len(p) + len(r) for p, r in sequences], (len(sequences), width))

    def check_engine(self, batch, engine, continued=False):
        """Reads again some of what `engine` has sampled with the present weights. Both should compute the
        same log-probabilities. Raises InputError if they differ by more than rounding: then the run would
        train on something else than it samples, and nothing else would show it. continued: some responses
        were begun by an earlier policy, as where a run resumes with --oversample."""
        first = [i for i, p in enumerate(batch.problems) if i == 0 or p is not batch.problems[i - 1]]
        rows = first[: max(16, dist.get_world_size())]  # of as many engines as there are
        ours = self.logprobs([batch.sequences[i] for i in rows])
        gaps = (ours - batch.rollout_logprobs[rows, : ours.shape[1]]).abs()[batch.mask[rows, : ours.shape[1]]]
        # Measured: 1e-6 in float32, 0.02 to 0.06 in bfloat16.
        bound = 0.02 if self.dtype == torch.float32 and not continued else 0.2
        if not gaps.mean() <= bound:
            raise InputError(
                f"{self.model}: the trainer's log-probabilities differ from those of {engine.name}, which "
                f"sampled, by {gaps.mean():.2g} per token, where rounding explains {bound} at most; try "
                "--engine transformers or --dtype float32, or choose another model")

    def weights(self, dtype=None):
        """Yields (transformers' name, full tensor) of all that a checkpoint holds, in turn: all at once might
        not fit."""
        from torch.distributed.tensor import DTensor
        self.module.reshard()  # after a forward without backward, the outermost parameters are still gathered
        for name, p in checkpoint_tensors(self.module.lm):
            if not isinstance(p, DTensor):  # a buffer: each rank has all of it, as float32
                yield name, p
                continue
            # The shard goes to the device first, where gathering is fast, and in `dtype`: fewer bytes travel.
            local = p.detach().to_local().to(self.device, dtype or self.dtype)
            shard = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            yield name, shard.full_tensor()

    def save(self, folder):
        """Writes a Hugging Face folder that transformers and vLLM load. All ranks must call it."""
        state = {name: tensor.cpu() for name, tensor in self.weights(self.save_dtype) if dist.get_rank() == 0}
        if dist.get_rank() == 0:
            self.module.lm.config.dtype = self.save_dtype
            self.module.lm.save_pretrained(folder, state_dict=state)

    def check_saving(self, tokenizer):
        """Raises InputError if something other than the disk would keep the trained model from being
        saved."""
        def problem():
            try:
                with tempfile.TemporaryDirectory() as folder:  # all but the weights
                    self.module.lm.save_pretrained(folder, state_dict={})
                    tokenizer.save_pretrained(folder)
            except Exception as error:  # each part has its own validator
                return f"{type(error).__name__}: {first_line(error)}"
        if found := from_rank_0(problem):
            raise InputError(f"{self.model}: could not be saved after training ({found}); correct its files")


def savable(generation):
    """A generation config without what keeps it from being saved: transformers reads settings that contradict
    each other, and then refuses to write them. It samples by default if a setting, such as a temperature,
    needs that."""
    kept = {}
    # Twice, since a setting may need one that comes later.
    for name, value in 2 * [*generation.to_diff_dict().items()]:
        for needed in ({}, {"do_sample": True}):
            try:
                trial = {**kept, name: value, **needed}
                type(generation)(**trial).validate(strict=True)
            except ValueError:
                continue
            kept = trial
            break
    return type(generation)(**kept)
