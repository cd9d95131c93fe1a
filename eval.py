"""The papers' benchmarks, with the papers' metrics: average, pass and majority of k samples.

    python eval.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --benchmarks aime24 math500 --samples 16
    torchrun --nproc-per-node 8 eval.py ...          the ranks share the work
    python eval.py                                   the built-in model, on the built-in task
    python -m tools.compare a.jsonl b.jsonl          two evaluations side by side

Every response is written to the output file as soon as it is verified, and each has its own random seed. If
an evaluation was stopped, run the same command again: it samples what is missing. `evaluate_policy` is the
short evaluation that the training loop makes between its steps.
"""
import hashlib
import json
import math
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

from cli import BUILTIN_MODEL, CommandLine, InputError, clear_errors, is_main, option, run_of, say
from data import BOXED_SUFFIX, CHAIN, ENDINGS, load_problems, reading, render, trained_on
from engines import fingerprint, make_engine
from equality import equal
from log import progress
from machine import check_model, check_ranks, compute_dtype, init_distributed, load_tokenizer
from reward import MAX_ANSWER_CHARS, Failed, extract_answer
from rollout import make_verifier, sample_and_verify

# Where each benchmark is on the hub: OWNER/NAME[/CONFIG][:SPLIT].
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024", "aime25": "math-ai/aime25:test", "amc23": "math-ai/amc23:test",
    "math500": "HuggingFaceH4/MATH-500:test", "minerva": "math-ai/minervamath:test",
    "beyondaime": "ByteDance-Seed/BeyondAIME:test", "brumo25": "MathArena/brumo_2025",
    "hmmt25": "MathArena/hmmt_feb_2025", "gsm8k": "openai/gsm8k/main:test",
    "deepscaler": "agentica-org/DeepScaleR-Preview-Dataset", "dapo17k": "BytedTsinghua-SIA/DAPO-Math-17k"}
TEMPERATURE, TOP_P = 0.6, 0.95  # the papers'


