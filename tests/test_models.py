"""Models, engines and files on which a run could train on something else than it should: right, or one sentence."""
import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import families
import pytest
import torch
from conftest import complaint, metrics, run
from safetensors.torch import load_file, save_file

import log
from cli import BUILTIN_MODEL, InputError
from critic import PromptCritic
from data import load_problems, load_tokenizer, render
from engines import Response, make_engine, stop_tokens
from machine import skeleton
from policy import Policy
from ppo import TokenCritic, whiten
from rollout import Batch
from spo import normalize
from sppo import TrainConfig, policy_step

OPTIONS = dict(lr=1e-3, dtype="float32")
SMALL = ["--dataset", "chain:64", "--engine", "transformers", "--steps", "2", "--prompts-per-step", "8", "--minibatch", "4",
         "--lr", "0", "--critic-lr", "0", "--eval-every", "0", "--max-response-tokens", "24"]


def variant(folder, **changes):
    """A copy of the built-in model; changes: {file without .json: {key: value, or None to remove it}}."""
    shutil.copytree(BUILTIN_MODEL, folder, ignore=shutil.ignore_patterns("*.py", "*.jsonl", "__pycache__"))
    for name, new in changes.items():
        path = folder / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({key: value for key, value in {**old, **new}.items() if value is not None}))
    return folder


# ---- families ----------------------------------------------------------------------------------------------

TRAIN = ("GPT-2", "OPT", "OLMo 2", "Mistral, window", "Gemma 4", "Mixtral", "Qwen3-MoE", "DeepSeek-V3")
REFUSED = {"Gemma 2": "its output layer has final_logit_softcapping", "Granite": "its output layer has logits_scaling",
           "Phi-3, LongRoPE": "a row depends on the rows beside it", "GPT-OSS": "of type gpt_oss cannot be trained here",
           "Mamba-2": "of type mamba2 cannot be trained here", "MPT": "cannot be run here (AttributeError"}


def parts(model, device):
    """What `train` does with a model before its first update: (policy, engine, what it has sampled)."""
    c = TrainConfig.parse(None, [*SMALL, "--model", str(model), "--output", f"{model}/run", "--dtype", "float32",
                                 "--max-prompt-tokens", "64", "--max-response-tokens", "64"])
    c.check()
    tokenizer, problems = load_tokenizer(str(model)), load_problems("chain:8")
    policy = Policy(str(model), device, temperature=1.0, **c.training_options())
    policy.check_rows("the model", 128)
    policy.check_saving(tokenizer)
    engine = make_engine(c, str(model), tokenizer, device, 128)
    for parameter in engine.lm.parameters():
        parameter.data.zero_()  # all of it must come from the policy
    engine.sync(policy.weights())
    prompts = [render(p.messages, tokenizer) for p in problems]
    done = dict(engine.generate(prompts, temperature=1.0, max_tokens=8, seeds=[*range(len(prompts))]))
    return policy, engine, Batch(problems, prompts, [done[i] for i in range(len(prompts))], torch.zeros(len(prompts)))


@pytest.mark.parametrize("family", TRAIN)
def test_what_trains_agrees_with_its_engine_and_is_saved_as_it_was(family, tmp_path, device):
    families.build(family, tmp_path)
    policy, engine, batch = parts(tmp_path, device)
    gap = (policy.logprobs(batch.sequences) - batch.rollout_logprobs).abs()[batch.mask]
    assert gap.mean() < 1e-5
    policy.check_engine(batch, engine)
    policy.save(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.to(after[name].dtype)) for name, tensor in before.items())


