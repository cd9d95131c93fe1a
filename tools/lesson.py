"""Pictures of what SPPO and its relatives do, drawn from one real run of the built-in model.

    python -m tools.lesson              trains for some minutes, and draws
    python -m tools.lesson --redraw     draws again what docs/pictures/lesson.json holds
    python -m tools.lesson -- --seed 1 ...       what follows -- is given to the run

The run is SPPO's. PPO's critic and SPO's tracker learn from the same responses, but change nothing. So in
the end one batch can be shown with the advantages of all algorithms, each with a baseline that was trained.
"""
import json
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import sppo
from cli import CommandLine, InputError, clear_errors, option, say
from explain import Ratios, watch
from grpo import group_advantages, remax_advantages, rloo_advantages
from ppo import PPO, PPOConfig
from spo import SPO, SPOConfig, normalize
from sppo import SPPO, clipped_policy_loss, sequence_advantages, train
from tools.lesson_pictures import draw
from tools.plan import GIB, PlanConfig, count, fake_world, phases, shape_of

GROUP = 8  # responses to a prompt where its chance of success is measured, as in GRPO
PLAN = PlanConfig(vllm_memory=0.35)  # of README's 7B command


@dataclass
class LessonConfig(CommandLine):
    steps: int = option(40, "training steps", positive=True)
    output: str = option("docs/pictures", "folder for the pictures and lesson.json")
    run: str = option("runs/lesson", "folder of the run")
    shape: str = option(PlanConfig.model, "the model whose memory is planned, as in tools.plan")
    redraw: bool = option(False, "draw what --output holds, and train nothing")


@dataclass
class RunConfig(PPOConfig):
    """PPO's options, and the one that SPO adds."""
    init_samples: int = option(0, "as spo.py's: its tracker starts from 1/2")


class Together(SPPO):
    """SPPO trains the policy. PPO's critic and SPO's tracker look on, and learn from the same batches."""

    def __init__(self, run):
        super().__init__(run)
        self.others = self.ppo, self.spo = PPO(run), SPO(run)

    def advantages(self, batch):
        with self.run.clock("others"):  # their time, which is not SPPO's
            for other in self.others:
                other.advantages(batch)
        return super().advantages(batch)

    def update(self, batch):
        with self.run.clock("others"):
            for other in self.others:
                other.update(batch)
        return super().update(batch)


