"""Whole training runs beside each other: `python -m tools.bench stragglers` and `python -m tools.bench trl`.

    stragglers    --oversample beside waiting for all responses, where lengths have a long tail
    trl           grpo.py and sppo.py beside TRL's GRPOTrainer (pip install trl)

Runs take turns, so that a busy machine slows all alike, and what was measured is printed after each.
"""
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import BUILTIN_MODEL, CommandLine, InputError, option, say
from data import load_problems
from reward import verify
from tools.race import metrics_of


def need(package):
    if not importlib.util.find_spec(package):
        raise InputError(f"this benchmark needs {package}: `pip install {package}`")


# ---- stragglers --------------------------------------------------------------------------------------------

@dataclass
class StragglerConfig(CommandLine):
    output: str = option("runs/bench-stragglers", "folder of the runs")
    seeds: int = option(3, "runs of each", positive=True)
    steps: int = option(40, "training steps of each run", positive=True)
    prompts: int = option(64, "prompts a step", positive=True)
    oversample: float = option(1.5, "as sppo.py's --oversample", positive=True)
    max_staleness: tuple[int, ...] = option((16, 4), "as sppo.py's; each is tried")
    ranks: int = option(2, "processes, each with one thread and an engine of its own", positive=True)
    lr: float = option(1.5e-4, "learning rate; with 0 nothing is learned, and lengths stay what they are")

    def check(self):
        super().check()
        need("vllm")


def stragglers(arguments):
    """Trains with and without --oversample, and prints what each reached and how busy the engines were."""
    c = StragglerConfig.parse(__doc__, arguments)
    c.check()
    model = Path(c.output) / "model"
    if not (model / "model.safetensors").exists():
        say(f"Making a model whose lengths have a long tail, in {model}")
        from builtin.make import make_rambling
        # A reasoning model's distribution of lengths, on a task that can be learned.
        make_rambling(model, median=16, sigma=1.4, most=1000)
    settings = {"waiting": []}
    for age in c.max_staleness:
        settings[f"at most {age} steps old"] = ["--oversample", c.oversample, "--max-staleness", age]
    runs = {name: [] for name in settings}
    for seed in range(c.seeds):
        for name, options in settings.items():  # in turns
            folder = Path(c.output) / f"{name.replace(' ', '-')}-lr{c.lr:g}-{seed}"
            lines = metrics_of(folder, [
                "sppo.py", "--model", model, "--engine", "vllm", "--temperature", 1,
                "--max-prompt-tokens", 64, "--max-response-tokens", 1050, "--dtype", "float32",
                "--no-checkpoint-activations", "--lr", c.lr, "--critic-lr", 1e-3,
                "--clip-high", 0.28, "--save-every", 0, "--eval-every", c.steps,
                "--prompts-per-step", c.prompts, "--minibatch", c.prompts // 2, "--steps", c.steps,
                "--old-logprobs", "rollout", "--seed", seed, *options], ranks=c.ranks)
            runs[name].append(lines)
            say(f"  seed {seed}  {name:<24} {lines[-1]['seconds']:6.1f} s  accuracy "
                f"{lines[0]['eval_accuracy']:.3f} -> {lines[-1]['eval_accuracy']:.3f}")
    say(f"\n{c.steps} steps of {c.prompts} responses, {c.seeds} seeds: mean [lowest, highest]\n")
    report_stragglers({name: [straggler_metrics(c, lines) for lines in seeds]
                       for name, seeds in runs.items()})


def straggler_metrics(c, lines):
    """What the table of `stragglers` shows of one run."""
    def mean(*names):
        return statistics.mean(sum(m[name] for name in names) for m in lines[1:])
    return {"responses/s": c.steps * c.prompts / lines[-1]["seconds"],
            # A rank that waits for the others does so in time/reward.
            "sampling, s a step": mean("time/rollout", "time/reward"),
            "decodings a step": mean("rollout/longest"), "places idle": mean("rollout/idle"),
            "accuracy": lines[-1]["eval_accuracy"], "tokens trained on": mean("response_tokens")}


def report_stragglers(runs):
    """Prints a table. runs: {setting: [the metrics of each seed]}"""
    digits = {"responses/s": 1, "sampling, s a step": 2, "decodings a step": 0, "places idle": 2,
              "accuracy": 3, "tokens trained on": 1}
    say(f"{'':<22}" + "".join(f"{column:>22}" for column in digits))
    means = {}
    for name, seeds in runs.items():
        columns = {column: [metrics[column] for metrics in seeds] for column in digits}
        means[name] = {column: statistics.mean(values) for column, values in columns.items()}
        cells = (f"{means[name][column]:.{d}f} [{min(columns[column]):.{d}f}, {max(columns[column]):.{d}f}]"
                 for column, d in digits.items())
        say(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells))
    waiting = means.pop("waiting")
    for name, mean in means.items():
        say(f"\n{name}: {mean['responses/s'] / waiting['responses/s']:.2f} x the responses trained on per "
            f"second, in 1 / {waiting['decodings a step'] / mean['decodings a step']:.1f} of the decodings")