@pytest.mark.parametrize("family", REFUSED)
def test_what_does_not_train_is_refused_in_one_sentence(family, tmp_path, device):
    families.build(family, tmp_path)
    with pytest.raises(InputError) as error:
        parts(tmp_path, device)
    assert REFUSED[family] in str(error.value) and "\n" not in str(error.value)
    if family == "Phi-3, LongRoPE":
        with pytest.raises(InputError, match="depends on the rows beside it"):
            PromptCritic(str(tmp_path), device, minibatch=4, **OPTIONS).check_rows("the critic", 128)


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM")
@pytest.mark.parametrize("family", ["Qwen3-MoE", "OLMo 2"])  # fused experts; served through transformers' classes
def test_families_that_vllm_serves_in_its_own_way(family, tmp_path):
    families.build(family, tmp_path)
    done = run("sppo.py", *SMALL, "--engine", "vllm", "--model", tmp_path, "--dtype", "float32", "--temperature", "1", "--lr", "1e-2",
               "--max-prompt-tokens", "64", "--save-every", "0", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[-1]["policy/rollout_gap"] < 1e-4  # with the weights of step 1's update


def test_the_command_that_writes_the_table(tmp_path):
    done = run("tests/families.py", "--engine", "transformers", "--ranks", "2", "--output", tmp_path / "x.md", "Mixtral", "Gemma 2")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in (tmp_path / "x.md").read_text().splitlines()]
    assert rows[2][:2] == ["Mixtral", "trains"] and float(rows[2][2]) < 1e-5 and float(rows[2][3]) == 0
    assert rows[3][:2] == ["Gemma 2", "refused"] and rows[3][2].startswith("its output layer has final_logit_softcapping")


# ---- the gate ----------------------------------------------------------------------------------------------

def test_a_run_whose_engine_has_other_weights_ends_before_its_first_update(tmp_path):
    done = run("tests/damaged.py", *SMALL, "--output", tmp_path / "run")
    assert done.returncode == 2 and "differ from those of transformers" in done.stderr and "Traceback" not in done.stderr
    assert [m["step"] for m in metrics(tmp_path / "run")] == [0]


def test_what_is_random_is_noticed_in_policy_and_critic(tmp_path, device):
    families.build("OPT", tmp_path)
    for model in (Policy(str(tmp_path), device, temperature=1.0, **OPTIONS),
                  PromptCritic(str(tmp_path), device, minibatch=4, **OPTIONS)):
        model.check_rows("the model", 64)
        model.module.train()  # with the dropout of its config, which its layers read as a number
        with pytest.raises(InputError, match="a row is not the same when it is read again"):
            model.check_rows("the model", 64)


@pytest.mark.parametrize("first, later, old_logprobs, warns", [
    (1e-6, 1e-4, "policy", False), (0.03, 0.1, "policy", False), (0.03, 0.2, "policy", True), (1e-6, 0.03, "policy", True),
    (1e-6, 0.03, "rollout", False)])  # there, how far the policy has moved is in it too
def test_a_gap_that_grows_is_a_warning(first, later, old_logprobs, warns, tmp_path, capsys):
    written = log.Log(TrainConfig(output=str(tmp_path), steps=2, old_logprobs=old_logprobs))
    for step, gap in enumerate((first, later), 1):
        written.add({"reward": 0.5, "response_tokens": 9.0, "policy/rollout_gap": gap})
        written.write(step, 1.0)
    assert ("warning: trainer and engine differ five times as much" in capsys.readouterr().out) == warns


def test_an_encoder_is_no_critic(tmp_path, device):
    """Whose tokens see later ones; ours would not let them, and say nothing."""
    from transformers import BertConfig, BertModel
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=300)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a model of type bert cannot be trained here .*an encoder"):
        skeleton("AutoModel", str(tmp_path), False)


def test_a_smaller_critic_reads_ids_of_the_policy_that_stand_for_no_token(device):
    critic = TokenCritic(BUILTIN_MODEL, device, kind="mse", clip=0.2, minibatch=4, **OPTIONS)
    size = critic.module.backbone.config.vocab_size
    beyond, last = (critic.values([([1, 2], [number, 3, 4])]) for number in (size + 7, size - 1))
    assert torch.equal(beyond, last)


