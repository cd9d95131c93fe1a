"""What is done for GPUs, as far as a machine without one can tell: with stand-ins for CUDA, vLLM and a terminal."""
import errno
import importlib.util
import io
import json
import logging
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import complaint, run

import checkpoint
import engines
import log
import machine
import policy
import sharded
from cli import BUILTIN_MODEL, InputError
from engines import Response, VLLMEngine
from eval import EvalConfig
from log import progress
from rollout import Batch
from sppo import TrainConfig, clipped_policy_loss, policy_step
from tools import bench, gpu
from tools.plan import PlanConfig
from tools.race import RaceConfig

# ---- starting ----------------------------------------------------------------------------------------------

def test_a_gpu_that_torch_cannot_use_is_one_clear_sentence(monkeypatch):
    """Not a run on the CPU, for which vLLM's build for CUDA is of no use."""
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="finds no GPU: the driver is probably too old for CUDA 13.0"):
        machine.init_distributed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants the CPU
    assert machine.init_distributed().type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)  # torch for CPUs was installed
    assert machine.init_distributed().type == "cpu"


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "mine"}, {"PYTORCH_ALLOC_CONF": "mine"}])
def test_what_is_set_before_cuda_starts(monkeypatch, given):
    seen = []
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "set_device", lambda _: seen.append(os.environ["PYTORCH_CUDA_ALLOC_CONF"]))
    monkeypatch.setattr(machine.dist, "init_process_group", lambda *_, **__: None)
    assert machine.init_distributed().type == "cuda"
    assert seen == ["mine" if given else "expandable_segments:True,pinned_max_round_threshold_mb:1"]


def test_offload_steps_with_this_ranks_share_of_the_cores(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(machine.torch, "set_num_threads", asked.append)
    for ranks in ("4", "32"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        machine.use_all_cores()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    machine.use_all_cores()
    assert asked == [4, 1, 16]


def test_only_offload_on_a_gpu_takes_the_cores(monkeypatch, device):
    """At each step, since vLLM starts after the models; on a CPU the number of threads is the user's."""
    asked = []
    monkeypatch.setattr(sharded, "use_all_cores", lambda: asked.append(True))

    def make(device, offload):
        return policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32", offload=offload)
    for offload, on, times in (("all", "cpu", 0), ("none", "cuda", 0), ("all", "cuda", 1)):
        ours = make(device, offload)
        batch = Batch([None], [[1, 2]], [Response([3, 4, 5], [-1.0] * 3, True)], torch.ones(1))
        loss, _ = clipped_policy_loss(ours.forward(batch.sequences)[0], batch.rollout_logprobs, batch.rewards, batch.mask)
        ours.backward(loss, {})
        ours.device = torch.device(on)
        ours.step()
        assert len(asked) == times


def test_models_share_one_mesh(device):
    assert sharded.mesh_of_ranks("cpu", 1) is sharded.mesh_of_ranks("cpu", 1)


# ---- memory ------------------------------------------------------------------------------------------------

def test_adams_moments_are_there_from_the_start_and_stay_where_they_are(device):
    ours = policy.Policy(BUILTIN_MODEL, device, temperature=1.0, lr=1e-3, dtype="float32")

    def places():
        return [state[name].to_local().data_ptr() for state in map(ours.optimizer.state.get, ours.module.parameters())
                for name in ("exp_avg", "exp_avg_sq")]
    before = places()
    assert len(before) == 2 * len([*ours.module.parameters()])
    batch = Batch([None], [[1, 2]], [Response([3, 4, 5], [-1.0] * 3, True)], torch.ones(1))
    policy_step(ours, batch, range(1), torch.ones(1), TrainConfig(loss_mean="token"))
    assert places() == before
    assert all(ours.optimizer.state[p]["exp_avg"].to_local().any() for p in ours.module.parameters())


# ---- log-probabilities -------------------------------------------------------------------------------------

def test_no_entropy_where_only_log_probabilities_are_asked_for(device, monkeypatch):
    asked, chosen = [], policy.ChunkedLogProbs.chosen
    monkeypatch.setattr(policy.ChunkedLogProbs, "chosen", staticmethod(
        lambda *arguments: asked.append(arguments[-1]) or chosen(*arguments)))
    ours = policy.Policy(BUILTIN_MODEL, device, temperature=0.7, lr=1e-3, dtype="float32")
    sequences = [([1, 2, 3], [4, 5]), ([1], [2, 3, 4])]
    without = ours.logprobs(sequences)
    with_entropy, entropy = ours.forward(sequences)
    assert asked == [False, True] and entropy.any()
    assert torch.equal(without, with_entropy.detach())
    with torch.no_grad():
        assert not ours.forward(sequences)[1].any()


def test_float32_logits_of_bfloat16_states(monkeypatch):
    """As on a GPU, with a product that a CPU has not: its gradients are still bfloat16, and near the exact ones."""
    monkeypatch.setattr(policy.ChunkedLogProbs, "logits", staticmethod(lambda h, w: h.float() @ w.float().T))
    hidden, weight, targets = torch.randn(40, 16), torch.randn(50, 16), torch.randint(50, (40,))
    half = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in half]
    logprobs, _ = policy.ChunkedLogProbs.apply(*half, targets, 0.6)
    reference = (exact[0] @ exact[1].T / 0.6).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert logprobs.dtype == torch.float32 and torch.allclose(logprobs.double(), reference, atol=1e-4)
    for result in (logprobs, reference):
        (result * torch.linspace(-1, 1, 40)).sum().backward()
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.double() - theirs.grad).norm() < 0.02 * theirs.grad.norm()


