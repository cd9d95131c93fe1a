"""SPPO without a language model: control tasks with one binary reward (arXiv 2604.08865, section 5.3).

    python examples/control.py                                 Precision CartPole learns, in a minute
    python examples/control.py --task Pendulum --method PPO    another task, another baseline

SPPO treats a response as one action, and nothing in that needs language. Here a trajectory takes the place
of the response, its initial state s_0 that of the prompt, and a step that of a token:

    A = R - V(s_0)            R is 1 if the trajectory succeeds, else 0: the same A for each of its steps
    r_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    maximise  min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)        averaged over all steps
    fit V with binary cross-entropy against R

The formulas are imported from sppo.py and ppo.py, where they train language models. The order is the same
too. A language model first imitates texts, and so the policy here first imitates an expert: (1) the expert
learns with PPO from the environment's dense reward; (2) a clone learns from the expert's successful
trajectories, and is stopped early; (3) the clone goes on by trial and error with the binary reward.

Needs Gymnasium: pip install -r requirements-control.txt (or make control).
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, pi, radians
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.envs.classic_control import PendulumEnv
from torch import nn
from torch.distributions import Categorical, Independent, Normal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ppo import gae, value_loss, whiten  # noqa: E402
from sppo import clipped_policy_loss, sequence_advantages  # noqa: E402

EPOCHS, MINIBATCHES = 4, 4  # of each update
DEMONSTRATIONS = 32  # trajectories of the expert; the clone imitates those that succeed

# ---- the tasks ---------------------------------------------------------------------------------------------

@dataclass
class Task:
    """B trajectories in B environments, side by side; a state has D numbers."""
    env: str | type  # a name in Gymnasium, or a class of such environments
    horizon: int  # steps of the longest trajectory
    batch: int  # trajectories per update
    success: Callable  # (final states [B, D], last rewards [B], whether it ended early [B]) -> [B]: R
    scale: tuple  # states are divided by these D numbers, so that the networks see values around 1
    dense: Callable = lambda states, rewards: rewards / 100  # the expert's: [B, T + 1, D], [B, T] -> [B, T]
    expert_horizon: int = 1000  # a shorter one where an expert learns sooner with it
    cloned: float = 0.2  # the clone's share of successes; above that of chance
    options: dict = field(default_factory=dict)  # of the environment

    def make(self, count, seed):
        make = self.env if isinstance(self.env, type) else partial(gymnasium.make_vec, self.env)
        envs = make(num_envs=count, max_episode_steps=self.horizon, **self.options)
        envs.reset(seed=seed)
        return envs


class Pendulums(PendulumEnv):
    """Gymnasium's Pendulum, many at once: its `step` is numpy and takes arrays as well as numbers. One by
    one, the 16 x 1,000 steps of an update would take a second."""

    def __init__(self, num_envs, max_episode_steps):
        super().__init__()
        self.num_envs, self.single_action_space = num_envs, self.action_space
        self.never = np.zeros(num_envs, bool)  # a pendulum cannot fall

    def reset(self, seed=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, (2, self.num_envs)) * [[pi], [1]]  # angles, speeds
        return self._get_obs().T, {}

    def step(self, actions):
        states, rewards, *_ = super().step(actions.T)
        return states.T, rewards, self.never, self.never, {}


def pumped_energy(states, rewards):
    """MountainCar's reward says nothing before the goal, so the energy that a step adds counts too."""
    position, speed = states.unbind(-1)
    energy = speed**2 / 2 + 0.0025 / 3 * torch.sin(3 * position)
    return rewards / 100 + 1000 * energy.diff(dim=1)


TASKS = {
    "CartPole": Task("CartPole-v1", 200, 64, scale=(1, 1, 0.1, 1),
                     success=lambda s, reward, ended: ~ended & (abs(s[:, 2]) <= radians(0.5))),
    "MountainCar": Task("MountainCarContinuous-v0", 1000, 8, scale=(1, 0.07), dense=pumped_energy,
                        success=lambda s, reward, ended: s[:, 0] >= 0.45),
    "Hopper": Task("Hopper-v5", 1000, 8, success=lambda s, reward, ended: ~ended & (s[:, 0] > 1),
                   # The distance is only in the state to tell success by; divided by inf, no network sees it.
                   options=dict(exclude_current_positions_from_observation=False), scale=(inf, *[1] * 11)),
    # A crash also brings the legs to the ground. It is told by its reward, -100.
    "LunarLander": Task("LunarLander-v3", 1000, 16, scale=(1,) * 8, success=lambda s, reward, ended:
                        (s[:, 6:].max(1) == 1) & (abs(s[:, 0]) < 0.4) & (reward > -100)),
    "Pendulum": Task(Pendulums, 1000, 16, scale=(1, 1, 8), expert_horizon=200, cloned=0.5,
                     success=lambda s, reward, ended: s[:, 0] > 0.8),
}