class Lesson:
    """What is measured during the run: `data` becomes lesson.json."""

    def __init__(self, steps):
        self.begun = sppo.begin
        self.measured = {1, (steps + 1) // 2, steps}
        self.data, self.up, self.down = {"steps": steps, "critic": []}, [], []

    def begin(self, run, baseline):
        """In place of sppo.begin: the log is watched."""
        self.run, self.baseline, self.ratios = run, baseline, Ratios(run, baseline, clipped_policy_loss)
        step, log = self.begun(run, baseline)
        watch(log, "write", self.after_step)
        return step, log

    def after_step(self, _, step, seconds):
        """Between two steps the engine is awake, and no clock runs."""
        if not step:
            return
        for row in self.ratios.logprobs:
            part = self.up if self.ratios.advantages[row] > 0 else self.down
            part += self.ratios.ratio(row).tolist()
        if step in self.measured:
            problems = self.run.held_out
            share = self.run.sampler.sample(problems, GROUP).rewards.view(-1, GROUP).mean(1)
            value = self.value_logits(problems).sigmoid()
            self.data["critic"].append({"step": step, "share": share.tolist(), "value": rounded(value)})
        if step == (self.data["steps"] + 1) // 2:
            self.data["groups"] = self.praise(step)

    def value_logits(self, problems):
        critic = self.baseline.critic
        return critic.logits(critic.encode(problems))

    def praise(self, step):
        """One batch, and the advantage that each algorithm gives. Of it, a group whose rewards differ, and
        one in which all agree."""
        run, baseline = self.run, self.baseline
        problems = random.Random(0).sample(run.problems, len(run.held_out))
        batch = run.sampler.sample(problems, GROUP, greedy=True)
        remembered = torch.tensor(baseline.spo.expect(batch.problems))
        advantages = {
            "SPPO": sequence_advantages(batch.rewards, self.value_logits(batch.problems)),
            "SPO": normalize(batch.rewards - remembered),
            "GRPO": group_advantages(batch.rewards, GROUP), "RLOO": rloo_advantages(batch.rewards, GROUP),
            "ReMax": remax_advantages(batch.rewards, batch.greedy_rewards.repeat_interleave(GROUP)),
            "PPO": baseline.ppo.advantages(batch)}
        longest = batch.lengths.view(-1, GROUP).amax(1).tolist()
        shares = batch.rewards.view(-1, GROUP).mean(1).tolist()
        greedy = batch.greedy_rewards.tolist()

        def best(badness):
            return min(range(len(problems)), key=lambda i: (badness(i), longest[i]))
        # The first is drawn token by token, so it should be short.
        chosen = {"mixed": best(lambda i: (shares[i] in (0, 1), longest[i] > 24, abs(shares[i] - 0.5))),
                  "equal": best(lambda i: shares[i] != greedy[i])}
        return {"step": step, **{name: self.group(batch, i, advantages) for name, i in chosen.items()}}

    def group(self, batch, number, advantages):
        """What is drawn of one prompt."""
        rows = range(number * GROUP, (number + 1) * GROUP)
        problem, responses = batch.problems[rows[0]], [batch.responses[i] for i in rows]
        return {"problem": problem.messages[-1]["content"], "answer": problem.answer,
                "tokens": [[self.run.tokenizer.decode(token) for token in r.ids] for r in responses],
                "rewards": batch.rewards[rows].tolist(), "greedy": batch.greedy_rewards[number].item(),
                "advantages": {name: [rounded(row[: len(r.ids)] if row.dim() else row)
                                      for row, r in zip(advantages[name][rows], responses, strict=True)]
                               for name in advantages}}

    def ratio_counts(self, c):
        """How many tokens had which ratio, by the sign of their advantage; and how many had no gradient."""
        edges = np.linspace(0, 4, 81)
        up, down = np.array(self.up), np.array(self.down)
        return {"clip_low": c.clip_low, "clip_high": c.clip_high, "dual_clip": c.dual_clip,
                "edges": rounded(edges), "up": np.histogram(up.clip(0, 4), edges)[0].tolist(),
                "down": np.histogram(down.clip(0, 4), edges)[0].tolist(),
                "clipped": {"up": int((up > 1 + c.clip_high).sum()),
                            "down": int((down < 1 - c.clip_low).sum()),
                            "dual": int((down > (c.dual_clip or np.inf)).sum())}}


def rounded(values):
    return np.round(np.asarray(values, dtype=float), 4).tolist()


def lesson(c, extra):
    """Trains, and returns what lesson.json holds."""
    own = ["--dataset", SPOConfig.BUILTIN["dataset"], "--eval-problems", "64"]  # prompts that come back
    config = replace(RunConfig.parse("", own + extra), steps=c.steps, output=c.run, eval_every=c.steps)
    it = Lesson(c.steps)
    with patch.object(sppo, "begin", it.begin):
        train(config, Together)
    if len(it.data["critic"]) < len(it.measured):
        raise InputError("the run was stopped before its last step, so nothing can be drawn; run it again")
    lines = [json.loads(line) for line in Path(c.run, "metrics.jsonl").read_text().splitlines()][1:]
    seconds = {phase: statistics.median(line[f"time/{phase}"] - (phase == "critic") * line["time/others"]
                                        for line in lines)
               for phase in ("rollout", "reward", "logprobs", "critic", "update", "sync")}
    say(f"Counting what {c.shape} needs on {PLAN.gpus} GPUs.")
    return {**it.data, "extra": extra, "seconds": seconds, "responses": config.prompts_per_step,
            "ratios": it.ratio_counts(config), "plan": plan(c.shape)}


def plan(shape):
    """{phase: GiB by column} on one GPU: that of `python -m tools.plan`."""
    fake_world(PLAN.gpus)
    counts = [count(kind, shape_of(shape), PLAN.micro_batch_tokens,
                    replicas=PLAN.replicas, checkpoint_activations=PLAN.checkpoint_activations)
              for kind in ("policy", "prompts")]
    held = phases(*counts, "", PLAN.vllm_memory * PLAN.gpu_memory * GIB)
    return {"shape": shape, "gpus": PLAN.gpus, "gpu_memory": PLAN.gpu_memory, "phases": {
        name: {column: round(size / GIB, 2) for column, size in columns.items()}
        for name, columns in held.items()}}


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    c = LessonConfig.parse(__doc__, arguments[:cut])
    with clear_errors():
        c.check()
        folder, file = Path(c.output), Path(c.output) / "lesson.json"
        if c.redraw and not file.exists():
            raise InputError(f"{file}: there is nothing to draw; run the lesson first (without --redraw)")
        data = json.loads(file.read_text()) if c.redraw else lesson(c, arguments[cut + 1 :])
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, ensure_ascii=False) + "\n")
        draw(data, folder)
        say(f"The pictures are in {folder}.")


if __name__ == "__main__":
    main()