# ---- beside TRL --------------------------------------------------------------------------------------------

@dataclass
class TRLConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "a chat model: a Hugging Face name or folder")
    dataset: str = option("chain", "a dataset whose answers are numbers")
    output: str = option("runs/bench-trl", "folder of the runs")
    prompts: int = option(8, "prompts a step, times --group-size for sppo.py", positive=True)
    group_size: int = option(8, "samples per prompt", positive=True)
    tokens: int = option(64, "new tokens at most", positive=True)
    lr: float = option(1e-5, "learning rate")
    steps: int = option(3, "steps of grpo.py, before TRL and after it", positive=True)
    trl_steps: int = option(6, "steps of TRL", positive=True)
    sppo_steps: int = option(20, "steps of sppo.py", positive=True)
    threads: int = option(os.cpu_count(), "threads of each", positive=True)

    def check(self):
        super().check()
        need("trl")


def trl_run(c):
    """[(seconds, mean reward)] of each step of TRL's GRPOTrainer, as its users run it without a GPU."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    torch.set_num_threads(c.threads)
    starts, seconds, rewards = [], [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            starts.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - starts[-1])

    def reward(completions, answer, **_):
        scores = [verify(completion[0]["content"], gold, "any")
                  for completion, gold in zip(completions, answer, strict=True)]
        rewards.append(statistics.mean(scores))
        return scores
    problems = [{"prompt": list(p.messages), "answer": p.answer} for p in load_problems(c.dataset)]
    trainer = GRPOTrainer(
        model=c.model, reward_funcs=reward, callbacks=[Watch()], train_dataset=Dataset.from_list(problems),
        args=GRPOConfig(
            output_dir=f"{c.output}/trl", per_device_train_batch_size=c.prompts * c.group_size,
            num_generations=c.group_size, max_completion_length=c.tokens, learning_rate=c.lr,
            lr_scheduler_type="constant", beta=0.0, temperature=1.0, max_steps=c.trl_steps, bf16=True,
            use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True))
    trainer.train()
    return list(zip(seconds, rewards, strict=True))


def our_run(c, script, name, *options):
    """[(seconds, mean reward)] of each step of one of our scripts, on the same problems."""
    folder = Path(c.output) / name
    shutil.rmtree(folder, ignore_errors=True)  # or it might be of a day when the machine was busier
    lines = metrics_of(folder, [
        script, "--model", c.model, "--dataset", c.dataset, "--answer", "any", "--temperature", 1,
        "--lr", c.lr, "--dtype", "bfloat16", "--max-prompt-tokens", 256, "--max-response-tokens", c.tokens,
        "--no-checkpoint-activations", "--save-every", 0,
        "--eval-every", 0, *options], threads=c.threads)
    return [(m["time/step"], m["reward"]) for m in lines if m["step"]]


def said(name, steps):
    """Prints what is known of a run. Returns its median seconds a step after the first."""
    seconds, spent, by_minute = [s for s, _ in steps], 0.0, {}
    for step_seconds, reward in steps:
        spent += step_seconds
        by_minute.setdefault(int(spent // 60), []).append(reward)
    later = seconds[1:] or seconds
    say(f"{name:<18} {statistics.median(later):>7.1f} s a step [{min(later):.1f}, {max(later):.1f}]; "
        f"{sum(seconds):.0f} s in all; mean reward by minute  "
        + "  ".join(f"{minute}: {statistics.mean(rewards):.2f}" for minute, rewards in by_minute.items()))
    return statistics.median(later)


def trl(arguments):
    """Runs grpo.py, TRL, grpo.py again and sppo.py, and prints TRL's time for a step over grpo.py's."""
    c = TRLConfig.parse(__doc__, arguments)
    c.check()
    samples = c.prompts * c.group_size
    group = ["--prompts-per-step", c.prompts, "--minibatch", c.prompts, "--group-size", c.group_size,
             "--steps", c.steps]
    say(f"{c.model}: {samples} samples a step, at most {c.tokens} tokens, bfloat16, {c.threads} threads; "
        "seconds a step are median and range after the first\n")
    before = said("grpo.py", our_run(c, "grpo.py", "grpo-1", *group))
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory is free again at its end
        theirs = said("TRL GRPOTrainer", pool.apply(trl_run, (c,)))
    after = said("grpo.py again", our_run(c, "grpo.py", "grpo-2", *group))
    said(f"sppo.py, {samples} x 1", our_run(
        c, "sppo.py", "sppo", "--prompts-per-step", samples, "--minibatch", samples,
        "--steps", c.sppo_steps, "--critic-lr", 2 * c.lr))
    say(f"\none step of TRL takes {theirs / ((before + after) / 2):.2f} x the time of one of grpo.py")
