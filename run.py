"""What stands around the loop of a training run: its parts, put together; sampling; evaluation; its beginning and end."""
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

import checkpoint
from cli import Clock, Log, is_main, say
from data import InputError, Problem, load_problems, load_tokenizer, render, split
from eval import TEMPERATURE, TOP_P, benchmark_metrics, load_benchmark
from inflight import InFlight
from policy import Policy, init_distributed
from reward import Verifier
from rollout import Response, make_engine, sample_and_verify, stop_tokens


@dataclass
class Batch:
    """B responses; the samples of one prompt are adjacent. The same on every rank."""
    problems: list[Problem]  # [B], a problem repeated for each of its samples
    prompts: list[list[int]]  # [B] token ids
    responses: list[Response]  # [B]
    rewards: torch.Tensor  # [B], 0 or 1
    greedy_rewards: torch.Tensor | None = None  # [number of problems], where the baseline wants them
    expected: torch.Tensor | None = None  # [B], what the baseline expected when these were started, if that was earlier
    old_logprobs: torch.Tensor | None = None  # [B, T], of the policy that sampled; None where a step needs none

    def __post_init__(self):
        self.lengths = torch.tensor([len(r.ids) for r in self.responses])
        self.mask = torch.arange(int(self.lengths.max())) < self.lengths[:, None]  # [B, T]
        self.rollout_logprobs = torch.zeros(self.mask.shape)  # [B, T], as the engine saw them
        self.rollout_logprobs[self.mask] = torch.tensor([lp for r in self.responses for lp in r.logprobs])
        self.sequences = [(p, r.ids) for p, r in zip(self.prompts, self.responses, strict=True)]


