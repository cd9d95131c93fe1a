"""SPPO without a language model: control tasks with one binary reward (arXiv 2604.08865, section 5.3).

    python examples/control.py        CartPole learns to end upright: 85 % in one to three minutes
    python examples/control.py --task MountainCar --method PPO --updates 15    another task, another baseline

SPPO treats a response as one action, and nothing in that needs language. Here a trajectory takes the place
of the response, its initial state s_0 that of the prompt, and a step that of a token. A critic, which sees
s_0 alone, predicts V, the chance that the trajectory will succeed (R = 1; else R = 0):

    A = R - V(s_0)                                         the same for each step of the trajectory
    r_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    maximise  min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)    averaged over the mini-batch's steps; eps = 0.2
              where A < 0, never less than 3 A             (the dual clip)
    fit V with binary cross-entropy against R

A and the clipped loss (`sequence_advantages`, `clipped_policy_loss`) are imported from sppo.py, where they
train language models; PPO's formulas from ppo.py.

Except in Pendulum, an untrained policy seldom or never succeeds, and from failures alone there is little to
learn. A language model has imitated texts before it learns from rewards. So here, too, the policy first
imitates an expert: (1) the expert learns with PPO from the environment's dense reward, one for each step;
(2) a clone imitates the expert's successful trajectories, until it succeeds now and then; (3) the clone goes
on by trial and error with the binary reward.

Read `SPPO` and `train` first; then what they need: trajectories, networks, other baselines, tasks, the clone.
Needs Gymnasium: pip install -r requirements-control.txt (or make control).
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, pi, radians
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import make_vec
from gymnasium.envs.classic_control import PendulumEnv
from torch import nn
from torch.distributions import Categorical, Independent, Normal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # sppo.py is in the folder above
from ppo import gae, value_loss, whiten  # noqa: E402
from sppo import clipped_policy_loss, sequence_advantages  # noqa: E402

EPOCHS, MINIBATCHES = 4, 4  # each batch is used four times (by sppo.py once), in quarters: 16 optimiser steps
DEMONSTRATIONS = 32  # trajectories of the expert; the clone imitates those that succeed
tensor = partial(torch.as_tensor, dtype=torch.float32)

# ---- SPPO, and the loop ------------------------------------------------------------------------------------
# Shapes: B trajectories in a batch, b in a mini-batch; T steps in the batch's longest; D numbers in a state,
# D' in an action.

class SPPO:
    """A baseline, which is subtracted from R. Each method is one class like this, with a `critic`,
    `advantages` and `loss`, and `train` is the same for all. Here the baseline is V(s_0) = sigmoid(logit),
    and the critic gives the logit. V begins near 1/2, because an untrained logit is near 0. (sppo.py's V
    begins at the mean R of the first batch.) Where all s_0 are alike, as in CartPole, V is little more than a
    running mean of R over past batches."""

    def __init__(self, task):
        self.critic = Network(task.scale, 1)

    def advantages(self, batch):
        with torch.no_grad():
            logits = self.critic(batch.states[:, 0]).squeeze(-1)  # [B, D] -> [B]
        return sequence_advantages(batch.success, logits)  # R - sigmoid(logits)

    def loss(self, batch, rows):
        """The critic's, on the trajectories `rows` [b] of a mini-batch."""
        logits = self.critic(batch.states[rows, 0]).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, batch.success[rows])


