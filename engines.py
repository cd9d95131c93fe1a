"""Engines: token ids in, token ids and log-probabilities out. With vLLM in this process, or transformers.

Both have the same four methods, and the training loop never asks which one it has:

    engine.generate(prompts, ...)   yields (number of the prompt, Response), in the order in which they end
    engine.sleep()                  gives the GPU's memory to training (vLLM; transformers keeps it)
    engine.sync(weights)            takes the policy's new weights, and is awake afterwards
    engine.close()                  ends what the engine has started

Each rank has its own engine (or `tensor_parallel` neighbours share one) and samples its part of the prompts.
"""
import copy
import gc
import hashlib
import importlib.util
import logging
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cli import InputError, say
from log import progress
from machine import checkpoint_names, checkpoint_tensors, first_line, skeleton


@dataclass
class Response:
    ids: list[int]  # the sampled tokens; the last one is the end-of-sequence token if `finished`
    logprobs: list[float]  # of each token, in the distribution it was sampled from (after temperature)
    finished: bool  # False: it ran out of tokens, so it has no answer; or it is paused
    paused: bool = False  # stopped before its end, to be continued later


GIB = 2**30
# Bytes of a GPU that vLLM leaves free, if no `--vllm-memory` is given: for NCCL's buffers, for layers that
# FSDP gathers while the policy's weights travel, and for memory that the allocator cannot use. A guess.
RESERVED = 4 * GIB


def engine_class(c):
    """The engine that the options `c` of a script ask for; `--engine auto` is vLLM where it is installed.
    Raises InputError for options that this engine does not have."""
    vllm = c.engine != "transformers" and importlib.util.find_spec("vllm")
    if c.engine == "vllm" and not vllm:
        raise InputError("--engine vllm needs `pip install vllm`")
    for name in () if vllm else ("tensor_parallel", "oversample"):
        if (value := getattr(c, name, 0)) > (name == "tensor_parallel"):
            raise InputError(f"--{name.replace('_', '-')} {value} needs vLLM; leave it out, or install vLLM")
    return VLLMEngine if vllm else TransformersEngine


def make_engine(c, model, tokenizer, device, max_tokens):
    """That engine for `model`. max_tokens: of a prompt and its response together."""
    return engine_class(c)(
        model, device, stop=stop_tokens(model, tokenizer, c.trust_remote_code), max_tokens=max_tokens,
        dtype=c.dtype, seed=c.seed, tensor_parallel=c.tensor_parallel, memory=c.vllm_memory,
        trust_remote_code=c.trust_remote_code)


def fingerprint(model, tokenizer, trust_remote_code):
    """A text that changes with a model's weights, its chat template, or what ends a response, so that one
    file of an evaluation never mixes two models."""
    file = min(Path(model).glob("*.safetensors"), default=None)
    if file:
        with file.open("rb") as all_of_it:
            all_of_it.seek(file.stat().st_size // 2)  # 1 MiB from its middle: to read all of a 7B is slow
            weights = hashlib.sha1(all_of_it.read(1 << 20)).hexdigest()
    else:  # on the hub
        from transformers import AutoConfig
        weights = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)._commit_hash
    reads = repr((weights, tokenizer.chat_template, stop_tokens(model, tokenizer, trust_remote_code)))
    return hashlib.sha1(reads.encode()).hexdigest()


def stop_tokens(model, tokenizer, trust_remote_code=False):
    """Every token that ends a response: a chat model's generation config often has more
    than its tokenizer, and some models have their config.json alone."""
    from transformers import AutoConfig, GenerationConfig
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    named = [tokenizer, config, config.get_text_config()]
    try:
        named.append(GenerationConfig.from_pretrained(model))
    except OSError:  # the model has none
        pass
    except ValueError as error:
        raise InputError(f"{model}: its generation_config.json is refused by transformers "
                         f"({first_line(error)}); correct it") from None
    tokens = set()
    for part in named:
        some = getattr(part, "eos_token_id", None)
        tokens |= {*some} if isinstance(some, list) else {some}
    return sorted(tokens - {None})


