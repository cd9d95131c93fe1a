"""tools/board.py: what it sends is what the run wrote."""
import json

import pytest
from conftest import complaint

from tools.board import main


def test_tensorboard_gets_every_number_of_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    lines = [{"step": 0, "eval_accuracy": 0.25}, {"step": 1, "reward": 0.5, "critic/auc": None}, {"step": 2, "reward": 0.75}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "rew')  # a line that is being written
    main([str(tmp_path), "--once"])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [(1, 0.5), (2, 0.75)]
    assert [(e.step, e.value) for e in board.Scalars("eval_accuracy")] == [(0, 0.25)]
    assert set(board.Tags()["scalars"]) == {"reward", "eval_accuracy"}


def test_a_folder_without_metrics_is_one_clear_sentence(tmp_path, capsys):
    error = complaint(main, [tmp_path], capsys)
    assert "metrics.jsonl: no such file; give the --output folder of a run" in error and error.count("\n") == 1