# ---- metrics -----------------------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """The chance that at least one of k responses drawn from n, of which c are right, is right
    (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(answers, gold, equal=equal):
    """1.0 if the most frequent of `answers` is right, else 0.0. Ties share: 0.5 where one of two tied
    answers is right. Answers that are mathematically equal count as one, however they are written. None (no
    answer) has no vote."""
    groups = []  # [an answer, its votes]
    for answer, votes in Counter(answers).items():  # each text is compared once
        if answer is not None and len(answer) <= MAX_ANSWER_CHARS:
            group = next((g for g in groups if equal(answer, g[0])), None)
            if group is None:
                groups.append(group := [answer, 0])
            group[1] += votes
    tied = [answer for answer, votes in groups if votes == max(v for _, v in groups)]
    return sum(float(equal(answer, gold)) for answer in tied) / max(1, len(tied))


def bootstrap_interval(values, resamples=2000):
    """95 % bootstrap interval, over problems, of the mean of `values`; or, for a list of arrays, of the mean
    of their means, where each benchmark is resampled by itself."""
    rng = np.random.default_rng(0)
    parts = values if isinstance(values, list) else [values]
    means = [np.mean([p[rng.integers(len(p), size=len(p))].mean() for p in parts]) for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def best_of_k(rewards, k):
    """The expected highest reward of k responses drawn from all. For rewards of 0 and 1 it is pass@k; else it
    adds up the chance to reach each level that occurs, times its distance from the level below."""
    levels = sorted({0.0, *rewards})
    return sum((level - below) * pass_at_k(len(rewards), sum(r >= level for r in rewards), k)
               for below, level in pairwise(levels))


def per_problem(records, equal=equal):
    """Each metric of one benchmark as an array over its problems. `records`: every response, see `record`.
    Without maj@k where equal is None: a reward of one's own does not say what a response's answer is."""
    records = sorted(records, key=lambda r: (r["problem"], r["sample"]))

    def row(group):
        n, rewards, gold = len(group), [r["reward"] for r in group], group[0]["gold"]
        known = {r["answer"]: r["reward"] for r in group}

        def same(a, b):  # what was verified when it was sampled is not verified again
            if b == gold or (known[a] or known[b]):  # all right answers are equal, and no wrong one is right
                return known[a] if b == gold else known[a] == known[b]
            return equal(a, b)

        majority = {f"maj@{n}": majority_at_k([r["answer"] for r in group], gold, same)} if equal else {}
        return {f"avg@{n}": sum(rewards) / n, **majority,
                **{f"pass@{k}": best_of_k(rewards, k) for k in range(1, n + 1)},
                "tokens": sum(r["tokens"] for r in group) / n,
                "cut off": sum(not r["finished"] for r in group) / n}

    with ThreadPoolExecutor() as pool:  # each thread waits for the verifier's processes
        rows = [*pool.map(row, [list(group) for _, group in groupby(records, key=lambda r: r["problem"])])]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def benchmark_metrics(name, batch, samples):
    """{eval/NAME/METRIC: mean} of a Batch with `samples` responses to each problem."""
    solved = batch.rewards.view(-1, samples)  # [problems, samples]
    metrics = {f"avg@{samples}": solved.mean(), f"pass@{samples}": solved.amax(1).mean(),
               "tokens": batch.lengths.float().mean(), "cut_off": batch.truncated}
    return {f"eval/{label(name)}/{key}": float(value) for key, value in metrics.items()}


# ---- benchmarks and responses ------------------------------------------------------------------------------

def load_benchmark(name, c):
    """The problems of a benchmark by name, of a file, or of anything else that `load_problems` reads. c: the
    options, of which --prompt-field and --answer-field count for what is no benchmark with a name."""
    options = reading(c)
    if name in BENCHMARKS or name == "chain":
        options |= dict(prompt_field=None, answer_field=None)
    if name == "chain":  # problems that no training run on `chain` has seen
        return [p for p in load_problems(f"{BUILTIN_MODEL}/chain.jsonl", **options) if p.id >= CHAIN][:256]
    if name not in BENCHMARKS and not set(name) & set("/.:"):
        raise InputError(f"{name}: no such benchmark; give one of {', '.join([*BENCHMARKS, 'chain'])}, "
                         "a file, or HUB/NAME")
    return load_problems(BENCHMARKS.get(name, name), **options)


def label(name):
    """A benchmark's name in tables and metrics: a file's name without its folder and ending."""
    return Path(name.removesuffix(".gz")).stem if name.endswith(ENDINGS) else name


def record(benchmark, problem, sample, response, text, reward, mode):
    """One response as it is kept. `text` is what it says, finished or not; what was cut off has no answer."""
    answer = extract_answer(text, mode) if response.finished else None
    return {"benchmark": benchmark, "problem": problem.id, "sample": sample, "reward": reward,
            "gold": problem.answer, "answer": answer, "tokens": len(response.ids),
            "finished": response.finished, "question": problem.text, "response": text,
            **({"failed": reward.why} if isinstance(reward, Failed) else {})}


# ---- the file of an evaluation -----------------------------------------------------------------------------

class RolloutFile:
    """A line that says what was evaluated, then a line a response.

    All ranks append to it, each line in one write, which keeps lines whole on any file system but NFS. What
    was there when it was opened is in `done`: {(benchmark, problem, sample): line}.
    """

    def __init__(self, path, settings):
        """All ranks. Raises InputError if the file holds an evaluation with other settings, or something
        else: it is not changed then."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = self.path.read_bytes() if self.path.exists() else b""
        whole = there.rfind(b"\n") + 1  # a last line without an end was being written when it was stopped
        before, self.done = read_rollouts(self.path) if whole else (settings, {})
        summary = self.path.with_suffix(".json")
        if not whole and not json.dumps(settings).encode().startswith(there):
            raise InputError(f"{path}: was not written by eval.py; give another --output")
        if not there and summary.exists():
            raise InputError(f"{summary}: would be overwritten; delete it, or give another --output")
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(f"{path}: holds an evaluation with {name} {before.get(name)!r}, and this "
                                 f"one has {value!r}; give another --output, or delete that file")
        dist.barrier()  # all have read it
        self.file = self.path.open("ab", buffering=0)
        if is_main():
            self.file.truncate(whole)
            if not whole:
                self.write(settings)
        dist.barrier()

    def write(self, line):
        rest = json.dumps(line).encode() + b"\n"
        while rest:  # a full disk may take a part, and then raises OSError
            rest = rest[self.file.write(rest) :]

    def finish(self):
        """All ranks; returns the lines of all."""
        self.file.close()
        dist.barrier()
        return read_rollouts(self.path)[1]


def read_rollouts(path):
    """(settings, {(benchmark, problem, sample): line}) of a file that eval.py wrote."""
    settings, responses = {}, {}
    try:
        for line in map(json.loads, Path(path).read_text(encoding="utf-8").split("\n")[:-1]):
            if "model" in line:
                settings = line
            else:
                responses[line["benchmark"], line["problem"], line["sample"]] = line
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); give a file that "
                         "eval.py wrote") from None
    return settings, responses


# ---- while training ----------------------------------------------------------------------------------------

def load_eval_benchmarks(c, tokenizer):
    """{name: problems} of a training script's --eval-benchmarks."""
    benchmarks = {name: load_benchmark(name, c) for name in c.eval_benchmarks}
    if len({*map(label, benchmarks)}) < len(benchmarks):
        raise InputError(f"--eval-benchmarks {' '.join(benchmarks)}: metrics have a file's name without its "
                         "folder, and two are the same; rename one")
    for name, problems in benchmarks.items():
        longest = max(len(render(p.messages, tokenizer)) for p in problems)
        if longest > c.max_prompt_tokens:
            raise InputError(f"--eval-benchmarks {name}: has a prompt of {longest} tokens; raise "
                             "--max-prompt-tokens to that")
    return benchmarks


def evaluate_policy(run, log, step):
    """Accuracy on the held-out problems, one sampled response each, and the benchmarks. Its
    time is not counted."""
    def sample(*arguments, **options):
        batch = run.sampler.sample(*arguments, **options)
        failed = sum(count for name, count in run.sampler.metrics.items() if name.startswith("reward/"))
        if failed > len(batch.responses) / 2:
            say(f"warning: {failed} verifications of an evaluation of {len(batch.responses)} responses "
                "failed, which counts them as wrong: its accuracy tells nothing")
        return batch

    run.sampler.random.seed(f"{run.config.seed}/{step}/evaluation")
    for name, problems in run.benchmarks.items():
        batch = sample(problems, run.config.eval_samples, temperature=TEMPERATURE, top_p=TOP_P)
        log.add(benchmark_metrics(name, batch, run.config.eval_samples))
    if run.held_out:
        log.evaluated(step, sample(run.held_out), run.tokenizer)
    if step == 0:
        log.write(0, 0.0)


# ---- the script --------------------------------------------------------------------------------------------

@dataclass
class EvalConfig(CommandLine):
    model: str = option(BUILTIN_MODEL, "hub name, folder or run [built-in]", group="what to evaluate")
    benchmarks: tuple[str, ...] = option(
        ("aime24", "aime25", "amc23", "math500", "minerva"),
        f"any of {', '.join(BENCHMARKS)}, chain (built in), or what --dataset of sppo.py takes "
        "[a run's model: what the run held out]")
    prompt_field: str | None = option(None, "the problem's field in a row [problem, question or prompt]")
    answer_field: str | None = option(None, "the answer's field in a row [answer, solution or ground_truth]")
    output: str | None = option(None, "file of responses, continued if it exists [runs/eval/MODEL.jsonl]")
    samples: int = option(16, "responses per problem: the k of avg@k", group="sampling", positive=True)
    temperature: float = option(TEMPERATURE, "sampling temperature; 0 is greedy")
    top_p: float = option(TOP_P, "only the likeliest tokens of this total probability", positive=True, most=1)
    top_k: int = option(0, "only this many of the likeliest tokens (0: all)")
    max_response_tokens: int = option(8192, "a response that needs more has no answer", positive=True)
    answer: Literal["boxed", "any"] = option("boxed", "last \\boxed{}; any: without a box, the last number")
    reward: str | None = option(None, "FILE.py:FUNCTION(response, answer) -> number in [0, 1] [mathematics]")
    suffix: str = option(BOXED_SUFFIX, "what each prompt asks for at its end (empty: nothing)", empty=True)
    seed: int = option(0, "seed for sampling", most=2**63 - 1)
    tensor_parallel: int = option(1, "ranks that share one vLLM engine", group="running", positive=True)
    engine: Literal["auto", "vllm", "transformers"] = option("auto", "auto: vllm where it is installed")
    vllm_memory: float = option(0.9, "vLLM's share of a GPU's memory", most=1)
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "auto: bfloat16 if the hardware has it")
    reward_timeout: float = option(
        1.0, "processor seconds (ten times that on the clock) until a verification scores 0", positive=True)
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")

    # As in sppo.py: what the model of a run does not bring along.
    NOT_INHERITED = ("model", "output", "samples", "seed", "engine", "tensor_parallel", "vllm_memory",
                     "trust_remote_code")
    MUST_BE_TYPED = ("reward",)
    # The built-in model makes mistakes only at the temperature that it is trained at.
    BUILTIN = dict(
        benchmarks=("chain",), temperature=1.0, top_p=1.0, max_response_tokens=112, dtype="float32")

    @staticmethod
    def options_of(run):
        """Also the benchmark: what the run held out. For the built-in task there is another."""
        options = CommandLine.options_of(run)
        if not str(options.get("dataset")).startswith("chain") and (run / "held_out.jsonl").is_file():
            options["benchmarks"] = (str(run / "held_out.jsonl"),)
        return options

    def check(self):
        super().check()
        if self.output and not self.output.endswith(".jsonl"):
            raise InputError(f"--output {self.output}: is a file; give it a name that ends with .jsonl")
        if self.temperature == 0 and self.samples > 1:
            raise InputError("--temperature 0: greedy responses are all the same; give --samples 1")


def run_evaluation(c):
    """Samples what is not in the output file yet, verifies it, and prints the table."""
    c.check()
    tokenizer = load_tokenizer(c.model, c.trust_remote_code)
    problems = [(name, p) for name in dict.fromkeys(c.benchmarks) for p in load_benchmark(name, c)]
    if seen := trained_on(run_of(c.model), [p for _, p in problems], c):
        say(f"warning: {c.model} has trained on {seen} of the {len(problems)} problems, and knows them")
    prompts = {(name, p.id): render(p.messages, tokenizer) for name, p in problems}
    # The responses to sample, by the key under which RolloutFile knows them.
    jobs = {(name, p.id, sample): p for name, p in problems for sample in range(c.samples)}
    max_tokens = max(map(len, prompts.values())) + c.max_response_tokens
    check_model(c.model, max_tokens, c.trust_remote_code, "--max-response-tokens")

    device = init_distributed()
    c.dtype = compute_dtype(c.dtype, device)
    check_ranks(tensor_parallel=c.tensor_parallel)
    settings = {"model": c.model, "weights": fingerprint(c.model, tokenizer, c.trust_remote_code)}
    for name in ("temperature", "top_p", "top_k", "max_response_tokens", "answer", "dtype", "seed"):
        settings[name] = getattr(c, name)
    verifier = make_verifier(c)
    settings["reward"] = verifier.code
    records = RolloutFile(c.output or f"runs/eval/{(run_of(c.model) or Path(c.model)).name}.jsonl", settings)
    for key, p in jobs.items():
        old = records.done.get(key)
        if old and (old["question"], old["gold"]) != (p.text, p.answer):
            raise InputError(f"{records.path}: its problem {p.id} of {key[0]} has another text or answer "
                             "now; give another --output")
    if (there := 1 + max((sample for *_, sample in records.done), default=0)) > c.samples:
        raise InputError(f"{records.path}: has {there} samples per problem, and its table would become one "
                         f"of {c.samples}; give --samples {there}, or another --output")
    todo = [job for job in jobs.items() if job[0] not in records.done]
    if len(todo) < len(jobs):
        say(f"{records.path}: {len(jobs) - len(todo):,} of {len(jobs):,} responses are there already.")
    engine = make_engine(c, c.model, tokenizer, device, max_tokens) if todo else None
    if engine:
        sample_all(c, engine, tokenizer, verifier, records, todo, prompts)
    results = [r for key, r in records.finish().items() if key in jobs]
    if failed := sum("failed" in r for r in results):
        say(f"warning: {failed} verifications took too long or failed, and their rewards are 0")
    if is_main():
        report(c, results, verifier, records.path)
    verifier.close()
    if engine:
        engine.close()  # before the process group, which vLLM may end itself
    if dist.is_initialized():
        dist.destroy_process_group()


def sample_all(c, engine, tokenizer, verifier, file, todo, prompts):
    """This rank's part of `todo`, a list of (key, Problem); each response is written as soon as it is
    verified."""
    part = todo[dist.get_rank() // c.tensor_parallel :: dist.get_world_size() // c.tensor_parallel]
    # Each response has its own seed, so that it depends neither on what was sampled before nor
    # on the number of ranks.
    names = [f"{c.seed}/{name}/{number}/{sample}" for (name, number, sample), _ in part]
    seeds = [int.from_bytes(hashlib.sha1(name.encode()).digest()[:5], "big") for name in names]
    waiting, rewards = deque(), [r["reward"] for r in file.done.values()]  # the bar shows the score of all

    def write_verified(wait=False):
        while waiting and (wait or waiting[0][3].done()):
            i, response, text, reward = waiting.popleft()
            (name, _, sample), problem = part[i]
            rewards.append(reward.result())
            if dist.get_rank() % c.tensor_parallel == 0:  # ranks that share an engine have the same responses
                file.write(record(name, problem, sample, response, text, reward.result(), c.answer))
            bar.set_description(f"reward {sum(rewards) / len(rewards):.3f}", refresh=False)

    with progress.phase("evaluation", len(part), delay=0, leave=True, disable=not is_main(),
                        mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for sampled in sample_and_verify(
                engine, verifier, tokenizer, [prompts[key[:2]] for key, _ in part],
                [problem.answer for _, problem in part], temperature=c.temperature, top_p=c.top_p,
                top_k=c.top_k, max_tokens=c.max_response_tokens, seeds=seeds):
            waiting.append(sampled)
            write_verified()
        write_verified(wait=True)


def report(c, records, verifier, path):
    """Prints the table, and writes it with every pass@k to a .json file beside the responses."""
    parts = {name: [r for r in records if r["benchmark"] == name] for name in c.benchmarks}
    metrics = {name: per_problem(part, None if c.reward else verifier.equal) for name, part in parts.items()}
    table = {name: {key: (v.mean(), *bootstrap_interval(v)) for key, v in m.items()}
             for name, m in metrics.items()}
    if len(metrics) > 1:
        columns = {key: [m[key] for m in metrics.values()] for key in metrics[c.benchmarks[0]]}
        table["mean"] = {key: (np.mean([v.mean() for v in values]), *bootstrap_interval(values))
                         for key, values in columns.items()}
    n = c.samples
    shown = [f"avg@{n}", *([] if c.reward else [f"maj@{n}"]), f"pass@{n}"] if n > 1 else ["avg@1"]
    say(f"\n{c.model}, {n} samples at temperature {c.temperature}, top-p {c.top_p}, top-k "
        f"{c.top_k or 'all'}, at most {c.max_response_tokens} tokens: percent, with 95 % bootstrap intervals "
        "over problems\n")
    say(f"{'benchmark':<20} problems" + "".join(f"{name:>20}" for name in shown) + "    tokens   cut off")
    for name, row in table.items():
        count = sum(len(m["tokens"]) for key, m in metrics.items() if name in (key, "mean"))
        cells = "".join("{:>7.1f} [{:>4.1f}, {:>4.1f}]".format(*(100 * x for x in row[key])) for key in shown)
        cells += f"{row['tokens'][0]:>10,.0f}{100 * row['cut off'][0]:>8.1f} %"
        say(f"{label(name)[:20]:<20} {count:>8}{cells}")
    for name, part in parts.items():
        broken = set(verifier.unverifiable([r["gold"] for r in part]))
        others = [r["reward"] for i, r in enumerate(part) if i not in broken]
        if broken:
            say(f"\n{label(name)}: {len(broken) // n} of {len(part) // n} gold answers are broken, such as "
                f"{part[min(broken)]['gold'][:60]!r}: nobody can be right there. avg@{n} over the others: "
                f"{100 * np.mean(others or [np.nan]):.1f}")
    summary = path.with_suffix(".json")
    summary.write_text(json.dumps(table, indent=1) + "\n")  # {benchmark: {metric: [mean, low, high]}}
    say(f"\nEvery response is in {path}, every pass@k with its interval in {summary}.")


if __name__ == "__main__":
    with clear_errors():
        run_evaluation(EvalConfig.parse(__doc__))
