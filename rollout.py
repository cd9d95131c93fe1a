"""Sampling responses: vLLM in this process, or transformers' own generation behind the same four methods.

    engine.generate(prompts, ...)   yields (number of the prompt, Response), in the order in which they end
    engine.sleep()                  gives the accelerator's memory to training
    engine.sync(weights)            takes the policy's new weights, and is awake afterwards
    engine.close()

Each rank runs an engine of its own (or `tensor_parallel` neighbours share one), and samples its part of the prompts.
"""
import gc
import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import InputError


@dataclass
class Response:
    ids: list[int]  # the tokens sampled; the last one is the end-of-sequence token if `finished`
    logprobs: list[float]  # of each token, in the distribution that it was sampled from (after temperature)
    finished: bool  # False: ran out of tokens, so it has no answer; or is paused
    paused: bool = False  # stopped before its end, to be gone on with


def make_engine(kind, model, device, **options):
    """The engine `kind`: "vllm", "transformers", or "auto" for vLLM where it is installed."""
    if kind == "auto":
        kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return (VLLMEngine if kind == "vllm" else TransformersEngine)(model, device, **options)


def stop_tokens(model, tokenizer):
    """Every token that ends a response. A chat model's generation config often names more than its tokenizer does."""
    from transformers import GenerationConfig
    try:
        named = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # has none
        named = None
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in [*named, tokenizer.eos_token_id] if token is not None})


def per_prompt(prompts, begun, max_tokens, temperature):
    """For each prompt: what was begun of its response, both together, the tokens that may follow, the temperature."""
    begun = begun or [Response([], [], False)] * len(prompts)
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    return (begun, [ids + b.ids for ids, b in zip(prompts, begun, strict=True)],
            [limit - len(b.ids) for limit, b in zip(limits, begun, strict=True)],
            temperature if isinstance(temperature, list) else [temperature] * len(prompts))


def sample_and_verify(engine, verifier, tokenizer, prompts, answers, **sampling):
    """Yields (i, Response, text, future of its reward) as responses finish: the first are verified while others are
    still being written. What was cut off has no answer, whatever its text says; what was paused has no reward yet."""
    for i, response in engine.generate(prompts, **sampling):
        if response.paused:
            yield i, response, None, None
            continue
        text = tokenizer.decode(response.ids, skip_special_tokens=True)
        yield i, response, text, verifier.submit(text if response.finished else "", answers[i])