# ---- vLLM --------------------------------------------------------------------------------------------------

class VLLMEngine:
    def __init__(self, model, device, *, stop, max_tokens, dtype="bfloat16", seed=0, tensor_parallel=1,
                 memory=None, trust_remote_code=False):
        """model: hub name or folder. stop: token ids that end a response. max_tokens: of a prompt and its
        response together. memory: the share of a GPU's memory that vLLM may use while it is awake (None: what
        is free now, but for RESERVED)."""
        self.device, self.stop, self.taken = device, stop, None  # taken: bytes that vLLM gave back to sleep
        self.skeleton = skeleton("AutoModelForCausalLM", model, trust_remote_code)  # vLLM wants other names
        on_gpu = device.type == "cuda"
        self.share = share_of_memory(memory) if on_gpu else 0.5  # on a CPU, VLLM_CPU_KVCACHE_SPACE counts
        # Warnings would explain a first failure on a GPU. `sleep` turns them off after a first whole turn.
        self.warns = on_gpu and "VLLM_LOGGING_LEVEL" not in os.environ
        level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")
        # In this process, so that it takes new weights as tensors, without copies between processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Its logger has the same level, for what it prints before it reads the variable.
        logging.getLogger("vllm").setLevel(level.upper())
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # It warns that there is no Triton, which a CPU does not need.
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        if not importlib.util.find_spec("flashinfer"):  # vLLM 0.22 samples with it unless told not to
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; both are read on a CPU only
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or two ranks would share one core
        import vllm
        if on_gpu:
            # Responses that are written at once. Memory for the logits of so many is set aside (1,024 on an
            # H100, if nothing is said), and long responses fill the cache before there are 512.
            options = dict(max_num_seqs=512,
                           # Logits are not rounded to bfloat16, as in policy.py. (0.22 rounds them even so,
                           # and then `policy/rollout_gap` is larger.)
                           hf_overrides={"head_dtype": "float32"},
                           # It shares the buffers of CUDA graphs between processes, which memory that can
                           # grow in place (machine.py) does not allow. NCCL does the same work.
                           disable_custom_all_reduce=True)
        else:
            from vllm.platforms import current_platform
            # vLLM 0.32 compiles a few lines of its own with Inductor: a silent minute, and no gain on a CPU.
            current_platform.simple_compile_backend = "eager"
            # On a CPU it cannot cut the prefill of a request that has a seed ("does not use offset").
            options = dict(enable_chunked_prefill=False, max_num_batched_tokens=max(4096, max_tokens))
        self.name = f"vLLM {vllm.__version__}"
        self.SamplingParams = vllm.SamplingParams
        self.FINAL_ONLY = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        try:
            self.llm = vllm.LLM(
                model, dtype=dtype, max_model_len=max_tokens, tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher",  # torchrun has started all processes
                trust_remote_code=trust_remote_code, load_format="safetensors",
                # Ranks that share an engine must sample the same.
                seed=seed + dist.get_rank() // tensor_parallel,
                skip_tokenizer_init=True,  # token ids in, token ids out
                logprobs_mode="processed_logprobs",  # after temperature: what the ratio needs
                use_tqdm_on_load=False, disable_log_stats=True, gpu_memory_utilization=self.share,
                enable_sleep_mode=on_gpu, enforce_eager=not on_gpu, **options)  # graphs are for GPUs only
        except Exception as error:  # its checks and its models raise many kinds
            advice = "raise --vllm-memory, or make room for it with --offload between"
            if "memory" not in str(error):  # else its weights, or the cache of one response, need more
                advice = "try --engine transformers"
            why = " ".join(str(error).split()).partition(" [type=")[0]  # pydantic adds all that it was given
            raise InputError(f"{model}: {self.name} does not start with it ({type(error).__name__}: "
                             f"{why[:300]}); {advice}") from error
        if on_gpu:
            say(f"vLLM takes {self.share:.2f} of a GPU's memory while it samples (--vllm-memory)")
        self._free_transformers_classes()

    def _free_transformers_classes(self):
        """Some models vLLM serves through transformers' classes, which it changes in this process: they ask
        whether they are to be compiled. The trainer's are not. Those that were built before have no answer of
        their own, so their class gives one; those that are built later look for a vLLM config."""
        def answer(model):
            for module in model.modules():
                if "do_not_compile" in vars(module):  # vLLM's own modules keep the answer that they have
                    type(module).do_not_compile = True
        self.llm.apply_model(answer)
        from vllm.config import CompilationMode, set_current_vllm_config
        config = copy.copy(self.llm.llm_engine.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.mode = CompilationMode.NONE
        self.config = set_current_vllm_config(config)
        self.config.__enter__()  # for as long as the engine lives

    def generate(self, prompts, *, temperature, max_tokens, top_p=1.0, top_k=0, seeds=None, partial=None,
                 pause_after=None, wait_for=()):
        """Samples one response per prompt, and yields (number of the prompt, Response) as they end.

        prompts: lists of token ids; repeat one to sample it more often.
        temperature: one number, or one per prompt; 0 is greedy.
        top_k, top_p: of each token's distribution only the k likeliest (0: all), and of these the likeliest
            of this total probability.
        max_tokens: of a response; one number, or one per prompt.
        seeds: one per prompt; a response then depends on its seed alone (and on rounding).
        partial: a Response per prompt, to be continued.
        pause_after, wait_for: when `pause_after` responses have ended, and those to the prompts numbered in
            `wait_for` are among them, the others are paused. Paused responses are yielded last.
        """
        engine, ended, wait_for = self.llm.llm_engine, set(), set(wait_for)
        states, written, ended_tokens = engine.output_processor.request_states, 0, 0
        pause_after = len(prompts) if pause_after is None else pause_after
        partial = partial or [Response([], [], False)] * len(prompts)
        temperatures = temperature if isinstance(temperature, list) else [temperature] * len(prompts)
        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        for i, prompt in enumerate(prompts):
            started = partial[i].ids  # read again, as a longer prompt, and counted as a part of the response
            engine.add_request(str(i), {"prompt_token_ids": prompt + started}, self.SamplingParams(
                temperature=temperatures[i], top_p=top_p, top_k=top_k, seed=seeds and seeds[i],
                max_tokens=limits[i] - len(started), stop_token_ids=self.stop, ignore_eos=True,
                # Log-probabilities of the sampled tokens only; a response when it ends, not token by token.
                logprobs=0, flat_logprobs=True, output_kind=self.FINAL_ONLY, detokenize=False))

        def response(i, ids, flat, finished, paused=False):
            logprobs = [flat.logprobs[k] for k in flat.start_indices]
            return Response([*partial[i].ids, *ids], [*partial[i].logprobs, *logprobs], finished, paused)
        while engine.has_unfinished_requests() and not (len(ended) >= pause_after and ended >= wait_for):
            for request in engine.step():  # one token for every response that is being written
                i, output = int(request.request_id), request.outputs[0]
                ended.add(i)
                ended_tokens += len(output.token_ids)
                progress.add(1)
                yield i, response(i, output.token_ids, output.logprobs, output.finish_reason == "stop")
            before, written = written, ended_tokens + sum(
                len(state.detokenizer.output_token_ids) for state in states.values())
            progress.add(tokens=written - before)
        # vLLM returns nothing for an unfinished request, so read what it has collected so far (0.20 to 0.32).
        paused = [*states.values()]
        engine.abort_request([state.external_req_id for state in paused])
        for state in paused:
            i, ids = int(state.external_req_id), state.detokenizer.output_token_ids
            yield i, response(i, ids, state.logprobs_processor.logprobs, False, paused=True)

    def sleep(self):
        if self.device.type == "cuda":
            if self.warns and self.taken:  # it has slept, woken and sampled once
                logging.getLogger("vllm").setLevel(logging.ERROR)
            torch.cuda.empty_cache()
            before = torch.cuda.mem_get_info()[0]
            self.llm.sleep(level=2)  # drops weights and cache: `sync` must come before the next `generate`
            self.taken = torch.cuda.mem_get_info()[0] - before

    def _wake(self, what):
        torch.cuda.empty_cache()  # vLLM cannot use memory that PyTorch's allocator keeps
        self.llm.wake_up(tags=[what])

    def _check_room(self):
        """Raises InputError, on all ranks, if one of them lacks the memory that vLLM has given back. CUDA's
        own error would name no option."""
        torch.cuda.empty_cache()
        missing = -smallest_of_ranks(torch.cuda.mem_get_info()[0] - self.taken)
        if missing > 0:
            raise InputError(f"vLLM cannot wake up: of the {self.taken / GIB:.1f} GiB that it gave back, "
                             f"{missing / GIB:.1f} are missing; lower --vllm-memory, which is {self.share}, "
                             "or keep the models in host memory meanwhile, with --offload between")

    def sync(self, weights):
        """weights: an iterator of (transformers' name, full tensor); vLLM keeps about a
        layer of them at a time."""
        asleep = self.device.type == "cuda" and self.llm.llm_engine.is_sleeping()
        if asleep:
            self._check_room()
            self._wake("weights")
        named = checkpoint_names(self.skeleton, weights)
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named))
        if asleep:
            self._wake("kv_cache")
        if self.device.type == "cpu":
            self.llm.apply_model(_repack)
        # It holds keys and values of the old weights. vLLM keeps them if it is still at work.
        if self.llm.reset_prefix_cache() is False:
            raise RuntimeError("vLLM did not drop the keys and values of the old weights")

    def close(self):
        """Must come before the process group ends, which vLLM uses to shut down."""
        self.llm.llm_engine.engine_core.shutdown()
        self.config.__exit__(None, None, None)
        del self.llm
        gc.collect()