@torch.no_grad()
def sample(task, envs, policy):
    """One trajectory in each of B environments, from a new s_0, padded to the longest, T steps:
    states [B, T, D], actions [B, T] or [B, T, D'], mask [B, T], dense rewards [B, T], success [B]."""
    state, _ = envs.reset()
    running, ended = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs, bool)
    final, last_reward = state.copy(), np.zeros(envs.num_envs)
    states, actions, rewards, mask = [state], [], [], []
    while running.any() and len(mask) < task.horizon:
        action = policy(torch.as_tensor(state, dtype=torch.float32)).sample()
        state, reward, terminated, truncated, _ = envs.step(policy.to_env(action))
        for x, xs in zip((state, action, reward, running), (states, actions, rewards, mask), strict=True):
            xs.append(x)
        final[running], last_reward[running] = state[running], reward[running]
        ended = ended | running & terminated
        # An environment that is done starts over by itself. The mask leaves out what it does from there on.
        running = running & ~(terminated | truncated)
    states, rewards, mask = (torch.as_tensor(np.stack(x, 1), dtype=torch.float32)
                             for x in (states, rewards, mask))
    return SimpleNamespace(
        states=states[:, :-1], actions=torch.stack(actions, 1), mask=mask,
        dense=task.dense(states, rewards) * mask,
        success=torch.as_tensor(task.success(final, last_reward, ended), dtype=torch.float32))


# ---- the networks ------------------------------------------------------------------------------------------

