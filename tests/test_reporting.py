"""What a run shows besides its lines: TensorBoard, a profile."""

import gzip
import json

import pytest
from test_checkpoints import OPTIONS, run
from test_train import TEXT, metrics


@pytest.mark.slow
def test_tensorboard_shows_what_the_metrics_hold_after_a_resume_too(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    folder = tmp_path / "run"
    arguments = ["--data", str(tmp_path / "text.txt"), "--run-dir", str(folder), *OPTIONS, "--tensorboard"]
    run([*arguments, "--max-steps", "20", "--profile", "2"])
    trace = next((folder / "profile").rglob("perfetto_trace.json.gz"))
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    run(["--resume", str(folder), "--max-steps", "30"])
    board = accumulator.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for split in ("train", "valid"):
        wanted = [(row["step"], row["loss"]) for row in metrics(folder) if row["split"] == split]
        shown = [(event.step, event.value) for event in board.Scalars(f"{split}/loss")]
        assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in wanted]
