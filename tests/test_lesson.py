"""The pictures of `make lesson`, from a run of three steps; what is drawn is computed again here."""
import json
import statistics

import pytest
from conftest import ROOT, complaint, metrics, run

from tools.lesson import main

NAMES = {f"{name}.{kind}" for name in ("praise", "critic", "clock", "clipping", "step") for kind in ("png", "svg")}
OPTIONS = ["--engine", "transformers", "--prompts-per-step", "16", "--minibatch", "8", "--eval-problems", "12", "--lr", "1e-3",
           "--deterministic", "--dataset", "chain:200"]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    done = run("tools/lesson.py", "--steps", "3", "--run", folder / "run", "--output", folder / "pictures", "--shape", "builtin",
               "--", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "pictures/lesson.json").read_text())


@pytest.mark.xdist_group("lesson")
def test_every_picture_is_drawn_and_small(lesson):
    import matplotlib.image
    for folder in (lesson[0] / "pictures", ROOT / "docs/pictures"):
        assert {file.name for file in folder.iterdir()} == NAMES | {"lesson.json"}
        for name in NAMES:
            assert (folder / name).stat().st_size < 150_000
            if name.endswith("png"):
                image = matplotlib.image.imread(folder / name)
                assert image.std() > 0.05 and image[0, 0].tolist() == [1, 1, 1, 1]  # not blank, on opaque white


@pytest.mark.xdist_group("lesson")
def test_advantages_of_one_batch(lesson):
    groups = lesson[1]["groups"]
    assert len(set(groups["mixed"]["rewards"])) == 2 and len({*groups["equal"]["rewards"], groups["equal"]["greedy"]}) == 1
    for group in groups["mixed"], groups["equal"]:
        rewards, a = group["rewards"], group["advantages"]
        mean, n = statistics.mean(rewards), len(rewards)
        std = statistics.stdev(rewards)
        value = rewards[0] - a["SPPO"][0]
        assert n == 8 and 0 < value < 1
        for i, r in enumerate(rewards):
            assert a["GRPO"][i] == pytest.approx((r - mean) / (std + 1e-6), abs=1e-3)
            assert a["RLOO"][i] == pytest.approx((r - mean) * n / (n - 1), abs=1e-3)
            assert a["ReMax"][i] == r - group["greedy"]
            assert a["SPPO"][i] == pytest.approx(r - value, abs=2e-4)  # the same V for the same prompt
            assert len(a["PPO"][i]) == len(group["tokens"][i])
            text = "".join(group["tokens"][i])
            assert (f"\\boxed{{{group['answer']}}}" in text) == (r == 1)
        assert len({(r, x) for r, x in zip(rewards, a["SPO"], strict=True)}) == len(set(rewards))


@pytest.mark.xdist_group("lesson")
def test_what_else_is_drawn(lesson):
    folder, data = lesson
    lines = metrics(folder / "run")[1:]
    assert [at["step"] for at in data["critic"]] == [1, 2, 3]
    for at in data["critic"]:
        assert len(at["share"]) == len(at["value"]) == 12 and all(8 * share == int(8 * share) for share in at["share"])
    # Each token of the run has one ratio, save those of responses without advantage; SPPO has none of these.
    ratios = data["ratios"]
    assert sum(ratios["up"]) + sum(ratios["down"]) == pytest.approx(sum(16 * m["response_tokens"] for m in lines))
    clipped = sum(m["policy/clip_fraction"] * 16 * m["response_tokens"] for m in lines) / sum(16 * m["response_tokens"] for m in lines)
    ours = (ratios["clipped"]["up"] + ratios["clipped"]["down"]) / (sum(ratios["up"]) + sum(ratios["down"]))
    assert ours == pytest.approx(clipped, rel=0.1) and ours > 0  # the run's is a mean over mini-batches
    assert data["seconds"]["update"] == statistics.median(m["time/update"] for m in lines)
    assert 0 < data["seconds"]["critic"] < statistics.median(m["time/critic"] for m in lines)  # without PPO's and SPO's
    assert data["plan"]["phases"]["rollout"]["vLLM"] == pytest.approx(0.35 * 79, abs=0.01)
    committed = json.loads((ROOT / "docs/pictures/lesson.json").read_text())["plan"]["phases"]["update policy"]
    share = 7.615e9 * 4 / 4 / 2**30  # 7B in float32, over four GPUs
    assert [committed[name] for name in ("weights", "gradients", "optimizer")] == pytest.approx([share, share, 2 * share], rel=0.01)


@pytest.mark.xdist_group("lesson")
def test_those_who_look_on_change_nothing(lesson, tmp_path):
    done = run("sppo.py", "--steps", "3", *OPTIONS, "--eval-every", "3", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("reward", "response_tokens", "policy/loss", "policy/kl", "critic/bce", "critic/loss"):
        assert [m[name] for m in metrics(tmp_path)[1:]] == [m[name] for m in metrics(lesson[0] / "run")[1:]], name


@pytest.mark.parametrize("options, message", [
    (["--redraw", "--output", "nowhere"], "nowhere/lesson.json: there is nothing to draw"),
    (["--steps", "0"], "--steps 0: must be greater than 0")])
def test_bad_input_is_one_clear_sentence(options, message, capsys):
    assert message in complaint(main, options, capsys)