def smallest_of_ranks(number):
    """The smallest of the ranks' numbers: all of them must decide the same."""
    smallest = torch.tensor(number)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest.item()


def share_of_memory(asked):
    """The share of a GPU's memory that vLLM gets: `asked`, or if that is None, what is free now but for
    RESERVED. Raises InputError if so much is not free, or nothing remains."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    free = smallest_of_ranks(free)
    share = math.floor(100 * (free - RESERVED) / total) / 100 if asked is None else asked
    if not 0 < share * total <= free:
        wanted = f"more than {RESERVED / GIB:.0f}" if asked is None else f"{asked * total / GIB:.1f}"
        raise InputError(f"vLLM needs {wanted} GiB of a GPU, and beside the models {free / GIB:.1f} of "
                         f"{total / GIB:.1f} are free; lower --vllm-memory, or keep the models in host "
                         "memory meanwhile, with --offload between")
    return share


def _repack(model):
    """Works around vLLM 0.32 on a CPU: an output layer that is tied to the embedding keeps reading its packed
    weights from a buffer that `reload_weights` has freed, and the experts of a mixture get theirs unpacked.
    This makes both use the new weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():  # other layers keep no unpacked weights
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        if hasattr(module, "w13_weight"):
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


# ---- transformers ------------------------------------------------------------------------------------------