def train(task, policy, make_baseline, updates, seed, lr=3e-4, critic_lr=1e-3,
          after_update=lambda curve: False):
    """Trains `policy` in place. Returns the curve: the share of successes in each update's batch.
    `after_update(curve)` may look at it; if it returns True, the training ends."""
    torch.manual_seed(seed)
    envs = task.make(task.batch, seed)
    baseline, curve = make_baseline(task), []
    optimizer = torch.optim.Adam([dict(params=policy.parameters(), lr=lr),
                                  dict(params=baseline.critic.parameters(), lr=critic_lr)])
    while len(curve) < updates:
        batch = sample(task, envs, policy)
        with torch.no_grad():
            old = policy(batch.states).log_prob(batch.actions)  # [B, T]: log pi_old(a_t | s_t)
        advantages = baseline.advantages(batch)  # [B], or [B, T] in PPO; V has not seen these R yet
        for _ in range(EPOCHS):
            for rows in torch.randperm(task.batch).chunk(MINIBATCHES):  # [b]
                logprobs = policy(batch.states[rows]).log_prob(batch.actions[rows])  # [b, T]
                # With its defaults: eps 0.2, dual clip 3. Advantages [b] count for each of the T steps.
                loss, _ = clipped_policy_loss(logprobs, old[rows], advantages[rows], batch.mask[rows])
                # Policy and critic share no parameters, so the sum gives each the gradient of its own loss.
                step(optimizer, loss + baseline.loss(batch, rows))
        curve.append(batch.success.mean().item())
        if after_update(curve):
            break
    return curve


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def sample(task, envs, policy):
    """One trajectory in each of B environments, from a new s_0, padded to the longest, T steps:
    states [B, T, D], actions [B, T] or [B, T, D'], mask [B, T], 1 on the steps of the trajectory,
    success [B], which is R, and the dense rewards [B, T], of which only the expert learns."""
    first, _ = envs.reset()
    state, steps = first, []
    running, ended = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs, bool)
    while running.any() and len(steps) < task.horizon:
        action = policy(tensor(state)).sample()
        state, reward, terminated, truncated, _ = envs.step(policy.to_env(action))
        steps.append((state, action, reward, running))
        ended |= running & terminated  # by the environment, and not by the time limit (truncated)
        # Gymnasium resets a finished environment only at its next step. So the state after the last step is
        # still the trajectory's. The mask leaves out what comes from there on.
        running = running & ~(terminated | truncated)
    states, actions, rewards, mask = zip(*steps, strict=True)
    states = np.stack((first, *states), 1)  # [B, T + 1, D]: with the state after the last step
    rewards, mask = np.stack(rewards, 1), np.stack(mask, 1)
    rows, length = np.arange(envs.num_envs), mask.sum(1)
    last = states[rows, length]  # [B, D]: after each trajectory's last step
    success = task.success(last, rewards[rows, length - 1], ended)
    states, rewards, mask, success = map(tensor, (states, rewards, mask, success))
    return SimpleNamespace(states=states[:, :-1], actions=torch.stack(actions, 1), mask=mask, success=success,
                           dense=task.expert_rewards(states, rewards) * mask)


# ---- the networks ------------------------------------------------------------------------------------------

