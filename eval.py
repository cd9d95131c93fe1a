"""The papers' benchmarks, with the papers' metrics: average, pass and majority of k samples.

    python eval.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --benchmarks aime24 math500 --samples 16
    torchrun --nproc-per-node 8 eval.py ...          the ranks share the work
    python eval.py                                   the built-in model, on the built-in task
    python eval.py --compare a.jsonl b.jsonl         two evaluations side by side
    python eval.py --recheck a.jsonl                 its rewards against plain math-verify

Every response is a line of the output file as soon as it is verified, and each has a random seed of its own. An
evaluation that was stopped goes on from there: the same command again.
"""
import hashlib
import importlib.util
import json
import math
import multiprocessing
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Literal

from cli import CommandLine, clear_errors, is_main, option, say  # before torch: it quiets what loads after it

# isort: split
import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig

from data import BUILTIN_MODEL, InputError, load_problems, load_tokenizer, render
from policy import init_distributed
from pretrained import check_model
from reward import MAX_ANSWER_CHARS, Verifier, equal, extract_answer
from rollout import make_engine, sample_and_verify, stop_tokens

# Where each benchmark is on the hub: NAME[/CONFIG][:SPLIT].
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024", "aime25": "math-ai/aime25:test", "amc23": "math-ai/amc23:test",
    "math500": "HuggingFaceH4/MATH-500:test", "minerva": "math-ai/minervamath:test", "brumo25": "MathArena/brumo_2025",
    "hmmt25": "MathArena/hmmt_feb_2025", "gsm8k": "openai/gsm8k/main:test",
    "deepscaler": "agentica-org/DeepScaleR-Preview-Dataset", "dapo17k": "BytedTsinghua-SIA/DAPO-Math-17k"}
TEMPERATURE, TOP_P = 0.6, 0.95  # the papers'