class VLLMEngine:
    def __init__(self, model, device, *, stop, max_tokens, dtype="bfloat16", seed=0, tensor_parallel=1, memory=0.5,
                 trust_remote_code=False):
        self.device, self.stop = device, stop
        on_gpu = device.type == "cuda"
        # In this process, so that weights are handed over as tensors. Under torchrun every rank is its own launcher.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
            logging.getLogger("vllm").setLevel(logging.ERROR)  # what it says before it reads that
            warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if not on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or two ranks share one core
        import vllm
        self.name = f"vLLM {vllm.__version__}"
        self.SamplingParams, self.FINAL_ONLY = vllm.SamplingParams, vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.llm = vllm.LLM(
            model, dtype=dtype, max_model_len=max_tokens, tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher", trust_remote_code=trust_remote_code, load_format="safetensors",
            seed=seed + dist.get_rank() // tensor_parallel,  # ranks that share an engine must sample the same
            skip_tokenizer_init=True,  # ids in, ids out
            logprobs_mode="processed_logprobs",  # after temperature
            use_tqdm_on_load=False, disable_log_stats=True, gpu_memory_utilization=memory, enable_sleep_mode=on_gpu,
            enforce_eager=not on_gpu,  # CUDA graphs on a GPU; on a CPU, compilation costs a minute and buys little
            # vLLM 0.32 on a CPU cannot cut the prefill of a request that has a seed ("does not use offset").
            **({} if on_gpu else dict(enable_chunked_prefill=False, max_num_batched_tokens=max(4096, max_tokens))))

    def generate(self, prompts, *, temperature, max_tokens, top_p=1.0, seeds=None, begun=None, until=None):
        """Samples one response per prompt. prompts: lists of token ids; repeat one to sample it more often.
        temperature: one number, or one per prompt; 0 is greedy. seeds: one per prompt, and a response then depends on
        its seed alone (and on rounding). max_tokens: one number, or one per prompt. begun: a Response per prompt, to be
        gone on with. until: is called with the number of each prompt whose response ends; once it is true, and it must
        stay so, the others are paused, and come last."""
        engine = self.llm.llm_engine
        begun, prompts, limits, temperatures = per_prompt(prompts, begun, max_tokens, temperature)
        for i, ids in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": ids}, self.SamplingParams(
                temperature=temperatures[i], top_p=top_p, max_tokens=limits[i], seed=seeds and seeds[i],
                stop_token_ids=self.stop, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False,
                output_kind=self.FINAL_ONLY))

        def response(i, ids, flat, **end):
            return Response([*begun[i].ids, *ids], [*begun[i].logprobs, *(flat.logprobs[k] for k in flat.start_indices)], **end)
        enough = False
        while engine.has_unfinished_requests() and not enough:
            for request in engine.step():
                i, output = int(request.request_id), request.outputs[0]
                yield i, response(i, output.token_ids, output.logprobs, finished=output.finish_reason == "stop")
                enough = until is not None and until(i)
        # What is paused is read where vLLM gathers it: to be handed every token when it is chosen would cost more.
        paused = [*engine.output_processor.request_states.values()]
        engine.abort_request([state.external_req_id for state in paused])
        for state in paused:
            i, ids, flat = int(state.external_req_id), state.detokenizer.output_token_ids, state.logprobs_processor.logprobs
            yield i, response(i, ids, flat, finished=False, paused=True)

    def sleep(self):
        if self.device.type == "cuda":
            self.llm.sleep(level=2)  # drops weights and cache: `sync` must come before the next `generate`

    def sync(self, weights):
        """weights: an iterator of (Hugging Face name, full tensor), of which vLLM holds a layer's worth at a time."""
        asleep = self.device.type == "cuda" and self.llm.llm_engine.is_sleeping()
        if asleep:
            torch.cuda.empty_cache()  # it takes its memory past PyTorch's allocator, which would keep what training had
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if asleep:
            self.llm.wake_up(tags=["kv_cache"])
        if self.device.type == "cpu":
            self.llm.apply_model(_repack_output_layer)
        self.llm.reset_prefix_cache()  # it holds keys and values of the old weights

    def close(self):
        """Must come before the process group ends."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def _repack_output_layer(model):
    """vLLM 0.32 on a CPU: an output layer tied to the embedding keeps reading its packed weights from a buffer that
    `reload_weights` has freed, and samples from stale or foreign numbers. Point it at the new weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():  # layers packed for good have given theirs up
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class TransformersEngine:
    """For machines without vLLM: slower, and with a copy of the model that it keeps."""

    BATCH = 64  # prompts generated together

    def __init__(self, model, device, *, stop, max_tokens, dtype="bfloat16", seed=0, tensor_parallel=1, memory=None,
                 trust_remote_code=False):
        if tensor_parallel > 1:
            raise InputError(f"--tensor-parallel {tensor_parallel} needs vLLM; the transformers engine has one model a rank")
        import transformers
        self.name = f"transformers {transformers.__version__}"
        self.device, self.stop = device, stop
        self.random = torch.Generator().manual_seed(seed + dist.get_rank())
        self.lm = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True).to(device).eval()
        # Without the model's own repetition penalty or top-k, which vLLM leaves out by itself: ratios need plain sampling.
        self.lm.generation_config = transformers.GenerationConfig()

        def within_context(_, args, kwargs):  # rows that have ended go on beside those that have not
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"].clamp(max=max_tokens - 1)
            return args, kwargs
        self.lm.register_forward_pre_hook(within_context, with_kwargs=True)
        self.parameters = dict(self.lm.named_parameters())

    @torch.no_grad()
    def generate(self, prompts, *, temperature, max_tokens, top_p=1.0, seeds=None, begun=None, until=None):
        """As VLLMEngine's, but in batches, the shortest prompts first; what a batch has written comes at its end. With
        `until` there is only one batch, for which memory must suffice: of several, each would run to its longest."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
        begun, prompts, limits, temperatures = per_prompt(prompts, begun, max_tokens, temperature)
        seeds = seeds or torch.randint(2**62, (len(prompts),), generator=self.random).tolist()
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = len(prompts) if until and prompts else self.BATCH
        for rows in (by_length[i : i + size] for i in range(0, len(prompts), size)):
            width, most = max(len(prompts[i]) for i in rows), max(limits[i] for i in rows)
            ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in rows])
            attended = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            sampler = Sampler([temperatures[i] for i in rows], top_p, [seeds[i] for i in rows], most, self.device)
            ends = Ends(rows, [limits[i] for i in rows], self.stop, until, self.device)
            output = self.lm.generate(
                ids.to(self.device), attention_mask=attended.to(self.device), logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([ends]),
                generation_config=GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=0))
            sampled, logprobs = output[:, width:].tolist(), torch.cat(sampler.logprobs, dim=1).tolist()
            for i in [*ends.lengths, *(i for i in rows if i not in ends.lengths)]:
                row, paused = rows.index(i), i not in ends.lengths
                new = sampled[row][: ends.lengths.get(i)]
                yield i, Response([*begun[i].ids, *new], [*begun[i].logprobs, *logprobs[row][: len(new)]],
                                  finished=new[-1] in self.stop, paused=paused)

    def sleep(self):
        pass

    @torch.no_grad()
    def sync(self, weights):
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)

    def close(self):
        pass


class Sampler:
    """Chooses the tokens for transformers' `generate`: each row at its own temperature and with its own random numbers,
    so that a response does not depend on its neighbours. Keeps the log-probability of each, instead of all logits."""

    def __init__(self, temperatures, top_p, seeds, max_tokens, device):
        self.temperature, self.top_p, self.logprobs = torch.tensor(temperatures, device=device)[:, None], top_p, []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniform = torch.stack([torch.rand(max_tokens, generator=g) for g in generators]).to(device)

    def __call__(self, ids, logits):
        """Returns scores of which `generate` takes the largest: 0 for the chosen token, -inf for every other."""
        greedy = self.temperature == 0
        logits = logits.float() / torch.where(greedy, 1.0, self.temperature)
        if self.top_p < 1:
            probabilities, order = logits.softmax(-1).sort(descending=True)
            excess = probabilities.cumsum(-1) - probabilities >= self.top_p  # those before it suffice
            logits = logits.masked_fill(excess.scatter(1, order, excess), -torch.inf)
        logprobs = logits.log_softmax(-1)
        cumulated = logprobs.double().exp().cumsum(-1)
        drawn = torch.searchsorted(cumulated, self.uniform[:, len(self.logprobs), None] * cumulated[:, -1:], right=True)
        token = torch.where(greedy, logits.argmax(-1, keepdim=True), drawn)
        self.logprobs.append(logprobs.gather(1, token))
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)


class Ends:
    """Tells transformers' `generate` which rows have ended: at a stop token, or out of tokens; or all, because `until`,
    called with the number of each that ends, is true."""

    def __init__(self, rows, limits, stop_tokens, until, device):
        self.rows, self.until, self.enough, self.written = rows, until, False, 0
        self.limits = torch.tensor(limits, device=device)
        self.stop_tokens = torch.tensor(stop_tokens, dtype=torch.long, device=device)
        self.lengths = {}  # of those that have ended, in that order

    def __call__(self, ids, scores, **_):
        self.written += 1
        ended = torch.isin(ids[:, -1], self.stop_tokens) | (self.limits <= self.written)
        for row in ended.nonzero()[:, 0].tolist():
            if self.rows[row] not in self.lengths:  # what has ended goes on being written, and is not read
                self.lengths[self.rows[row]] = self.written
                self.enough = self.until is not None and self.until(self.rows[row])
        return ended | self.enough