class Network(nn.Module):
    """States [..., D] -> [..., outputs]."""

    def __init__(self, scale, outputs):
        super().__init__()
        self.register_buffer("scale", tensor(scale))  # [D]
        self.layers = nn.Sequential(nn.Linear(len(scale), 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                    nn.Linear(64, outputs))

    def forward(self, states):
        return self.layers(states / self.scale)


class Policy(nn.Module):
    """States [..., D] -> a distribution over actions: one of n choices, or D' numbers, each from a Gaussian
    whose mean depends on the state and whose width does not."""

    def __init__(self, task):
        super().__init__()
        space = task.make(1, seed=0).single_action_space
        self.limit = getattr(space, "high", None)  # [D']: the largest numbers allowed; None: discrete actions
        self.net = Network(task.scale, space.n if self.limit is None else len(space.high))
        self.log_std = nn.Parameter(torch.full(space.shape, -0.5))  # not used for discrete actions

    def forward(self, states):
        outputs = self.net(states)
        if self.limit is None:
            return Categorical(logits=outputs)
        return Independent(Normal(outputs, self.log_std.exp()), 1)  # its log_prob sums over the D' numbers

    def to_env(self, actions):
        """Scales -1 to 1 to what the environment allows, from -limit to limit. (log_prob is of what was
        sampled, before it is cut to -1 to 1.)"""
        return actions.numpy() if self.limit is None else actions.clamp(-1, 1).numpy() * self.limit


# ---- other baselines ---------------------------------------------------------------------------------------

class PPO:
    """A critic that sees every s_t. GAE makes an advantage for each step from its values. With gamma = lam =
    1 it is R - V(s_t): SPPO's with s_t for s_0. They are whitened: in each batch their mean becomes 0 and
    their standard deviation 1. As usual in PPO, V is the critic's output itself, fitted by squared error. A
    value that has moved `value_clip` towards its return gets no further gradient. `advantages` is called
    before `loss`, which needs what it keeps."""

    def __init__(self, task, whitened=True, dense=False, gamma=1.0, lam=1.0, value_clip=0.5):
        self.critic = Network(task.scale, 1)
        self.whitened, self.dense = whitened, dense
        self.gamma, self.lam, self.value_clip = gamma, lam, value_clip

    def advantages(self, batch):
        with torch.no_grad():
            self.values = self.critic(batch.states).squeeze(-1) * batch.mask  # [B, T]
        # [B, T]: True at each trajectory's last step
        last = torch.arange(batch.mask.shape[1]) == batch.mask.sum(1, keepdim=True) - 1
        rewards = batch.dense if self.dense else batch.success[:, None] * last  # R comes with the last step
        advantages, self.returns = gae(rewards, self.values, batch.mask, self.gamma, self.lam)
        return whiten(advantages, batch.mask) if self.whitened else advantages

    def loss(self, batch, rows):
        values, mask = self.critic(batch.states[rows]).squeeze(-1), batch.mask[rows]
        return value_loss(values, self.values[rows], self.returns[rows], mask, num_tokens=mask.sum(),
                          kind="mse", clip=self.value_clip)


class BatchMean:
    """The simplest baseline: the mean R of the same batch. A batch that fails as a whole teaches nothing,
    because all its advantages are 0. (SPPO's V would be above 0, so it blames each failure.)"""

    def __init__(self, task):
        self.critic = nn.Identity()  # no parameters, so that `train` needs no special case

    def advantages(self, batch):
        return batch.success - batch.success.mean()

    def loss(self, batch, rows):
        return 0


# SPPO does not whiten. So "PPO, not whitened" differs from it by the critic alone: what it sees, and how it
# is fitted.
METHODS = {"SPPO": SPPO, "PPO": PPO, "PPO, not whitened": partial(PPO, whitened=False),
           "batch mean": BatchMean}

# ---- the tasks ---------------------------------------------------------------------------------------------

# Horizons, batches and what is a success are the paper's; how experts and clones learn is ours.

@dataclass
class Task:
    env: Callable  # makes `num_envs` environments, which step together
    horizon: int  # steps of the longest trajectory
    batch: int  # B, trajectories per update
    success: Callable  # (last states [B, D], last rewards [B], whether it ended early [B]) -> R [B]
    scale: tuple  # states are divided by these D numbers, so that the networks see values around 1
    # The expert's rewards: (states [B, T + 1, D], the environment's rewards [B, T]) -> [B, T]. Divided by
    # 100, because the environment's rewards add up to hundreds, and an untrained critic's values are near 0.
    expert_rewards: Callable = lambda states, rewards: rewards / 100
    # How the expert learns: the horizon, the discount, the learning rate, and the share of successes at which
    # it is done.
    expert_horizon: int = 1000
    expert_gamma: float = 0.98
    expert_lr: float = 1e-3
    expert_success: float = 0.5
    cloned: float = 0.2  # the share of successes at which the clone is done: more than a random policy's

    def make(self, count, seed):
        envs = self.env(num_envs=count, max_episode_steps=self.horizon)
        envs.reset(seed=seed)
        return envs


class Pendulums(PendulumEnv):
    """Many of Gymnasium's Pendulum, as one: its `step` is numpy and takes arrays as well as numbers. One by
    one, the 16 x 1,000 steps of an update would take a second."""

    def __init__(self, num_envs, max_episode_steps):
        super().__init__()
        self.num_envs, self.single_action_space = num_envs, self.action_space
        self.never = np.zeros(num_envs, bool)  # a pendulum cannot fall, and `sample` stops at the horizon

    def reset(self, seed=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, (2, self.num_envs)) * [[pi], [1]]  # angles, speeds
        return self._get_obs().T, {}

    def step(self, actions):
        states, rewards, *_ = super().step(actions.T)
        return states.T, rewards, self.never, self.never, {}


def pumped_energy(states, rewards):
    """Before the goal, MountainCar's reward says only not to push, so the energy that a step adds counts too.
    The slope pulls with -0.0025 cos(3 position). So the potential energy is 0.0025 / 3 sin(3 position)."""
    position, speed = states.unbind(-1)
    energy = speed**2 / 2 + 0.0025 / 3 * torch.sin(3 * position)
    return rewards / 100 + 1000 * energy.diff(dim=1)


TASKS = {
    # Never to fall or leave the track, and to end within half a degree of upright. State: position, speed,
    # angle, its speed.
    "CartPole": Task(partial(make_vec, "CartPole-v1"), horizon=200, batch=64, scale=(1, 1, 0.1, 1),
                     success=lambda s, reward, ended: ~ended & (abs(s[:, 2]) <= radians(0.5))),
    # To reach the goal, at 0.45. State: position, speed.
    "MountainCar": Task(partial(make_vec, "MountainCarContinuous-v0"), horizon=1000, batch=8, scale=(1, 0.07),
                        success=lambda s, reward, ended: s[:, 0] >= 0.45, expert_rewards=pumped_energy),
    # To stay healthy, as Gymnasium calls it, and to get more than a metre forward. The state begins with this
    # distance, for `success` alone: divided by inf it is 0, and no network sees it.
    "Hopper": Task(partial(make_vec, "Hopper-v5", exclude_current_positions_from_observation=False),
                   horizon=1000, batch=8, scale=(inf, *[1] * 11), expert_gamma=0.99, expert_lr=3e-4,
                   success=lambda s, reward, ended: ~ended & (s[:, 0] > 1)),
    # To have a leg on the ground, near the middle. State: x first, the two legs' contacts last. After a crash
    # the legs may touch the ground too, but then the last reward is -100.
    "LunarLander": Task(partial(make_vec, "LunarLander-v3"), horizon=1000, batch=16, scale=(1,) * 8,
                        success=lambda s, reward, ended:
                        (s[:, 6:].max(1) == 1) & (abs(s[:, 0]) < 0.4) & (reward > -100), expert_success=0.3),
    # To end within 37 degrees of upright. State: the angle's cosine, its sine, its speed. With some seeds, a
    # random policy does so in a quarter of its trajectories, so the clone is stopped later.
    "Pendulum": Task(Pendulums, horizon=1000, batch=16, scale=(1, 1, 8), expert_horizon=200, cloned=0.5,
                     success=lambda s, reward, ended: s[:, 0] > 0.8),
}

# ---- where the policy comes from: an expert, and its clone -------------------------------------------------

def train_expert(task, seed, updates=1000):
    """PPO on the dense reward, until enough trajectories of the last five batches also succeed, or `updates`
    are over. It need not be good, since it only has to give the clone some successes."""
    print("Training the expert ...", flush=True)
    torch.manual_seed(seed)
    policy = Policy(task)
    ppo = partial(PPO, dense=True, gamma=task.expert_gamma, lam=0.95, value_clip=inf)
    task = replace(task, horizon=min(task.horizon, task.expert_horizon))
    curve = train(task, policy, ppo, updates, seed, lr=task.expert_lr,
                  after_update=lambda curve: sum(curve[-5:]) / 5 > task.expert_success)
    print(f"The expert took {len(curve)} updates of {task.batch} trajectories with the dense reward, and "
          f"succeeds in {np.mean(curve[-5:]):.0%}.", flush=True)
    return policy


def clone(task, expert, seed, target):
    """A policy that imitates the expert's successes, until it succeeds itself in a share `target` of 32
    trajectories. It is stopped early, so that there is more to learn. (Its true share is lower, because the
    first 32 that reach the target were partly lucky.)"""
    torch.manual_seed(seed)
    envs, policy = task.make(DEMONSTRATIONS, seed + 1000), Policy(task)  # other s_0 than in training
    shown = sample(task, envs, expert)
    if not shown.success.any():
        raise SystemExit(f"The expert of seed {seed} never succeeds: give another --seed")
    imitated = (shown.mask * shown.success[:, None]).bool()  # [B, T]: the steps of successful trajectories
    states, actions = shown.states[imitated], shown.actions[imitated]
    optimizer = torch.optim.Adam(policy.parameters(), 3e-4)
    for steps in range(30_000):
        if steps % (3 if steps < 300 else 100) == 0:  # not each time: sampling costs more than the step
            success = sample(task, envs, policy).success.mean()
            if success >= target:
                break
        step(optimizer, -policy(states).log_prob(actions).mean())
    else:
        raise SystemExit(f"The clone of seed {seed} never gets to {target:.0%}: give another --seed")
    print(f"The clone took {steps} steps on {shown.success.sum():.0f} successes of the expert's "
          f"{DEMONSTRATIONS} trajectories, and succeeds in {success:.0%} of its own.", flush=True)
    return policy


def start(name, seed, target=None):
    """The clone. It and the expert are kept in runs/control, so that all methods start from the same.
    target: as in `clone`; tools/control.py gives others than the task's."""
    task, folder = TASKS[name], ROOT / "runs" / "control"
    target = target or task.cloned

    def kept(file, make):
        """The policy in this file; the first time, make() trains it."""
        policy = Policy(task)
        if (folder / file).exists():
            print(f"From {folder / file}. (To begin anew, delete {folder}.)")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(make().state_dict(), folder / file)
        policy.load_state_dict(torch.load(folder / file))
        return policy

    def expert():
        return kept(f"{name}-{seed}-expert.pt", lambda: train_expert(task, seed))
    return kept(f"{name}-{seed}-clone-{target}.pt", lambda: clone(task, expert(), seed, target))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="CartPole", help="[CartPole]")
    parser.add_argument("--method", choices=METHODS, default="SPPO", metavar="METHOD",
                        help=" or ".join(map(repr, METHODS)) + " [SPPO]")
    parser.add_argument("--updates", type=int, default=100,
                        help="how many; each has 64 trajectories in CartPole, and 8 or 16 elsewhere [100]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    args = parser.parse_args()
    if args.updates < 1 or args.seed < 0:
        parser.error("--updates must be at least 1, and --seed at least 0")
    torch.set_num_threads(1)  # more threads only slow so small networks down
    task, policy = TASKS[args.task], start(args.task, args.seed)

    def show(curve):
        if len(curve) % 5 == 0 or len(curve) == args.updates:
            mean = np.mean(curve[-5:])
            print(f"{len(curve) * task.batch:7,} trajectories: {mean:4.0%} succeed ", "#" * round(50 * mean),
                  flush=True)

    print(f"{args.method} on {args.task}, from the clone. Each line is the mean of five updates.", flush=True)
    curve = train(task, policy, METHODS[args.method], args.updates, args.seed, after_update=show)
    import matplotlib.pyplot as plt
    done = [task.batch * (i + 1) for i in range(len(curve))]
    plt.plot(done, curve, color="#9ecae1", label="an update")
    plt.plot(done, [np.mean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))], label="mean of five")
    plt.gca().set(title=f"{args.method} on {args.task}, from the clone", xlabel="trajectories",
                  ylabel="share of successes", ylim=(0, 1.02))
    plt.legend()
    file = ROOT / "runs" / "control" / f"{args.task}-{args.method}-{args.seed}.png"
    plt.savefig(file)
    print(f"The curve is in {file}.")


if __name__ == "__main__":
    main()
