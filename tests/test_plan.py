"""tools/plan.py: what it plans is what a step holds, and what it adds up."""
import json
import re

import pytest
import torch
from conftest import complaint, run
from torch.distributed.fsdp import fully_shard

from tools.plan import SETTINGS, Count, LiveBytes, largest_budget, main, phases


def test_the_plan_is_what_a_step_really_holds():
    """In a world of one, where a step can be taken: the same code on fake tensors, and with real numbers."""
    done = run("tests/planning.py")
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    for case, planned, real in cases:
        assert planned == real, case
        assert 0 < real["infer"] < real["update"]
    assert {case[3] for case, *_ in cases} == {*SETTINGS}


def test_fsdp_still_takes_and_frees_memory_where_it_is_watched(device):
    """LiveBytes sees a gathered layer come and go through UntypedStorage.resize_. Where a new torch frees it otherwise,
    this must fail, and not the plan be wrong."""
    layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    with LiveBytes() as memory:
        for part in (*layers, model):
            fully_shard(part)
        weights, size = memory.live, 64 * 64 * 4
        model(torch.ones(1, 64))
    assert weights + size <= memory.peak < weights + 2 * size + 1000 and memory.live < weights + 2 * size


def test_what_the_plan_adds_up():
    """Adam's moments are twice the weights, gradients as large as these; vLLM takes 40."""
    policy, critic = Count(8, 6, 20), Count(2, 3, 9)

    def totals(*arguments):
        return [sum(held.values()) for held in phases(*arguments, 40).values()]
    assert totals(policy, critic, "none") == [30 + 40, 24 + 6 + 6, 32 + 20 + 6, 8 + 9 + 24]
    assert totals(policy, critic, "all") == [40, 6, 20, 9]
    assert totals(policy, critic, "between") == [40, 8 + 6, 32 + 20, 8 + 9]
    assert totals(policy, None, "none") == [24 + 40, 24 + 6, 32 + 20]
    plans = {1000: phases(policy, critic, "none", 40),
             2000: phases(Count(8, 7, 30), Count(2, 4, 10), "none", 40)}
    assert largest_budget(plans, 73) == 2304  # the policy's update has 58, and 10 more for every 1,000 tokens
    assert largest_budget(plans, 47) == 0


@pytest.mark.parametrize("arguments, message", [
    (["no/such"], "no/such: is neither a folder with a config.json nor a model on the hub"),
    (["--gpus", "0"], "--gpus 0: must be greater than 0"),
    (["--gpus", "4", "--no-checkpoint-activations", "Qwen/Qwen2.5-0.5B", "--replicas", "3"],
     "--replicas 3 does not divide --gpus 4")])
def test_bad_input_is_one_clear_sentence(arguments, message, capsys):
    error = complaint(main, arguments, capsys)
    assert message in error and error.count("\n") == 1


def test_the_command():
    """The model stands among the options, and its shapes are small: the built-in model's, from its folder."""
    done = run("tools/plan.py", "--gpus", "2", "builtin", "--max-prompt-tokens", "64", "--max-response-tokens", "448",
               "--micro-batch-tokens", "512")
    assert done.returncode == 0, done.stderr
    assert "sppo: policy builtin, 0.00B parameters; critic builtin" in done.stdout
    assert len(re.findall(r"^  update critic +0\.0", done.stdout, re.M)) == 3
    assert re.findall(r"^\| (none|between|all) \| \d", done.stdout, re.M) == [*SETTINGS]
    assert "--offload between moves 0 GiB a step" in done.stdout