# ---- files of a model --------------------------------------------------------------------------------------

def test_an_output_layer_of_its_own_in_a_checkpoint_that_says_tied(tmp_path):
    """On two ranks, of which only the first has seen the checkpoint."""
    model = variant(tmp_path / "model", config={"tie_word_embeddings": True})
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = run("sppo.py", *SMALL, "--model", model, "--dtype", "float32", "--max-prompt-tokens", "64", "--output", tmp_path / "run",
               ranks=2, timeout=120)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run")[-1]["policy/rollout_gap"] < 1e-4
    saved = load_file(tmp_path / "run/model/model.safetensors")
    assert torch.equal(saved["lm_head.weight"], weights["lm_head.weight"].to(saved["lm_head.weight"].dtype))


@pytest.mark.parametrize("change, sentence", [
    ("model.norm.weight", "lacks model.norm.weight"), ("extra.weight", "has extra.weight, which Qwen2ForCausalLM does not")])
def test_a_checkpoint_that_does_not_belong_to_its_config(change, sentence, tmp_path, device):
    model = variant(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights[change] = weights.pop("model.norm.weight")
    weights |= {} if "extra" not in change else {"model.norm.weight": weights[change].clone()}
    if "extra" not in change:
        del weights[change]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=sentence):
        Policy(str(model), device, temperature=1.0, **OPTIONS)


@pytest.mark.parametrize("settings, do_sample", [
    ({"pad_token_id": -1}, None), ({"length_penalty": 2.0}, None), ({"early_stopping": True}, None), ({"output_scores": True}, None),
    ({"temperature": 0.6, "top_p": 0.9, "pad_token_id": -1}, True),
    ({"do_sample": True, "top_k": 3}, True), ({}, None), ({"early_stopping": True, "num_beams": 2}, None)])
def test_generation_settings_that_transformers_reads_and_does_not_write(settings, do_sample, tmp_path, device):
    model = variant(tmp_path / "model", generation_config={"eos_token_id": [257, 0], **settings})
    policy = Policy(str(model), device, temperature=1.0, **OPTIONS)
    policy.check_saving(load_tokenizer(str(model)))
    policy.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved.get("do_sample") == do_sample and saved["eos_token_id"] == [257, 0]
    kept = {"temperature", "top_p", "top_k", "num_beams"} | ({"early_stopping"} if "num_beams" in settings else set())
    assert all(saved.get(name) == value for name, value in settings.items() if name in kept)


def test_generation_settings_that_transformers_does_not_read(tmp_path):
    model = variant(tmp_path / "model", generation_config={"num_return_sequences": 4})
    with pytest.raises(InputError, match="its generation_config.json is refused by transformers .Greedy methods"):
        stop_tokens(str(model), load_tokenizer(str(model)))


def test_what_would_keep_a_model_from_being_saved_is_said_before_training(device):
    def broken(folder):
        raise ValueError("no such vocabulary")
    policy = Policy(BUILTIN_MODEL, device, temperature=1.0, **OPTIONS)
    with pytest.raises(InputError, match="could not be saved after training .ValueError: no such vocabulary"):
        policy.check_saving(SimpleNamespace(save_pretrained=broken))


def test_end_tokens_of_config_json_count(tmp_path):
    model = variant(tmp_path / "model", config={"eos_token_id": 250}, generation_config={"eos_token_id": [251]})
    tokenizer = load_tokenizer(str(model))
    assert stop_tokens(str(model), tokenizer) == sorted({250, 251, tokenizer.eos_token_id})
    (model / "generation_config.json").unlink()
    assert stop_tokens(str(model), tokenizer) == sorted({250, tokenizer.eos_token_id})


# ---- tokenizers --------------------------------------------------------------------------------------------

