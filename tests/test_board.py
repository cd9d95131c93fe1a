"""tools/board.py: what it sends is what the run wrote."""
import json
import sys
import types

from conftest import complaint

from tools.board import main


def test_tensorboard_gets_every_number_of_every_step(tmp_path, monkeypatch):
    sent = []
    writer = types.SimpleNamespace(add_scalar=lambda name, value, step: sent.append((step, name, value)), flush=lambda: None)
    board = types.SimpleNamespace(SummaryWriter=lambda folder: sent.append(folder) or writer)  # it need not be installed
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    lines = [{"step": 0, "eval_accuracy": 0.25}, {"step": 1, "reward": 0.5, "critic/auc": None}, {"step": 2, "reward": 0.75}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "rew')  # a line that is being written
    main([str(tmp_path), "--once"])
    assert sent == [tmp_path / "tensorboard", (0, "eval_accuracy", 0.25), (1, "reward", 0.5), (2, "reward", 0.75)]


def test_a_folder_without_metrics_is_one_clear_sentence(tmp_path, capsys):
    error = complaint(main, [tmp_path], capsys)
    assert "metrics.jsonl: no such file; give the --output folder of a run" in error and error.count("\n") == 1