class TransformersEngine:
    """For machines without vLLM: a plain decoding loop around a second copy of the Hugging
    Face model. Slower."""

    BATCH = 64  # prompts that are decoded together

    def __init__(self, model, device, *, stop, max_tokens, dtype="bfloat16", seed=0, tensor_parallel=1,
                 memory=None, trust_remote_code=False):
        import transformers
        self.name = f"transformers {transformers.__version__}"
        self.device, self.stop = device, stop
        self.random = torch.Generator().manual_seed(seed + dist.get_rank())
        self.lm = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True,
        ).to(device).eval()

    @torch.no_grad()
    def generate(self, prompts, *, temperature, max_tokens, top_p=1.0, top_k=0, seeds=None, partial=None,
                 pause_after=None, wait_for=()):
        """As VLLMEngine's, in batches of prompts of about the same length. But no response can be paused or
        continued, and `max_tokens` is one number."""
        if pause_after is not None:
            raise InputError("--oversample needs vLLM: transformers cannot pause a response; leave it out")
        temperatures = temperature if isinstance(temperature, list) else [temperature] * len(prompts)
        seeds = seeds or torch.randint(2**62, (len(prompts),), generator=self.random).tolist()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for rows in (order[start : start + self.BATCH] for start in range(0, len(order), self.BATCH)):
            writing = {i: Response([], [], False) for i in rows}
            for tokens, logprobs in self._decode([prompts[i] for i in rows], [temperatures[i] for i in rows],
                                                 top_p, top_k, [seeds[i] for i in rows], max_tokens):
                progress.add(tokens=len(writing))
                for i, token, logprob in zip(rows, tokens, logprobs, strict=True):
                    if i in writing:  # a row that has ended is still decoded with its batch, but not read
                        writing[i].ids.append(token)
                        writing[i].logprobs.append(logprob)
                        writing[i].finished = token in self.stop
                        if writing[i].finished or len(writing[i].ids) == max_tokens:
                            progress.add(1)
                            yield i, writing.pop(i)
                if not writing:
                    break

    def _decode(self, prompts, temperatures, top_p, top_k, seeds, steps):
        """Yields, `steps` times, the next token and its log-probability of every row: two lists [b]."""
        from transformers import DynamicCache
        # Padded on the left, so that all rows write their next token at the same place.
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)  # [b, width]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        # Each row has its own random numbers, so that a response does not depend on its neighbours.
        uniform = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds])
        uniform, temperatures = uniform.to(self.device), torch.tensor(temperatures, device=self.device)
        cache = DynamicCache()
        for step in range(steps):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                             past_key_values=cache, logits_to_keep=1)
            tokens, logprobs = sample_tokens(output.logits[:, -1], temperatures, top_p, top_k,
                                             uniform[:, step])
            yield tokens.tolist(), logprobs.tolist()
            ids = tokens[:, None]  # keys and values of everything before it are in the cache
            mask = torch.cat([mask, torch.ones_like(ids)], 1)

    def sleep(self):
        pass  # a second copy of the weights stays on the device: this engine is for small models

    @torch.no_grad()
    def sync(self, weights):
        ours = dict(checkpoint_tensors(self.lm))
        for name, tensor in weights:
            ours[name].copy_(tensor)

    def close(self):
        pass


def sample_tokens(logits, temperatures, top_p, top_k, uniform):
    """Draws a token from each row's softmax(logits / temperature), kept to its `top_k` likeliest tokens (0:
    all), and to the likeliest of these of total mass top_p.

    logits [b, V]; temperatures [b], 0 for the likeliest token; uniform [b], random numbers in [0, 1).
    Returns tokens [b] and their log-probabilities [b] in the distribution that they were drawn from.
    """
    greedy = (temperatures == 0)[:, None]
    logits = logits.float() / torch.where(greedy, 1.0, temperatures[:, None])
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(descending=True)
        excess = probabilities.cumsum(-1) - probabilities >= top_p  # likelier tokens have that mass already
        logits = logits.masked_fill(excess.scatter(1, order, excess), -torch.inf)
    logprobs = logits.log_softmax(-1)
    # Inverse transform sampling: the first token at which the cumulative probability
    # exceeds the random number.
    cumulated = logprobs.double().exp().cumsum(-1)
    if not cumulated[:, -1].isfinite().all():
        raise InputError("the policy's probabilities are no numbers any more: training has diverged; lower "
                         "--lr")
    drawn = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    tokens = torch.where(greedy, logits.argmax(-1, keepdim=True), drawn)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]
