"""Sampling responses: vLLM in this process, or transformers' own generation behind the same four methods.

    engine.generate(prompts, ...)   yields (number of the prompt, Response), in the order in which they finish
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
    finished: bool  # False: ran out of tokens, so it has no answer


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
        self.SamplingParams, self.output_kind = vllm.SamplingParams, vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.llm = vllm.LLM(
            model, dtype=dtype, max_model_len=max_tokens, tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher", trust_remote_code=trust_remote_code,
            seed=seed + dist.get_rank() // tensor_parallel,  # ranks that share an engine must sample the same
            skip_tokenizer_init=True,  # ids in, ids out
            generation_config="vllm",  # not the model's own top-p or repetition penalty: ratios need plain sampling
            logprobs_mode="processed_logprobs",  # after temperature
            use_tqdm_on_load=False, disable_log_stats=True, gpu_memory_utilization=memory, enable_sleep_mode=on_gpu,
            enforce_eager=not on_gpu)  # CUDA graphs on a GPU; on a CPU, compilation costs a minute and buys little

    def generate(self, prompts, *, temperature, max_tokens, seeds=None):
        """Samples one response per prompt. prompts: lists of token ids; repeat one to sample it more often.
        temperature: one number, or one per prompt; 0 is greedy. seeds: one per prompt, to repeat a run exactly."""
        temperatures = temperature if isinstance(temperature, list) else [temperature] * len(prompts)
        engine = self.llm.llm_engine
        for i, ids in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": ids}, self.SamplingParams(
                temperature=temperatures[i], max_tokens=max_tokens, seed=seeds and seeds[i],
                stop_token_ids=self.stop, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False,
                output_kind=self.output_kind))
        while engine.has_unfinished_requests():
            for request in engine.step():
                output = request.outputs[0]
                flat = output.logprobs
                yield int(request.request_id), Response(
                    list(output.token_ids), [flat.logprobs[i] for i in flat.start_indices],
                    output.finish_reason == "stop")

    def sleep(self):
        if self.device.type == "cuda":
            self.llm.sleep(level=2)  # drops weights and cache: `sync` must come before the next `generate`

    def sync(self, weights):
        """weights: an iterator of (Hugging Face name, full tensor), of which vLLM holds a layer's worth at a time."""
        asleep = self.device.type == "cuda" and self.llm.llm_engine.is_sleeping()
        if asleep:
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
        self.random = torch.Generator(device).manual_seed(seed + dist.get_rank())
        self.lm = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code).to(device).eval()
        self.parameters = dict(self.lm.named_parameters())

    @torch.no_grad()
    def generate(self, prompts, *, temperature, max_tokens, seeds=None):
        from transformers import GenerationConfig, LogitsProcessorList
        temperatures = temperature if isinstance(temperature, list) else [temperature] * len(prompts)
        # Neighbours in a batch share a temperature and, as far as possible, a length.
        order = sorted(range(len(prompts)), key=lambda i: (temperatures[i], len(prompts[i])))
        while order:
            t = temperatures[order[0]]
            rows = [i for i in order[: self.BATCH] if temperatures[i] == t]
            order = order[len(rows):]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[self.stop[0]] * (width - len(prompts[i])) + prompts[i] for i in rows])
            attended = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            recorder = LogProbRecorder(t or 1.0)
            torch.manual_seed(seeds[rows[0]] if seeds else int(torch.randint(2**62, (), generator=self.random)))
            output = self.lm.generate(
                ids.to(self.device), attention_mask=attended.to(self.device),
                logits_processor=LogitsProcessorList([recorder]),
                generation_config=GenerationConfig(
                    max_new_tokens=max_tokens, do_sample=t > 0, temperature=t or None, top_p=1.0, top_k=0,
                    eos_token_id=self.stop, pad_token_id=self.stop[0]))
            logprobs = recorder.finish(output).tolist()
            for i, sampled, lp in zip(rows, output[:, width:].tolist(), logprobs, strict=True):
                end = next((k + 1 for k, token in enumerate(sampled) if token in self.stop), len(sampled))
                yield i, Response(sampled[:end], lp[:end], sampled[end - 1] in self.stop)

    def sleep(self):
        pass

    @torch.no_grad()
    def sync(self, weights):
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)

    def close(self):
        pass


class LogProbRecorder:
    """Keeps the log-probability of each sampled token while `generate` runs, instead of all its logits."""

    def __init__(self, temperature):
        self.temperature, self.scores, self.logprobs = temperature, None, []

    def __call__(self, ids, logits):
        self._take(ids)
        self.scores = (logits.float() / self.temperature).log_softmax(-1)
        return logits

    def _take(self, ids):
        if self.scores is not None:
            self.logprobs.append(self.scores.gather(1, ids[:, -1:]))

    def finish(self, ids):
        """ids [b, prompt + response] -> log-probabilities of the response [b, T]."""
        self._take(ids)
        return torch.cat(self.logprobs, dim=1)