class Run:
    """The parts of a training run, put together; and sampling, which the loop, evaluation and baselines share."""

    def __init__(self, config):
        self.config = c = config
        c.check()
        self.tokenizer, self.problems, self.held_out = load_data(c)
        self.benchmarks = load_benchmarks(c, self.tokenizer)
        self.device = init_distributed()
        for name, size in (("--tensor-parallel", c.tensor_parallel), ("--replicas", c.replicas)):
            if dist.get_world_size() % size:
                raise InputError(f"{name} {size} does not divide the {dist.get_world_size()} ranks")
        self.clock = Clock(self.device)
        self.given_up = {"reward/timeouts": 0, "reward/crashes": 0}  # so far
        self.decoding = {}  # of the last call of `generate`: metrics of how well the engines were filled
        self.verifier = Verifier(c.reward_workers, c.reward_timeout, c.answer)
        check_answers(self, c.dataset)
        torch.manual_seed(c.seed)
        if c.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists on it where there is CUDA
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.random = random.Random()  # seeded anew for each step, the same on every rank: there is no state to save
        # The engine goes first: on a GPU it sizes its cache by what is free, and then sleeps until it is needed.
        self.engine = make_engine(
            c.engine, c.model, self.device, stop=stop_tokens(c.model, self.tokenizer), dtype=c.dtype, seed=c.seed,
            max_tokens=c.max_prompt_tokens + c.max_response_tokens, tensor_parallel=c.tensor_parallel,
            memory=c.vllm_memory, trust_remote_code=c.trust_remote_code)
        self.engine.sleep()
        self.engine_memory = torch.cuda.memory_allocated()  # what it still seems to hold is none of training's
        self.in_flight = InFlight(self)
        self.policy = Policy(c.model, self.device, temperature=c.temperature, lr=c.lr, **c.training_options())

    def sample(self, problems, samples=1, greedy=False, temperature=None, top_p=1.0):
        """Samples and verifies `samples` responses per problem; the ranks share the work, and all get the whole Batch.
        With `greedy`, each problem's greedy response is also generated, and its reward kept in `greedy_rewards`."""
        temperature = self.config.temperature if temperature is None else temperature
        each = samples + greedy  # of these, the last is greedy
        problems = [p for p in problems for _ in range(each)]
        prompts = [render(p.messages, self.tokenizer) for p in problems]
        temperatures = [temperature if j % each < samples else 0.0 for j in range(len(problems))]
        done = self.generate(prompts, [p.answer for p in problems], temperatures, top_p, each)
        sampled = [j for j in range(len(problems)) if j % each < samples]
        return Batch([problems[j] for j in sampled], [prompts[j] for j in sampled], [done[j][0] for j in sampled],
                     torch.tensor([done[j][1] for j in sampled]),
                     torch.tensor([done[j][1] for j in range(samples, len(problems), each)]) if greedy else None)

    def generate(self, prompts, answers, temperatures, top_p=1.0, neighbours=1, begun=None, until=None):
        """{number of the prompt: (Response, reward)}, the same on every rank. The engines share the prompts, of which
        `neighbours` that follow each other go to the same one. begun: a Response per prompt, to be gone on with.
        until(engine's prompts, number of the engine, number of engines): tells when it may stop, as in rollout.py; what is
        paused then has the reward None. Leaves in `decoding` the tokens written; the most that any response got, which is how
        often engines decoded that hold all at once; and the share of places left empty until the longest was written."""
        c, world = self.config, dist.get_world_size()
        first_seed = self.random.getrandbits(40)
        engine, engines = dist.get_rank() // c.tensor_parallel, world // c.tensor_parallel
        mine = [j for j in range(len(prompts)) if j // neighbours % engines == engine]
        enough = until and until(mine, engine, engines)
        if enough and enough():
            mine = []
        done = {}
        with self.clock("rollout"):
            for n, response, _, reward in sample_and_verify(
                    self.engine, self.verifier, self.tokenizer, [prompts[j] for j in mine], [answers[j] for j in mine],
                    max_tokens=c.max_response_tokens, top_p=top_p, temperature=[temperatures[j] for j in mine],
                    # Seeds of its own for each response cost some speed; ranks that share an engine must agree, though.
                    seeds=[first_seed + j for j in mine] if c.deterministic or c.tensor_parallel > 1 else None,
                    begun=begun and [begun[j] for j in mine], until=enough and (lambda n: enough(mine[n]))):
                done[mine[n]] = response, reward
        with self.clock("reward"):
            parts = [None] * world
            done = {j: (response, reward and reward.result()) for j, (response, reward) in done.items()}
            dist.all_gather_object(parts, (done, self.verifier.timeouts, self.verifier.crashes))
            parts, timeouts, crashes = zip(*parts[:: c.tensor_parallel], strict=True)  # one rank of each engine
            self.given_up = {"reward/timeouts": sum(timeouts), "reward/crashes": sum(crashes)}
        done = {j: result for part in parts for j, result in part.items()}
        written = [len(response.ids) - (len(begun[j].ids) if begun else 0) for j, (response, _) in done.items()]
        longest = max(written, default=0)
        self.decoding = {"rollout/generated_tokens": sum(written), "rollout/longest": longest,
                         "rollout/idle": 1 - sum(written) / max(1, len(prompts) * longest)}
        return done


# ---- what a run needs before it begins ------------------------------------------------------------------------------

def load_data(c):
    """(tokenizer, training problems, held-out problems), without the problems whose prompts are too long."""
    tokenizer = load_tokenizer(c.model, c.trust_remote_code)
    readers = [tokenizer] + ([load_tokenizer(c.critic_model, c.trust_remote_code)] if c.critic_model else [])
    problems = load_problems(c.dataset)
    fitting = [p for p in problems if all(len(render(p.messages, t)) <= c.max_prompt_tokens for t in readers)]
    if len(fitting) < len(problems):
        say(f"{c.dataset}: dropped {len(problems) - len(fitting)} of {len(problems)} problems, whose prompts are longer "
            f"than --max-prompt-tokens {c.max_prompt_tokens}")
    if not fitting:
        raise InputError(f"{c.dataset}: every prompt is longer than --max-prompt-tokens {c.max_prompt_tokens}; raise it")
    return tokenizer, *split(fitting, c.eval_problems if c.eval_every else 0, c.seed)


def load_benchmarks(c, tokenizer):
    benchmarks = {name: load_benchmark(name) for name in c.eval_benchmarks} if c.eval_every else {}
    for name, problems in benchmarks.items():
        longest = max(len(render(p.messages, tokenizer)) for p in problems)
        if longest > c.max_prompt_tokens:
            raise InputError(f"--eval-benchmarks {name}: has a prompt of {longest} tokens; raise --max-prompt-tokens to that")
    return benchmarks


def check_answers(run, name):
    """A gold answer that cannot be verified against could never be earned: better said now than never."""
    problems = run.problems + run.held_out
    share = problems[dist.get_rank() :: dist.get_world_size()]
    bad = [None] * dist.get_world_size()
    dist.all_gather_object(bad, [share[i] for i in run.verifier.unverifiable([p.answer for p in share])])
    bad = sorted((p for part in bad for p in part), key=lambda p: p.id)
    if bad:
        raise InputError(f"{name}, row {bad[0].id + 1}: the answer {bad[0].answer[:100]!r} cannot be parsed, so no response "
                         f"could be verified against it ({len(bad)} such rows); correct or remove it")


# ---- beginning, evaluation, end -------------------------------------------------------------------------------------

def begin(run, baseline):
    """(step after which the run goes on, or 0; its Log). Nothing is written into the output folder before this."""
    run.lock, logs = [], []
    problem = checkpoint.first_problem(lambda: dist.get_rank() or run.lock.append(checkpoint.lock(run.config.output)))
    if problem:
        raise InputError(f"{run.config.output}: {problem}")
    begun = checkpoint.resume(run, baseline)
    plan_memory(run, baseline)
    if problem := checkpoint.first_problem(lambda: logs.append(Log(run.config, begun))):
        raise InputError(f"{run.config.output}: cannot be written ({problem})")
    say(f"{type(run.policy.module.lm).__name__}, {run.policy.size / 1e6:,.2f}M parameters, from {run.config.model}; engine "
        f"{run.engine.name}; {dist.get_world_size()} x {run.device.type}; {len(run.problems):,} problems of "
        f"{run.config.dataset}, {len(run.held_out)} more held out")
    return begun, logs[0]


def plan_memory(run, baseline):
    """Where there is a GPU, has the memory of training planned, in a process of its own: on tensors and ranks that are fake."""
    run.planned = None
    if run.device.type == "cuda" and is_main():
        import plan  # it counts what the files above this one do
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        kind = {"PromptCritic": "prompts", "TokenCritic": "responses"}.get(type(getattr(baseline, "critic", None)).__name__)
        run.planned = pool.submit(plan.training_peak, run.config, kind, dist.get_world_size())
        pool.shutdown(wait=False)
        torch.cuda.reset_peak_memory_stats()


def say_memory(run):
    """Once, after the first step by whose end the planning is done: what training held of a GPU beside what was planned."""
    if run.planned and run.planned.done():
        if problem := run.planned.exception():
            say(f"The memory of a GPU could not be planned ({type(problem).__name__}: {problem}); nothing depends on it")
        else:
            say(memory_line(run.planned.result(), torch.cuda.max_memory_allocated() - run.engine_memory))
        run.planned = None


def memory_line(planned, measured):
    """planned, measured: bytes."""
    return (f"Memory of a GPU at the peak of training, without vLLM's: {planned / 2**30:.1f} GiB planned for micro-batches "
            f"that are full, {measured / 2**30:.1f} measured, {100 * (measured / planned - 1):+.0f} %")


def next_batch(run, baseline, step):
    """(Batch of a step (from 1), metrics): all that was started for it, or with --oversample the first to finish."""
    c = run.config
    if c.oversample:
        taken, metrics = run.in_flight.take(baseline, step)
        batch = Batch([s.problem for s in taken], [s.prompt for s in taken], [s.response for s in taken],
                      torch.tensor([s.reward for s in taken]))
        if all(s.expected is not None for s in taken):
            batch.expected = torch.tensor([s.expected for s in taken])
        return batch, {**run.decoding, **metrics}
    problems = baseline.next_problems((step - 1) * c.prompts_per_step, c.prompts_per_step)
    return run.sample(problems, baseline.samples_per_prompt, baseline.wants_greedy), run.decoding


def evaluate(run, log, step):
    """Accuracy on the held-out problems, one sampled response each, and the benchmarks. The clock of training stands."""
    run.random.seed(f"{run.config.seed}/{step}/evaluation")
    for name, problems in run.benchmarks.items():
        batch = run.sample(problems, run.config.eval_samples, temperature=TEMPERATURE, top_p=TOP_P)
        log.add(benchmark_metrics(name, batch, run.tokenizer, run.verifier))
    if run.held_out:
        batch = run.sample(run.held_out)
        log.evaluated(step, batch, run.tokenizer)
    if step == 0:
        log.write(0, 0.0)


def finish(run, log, lost):
    """Saves the model where transformers and vllm find it, and says what happened. `lost`: the run was told to stop, and
    could not be saved."""
    c, folder = run.config, f"{run.config.output}/model"
    error = f"{c.output}: stopped after step {log.step}, with no room for a checkpoint of it" if lost else None
    if log.step == c.steps:
        problem = checkpoint.first_problem(log.sync) or checkpoint.first_problem(lambda: run.policy.save(folder))
        problem = problem or checkpoint.first_problem(lambda: dist.get_rank() or run.tokenizer.save_pretrained(folder))
        if problem:
            error = f"{folder}: the trained model could not be saved ({problem})" + (
                "; make room, and give the same command with --resume, which goes on from the last checkpoint"
                if checkpoint.existing(c.output) else ", and there is no checkpoint: this training is lost")
    if not error:
        log.finish(run.tokenizer, run.clock.total)
    run.verifier.close()
    run.engine.close()  # before the process group, which vLLM may end itself
    if dist.is_initialized():
        dist.destroy_process_group()
    if error:
        raise InputError(error)
