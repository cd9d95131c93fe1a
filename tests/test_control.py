"""examples/control.py and its experiments, on trajectories of a few steps."""
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from tools import control as experiments

gymnasium = pytest.importorskip("gymnasium")
from examples import control  # noqa: E402


@pytest.fixture
def short(monkeypatch, tmp_path):
    """CartPole's task is to stand for 20 steps, and everything is kept in an empty folder."""
    task = replace(control.TASKS["CartPole"], horizon=20, batch=8, success=lambda s, reward, ended: ~ended)
    monkeypatch.setitem(control.TASKS, "CartPole", task)
    monkeypatch.setattr(control, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "PLAN", [("CartPole", 2, [0, 1], [""], ["SPPO", "PPO"])])
    return tmp_path


@pytest.mark.parametrize("name, env, to_state", [
    ("CartPole", "CartPole-v1", list), ("MountainCar", "MountainCarContinuous-v0", list),
    ("Pendulum", "Pendulum-v1", lambda state: [math.atan2(state[1], state[0]), state[2]])])
def test_trajectories_are_those_of_one_environment_at_a_time(name, env, to_state):
    """Here each action is tried again, in an environment of its own. Success is to end to the right."""
    torch.manual_seed(0)
    task = replace(control.TASKS[name], horizon=25, success=lambda s, reward, ended: s[:, 0] > 0)
    batch = control.sample(task, task.make(16, seed=0), policy := control.Policy(task))
    alone, right = gymnasium.make(env).unwrapped, []
    for states, actions, mask in zip(batch.states, batch.actions, batch.mask, strict=True):
        alone.reset()
        alone.state = np.array(to_state(states[0].tolist()))
        for t in range(25):
            state, _, ended, *_ = alone.step(policy.to_env(actions[t]))
            goes_on = not ended and t < 24
            assert mask[t] == 1 and (mask[t + 1:].sum() > 0) == goes_on
            if not goes_on:
                break
            assert states[t + 1].tolist() == pytest.approx(state.tolist(), abs=1e-3)
        right.append(float(state[0] > 0))
    assert batch.success.tolist() == right


def test_pendulums_hang_anywhere_and_actions_fill_the_limits():
    task = control.TASKS["Pendulum"]
    cosines = task.make(32, seed=0).reset()[0][:, 0]
    assert cosines.min() < -0.9 and cosines.max() > 0.9
    assert control.Policy(task).to_env(torch.tensor([[0.5], [-3.0]])).tolist() == [[1.0], [-2.0]]


@pytest.mark.parametrize("name, state, reward, ended, succeeds", [
    ("CartPole", [0, 0, math.radians(-0.49), 0], 1, False, True),
    ("CartPole", [0, 0, math.radians(-0.51), 0], 1, False, False),
    ("CartPole", [2.5, 0, 0, 0], 1, True, False),
    ("MountainCar", [0.45, 0], 100, True, True), ("MountainCar", [0.44, 0], 0, False, False),
    ("Hopper", [1.1] + [0] * 11, 1, False, True), ("Hopper", [1.1] + [0] * 11, 1, True, False),
    ("Hopper", [0.9] + [0] * 11, 1, False, False),
    ("LunarLander", [-0.3, 0, 0, 0, 0, 0, 0, 1], 100, True, True),
    ("LunarLander", [-0.3, 0, 0, 0, 0, 0, 1, 1], -100, True, False),  # crashed
    ("LunarLander", [0.5, 0, 0, 0, 0, 0, 1, 1], 100, True, False),
    ("LunarLander", [0.3, 0, 0, 0, 0, 0, 0, 0], 0, False, False),
    ("Pendulum", [0.81, 0, 8], -1, False, True), ("Pendulum", [0.79, 0, 0], -1, False, False)])
def test_what_counts_as_success(name, state, reward, ended, succeeds):
    assert control.TASKS[name].success(np.array([state]), np.array([reward]), np.array([ended])) == [succeeds]


@pytest.mark.parametrize("method", control.METHODS)
def test_every_method_learns(method):
    """To have the cart on the right after 20 steps, which chance does in half of the trajectories."""
    task = replace(control.TASKS["CartPole"], horizon=20, success=lambda s, reward, ended: s[:, 0] > 0)
    torch.manual_seed(0)
    curve = control.train(task, control.Policy(task), control.METHODS[method], 12, seed=0, lr=3e-3)
    assert curve[0] < 0.7 and curve[-1] > 0.9