class Network(nn.Module):
    """States [..., D] -> [..., outputs]."""

    def __init__(self, scale, outputs):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.layers = nn.Sequential(nn.Linear(len(scale), 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                    nn.Linear(64, outputs))

    def forward(self, states):
        return self.layers(states / self.scale)


class Policy(nn.Module):
    """States [..., D] -> a distribution over actions: a choice, or Gaussian, equally wide in all states."""

    def __init__(self, task):
        super().__init__()
        space = task.make(1, seed=0).single_action_space
        self.limit = getattr(space, "high", None)  # of what the environment accepts; None for a choice
        self.net = Network(task.scale, space.n if self.limit is None else len(space.high))
        self.log_std = nn.Parameter(torch.full(space.shape, -0.5))

    def forward(self, states):
        outputs = self.net(states)
        if self.limit is None:
            return Categorical(logits=outputs, validate_args=False)
        return Independent(Normal(outputs, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def to_env(self, actions):
        return actions.numpy() if self.limit is None else actions.clamp(-1, 1).numpy() * self.limit


# ---- the baselines: what is subtracted from the reward -----------------------------------------------------

class SPPO:
    """A critic that sees s_0 alone, as the language model's critic reads the prompt alone."""

    def __init__(self, task):
        self.critic = Network(task.scale, 1)

    def advantages(self, batch):
        with torch.no_grad():
            logits = self.critic(batch.states[:, 0])[:, 0]  # [B]
        return sequence_advantages(batch.success, logits)

    def loss(self, batch, rows):
        logits = self.critic(batch.states[rows, 0])[:, 0]
        return F.binary_cross_entropy_with_logits(logits, batch.success[rows])


class PPO:
    """A critic that sees every s_t. GAE makes an advantage for every step, and the batch whitens them."""

    def __init__(self, task, whitened=True, dense=False, gamma=1.0, lam=1.0, value_clip=0.5):
        self.critic = Network(task.scale, 1)
        self.whitened, self.dense = whitened, dense
        self.gamma, self.lam, self.value_clip = gamma, lam, value_clip

    def advantages(self, batch):
        with torch.no_grad():
            self.values = self.critic(batch.states)[..., 0] * batch.mask  # [B, T]
        last = torch.arange(batch.mask.shape[1]) == batch.mask.sum(1, keepdim=True) - 1  # [B, T]
        rewards = batch.dense if self.dense else batch.success[:, None] * last
        advantages, self.returns = gae(rewards, self.values, batch.mask, self.gamma, self.lam)
        return whiten(advantages, batch.mask).float() if self.whitened else advantages

    def loss(self, batch, rows):
        values, mask = self.critic(batch.states[rows])[..., 0], batch.mask[rows]
        return value_loss(values, self.values[rows], self.returns[rows], mask, mask.sum(), "mse",
                          self.value_clip)


class BatchMean:
    """The least that can be subtracted, the batch's mean reward. It learns nothing."""
    critic = None

    def __init__(self, task):
        pass

    def advantages(self, batch):
        return batch.success - batch.success.mean()


METHODS = {"SPPO": SPPO, "PPO": PPO, "PPO, not whitened": partial(PPO, whitened=False),
           "batch mean": BatchMean}


# ---- the loop: that of sppo.py -----------------------------------------------------------------------------

def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(task, policy, make_baseline, updates, seed, lr=3e-4, critic_lr=1e-3, report=lambda *_: False):
    """Trains `policy` in place. Returns each update's share of successes. `report(update, share)` stops it by
    returning True."""
    torch.manual_seed(seed)
    envs, baseline, curve = task.make(task.batch, seed), make_baseline(task), []
    groups = [dict(params=policy.parameters(), lr=lr)]
    if baseline.critic:
        groups.append(dict(params=baseline.critic.parameters(), lr=critic_lr))
    optimizer = torch.optim.Adam(groups)
    for update in range(1, updates + 1):
        batch = sample(task, envs, policy)
        curve.append(batch.success.mean().item())
        with torch.no_grad():
            old = policy(batch.states).log_prob(batch.actions)  # [B, T]
        advantages = baseline.advantages(batch)  # [B] or [B, T], before the critic learns from this batch
        for _ in range(EPOCHS):
            for rows in torch.randperm(task.batch).chunk(MINIBATCHES):
                logprobs = policy(batch.states[rows]).log_prob(batch.actions[rows])
                loss, _ = clipped_policy_loss(logprobs, old[rows], advantages[rows], batch.mask[rows])
                if baseline.critic:
                    loss = loss + baseline.loss(batch, rows)  # the two share no parameters
                step(optimizer, loss)
        if report(update, curve[-1]):
            break
    return curve


# ---- where the policy comes from: an expert, and its clone -------------------------------------------------

def train_expert(task, seed, updates=1000):
    """PPO on the dense reward, until half of the trajectories of the last five batches also succeed."""
    torch.manual_seed(seed)
    policy, recent = Policy(task), []

    def enough(update, success):
        recent.append(success)
        return sum(recent[-5:]) / 5 > 0.5

    ppo = partial(PPO, dense=True, gamma=0.98, lam=0.95, value_clip=inf)
    task = replace(task, horizon=min(task.horizon, task.expert_horizon))
    train(task, policy, ppo, updates, seed, lr=1e-3, report=enough)
    print(f"The expert took {len(recent)} updates of {task.batch} trajectories with the dense reward.")
    return policy


def clone(task, expert, seed, target):
    """A policy that imitates the expert's successes, until it succeeds itself in a share `target` of its
    trajectories: a perfect clone would leave nothing to learn."""
    torch.manual_seed(seed)
    envs, policy = task.make(DEMONSTRATIONS, seed + 1000), Policy(task)
    shown = sample(task, envs, expert)
    if not shown.success.any():
        raise SystemExit(f"{task.env}: the expert of this seed never succeeds; give another --seed")
    mask = shown.mask * shown.success[:, None]
    optimizer = torch.optim.Adam(policy.parameters(), 3e-4)
    for steps in range(3000):
        if steps % 3 == 0 and (success := sample(task, envs, policy).success.mean()) >= target:
            break
        step(optimizer, -(policy(shown.states).log_prob(shown.actions) * mask).sum() / mask.sum())
    print(f"The clone took {steps} steps on {shown.success.sum():.0f} of the expert's trajectories, and "
          f"succeeds in {success:.0%} of its own.", flush=True)
    return policy


def start(name, seed, target=None):
    """The clone. It and the expert are kept in runs/control, so that all methods start from the same."""
    task, folder = TASKS[name], ROOT / "runs" / "control"
    target = target or task.cloned

    def kept(file, make):
        policy = Policy(task)
        if not (folder / file).exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(make().state_dict(), folder / file)
        policy.load_state_dict(torch.load(folder / file))
        return policy

    return kept(f"{name}-{seed}-clone-{target}.pt", lambda: clone(
        task, kept(f"{name}-{seed}-expert.pt", lambda: train_expert(task, seed)), seed, target))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="CartPole")
    parser.add_argument("--method", choices=METHODS, default="SPPO")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args, recent = parser.parse_args(), []
    torch.set_num_threads(1)  # more threads only slow so small networks down
    task, policy = TASKS[args.task], start(args.task, args.seed)

    def show(update, success):
        recent.append(success)
        if update % 5 == 0:
            mean = sum(recent[-5:]) / 5
            print(f"{update * task.batch:7,} trajectories: {mean:4.0%} succeed  " + "#" * round(50 * mean),
                  flush=True)

    curve = train(task, policy, METHODS[args.method], args.updates, args.seed, report=show)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    plt.plot([task.batch * (i + 1) for i in range(len(curve))], curve)
    plt.gca().set(title=f"{args.method} on {args.task}", xlabel="trajectories", ylabel="share of successes")
    file = Path("runs", "control", f"{args.task}-{args.method}-{args.seed}.png")
    plt.savefig(ROOT / file)
    print(f"The curve is in {file}.")


if __name__ == "__main__":
    main()
