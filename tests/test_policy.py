"""Micro-batches, ranks, memory and saving change nothing about what is learned."""
import importlib.util
import random
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import run

import machine
import policy
import sharded
from cli import BUILTIN_MODEL
from critic import PromptCritic
from data import load_tokenizer
from engines import Response
from rollout import Batch
from sppo import TrainConfig, clipped_policy_loss, policy_step, rollout_weights
from tools.plan import LiveBytes


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_deal_every_row_once_and_equally_many_to_each_rank(seed, monkeypatch):
    rng = random.Random(seed)
    world, budget = rng.randint(1, 5), rng.randint(10, 200)
    lengths = [rng.randint(1, 120) for _ in range(rng.randint(1, 40))]
    shares = []
    for rank in range(world):
        monkeypatch.setattr(sharded.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(sharded.dist, "get_rank", lambda rank=rank: rank)
        shares.append(sharded.micro_batches(lengths, budget))
    assert sorted(row for share in shares for rows in share for row in rows) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for rows in (rows for share in shares for rows in share if len(rows) > 1):
        longest = max(lengths[row] for row in rows)
        assert longest * len(rows) <= budget
        assert min(lengths[row] for row in rows[budget // 8 // longest + 1 :] or rows[:1]) >= 0.8 * longest  # little padding


@pytest.fixture(scope="session")
def gradients(tmp_path_factory):
    """{(ranks, micro-batch budget): loss, metrics, gradients}; on 4 ranks, two replicas of two shards (HSDP)"""
    found = {}
    for ranks, replicas in ((1, 1), (2, 1), (4, 2)):
        output = tmp_path_factory.mktemp("gradients") / "g.pt"
        done = run("tests/gradients.py", output, 0, replicas, 10**6, 100, 150, ranks=ranks - 1 and ranks)
        assert done.returncode == 0, done.stderr
        found.update({(ranks, budget): result for budget, result in torch.load(output).items()})
    return found


@pytest.mark.xdist_group("gradients")
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradients_do_not_depend_on_micro_batches_or_ranks(gradients, per_token):
    which = [(1, 150), (2, 150), (4, 150)] if per_token else [(1, 10**6), (1, 100), (2, 100), (2, 10**6), (4, 100)]
    reference, *others = [gradients[w] for w in which]
    if not per_token:
        assert reference["micro_batches"] == [1]
        assert len(set(others[1]["micro_batches"])) == 2, "the two ranks should have unequal numbers of micro-batches"
    for other in others:
        same(other, reference)


@pytest.mark.xdist_group("gradients")
def test_replicas_add_up_their_gradients_once_for_all_micro_batches(gradients):
    """HSDP, two replicas of two ranks: as often with several micro-batches as with one."""
    several, one = gradients[4, 100], gradients[4, 10**6]
    assert max(several["micro_batches"]) > 1 and one["micro_batches"] == [1] * 4
    assert several["between_replicas"] == one["between_replicas"] > 0
    assert gradients[2, 100]["between_replicas"] == 0


def same(one, other):
    for name, value in other["metrics"].items():
        assert one["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, gradient in other["gradients"].items():
        assert far(one["gradients"][name], gradient) < 1e-4, name


def far(one, other):
    """How far apart two tensors are, by their size: sums of float32 in another order differ by some 1e-6, on any CPU."""
    return ((one - other).norm() / other.norm()).item()


def test_it_is_compiled_for_gpus_where_there_is_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/some")
    monkeypatch.setattr(machine.os.path, "exists", lambda _: True)
    for gpu in (False, True):
        monkeypatch.setattr(machine.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert machine.compiles() == gpu
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not machine.compiles()


def test_attention_on_a_gpu_has_few_shapes_and_the_same_result(monkeypatch):
    """Lengths are padded for cuDNN; outputs and gradients are as without."""
    torch.manual_seed(0)
    seen, sdpa = [], machine.F.scaled_dot_product_attention

    def recorded(query, key, value, **options):
        seen.append((query.shape[2], key.shape[2], value.shape[2]))
        return sdpa(query, key, value, **options)
    monkeypatch.setattr(machine.F, "scaled_dot_product_attention", recorded)
    for length in (5, 256, 300):
        inputs = [torch.randn(2, heads, length, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
        results = []
        for cuda in (False, True):
            monkeypatch.setattr(torch.Tensor, "is_cuda", cuda)
            out, _ = machine.causal_attention(None, *inputs, None, 0.3)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for plain, padded in zip(*results, strict=True):
            assert plain.shape == padded.shape and far(padded.float(), plain.float()) < 0.02
    assert seen[1::2] == [(256,) * 3, (256,) * 3, (512,) * 3] and seen[0] == (5,) * 3


def test_fused_kernels_are_used_on_a_gpu_where_they_are_installed(device, monkeypatch):
    given = []
    library = SimpleNamespace(_apply_liger_kernel_to_instance=lambda model, **options: given.append((model, options)))
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", library)
    find = importlib.util.find_spec
    for gpu, installed in ((False, True), (True, False), (True, True)):
        monkeypatch.setattr(machine, "compiles", lambda gpu=gpu: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest, installed=installed: (
            installed if name == "liger_kernel" else find(name, *rest)))
        lm = machine.load("AutoModelForCausalLM", BUILTIN_MODEL, False)
        assert given == ([(lm, {"fused_linear_cross_entropy": False})] if gpu and installed else [])


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
@pytest.mark.xdist_group("gradients")
def test_compiled_it_is_the_same(gradients, tmp_path):
    """With checkpointed activations."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    if not pick_vec_isa():
        pytest.skip("for a CPU without AVX2 torch 2.13 writes C++ that no compiler takes")
    done = run("tests/gradients.py", tmp_path / "g.pt", 1, 1, 100)
    assert done.returncode == 0, done.stderr
    for budget, result in torch.load(tmp_path / "g.pt").items():
        assert result["compiled"]
        same(result, gradients[1, budget])


def test_a_response_without_an_advantage_is_not_read_again_and_counts(device):
    """Against the loss of all rows, whole."""
    rng = random.Random(0)
    ours = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32", max_grad_norm=1e9)
    responses = [Response([rng.randrange(256) for _ in range(n)], [-1.0] * n, True) for n in (7, 4, 9, 5)]
    batch = Batch([None] * 4, [[1, 2, 3], [4, 5], [6], [7, 8]], responses, torch.zeros(4))
    batch.old_logprobs = ours.logprobs(batch.sequences) + 0.3 * torch.randn(batch.mask.shape)
    advantages, read, forward, found = torch.tensor([0.0, 1.0, 0.0, -2.0]), [], ours.forward, {}
    ours.optimizer.step = lambda: found.update((name, p.grad.full_tensor()) for name, p in ours.module.named_parameters())
    ours.forward = lambda sequences: read.extend(sequences) or forward(sequences)
    policy_step(ours, batch, range(4), advantages, TrainConfig(loss_mean="token"))
    assert sorted(read) == sorted([batch.sequences[1], batch.sequences[3]])
    loss, _ = clipped_policy_loss(forward(batch.sequences)[0], batch.old_logprobs, advantages, batch.mask)
    loss.backward()
    # All of it at once: some parts are a thousand times smaller than others, and have their rounding.
    whole = torch.cat([parameter.grad.full_tensor().flatten() for parameter in ours.module.parameters()])
    assert far(torch.cat([gradient.flatten() for gradient in found.values()]), whole) < 1e-4
    ours.optimizer.zero_grad()
    metrics = policy_step(ours, batch, range(4), torch.zeros(4), TrainConfig(loss_mean="token"))
    assert not metrics["policy/skipped"] and not any(gradient.any() for gradient in found.values())


def test_rollout_correction_reaches_the_gradient(device):
    """Of a mini-batch in two micro-batches, against the weighed loss of all rows, whole."""
    rng = random.Random(0)
    ours = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32", max_grad_norm=1e9, micro_batch_tokens=16)
    responses = [Response([rng.randrange(256) for _ in range(n)], [-1.0] * n, True) for n in (12, 4, 3)]
    batch, advantages, found = Batch([None] * 3, [[1, 2], [4], [6]], responses, torch.zeros(3)), torch.tensor([-1.0, 1.0, 2.0]), {}
    batch.rollout_logprobs = ours.logprobs(batch.sequences) + 0.5 * torch.randn(batch.mask.shape)
    ours.optimizer.step = lambda: found.update((name, p.grad.full_tensor()) for name, p in ours.module.named_parameters())
    metrics = policy_step(ours, batch, range(3), advantages, TrainConfig(rollout_correction=1.2, loss_mean="token"))
    logprobs, _ = ours.forward(batch.sequences)
    weights = rollout_weights(logprobs, batch.rollout_logprobs, batch.mask, 1.2)
    loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), weights * advantages[:, None], batch.mask)
    loss.backward()
    whole = torch.cat([parameter.grad.full_tensor().flatten() for parameter in ours.module.parameters()])
    assert far(torch.cat([gradient.flatten() for gradient in found.values()]), whole) < 1e-4
    share = ((logprobs - batch.rollout_logprobs)[batch.mask].exp() > 1.2).double().mean().item()
    assert 0 < share < 1 and metrics["policy/rollout_truncated"] == pytest.approx(share)
    assert "policy/rollout_truncated" not in policy_step(ours, batch, range(3), advantages, TrainConfig(loss_mean="token"))


@pytest.mark.parametrize("ranks, replicas, offload, tied", [(3, 1, "offload", True), (4, 2, "", False)])
def test_only_rank_0_reads_the_weights(tmp_path, ranks, replicas, offload, tied):
    """The others are given a folder without any. Three ranks have unequal shards; two replicas on four ranks: HSDP."""
    from transformers import AutoConfig, AutoModelForCausalLM
    for name in ("weights", "none"):
        shutil.copytree(BUILTIN_MODEL, tmp_path / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = AutoConfig.from_pretrained(BUILTIN_MODEL)
    config.num_hidden_layers, config.layer_types = 16, ["full_attention"] * 16
    config.tie_word_embeddings, config.dtype = tied, torch.bfloat16
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "weights")
    (tmp_path / "none" / "model.safetensors").unlink()
    config.save_pretrained(tmp_path / "none")
    done = run("tests/starting.py", tmp_path, tmp_path / "weights", tmp_path / "none", replicas, offload, ranks=ranks)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got["save_dtype"] == torch.bfloat16 and got["tied"] == tied
        assert {*got["waits"]} == {7200}  # seconds; torch's own groups would wait for 30 minutes, on GPUs for 10
        assert got["ranks"] == ([[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]] if replicas == 2 else [[0, 1, 2]])
        base = model.base_model
        for ours, theirs in ((got["weights"], model.named_parameters()), (got["critic"], base.named_parameters()),
                             (got["buffers"], model.named_buffers()),  # rotary frequencies: in no file
                             (got["critic_buffers"], base.named_buffers())):
            theirs = dict(theirs)
            assert ours.keys() == theirs.keys() and ours
            assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
        assert not any(part.any() for part in got["head"])
        if rank and replicas == 1:
            assert got["peak"] < 0.75 * got["size"]  # half of it for good, and a layer or two on their way


def test_offload_between_moves_one_model_at_a_time_and_changes_nothing(device, monkeypatch):
    """On a CPU they are made too, into memory that is made once."""
    moves, move = [], sharded.ShardedModel._move
    monkeypatch.setattr(sharded.ShardedModel, "_move", lambda model, where, *more: moves.append(
        (type(model).__name__, "to host" if where == "cpu" else "to device")) or move(model, where, *more))
    prompts, rng = [[1, 2, 3], [4, 5]], random.Random(0)
    responses = [Response([rng.randrange(256) for _ in range(n)], [-1.0] * n, True) for n in (7, 4)]

    def train(between):
        options = dict(lr=1e-3, dtype="float32", checkpoint_activations=False, offload="between" if between else "none")
        ours = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, **options)
        critic = PromptCritic(BUILTIN_MODEL, device, minibatch=2, **options)
        batch = Batch([None] * 2, prompts, responses, torch.tensor([0.0, 1.0]))
        for _ in range(2):
            batch.old_logprobs = ours.logprobs(batch.sequences)
            logits = critic.logits(prompts)
            with ours.on_device():
                for _ in range(2):
                    policy_step(ours, batch, range(2), torch.tensor([-1.0, 1.0]), TrainConfig(loss_mean="token"))
            critic.update(prompts, batch.rewards)
            weights = dict(ours.weights())
            places.append([p.to_local().data_ptr() for p in ours.module.parameters()])
        return [logits, *weights.values(), *(tensor.full_tensor() for model in (ours, critic) for name, tensor in model.state_dict().items()
                                          if name.endswith(("weight", "avg", "avg_sq")))]

    places = []
    without, none = train(False), moves.copy()
    with_it = train(True)
    assert places[2] == places[3] and len({*places[3]}) == len(places[3])
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True)) and not none
    a, b = "Policy", "PromptCritic"
    assert moves == [(a, "to host"), (b, "to host")] + 2 * [
        (a, "to device"), (a, "to host"), (b, "to device"), (b, "to host"),  # they infer
        (a, "to device"), (a, "to host"), (b, "to device"), (b, "to host")]  # they learn; and the engine gets the weights


def test_a_model_that_moves_takes_everything_along(device):
    """Here to `meta`, the one other device that every machine has."""
    trained = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32")
    batch = Batch([None], [[1, 2]], [Response([3, 4, 5], [-1.0] * 3, True)], torch.ones(1))
    policy_step(trained, batch, range(1), torch.ones(1), TrainConfig(loss_mean="token"))
    before = [*trained.module.parameters()]
    trained._move("meta")
    after, known = [*trained.module.parameters()], trained.optimizer.param_groups[0]["params"]
    assert all(p.to_local().is_meta for p in after)
    assert all(a is b is c for a, b, c in zip(before, after, known, strict=True))  # or the optimiser would step elsewhere
    moments = [tensor for p in after for tensor in trained.optimizer.state[p].values()]
    assert len(moments) == 3 * len(after) and all(tensor.is_meta for tensor in moments)


def peak(tokens, how):
    hidden, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(50_000, 32, requires_grad=True)
    targets = torch.randint(50_000, (tokens,))
    with LiveBytes() as memory:
        if how == "chunked":
            logprobs, _ = policy.ChunkedLogProbs.apply(hidden, weight, targets, 0.6)
        else:
            logprobs = (hidden @ weight.T / 0.6).log_softmax(-1).gather(1, targets[:, None])
        logprobs.sum().backward()
    return memory.peak / 2**20


def test_memory_of_log_probabilities_does_not_grow_with_vocabulary_times_length(monkeypatch):
    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", 1 << 22)
    grown = {how: peak(1500, how) - peak(500, how) for how in ("chunked", "whole")}
    print(f"\n1,000 more tokens of a 50,000 vocabulary cost {grown['chunked']:.1f} MiB chunked, {grown['whole']:.1f} whole")
    one_copy_of_the_logits = 1000 * 50_000 * 4 / 2**20
    assert grown["whole"] > one_copy_of_the_logits
    assert grown["chunked"] < one_copy_of_the_logits / 100


def test_saved_folder_is_the_same_model_for_transformers(tmp_path, device):
    from transformers import AutoModelForCausalLM
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    trained = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32", checkpoint_activations=False)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.mul_(1.01)
    prompt, response = tokenizer.encode("1+2="), tokenizer.encode("3<|end|>")
    ours = trained.logprobs([(prompt, response)])[0]
    trained.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    logprobs = loaded(torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
    theirs = [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-4)
