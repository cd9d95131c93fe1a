"""The pictures of `make lesson`, from a run of three steps; what is drawn is computed again here."""
import json
import statistics

import pytest
from conftest import ROOT, complaint, metrics, run

from tools.lesson import correlation, main, ranks

NAMES = {f"{name}.{kind}" for name in ("praise", "critic") for kind in ("png", "svg")}
OPTIONS = ["--engine", "transformers", "--prompts-per-step", "8", "--minibatch", "4", "--eval-problems", "8", "--lr", "1e-3",
           "--deterministic", "--dataset", "chain:200", "--steps", "3", "--eval-every", "3",
           "--max-response-tokens", "64"]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lesson")
    done = run("tools/lesson.py", "--output", folder / "pictures", "--seeds", "2", "--responses", "4", "--", *OPTIONS, "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "pictures/lesson.json").read_text())


@pytest.mark.xdist_group("lesson")
def test_every_picture_is_drawn_and_small(lesson):
    import matplotlib.image
    for folder, others in (lesson[0] / "pictures", {"lesson.json"}), (ROOT / "docs/pictures", {
            "lesson.json", "step.svg", "step.png", "curves.png", "samples.png"}):
        assert {file.name for file in folder.iterdir()} == NAMES | others
        for name in NAMES:
            # Those in the repository are small; those drawn here show another run, with other texts.
            assert (folder / name).stat().st_size < (150_000 if "lesson.json" in others and len(others) > 1 else 250_000)
            if name.endswith("png"):
                image = matplotlib.image.imread(folder / name)
                assert image.std() > 0.05 and image[0, 0].tolist() == [1, 1, 1, 1]  # not blank, on opaque white


def test_of_another_model_only_what_v_knows_is_drawn(tmp_path):
    """SmolLM2's, as it is committed."""
    (tmp_path / "lesson.json").write_text((ROOT / "results/smollm2/lesson.json").read_text())
    main(["--redraw", "--output", str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == {"lesson.json", "critic.png", "critic.svg"}


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
def test_those_who_look_on_change_nothing(lesson, tmp_path):
    folder, data = lesson
    lines = metrics(folder / "run/0")[1:]
    assert [at["step"] for at in data["critic"]] == [1, 2, 3]
    for at in data["critic"]:
        assert len(at["share"]) == len(at["value"]) == 8
        assert all(4 * share == int(4 * share) for share in at["share"])
    assert [[at["step"] for at in seed] for seed in data["knows"]] == [[1, 2, 3]] * 2
    assert data["knows"][0][2]["r"] == pytest.approx(statistics.correlation(data["critic"][2]["value"], data["critic"][2]["share"]),
                                                     abs=0.01)
    done = run("sppo.py", *OPTIONS, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("reward", "response_tokens", "policy/loss", "policy/kl", "critic/bce", "critic/loss"):
        assert [m[name] for m in metrics(tmp_path)[1:]] == [m[name] for m in lines], name


@pytest.mark.xdist_group("lesson")
def test_after_a_kill_only_what_had_not_ended_is_run_again(lesson, monkeypatch, capsys):
    folder, data = lesson

    def killed(config, _):
        begun.append(config.seed)
        raise KeyboardInterrupt
    command = "--output", folder / "again", "--seeds", "2", "--responses", "4", "--", *OPTIONS, "--output", folder / "run"
    begun = []
    monkeypatch.setattr("tools.lesson.train", killed)
    monkeypatch.setattr("tools.lesson.draw", lambda *_: None)
    main([str(word) for word in command])
    assert capsys.readouterr().out.count("to train it anew, delete it") == 2
    assert not begun and json.loads((folder / "again/lesson.json").read_text()) == data
    (folder / "run/1/measured.json").rename(folder / "run/1/kept.json")
    with pytest.raises(SystemExit):
        main([str(word) for word in command])
    (folder / "run/1/kept.json").rename(folder / "run/1/measured.json")
    assert begun == [1]
    with pytest.raises(SystemExit):  # other options are another run
        main([str(word) for word in [*command, "--lr", "1e-4"]])
    assert begun == [1, 0]


def test_correlations():
    x, y = [0.3, 0.1, 0.3, 0.9, 0.3], [1.0, 0.0, 0.5, 0.5, 0.7]
    naive = [[1 + sum(b < a for b in values) + (values.count(a) - 1) / 2 for a in values] for values in (x, y)]
    assert [ranks(x).tolist(), ranks(y).tolist()] == naive
    assert correlation(x, y) == pytest.approx(statistics.correlation(x, y), abs=1e-3)
    assert correlation([1, 1], [0, 1]) is None


def test_bad_input_is_one_clear_sentence(capsys):
    error = complaint(main, ["--redraw", "--output", "nowhere"], capsys)
    assert "nowhere/lesson.json: there is nothing to draw" in error and error.count("\n") == 1