@pytest.mark.parametrize("gpu", [False, True])
def test_the_output_layers_gradient_is_added_up_in_float32(monkeypatch, gpu):
    """Of 64 chunks. In bfloat16, as the weights are, the sums would be 0.6 % off. On a GPU with a product that a CPU has not."""
    def addmm(total, a, b, out_dtype, out):
        assert total is out and out.dtype == out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        return out.add_(a.float() @ b.float())
    torch.manual_seed(0)
    monkeypatch.setattr(policy.ChunkedLogProbs, "logits", staticmethod(lambda h, w: h.float() @ w.float().T))
    monkeypatch.setattr(policy, "CHUNK_ELEMENTS", 16 * 500)
    monkeypatch.setattr(torch.Tensor, "is_cuda", gpu)
    monkeypatch.setattr(torch, "addmm", addmm)
    hidden, weight, targets, upstream = torch.randn(1024, 32), torch.randn(500, 32), torch.randint(500, (1024,)), torch.randn(1024)
    half = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in half]
    (policy.ChunkedLogProbs.apply(*half, targets, 1.0)[0] * upstream).sum().backward()
    ((exact[0] @ exact[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0] * upstream).sum().backward()
    off = ((half[1].grad.double() - exact[1].grad).norm() / exact[1].grad.norm()).item()
    print(f"\nthe output layer's gradient is {off:.2%} off")
    assert half[1].grad.dtype == torch.bfloat16 and off < 0.004


# ---- what is seen meanwhile, and where nothing can be locked -----------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rank, terminal, shown", [("0", Terminal, True), ("1", Terminal, False),
                                                   ("0", io.StringIO, False)])
def test_a_long_phase_shows_how_far_it_is(monkeypatch, rank, terminal, shown):
    screen = terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(log.tqdm, "monitor_interval", 0)
    with progress.phase("rollout", 8, delay=0, mininterval=0):
        for _ in range(3):
            progress.add(1, 50)
        during = screen.getvalue()
    assert ("rollout" in during and "3/8" in during and "tokens/s" in during) == shown
    assert ("rollout" in screen.getvalue().rpartition("\r")[2]) is False  # the line is gone
    with progress.phase("update"):  # too short to be shown
        progress.add(1, 50)
    assert "update" not in screen.getvalue()


def test_the_engine_tells_what_it_has_written(monkeypatch, device):
    """Tokens as they are written, and not when their response ends: the fake one writes two at a time."""
    told, states = [], {}

    class Engine:
        output_processor = type("", (), {"request_states": states})

        def add_request(self, number, prompt, params):
            ids = []
            states[number] = type("", (), {"detokenizer": type("", (), {"output_token_ids": ids})})

        def has_unfinished_requests(self):
            return bool(states)

        def step(self):
            for state in states.values():
                state.detokenizer.output_token_ids.extend([1, 1])
            done = [n for n, s in states.items() if len(s.detokenizer.output_token_ids) >= 2 + 2 * int(n)]
            return [type("", (), {"request_id": n, "outputs": [type("", (), dict(
                token_ids=states.pop(n).detokenizer.output_token_ids, finish_reason="stop",
                logprobs=type("", (), dict(logprobs=[], start_indices=[]))))]}) for n in done]

        def abort_request(self, numbers):
            assert not numbers
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.llm, engine.stop, engine.FINAL_ONLY = type("", (), {"llm_engine": Engine()}), [], None
    engine.SamplingParams = lambda **_: None
    monkeypatch.setattr(progress, "add", lambda rows=0, tokens=0: told.append((rows, tokens)))
    assert len([*engine.generate([[1], [1], [1]], temperature=1.0, max_tokens=9)]) == 3
    assert told == [(1, 0), (0, 6), (1, 0), (0, 4), (1, 0), (0, 2)]


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    assert checkpoint.lock(tmp_path) is not None
    assert "cannot be locked" in capsys.readouterr().out


GIB = 2**30


