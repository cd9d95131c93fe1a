"""Run by test_rollout.py under torchrun: sppo.py with vLLM as on a GPU, of which only the interface is there. It notes what it
is asked, and lets nobody sample from an engine that sleeps. What it writes depends on prompt and seed alone."""
import importlib.machinery
import json
import random
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist

import config
import engines
import sppo
from reward import Verifier

trained = []  # policy and critic
seen = dict(events=[], requests=[], batches=[], resident=[], seed=None)


class LLM:
    def __init__(self, model, *, seed, tensor_parallel_size, enable_sleep_mode, max_num_seqs, hf_overrides,
                 disable_custom_all_reduce, gpu_memory_utilization, **options):
        assert enable_sleep_mode and tensor_parallel_size == 2 and disable_custom_all_reduce
        assert len(trained) == 2  # policy and critic are there, and vLLM takes what they leave
        seen["options"] = [max_num_seqs, hf_overrides, gpu_memory_utilization]
        self.llm_engine = self.engine_core = self.output_processor = self
        self.request_states = {}  # nothing is paused here
        self.awake, self.waiting, seen["seed"] = {"weights", "kv_cache"}, {}, seed
        seen["events"].append("init")

    def is_sleeping(self):
        return len(self.awake) < 2

    def sleep(self, level):
        self.awake = set()
        seen["events"].append(f"sleep {level}")

    def wake_up(self, tags):
        self.awake |= {*tags}
        seen["events"].append(f"wake {' '.join(tags)}")

    def collective_rpc(self, name, kwargs):
        assert "weights" in self.awake
        seen["events"].append(f"{name} {sum(1 for _ in kwargs['weights_iterator'])}")

    def reset_prefix_cache(self):
        assert not self.is_sleeping()
        seen["events"].append("reset_prefix_cache")
        return True

    def add_request(self, number, prompt, params):
        assert not self.is_sleeping()
        if not self.waiting:
            seen["events"].append("generate")
            seen["requests"].append([])
        self.waiting[number] = prompt["prompt_token_ids"], params.seed
        seen["requests"][-1].append(self.waiting[number])
        seen["resident"] += [type(model).__name__ for model in trained if model.is_on_device]

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        assert not self.is_sleeping()
        number, asked = self.waiting.popitem()
        rng = random.Random(repr(asked))
        ids = [rng.randrange(256) for _ in range(rng.randint(1, 20))]
        logprobs = SimpleNamespace(logprobs=[-1.0] * len(ids), start_indices=range(len(ids)))
        return [SimpleNamespace(request_id=number, outputs=[SimpleNamespace(
            token_ids=ids, logprobs=logprobs, finish_reason="stop")])]

    def abort_request(self, numbers):
        assert not numbers

    def shutdown(self):
        seen["events"].append("shutdown")


def submit(verifier, response, answer):
    """A verification that fails."""
    verifier.timeouts += 1
    return Verifier.submit(verifier, "", answer)


class Noted(sppo.SPPO):
    def __init__(self, run):
        super().__init__(run)
        run.verifier.submit = partial(submit, run.verifier)
        trained.extend([run.policy, self.critic])

    def advantages(self, batch):
        seen["batches"].append([r.ids for r in batch.responses])
        return super().advantages(batch)


vllm = sys.modules["vllm"] = ModuleType("vllm")
vllm.__version__, vllm.LLM, vllm.SamplingParams = "of a test", LLM, SimpleNamespace
vllm.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=1))
vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)  # it is installed, then
torch.cuda.empty_cache = lambda: None
torch.cuda.mem_get_info = lambda: ((39 + dist.get_rank()) * 2**30, 80 * 2**30)  # bytes free, and of all
on_gpu = engines.VLLMEngine
on_gpu._free_transformers_classes = lambda engine: setattr(engine, "config", nullcontext())
sppo.Policy.check_engine = lambda *_, **__: None  # its log-probabilities are made up
config.check_model = lambda *_, **__: None  # it does not share the three heads of the built-in model
engines.VLLMEngine = lambda model, device, **options: on_gpu(model, torch.device("cuda"), **options)
output, *arguments = sys.argv[1:]
end = dist.destroy_process_group


def note():
    Path(output, f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    end()


dist.destroy_process_group = note
sppo.train(sppo.TrainConfig.parse(None, arguments), Noted)
