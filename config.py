"""The options of every training script: their defaults, and what is refused before anything is loaded."""
import importlib.util
from dataclasses import dataclass
from typing import Literal

import checkpoint
import data
from cli import BUILTIN_MODEL, CommandLine, InputError, is_main, option
from engines import engine_class
from machine import check_model, skeleton
from policy import check_output_layer


@dataclass
class TrainConfig(CommandLine):
    """The options of every training script. Algorithms add theirs in a subclass."""
    model: str = option(BUILTIN_MODEL, "policy: a hub name, a folder, or a run's folder [built-in]",
                        group="what to train on")
    dataset: str = option("chain", "chain[:SIZE], FILE.{jsonl,json,csv,parquet} or HUB/NAME[/CONFIG][:SPLIT]")
    prompt_field: str | None = option(None, "the problem's field in a row [problem, question or prompt]")
    answer_field: str | None = option(None, "the answer's field in a row [answer, solution or ground_truth]")
    output: str = option("runs/sppo", "folder for all that the run writes, with the trained model")
    critic_model: str | None = option(None, "model that the critic starts from [the policy's]")
    max_prompt_tokens: int = option(1024, "problems with longer prompts are dropped, with a message")
    max_response_tokens: int = option(8192, "a response that needs more has no answer", positive=True)
    answer: Literal["boxed", "any"] = option("boxed", "last \\boxed{}; any: without a box, the last number")
    reward: str | None = option(None, "FILE.py:FUNCTION(response, answer) -> number in [0, 1] [mathematics]")
    suffix: str = option(data.BOXED_SUFFIX, "what each prompt asks for at its end (empty: nothing)",
                         empty=True)

    steps: int = option(1000, "training steps: one rollout and its updates", group="algorithm", positive=True)
    prompts_per_step: int = option(256, "prompts sampled in a step", positive=True)
    minibatch: int = option(128, "prompts, with all their samples, in one optimiser step", positive=True)
    critic_minibatch: int = option(0, "prompts in one optimiser step of the critic (0: as --minibatch)")
    lr: float = option(1e-6, "learning rate of the policy")
    lr_decay: float = option(0.0, "--lr falls towards 0 over this last share of the steps", most=1)
    critic_lr: float = option(5e-6, "learning rate of the critic")
    critic_warmup: int = option(0, "first steps, in which the critic learns and the policy does not")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm (0: not at all)")
    clip_low: float = option(0.2, "the ratio's lower bound is 1 - this", most=1)
    clip_high: float = option(0.2, "the ratio's upper bound is 1 + this")
    dual_clip: float = option(3.0, "where A < 0, the objective is at least this times A (0: no such bound)")
    loss_mean: Literal["token", "sequence"] = option("token", "each token weighs the same, or each response")
    old_logprobs: Literal["policy", "rollout"] = option(
        "policy", "pi_old: computed anew, or the engine's, which saves a forward")
    rollout_correction: float = option(
        0.0, "weigh tokens by pi_old / pi_rollout, at most this, say 2: for the engine's rounding (0: no)")
    seed: int = option(0, "seed for data order and sampling", most=2**63 - 1)

    temperature: float = option(
        0.6, "of sampling; the ratio's logits are divided by it too", group="sampling", positive=True)
    engine: Literal["auto", "vllm", "transformers"] = option("auto", "auto is vllm where it is installed")
    tensor_parallel: int = option(1, "neighbouring ranks that share one vLLM engine", positive=True)
    vllm_memory: float | None = option(
        None, "vLLM's share of a GPU's memory [auto: what the models leave free]", positive=True, most=1)
    oversample: float = option(0.0, "extra prompts in flight, as a share: train on the first to finish")
    reward_timeout: float = option(
        1.0, "processor seconds (ten times that on the clock) until a verification scores 0", positive=True)

    micro_batch_tokens: int = option(18432, "tokens in one forward", group="memory and speed", positive=True)
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "auto: bfloat16 if the hardware has it")
    checkpoint_activations: bool = option(True, "recompute activations in the backward: saves memory")
    replicas: int = option(1, "copies of the sharded model, say one a node (HSDP)", positive=True)
    offload: Literal["none", "between", "all"] = option(
        "none", "weights and optimiser state in host memory: between turns (faster), or always (smaller)")

    eval_every: int = option(10, "steps between evaluations on held-out problems (0: never)", group="running")
    eval_problems: int = option(256, "problems held out of the dataset, a fifth of it at most")
    eval_benchmarks: tuple[str, ...] = option((), "also evaluate on these benchmarks of eval.py, or files")
    eval_samples: int = option(1, "responses per problem of a benchmark", positive=True)
    save_every: int = option(20, "steps between checkpoints (0: only when the run is asked to stop)")
    resume: bool = option(False, "continue from the newest checkpoint in --output, if there is one")
    samples: str = option("8", "responses of each step to save in samples.jsonl: a number, or all")
    tensorboard: bool = option(False, "also write metrics and samples for TensorBoard")
    wandb: str | None = option(None, "also send metrics and samples to this project at Weights & Biases")
    deterministic: bool = option(False, "the same command gives the same numbers on the same CPU; slower")
    trust_remote_code: bool = option(False, "run model code that comes with a checkpoint")
    explain: bool = option(False, "train one step, and tell all that happens to two of its prompts")

    # `CommandLine` in cli.py uses these three. A model that a run has trained brings that run's options along
    # as defaults. But not these, which belong to one run or one machine, or let code run.
    NOT_INHERITED = (
        "model", "critic_model", "output", "engine", "tensor_parallel", "vllm_memory", "micro_batch_tokens",
        "replicas", "offload", "resume", "samples", "tensorboard", "wandb", "deterministic", "explain",
        "trust_remote_code")
    MUST_BE_TYPED = ("reward",)
    # For the built-in model: with 360k parameters it needs other settings than one of 1.5 billion.
    BUILTIN = dict(
        steps=70, prompts_per_step=128, minibatch=64, critic_minibatch=16, lr=2.5e-4, lr_decay=0.7,
        critic_lr=1e-3, clip_high=0.28, loss_mean="sequence", temperature=1.0, max_prompt_tokens=64,
        max_response_tokens=112, save_every=0, eval_every=10, eval_problems=512, dtype="float32",
        checkpoint_activations=False)

    def check(self):
        super().check()
        if self.prompts_per_step % self.minibatch:
            raise InputError(f"--minibatch {self.minibatch} does not divide --prompts-per-step "
                             f"{self.prompts_per_step}; choose a divisor of it")
        if self.critic_warmup >= self.steps and not self.explain:
            raise InputError(f"--critic-warmup {self.critic_warmup}: with --steps {self.steps} the policy "
                             "would never be trained; give more steps, or a shorter warm-up")
        for name in ("dual_clip", "rollout_correction"):
            if 0 < (value := getattr(self, name)) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: would also bind where the policy has "
                                 "not moved; give more than 1, or 0 for none")
        # One response may come from several policies, of which only the engine knew the log-probabilities.
        if self.oversample and self.old_logprobs != "rollout":
            raise InputError(f"--oversample {self.oversample}: also give --old-logprobs rollout")
        if self.rollout_correction and self.old_logprobs == "rollout":
            raise InputError("--old-logprobs rollout compares with the engine already; leave it out, or "
                             f"--rollout-correction {self.rollout_correction}")
        if self.rollout_correction and self.explain:
            raise InputError("--explain does not tell what --rollout-correction changes; leave one out")
        if not self.eval_benchmarks:
            self.tell_unused(("eval_samples",), "it is for --eval-benchmarks")
        if self.eval_benchmarks and not self.eval_every:
            raise InputError(f"--eval-benchmarks {' '.join(self.eval_benchmarks)}: --eval-every 0 never "
                             "evaluates; leave one of them out")
        if not str(self.samples).isdigit() and self.samples != "all":
            raise InputError(f"--samples {self.samples}: must be a number, or all")
        for package, wanted in (("tensorboard", self.tensorboard), ("wandb", self.wandb)):
            if wanted and not importlib.util.find_spec(package):
                raise InputError(f"--{package}: is not installed; pip install {package}")
        if not self.explain:
            checkpoint.check_output(self.output, self.resume)
        if is_main():  # on other nodes the file need not be
            data.file_of(self.dataset)
        prompt, trust = self.max_prompt_tokens, self.trust_remote_code
        engine_class(self)  # is there one, with these options?
        if not self.explain and (problem := checkpoint.unwritable(self.output)):
            raise InputError(f"{self.output}: cannot be written ({problem}); give another --output")
        check_model(self.model, prompt + self.max_response_tokens, trust,
                    tensor_parallel=self.tensor_parallel)
        check_output_layer(self.model, trust)
        if self.critic_model:
            check_model(self.critic_model, prompt, trust, "--max-prompt-tokens")
            skeleton("AutoModel", self.critic_model, trust)

    def without_critic(self, algorithm):
        """For an algorithm that has none: the critic's options change nothing."""
        names = "critic_model", "critic_lr", "critic_minibatch", "critic_warmup"
        self.tell_unused(names, f"{algorithm} has no critic")
        self.critic_model, self.critic_warmup = None, 0

    def training_options(self):
        """The keyword arguments of `ShardedModel` for the policy."""
        return {name: getattr(self, name) for name in (
            "lr", "weight_decay", "max_grad_norm", "dtype", "micro_batch_tokens", "replicas",
            "checkpoint_activations", "offload", "trust_remote_code")}

    def critic_options(self):
        """The same for a critic, with its own learning rate and mini-batch. Raises InputError if mini-batches
        would be of unequal sizes. (Asked here, because only some algorithms have a critic.)"""
        size = self.critic_minibatch or self.minibatch
        if size < self.prompts_per_step and self.prompts_per_step % size:
            raise InputError(f"--critic-minibatch {size} does not divide --prompts-per-step "
                             f"{self.prompts_per_step}; choose a divisor of it, or 0 for --minibatch")
        return {**self.training_options(), "lr": self.critic_lr,
                "minibatch": size}
