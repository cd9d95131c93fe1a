"""tools/plan.py: what it plans is what a step holds, and what it adds up."""
import importlib
import json
import re

import pytest
import torch
from conftest import complaint, run
from torch.distributed.fsdp import fully_shard

from cli import InputError
from tools.live_bytes import LiveBytes
from tools.plan import Count, largest_budget, main, moved_between, phases, shape_of

PRIVATE = "torch.distributed.fsdp._fully_shard._fsdp_param_group"


def test_the_plan_is_what_a_step_really_holds():
    """In a world of one, where a step can be taken: the same code on fake tensors, and with real numbers."""
    done = run("tests/planning.py")
    assert done.returncode == 0, done.stderr
    for what, (planned, real) in json.loads(done.stdout.splitlines()[-1]).items():
        print(what, planned, real)
        assert planned > 0 and planned == pytest.approx(real, rel=0.1), what


def test_torch_still_has_the_private_methods_that_are_watched(device):
    """LiveBytes patches two methods of FSDP. Where a new torch has moved them, or no longer gathers through
    them, this test must fail, and not the plan be wrong."""
    version = f"torch {torch.__version__}: correct tools/live_bytes.py"
    try:
        group = importlib.import_module(PRIVATE).FSDPParamGroup
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{version}; FSDPParamGroup is elsewhere ({error})")
    missing = [name for name in ("unshard", "wait_for_unshard") if not callable(getattr(group, name, None))]
    assert not missing, f"{version}; FSDPParamGroup has no {missing}"
    model = fully_shard(torch.nn.Linear(64, 64, bias=False))
    with LiveBytes() as memory:
        model(torch.ones(1, 64))
    assert memory.gathered_at_peak >= 64 * 64 * 4, f"{version}; FSDP gathers a layer by other methods"


def test_another_torch_is_one_clear_sentence(monkeypatch):
    monkeypatch.delattr(importlib.import_module(PRIVATE).FSDPParamGroup, "wait_for_unshard")
    message = re.escape(f"torch {torch.__version__}: its FSDP has changed")
    with pytest.raises(InputError, match=message), LiveBytes():
        pass


def test_what_the_plan_adds_up():
    policy, critic = Count(8, 8, 16, (6, 5), (20, 5)), Count(2, 2, 4, (3, 1), (9, 1))

    def totals(*arguments):
        return [sum(held.values()) for held in phases(*arguments).values()]
    assert totals(policy, critic, "", 40) == [30 + 40, 24 + 6 + 6, 32 + 20 + 6, 8 + 9 + 24]
    assert totals(policy, critic, "", 40, False) == [70, 76, 98, 81]
    assert totals(policy, critic, "--offload", 40) == [40, 6, 20, 9]
    assert totals(policy, critic, "--offload-between", 40) == [40, 8 + 6, 32 + 20, 8 + 9]
    assert totals(policy, None, "", 40) == [24 + 40, 24 + 6, 32 + 20]
    plans = {1000: phases(policy, critic, "", 40),
             2000: phases(Count(8, 8, 16, (7, 5), (30, 5)), Count(2, 2, 4, (4, 1), (10, 1)), "", 40)}
    assert largest_budget(plans, 73) == 2304  # the policy's update has 58, and 10 more for every 1,000 tokens
    assert largest_budget(plans, 47) == 0
    assert moved_between(policy, critic) == 2 * 8 + 2 * (8 + 16) + 8 + 2 * 2 + 2 * (2 + 4)
    assert moved_between(policy, None) == 2 * 8 + 2 * (8 + 16) + 8
    assert shape_of("Qwen/Qwen3-8B").head_dim == 128


@pytest.mark.parametrize("arguments, message", [
    (["no/such"], "no/such: is neither a folder with a config.json nor a model on the hub"),
    (["--gpus", "0"], "--gpus 0: must be greater than 0"),
    (["Qwen/Qwen2.5-0.5B", "--gpus", "4", "--replicas", "3"], "--replicas 3 does not divide --gpus 4")])
def test_bad_input_is_one_clear_sentence(arguments, message, capsys):
    error = complaint(main, arguments, capsys)
    assert message in error and error.count("\n") == 1


def test_the_command():
    """The model first, and shapes small enough for a test: the built-in model's, from its folder."""
    done = run("tools/plan.py", "builtin", "--gpus", "2", "--max-prompt-tokens", "64",
               "--max-response-tokens", "448", "--micro-batch-tokens", "512")
    assert done.returncode == 0, done.stderr
    assert "sppo: policy builtin, 0.00B parameters; critic builtin" in done.stdout
    assert len(re.findall(r"^  update critic +0\.0", done.stdout, re.M)) == 3
    assert "--offload-between moves 0 GiB a step" in done.stdout
    assert len(re.findall(r"^\| (as it is|--offload|--offload-between)", done.stdout, re.M)) == 6