@dataclass
class Config(CommandLine):
    model: str = option(BUILTIN_MODEL, "Hugging Face name or folder, or a run's --output (default: the built-in model)")
    benchmarks: tuple[str, ...] = option(("aime24", "aime25", "amc23", "math500", "minerva"),
                                         f"any of {', '.join(BENCHMARKS)}, chain (built in), or what sppo.py's --dataset takes")
    data: str | None = option(None, "folder with NAME.jsonl or NAME.parquet for benchmarks, where there is no network")
    samples: int = option(16, "responses per problem: the k of avg@k, pass@k and maj@k")
    temperature: float = option(TEMPERATURE, "sampling temperature; 0 is greedy")
    top_p: float = option(TOP_P, "sample from the likeliest tokens that together have this probability")
    max_response_tokens: int = option(8192, "a response that needs more has no answer")
    answer: Literal["boxed", "any"] = option("boxed", "what is an answer: the last \\boxed{}, or failing that any last number")
    output: str | None = option(None, "file of responses, continued if it exists [runs/eval/MODEL.jsonl]")
    compare: tuple[str, ...] = option((), "instead: two files of responses, side by side")
    recheck: str | None = option(None, "instead: a file of responses, scored again by plain math-verify")
    engine: Literal["auto", "vllm", "transformers"] = option("auto", "what samples; auto is vllm where it is installed")
    tensor_parallel: int = option(1, "neighbouring ranks that share one vLLM engine")
    vllm_memory: float = option(0.9, "vLLM's share of a GPU's memory")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "compute type")
    reward_workers: int = option(2, "verifier processes on each rank")
    reward_timeout: float = option(1.0, "processor seconds after which a verification is given up, and scores 0")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    seed: int = option(0, "of sampling")

    # The built-in model only slips at the temperature that it is trained at.
    BUILTIN: ClassVar[dict] = dict(benchmarks=("chain",), temperature=1.0, top_p=1.0, max_response_tokens=64, dtype="float32")

    def check(self):
        for name in ("samples", "max_response_tokens", "top_p", "reward_workers", "reward_timeout", "tensor_parallel"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be greater than 0")
        if self.temperature < 0 or self.top_p > 1:
            raise InputError(f"--temperature {self.temperature} --top-p {self.top_p}: give at least 0 and at most 1")
        if self.output and not self.output.endswith(".jsonl"):
            raise InputError(f"--output {self.output}: is a file of responses; give it a name that ends with .jsonl")
        if self.engine == "vllm" and not importlib.util.find_spec("vllm"):
            raise InputError("--engine vllm needs `pip install vllm`")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(f"--temperature 0 --samples {self.samples}: greedy responses are all the same; give --samples 1")


# ---- metrics --------------------------------------------------------------------------------------------------------

def pass_at_k(n, c, k):
    """The chance that at least one of k responses drawn from n, of which c are right, is right (arXiv 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(answers, gold, equal=equal):
    """1.0 if the most frequent of `answers` is right, else 0.0; tied answers share: 0.5 where one of two is right.
    Answers that are mathematically equal count as one, however they are written. None (no answer) has no vote."""
    groups = []  # [an answer, its votes]
    for answer in answers:
        if answer is not None and len(answer) <= MAX_ANSWER_CHARS:
            group = next((g for g in groups if answer == g[0] or equal(answer, g[0])), None)
            if group:
                group[1] += 1
            else:
                groups.append([answer, 1])
    tied = [answer for answer, votes in groups if votes == max(v for _, v in groups)]
    return sum(float(equal(answer, gold)) for answer in tied) / max(1, len(tied))


def interval(values, resamples=2000):
    """95 % bootstrap interval, over problems, of the mean of `values`; or, for a list of arrays, of the mean of their
    means, each benchmark resampled by itself."""
    rng = np.random.default_rng(0)
    parts = values if isinstance(values, list) else [values]
    means = [np.mean([p[rng.integers(len(p), size=len(p))].mean() for p in parts]) for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def per_problem(records, equal=equal):
    """Each metric of one benchmark as an array over its problems. `records`: every response, see `record`."""
    records = sorted(records, key=lambda r: (r["problem"], r["sample"]))
    metrics = {}
    for _, group in groupby(records, key=lambda r: r["problem"]):
        group = list(group)
        n, right = len(group), sum(r["reward"] > 0 for r in group)
        known = {r["answer"]: r["reward"] for r in group}  # was verified when it was sampled
        values = {f"avg@{n}": right / n, f"maj@{n}": majority_at_k(
            [r["answer"] for r in group], group[0]["gold"],
            lambda a, b, known=known, gold=group[0]["gold"]: known[a] if b == gold and a in known else equal(a, b))}
        values |= {f"pass@{k}": pass_at_k(n, right, k) for k in range(1, n + 1)}
        values |= {"tokens": sum(r["tokens"] for r in group) / n, "cut off": sum(not r["finished"] for r in group) / n}
        for name, value in values.items():
            metrics.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in metrics.items()}


def benchmark_metrics(name, batch, tokenizer, verifier):
    """{eval/NAME/METRIC: mean} of a training loop's Batch."""
    records, count = [], Counter()
    for problem, response, reward in zip(batch.problems, batch.responses, batch.rewards.tolist(), strict=True):
        text = tokenizer.decode(response.ids, skip_special_tokens=True)
        records.append(record(name, problem, count[problem.id], response, text, reward, verifier.mode))
        count[problem.id] += 1
    metrics, n = per_problem(records, verifier.equal), max(count.values())
    shown = [f"avg@{n}", *([f"maj@{n}", f"pass@{n}"] if n > 1 else []), "tokens", "cut off"]
    return {f"eval/{label(name)}/{key.replace(' ', '_')}": metrics[key].mean() for key in shown}


# ---- benchmarks and responses ---------------------------------------------------------------------------------------

def load_benchmark(name, data=None):
    """The problems of a benchmark by name, of a file, or of anything else that `load_problems` reads."""
    if name == "chain":  # problems that no training run on `chain` has seen
        return [p for p in load_problems("chain:21000") if p.id >= 20_000][:256]
    if name not in BENCHMARKS:
        if not set(name) & set("/.:"):
            raise InputError(f"{name}: no such benchmark; give one of {', '.join(BENCHMARKS)}, chain, a file, or HUB/NAME")
        return load_problems(name)
    files = [Path(data) / f"{name}.{kind}" for kind in ("jsonl", "parquet")] if data else []
    for file in files:
        if file.is_file():
            return load_problems(str(file))
    try:
        return load_problems(BENCHMARKS[name])
    except InputError as error:
        raise InputError(f"benchmark {name}: {error}; where there is no network, put its problems into {name}.jsonl or "
                         f"{name}.parquet, and name that file itself, or its folder with eval.py's --data") from None


def label(name):
    """A benchmark's name in tables and metrics: of a file, its stem."""
    return Path(name).stem if name.endswith((".jsonl", ".parquet")) else name


def record(benchmark, problem, sample, response, text, reward, mode):
    """One response as it is kept. `text` is what it says, finished or not; what was cut off has no answer."""
    return {"benchmark": benchmark, "problem": problem.id, "sample": sample, "reward": reward, "gold": problem.answer,
            "answer": extract_answer(text, mode) if response.finished else None, "tokens": len(response.ids),
            "finished": response.finished, "question": problem.messages[-1]["content"], "response": text}


class Records:
    """The file of an evaluation: a line that says what was evaluated, then a line a response. Each rank but the first
    writes such a file of its own beside it, with its number at the end; they are merged into the first when an
    evaluation ends, and when it is taken up again."""

    def __init__(self, path, settings):
        """All ranks. Raises InputError if the file holds an evaluation with other settings."""
        self.path, self.settings = Path(path), settings
        if is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.merge()
        dist.barrier()
        _, self.done = read_records(self.path)
        rank = dist.get_rank()
        self.file = (Path(f"{self.path}.{rank}") if rank else self.path).open("a", encoding="utf-8")
        if rank:
            self.write(self.settings)

    def merge(self):
        """Rank 0: everything that was completely written, once, in the first file."""
        lines, parts = {}, ([self.path] if self.path.is_file() else []) + rank_files(self.path)
        for part in parts:
            settings, records = read_records(part)
            for name in self.settings if records else ():
                if (settings or {}).get(name) != self.settings[name]:
                    raise InputError(f"{part}: holds an evaluation with {name} {(settings or {}).get(name)!r}, and this one "
                                     f"has {self.settings[name]!r}; give another --output, or delete that file")
            lines |= records
        whole = self.path.with_suffix(".partial")
        with whole.open("w", encoding="utf-8") as file:
            for line in (self.settings, *lines.values()):
                file.write(json.dumps(line) + "\n")
        whole.replace(self.path)
        for part in rank_files(self.path):
            part.unlink()

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def finish(self):
        """All ranks; returns all records on rank 0."""
        self.file.close()
        dist.barrier()
        if is_main():
            self.merge()
            return read_records(self.path)[1]


def rank_files(path):
    return sorted(p for p in Path(path).parent.iterdir() if re.fullmatch(re.escape(Path(path).name) + r"\.\d+", p.name))


def read_records(path):
    """(settings or None, {(benchmark, problem, sample): record}) of a file. A last line without an end was being written
    when the evaluation was stopped, and does not count."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a file that eval.py wrote") from None
    settings, records = None, {}
    for i, line in enumerate(text.split("\n")[:-1]):
        try:
            line = json.loads(line)
            if "model" in line:
                settings = line
            else:
                records[line["benchmark"], line["problem"], line["sample"]] = line
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {i + 1}: is no response that eval.py wrote; give another file") from None
    return settings, records


def fingerprint(model, trust_remote_code):
    """Something that changes when a model's weights do, so that responses of two models never count as one's."""
    if not Path(model).is_dir():
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)._commit_hash
    digest = hashlib.sha1()
    for file in sorted(Path(model).glob("*.safetensors")):
        with file.open("rb") as weights:
            weights.seek(file.stat().st_size // 2)  # a mebibyte of the numbers; not all of a 7B model's
            digest.update(weights.read(1 << 20))
    return digest.hexdigest()


# ---- an evaluation --------------------------------------------------------------------------------------------------

def evaluate(c):
    """Samples what is not in the output file yet, verifies it, and prints the table."""
    trained = Path(c.model) / "model"
    model = str(trained) if (trained / "config.json").is_file() else c.model
    tokenizer = load_tokenizer(model, c.trust_remote_code)
    benchmarks = {name: load_benchmark(name, c.data) for name in c.benchmarks}
    jobs = [(name, p, sample) for name, problems in benchmarks.items() for p in problems for sample in range(c.samples)]
    prompts = {(name, p.id): render(p.messages, tokenizer) for name, problems in benchmarks.items() for p in problems}
    max_tokens = max(map(len, prompts.values())) + c.max_response_tokens
    check_model(model, max_tokens, c.trust_remote_code, "--max-response-tokens")

    device = init_distributed()
    if dist.get_world_size() % c.tensor_parallel:
        raise InputError(f"--tensor-parallel {c.tensor_parallel} does not divide the {dist.get_world_size()} ranks")
    records = Records(c.output or f"runs/eval/{Path(c.model).name}.jsonl", {
        "model": c.model, "weights": fingerprint(model, c.trust_remote_code),
        **{name: getattr(c, name) for name in ("temperature", "top_p", "max_response_tokens", "answer", "dtype", "seed")}})
    for name, problem, sample in jobs:
        if (old := records.done.get((name, problem.id, sample))) and (
                old["question"], old["gold"]) != (problem.messages[-1]["content"], problem.answer):
            raise InputError(f"{records.path}: its problem {problem.id} of {name} has another text or "
                             "answer now; give another --output")
    todo = [job for job in jobs if (job[0], job[1].id, job[2]) not in records.done]
    if len(todo) < len(jobs):
        say(f"{records.path}: {len(jobs) - len(todo):,} of {len(jobs):,} responses are there already.")
    verifier = Verifier(c.reward_workers, c.reward_timeout, c.answer)
    golds = {problem.answer for problems in benchmarks.values() for problem in problems}
    if is_main() and (bad := verifier.unverifiable(sorted(golds))):
        say(f"{len(bad)} gold answers cannot be parsed, so no response to them can be right: "
            + ", ".join(repr(sorted(golds)[i]) for i in bad[:5]))
    engine = None
    if todo:
        engine = make_engine(c.engine, model, device, stop=stop_tokens(model, tokenizer), dtype=c.dtype, seed=c.seed,
                             max_tokens=max_tokens, tensor_parallel=c.tensor_parallel, memory=c.vllm_memory,
                             trust_remote_code=c.trust_remote_code)
        sample_all(c, engine, tokenizer, verifier, records, todo, prompts)
    results = records.finish()
    if is_main():
        wanted = {(name, problem.id, sample) for name, problem, sample in jobs}
        report(c, [r for key, r in results.items() if key in wanted], verifier, records.path)
    verifier.close()
    if engine:
        engine.close()  # before the process group, which vLLM may end itself
    if dist.is_initialized():
        dist.destroy_process_group()


def sample_all(c, engine, tokenizer, verifier, records, todo, prompts):
    """This rank's part of `todo`; each response is written as soon as it is verified."""
    mine = todo[dist.get_rank() // c.tensor_parallel :: dist.get_world_size() // c.tensor_parallel]
    writes = dist.get_rank() % c.tensor_parallel == 0  # ranks that share an engine hold the same responses
    seeds = [int.from_bytes(hashlib.sha1(f"{c.seed}/{name}/{p.id}/{k}".encode()).digest()[:5]) for name, p, k in mine]
    bar = tqdm(total=len(mine), unit="response", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30,
               disable=not is_main())
    waiting, rewards = deque(), [r["reward"] for r in records.done.values()]  # the score so far counts what was there
    responses = sample_and_verify(
        engine, verifier, tokenizer, [prompts[name, p.id] for name, p, _ in mine], [p.answer for _, p, _ in mine],
        temperature=c.temperature, top_p=c.top_p, max_tokens=c.max_response_tokens, seeds=seeds)
    while waiting or responses:
        if responses and (new := next(responses, None)):
            waiting.append(new)
        elif responses:
            responses = None
        while waiting and (not responses or waiting[0][3].done()):
            i, response, text, reward = waiting.popleft()
            name, problem, sample = mine[i]
            rewards.append(reward.result())
            if writes:
                records.write(record(name, problem, sample, response, text, reward.result(), c.answer))
            bar.update()
            bar.set_postfix_str(f"{100 * sum(rewards) / len(rewards):.1f} % right", refresh=False)
    bar.close()


def report(c, records, verifier, path):
    """Prints the table, and writes it with every pass@k to a .json file beside the responses."""
    metrics = {}
    with ThreadPoolExecutor(c.reward_workers) as threads:  # answers are compared in the verifier's processes
        for name in c.benchmarks:
            mine = sorted((r for r in records if r["benchmark"] == name), key=lambda r: r["problem"])
            groups = [list(group) for _, group in groupby(mine, key=lambda r: r["problem"])]
            parts = list(threads.map(lambda group: per_problem(group, verifier.equal), groups))
            metrics[name] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    table = {name: {key: (v.mean(), *interval(v)) for key, v in m.items()} for name, m in metrics.items()}
    if len(metrics) > 1:
        columns = {key: [m[key] for m in metrics.values()] for key in metrics[c.benchmarks[0]]}
        table["mean"] = {key: (np.mean([v.mean() for v in vs]), *interval(vs)) for key, vs in columns.items()}
    n = c.samples
    shown = [f"avg@{n}", f"maj@{n}", f"pass@{n}"] if n > 1 else ["avg@1"]
    say(f"\n{c.model}, {n} samples at temperature {c.temperature}, top-p {c.top_p}, at most {c.max_response_tokens} tokens: "
        "percent, with 95 % bootstrap intervals over problems\n")
    say(f"{'benchmark':<20} problems" + "".join(f"{name:>20}" for name in shown) + "    tokens   cut off")
    for name, row in table.items():
        count = sum(len(m["tokens"]) for key, m in metrics.items() if name in (key, "mean"))
        cells = "".join("{:>7.1f} [{:>4.1f}, {:>4.1f}]".format(*(100 * x for x in row[key])) for key in shown)
        say(f"{label(name)[:20]:<20} {count:>8}{cells}{row['tokens'][0]:>10,.0f}{100 * row['cut off'][0]:>8.1f} %")
    if n > 1:
        ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
        say("\npass@k" + " " * 23 + "".join(f"{k:>8}" for k in ks))
        for name, row in table.items():
            say(f"{label(name)[:28]:<29}" + "".join(f"{100 * row[f'pass@{k}'][0]:>8.1f}" for k in ks))
    summary = path.with_suffix(".json")
    summary.write_text(json.dumps(table, indent=1) + "\n")  # {benchmark: {metric: [mean, low, high]}}
    say(f"\nEvery response is in {path}, every pass@k with its interval in {summary}.")


# ---- two evaluations, or one twice ----------------------------------------------------------------------------------

def compare(first, second):
    """Differences per benchmark, B - A, over the problems that both have, and the problems that flipped."""
    (settings_a, a), (settings_b, b) = read_records(first), read_records(second)
    for name, value in (settings_a or {}).items():
        if name not in ("model", "weights") and value != (settings_b or {}).get(name):
            say(f"warning: {name} differs: {value} in A, {(settings_b or {}).get(name)} in B")
    for file, records in ((first, a), (second, b)):
        samples = set(Counter((name, problem) for name, problem, _ in records).values())
        if len(samples) > 1 or rank_files(file):
            say(f"warning: {file} is incomplete: its evaluation was stopped; the command that wrote it goes on")
    averages = []
    for records in (a, b):
        rewards = {}
        for (name, problem, _), r in records.items():
            rewards.setdefault((name, problem), []).append(r["reward"])
        averages.append({key: np.mean(values) for key, values in rewards.items()})
    questions = {(name, problem): r["question"] for (name, problem, _), r in a.items()}
    both = sorted(key for key in averages[0] if key in averages[1])
    if any(r["question"] != questions.get((name, problem), r["question"]) for (name, problem, _), r in b.items()):
        raise InputError(f"{first} and {second}: have different problems under the same number; they cannot be compared")
    if not both:
        raise InputError(f"{first} and {second}: have no problem in common; compare evaluations of the same benchmarks")
    say(f"A {first}\nB {second}\n\n{'benchmark':<20} problems       A       B   B - A  95 % interval, paired")
    differences, flipped = [], []
    for name, keys in groupby(both, key=lambda key: key[0]):
        keys = list(keys)
        x, y = (np.array([side[key] for key in keys]) for side in averages)
        differences.append(y - x)
        flipped += [key for key, before, after in zip(keys, x, y, strict=True) if (before >= 0.5) != (after >= 0.5)]
        low, high = interval(y - x)
        means = f"{100 * x.mean():>8.1f}{100 * y.mean():>8.1f}{100 * (y - x).mean():>+8.1f}"
        say(f"{label(name)[:20]:<20} {len(keys):>8}{means}  [{100 * low:+.1f}, {100 * high:+.1f}]")
    if len(differences) > 1:
        low, high = interval(differences)
        say(f"{'mean':<20} {len(both):>8}{'':16}{100 * np.mean([d.mean() for d in differences]):>+8.1f}"
            f"  [{100 * low:+.1f}, {100 * high:+.1f}]")
    for better, title in ((True, "wrong in A, right in B"), (False, "right in A, wrong in B")):
        keys = [key for key in flipped if (averages[1][key] > averages[0][key]) == better]
        say(f"\n{title} (at least half of the samples): {len(keys)}")
        for key in keys:
            say(f"  {label(key[0])} {key[1]:>5}  {averages[0][key]:.2f} -> {averages[1][key]:.2f}  "
                + " ".join(questions[key].split())[:90])


def plain_math_verify(text, gold):
    from math_verify import parse, verify
    parsed = [parse(part, raise_on_error=True) for part in (f"\\boxed{{{gold}}}", text)]
    return float(verify(*parsed, raise_on_error=True))


def recheck(path):
    """Scores every finished response again with nothing but math-verify over the text's last box."""
    _, records = read_records(path)
    counts, differing, pool = Counter(), [], None
    for r in tqdm(records.values(), unit="response", disable=None):
        box = r["response"].rfind("\\boxed")
        if not r["finished"] or box < 0:
            counts["without a box or unfinished" if not r["reward"] else "rewarded without a box"] += 1
            continue
        pool = pool or multiprocessing.get_context("fork").Pool(1)
        try:
            reward = pool.apply_async(plain_math_verify, (r["response"][box:], r["gold"])).get(timeout=15)
        except Exception as error:  # whatever it raises: it has no verdict, and what is without one cannot differ
            counts[f"math-verify failed ({type(error).__name__})"] += 1
            if isinstance(error, multiprocessing.TimeoutError):  # it may never return, and not heed its own alarm
                pool.terminate()
                pool = None
            continue
        counts["agree, right" if r["reward"] and reward else "agree, wrong" if r["reward"] == reward else "differ"] += 1
        if r["reward"] != reward:
            differing.append(r)
    say(f"{path}: {len(records):,} responses, scored again by math-verify over the last box")
    for name, count in sorted(counts.items()):
        say(f"{count:>8,}  {name}")
    if pool:
        pool.terminate()
    for r in differing:
        box = r["response"][r["response"].rfind("\\boxed") :][:80]
        say(f"  {r['benchmark']} {r['problem']}/{r['sample']}: ours {r['reward']:.0f}; gold {r['gold']!r}, answer "
            f"{r['answer']!r}, last box {box!r}")


def main(arguments=None):
    config = Config.parse(__doc__, arguments)
    with clear_errors():
        config.check()
        if config.recheck:
            recheck(config.recheck)
        elif config.compare:
            if len(config.compare) != 2:
                raise InputError(f"--compare takes two files of responses, not {len(config.compare)}")
            compare(*config.compare)
        else:
            evaluate(config)


if __name__ == "__main__":
    main()