class Card:
    """A GPU of 80 GiB, of which the models hold `models`, and vLLM in its place."""

    def __init__(self, monkeypatch, models=40):
        self.models, self.vllm, self.dropped, self.awake = models, 30, True, True
        self.llm_engine = self
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (
            (80 - self.models - self.vllm * self.awake) * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        self.engine = VLLMEngine.__new__(VLLMEngine)
        self.engine.llm, self.engine.device, self.engine.taken = self, torch.device("cuda"), None
        self.engine.share, self.engine.warns, self.engine.skeleton = 0.4, True, None

    def sleep(self, level):
        self.awake = False

    def is_sleeping(self):
        return not self.awake

    def wake_up(self, tags):
        self.awake = True

    def collective_rpc(self, name, kwargs):
        pass

    def reset_prefix_cache(self):
        return self.dropped


def test_vllm_takes_what_the_models_leave_and_says_what_is_too_much(monkeypatch, device):
    card = Card(monkeypatch)
    card.awake = False
    assert engines.share_of_memory(None) == 0.45  # 40 GiB are free, and 4 of them remain so
    assert engines.share_of_memory(0.5) == 0.5
    with pytest.raises(InputError, match=r"needs 48.0 GiB of a GPU, and .* 40.0 of 80.0 are free; lower --vllm-memory, or .* --offload"):
        engines.share_of_memory(0.6)
    card.models = 77
    with pytest.raises(InputError, match="needs more than 4 GiB of a GPU, and .* 3.0 of 80.0 are free"):
        engines.share_of_memory(None)


def test_before_vllm_wakes_it_is_known_whether_there_is_room(monkeypatch, device):
    card = Card(monkeypatch)
    card.engine.sleep()
    card.engine.sync([])
    assert card.awake
    card.engine.sleep()
    card.models = 51
    with pytest.raises(InputError, match=r"of the 30.0 GiB that it gave back, 1.0 are missing; lower --vllm-memory, which is 0.4, or .* --offload"):
        card.engine.sync([])
    assert not card.awake


def test_vllm_warns_until_it_has_slept_and_sampled_once(monkeypatch, device):
    card, logger = Card(monkeypatch), logging.getLogger("vllm")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    card.engine.sleep()
    card.engine.sync([])
    assert logger.level == logging.WARNING
    card.engine.sleep()
    assert logger.level == logging.ERROR


def test_keys_and_values_of_old_weights_are_an_error(monkeypatch, device):
    card = Card(monkeypatch)
    card.dropped = False
    with pytest.raises(RuntimeError, match="did not drop the keys and values of the old weights"):
        card.engine.sync([])


# ---- python -m tools.gpu -----------------------------------------------------------------------------------

def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "there is no GPU that torch can use" in error and error.count("\n") == 1


@pytest.mark.parametrize("parts, message", [("race", "also give --model"), ("rice", "must be of versions, demo")])
def test_parts_that_cannot_be_run(parts, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    assert message in complaint(gpu.main, ["--parts", parts], capsys)


def test_a_part_that_fails_or_takes_too_long_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "DRY", {})
    monkeypatch.setattr(gpu, "PARTS", {
        "fine": (60, 2, "-c 'print(1); print(2); print(3)'"), "slow": (1, 1, "-c 'import time; time.sleep(60)'"),
        "broken": (60, 1, "-c 'raise ValueError(\"of this part\")'")})
    gpu.main(["--dry", "--output", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu.json").read_text())
    assert parts["fine"]["said"] == ["2", "3"]
    assert parts["broken"]["error"] == "exit code 1: ValueError: of this part"
    assert parts["slow"]["error"] == "took more than 1 s"
    assert "ValueError: of this part" in (tmp_path / "gpu.md").read_text()
    assert "failed: took more than 1 s" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
@pytest.mark.parametrize("name", ["versions", "generate", "offload between"])
def test_the_dry_run_of_a_part(name, tmp_path):
    """Those whose command no other test runs."""
    words = shlex.split(gpu.DRY.get(name, gpu.PARTS[name][2]).replace("runs/gpu", str(tmp_path)))
    if words[0] == "-m":
        done = run(f"{words[1].replace('.', '/')}.py", *words[2:])
    else:
        done = subprocess.run([sys.executable, *words], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {"versions": "torch ", "generate": "ratio ", "offload between": "memory: peak"}[name] in done.stdout


@pytest.mark.parametrize("name, command", [*((name, command) for name, (*_, command) in gpu.PARTS.items()), *gpu.DRY.items()])
def test_the_commands_are_understood(name, command):
    """Every part, on a GPU and dry: its options exist, with values that no check refuses."""
    words = shlex.split(command.partition(" -- ")[0])
    config = {"sppo.py": (TrainConfig, 1), "tools.plan": (PlanConfig, 3), "tools.bench": (bench.StepConfig, 3),
              "eval.py": (EvalConfig, 1), "tools.race": (RaceConfig, 2)}
    kind, first = config.get(words[1] if words[0] == "-m" else words[0], (None, 0))
    if name == "generate":
        kind = bench.GenerateConfig
    if kind:
        kind.parse("", words[first:])