def test_ppo_pays_the_binary_reward_with_the_last_step():
    torch.manual_seed(0)
    task = replace(control.TASKS["CartPole"], horizon=30, success=lambda s, reward, ended: s[:, 0] > 0)
    batch = control.sample(task, task.make(16, seed=0), control.Policy(task))
    ppo = control.PPO(task, whitened=False)
    with torch.no_grad():
        expected = (batch.success[:, None] - ppo.critic(batch.states)[..., 0]) * batch.mask  # lambda = 1
    assert batch.mask.sum() < batch.mask.numel() and 0 < batch.success.sum() < 16
    assert torch.allclose(ppo.advantages(batch), expected, atol=1e-6)


def test_the_command_trains_and_prints_a_curve(short, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["control.py", "--updates", "10"])
    control.main()
    said = capsys.readouterr().out
    assert "The expert took" in said and "The clone took" in said
    assert said.count("trajectories: ") == 2  # every five updates
    assert (short / "runs/control/CartPole-SPPO-0.png").exists()
    kept = {file: file.stat().st_mtime_ns for file in short.glob("runs/control/*.pt")}
    control.main()
    assert "The clone took" not in capsys.readouterr().out  # and so all methods start from the same one
    assert kept == {file: file.stat().st_mtime_ns for file in short.glob("runs/control/*.pt")}


@pytest.mark.parametrize("option", [("--updates", "0"), ("--seed", "-1")])
def test_bad_input_is_refused_before_anything_is_trained(short, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["control.py", *option])
    with pytest.raises(SystemExit) as end:
        control.main()
    assert end.value.code == 2 and "--updates must be at least 1, and --seed at least 0" in capsys.readouterr().err
    assert not (short / "runs").exists()


def test_a_clone_that_cannot_succeed_is_not_kept(short, monkeypatch):
    monkeypatch.setattr(control, "range", lambda steps: [0, 1, 2], raising=False)  # of 30,000
    with pytest.raises(SystemExit, match="The clone of seed 0 never gets to 110%"):
        control.start("CartPole", 0, target=1.1)
    assert [file.name for file in short.glob("runs/control/*.pt")] == ["CartPole-0-expert.pt"]


def test_experiments_go_on_after_the_last_run_that_ended(short, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["control"])
    real, calls = control.train, []

    def killed(task, policy, method, updates, seed, **options):
        calls.append(seed)
        if len(calls) == 6:  # two experts, three runs, and then this one
            raise KeyboardInterrupt
        return real(task, policy, method, updates, seed, **options)

    monkeypatch.setattr(control, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.main()
    ended = json.loads((short / "control.json").read_text())
    assert [(run["method"], run["seed"]) for run in ended] == [("SPPO", 0), ("PPO", 0), ("SPPO", 1)]
    calls.clear()
    experiments.main()
    runs = json.loads((short / "control.json").read_text())
    assert calls == [1] and runs[:3] == ended and (runs[3]["method"], runs[3]["seed"]) == ("PPO", 1)
    assert (short / "control.png").exists()
    calls.clear()
    monkeypatch.setattr(experiments, "PLAN", [("CartPole", 3, [1], [""], ["SPPO", "PPO"])])  # one update more
    experiments.main()
    runs = json.loads((short / "control.json").read_text())
    assert calls == [1, 1] and [len(run["success"]) for run in runs] == [2, 2, 3, 3]


def test_the_table_has_the_end_of_each_run(short):
    runs = [dict(task="CartPole", method="SPPO", setting="", seed=seed, trajectories=8,
                 success=[0.25] * 18 + [end, end], cpu_seconds=900) for seed, end in enumerate((0.5, 1.0))]
    assert "| CartPole | 160 | 2 | 0.25 | 0.75 [0.50, 1.00] |" in experiments.table(runs)
    assert "2 runs, 0.5 hours" in experiments.table(runs)


def test_the_results_page_says_of_the_control_tasks_what_the_planned_runs_did():
    runs = json.loads((ROOT / "results/control.json").read_text())
    planned = {(name, method, setting, seed, updates) for name, updates, seeds, settings, methods in experiments.PLAN
               for seed in seeds for setting in settings for method in methods}
    assert sorted(planned) == sorted((r["task"], r["method"], r["setting"], r["seed"], len(r["success"])) for r in runs)
    table = experiments.table(runs)
    assert (ROOT / "results/control.md").read_text() == table
    page = (ROOT / "results/README.md").read_text().split("## Control tasks")[1].split("\n## ")[0]
    third = {f"{np.mean([r['success'][60:90] for r in runs if (r['task'], r['method']) == ('Hopper', method)]):.2f}"
             for method in ("SPPO", "PPO", "PPO, not whitened")}
    assert {*re.findall(r"\d\.\d\d", page)} <= {*re.findall(r"\d\.\d\d", table)} | third
    hours, = re.findall(r"[\d.]+ hours", page)
    assert hours in table and f"{hours} of a core" in experiments.__doc__