def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path):
    model = variant(tmp_path / "model", config={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
                    tokenizer_config={"tokenizer_class": "LlamaTokenizerFast"})
    with pytest.raises(InputError, match=r"its tokenizer, as transformers loads it, reads 'The plan.* as "):
        load_tokenizer(str(model))


def test_a_prompt_does_not_end_with_an_end_token(tmp_path):
    from tokenizers.processors import TemplateProcessing
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    tokenizer.chat_template, end = None, tokenizer.eos_token
    plain = render([{"role": "user", "content": "1+1?"}], tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(  # what add_eos_token does
        single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    assert tokenizer.encode("1")[-1] == tokenizer.eos_token_id
    assert render([{"role": "user", "content": "1+1?"}], tokenizer) == [tokenizer.eos_token_id, *plain]


def test_a_template_that_refuses_a_system_message_is_one_sentence():
    tokenizer = load_tokenizer(BUILTIN_MODEL)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(InputError, match=r"does not take messages by system, user \(no system here\); change"):
        render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], tokenizer)


# ---- numbers that are no numbers ---------------------------------------------------------------------------

def test_a_bound_of_0_on_the_gradient_is_no_bound(device):
    norms = []
    for bound in (0.0, 1e9):
        policy = Policy(BUILTIN_MODEL, device, temperature=1.0, max_grad_norm=bound, **OPTIONS)
        before = [p.detach().full_tensor().clone() for p in policy.module.parameters()]
        batch = Batch([None], [[1, 2]], [Response([3, 4, 5], [-1.0] * 3, True)], torch.ones(1))
        policy_step(policy, batch, range(1), torch.ones(1), TrainConfig())
        norms.append(sum((p.detach().full_tensor() - b).norm().item() for p, b in zip(policy.module.parameters(), before, strict=True)))
    assert norms[0] == norms[1] > 0


def test_a_single_advantage_is_0_when_it_is_normalised():
    assert normalize(torch.tensor([0.7])).tolist() == [0.0]
    assert whiten(torch.tensor([[0.7]]), torch.ones(1, 1)).tolist() == [[0.0]]
    assert math.isclose(normalize(torch.tensor([1.0, 3.0]))[1].item(), 2**-0.5, rel_tol=1e-6)


# ---- what is told before anything is loaded ----------------------------------------------------------------

@pytest.mark.parametrize("options, sentence", [
    (["--oversample", "0.5", "--old-logprobs", "rollout", "--engine", "transformers"], "--oversample 0.5 needs vLLM"),
    (["--tensor-parallel", "2", "--engine", "transformers"], "--tensor-parallel 2 needs vLLM"),
    (["--output", f"{BUILTIN_MODEL}/config.json/x"], "config.json is a file); give another --output")])
def test_options_that_cannot_be(options, sentence, capsys):
    assert sentence in complaint(lambda arguments: TrainConfig.parse(None, arguments).check(), options, capsys)


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM")
def test_heads_that_cannot_be_shared(capsys):
    said = complaint(lambda a: TrainConfig.parse(None, a).check(), ["--tensor-parallel", "7", "--output", "runs/none"], capsys)
    assert "attention heads cannot be shared among --tensor-parallel 7" in said


def test_a_folder_with_the_weights_of_an_adapter_alone(tmp_path, capsys):
    model = variant(tmp_path / "model")
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    assert "has no model.safetensors" in complaint(
        lambda a: TrainConfig.parse(None, a).check(), ["--model", model, "--max-response-tokens", "64", "--max-prompt-tokens", "64"], capsys)


def test_weights_that_cannot_be_read(tmp_path):
    model = variant(tmp_path / "model")
    (model / "model.safetensors").write_text("junk")
    for option in "--model", "--critic-model":
        done = run("sppo.py", *SMALL, option, model, "--max-prompt-tokens", "64", "--output", tmp_path / "run")
        assert done.returncode == 2 and "its checkpoint cannot be read" in done.stderr and "Traceback" not in done.stderr
