"""What a run shows besides its lines: TensorBoard, a profile."""

import gzip
import io
import json

import pytest
from rich.console import Console
from rich.text import Text
from test_checkpoints import OPTIONS, run
from test_train import TEXT, metrics

from jaxlstm.training.metrics import Report, say


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


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_time_left_is_seen_in_any_terminal(tmp_path, width):
    """It is what the bar is for, and the figures, which are also in the metrics, are what gives way."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    report = Report(tmp_path, console, "characters", lambda loss: f"{loss:.4f} nats  {1.44 * loss:.4f} bits/char")
    report.begin(0.0)
    with report:
        report.train(3120, 0.9517, 45646, 0.5, 0)
        report.valid(3120, {"loss": 0.8443}, 1e6, best=True, sample="")
        report.train(3140, 0.9517, 45646, 0.6, 0)
    last = Text.from_ansi(console.file.getvalue()).plain.split("\n")[-2]
    assert last.startswith("step  3,140  loss 0.9517 nats")
    assert last.endswith(":00 left")
    assert len(last) <= width
    assert ("valid 0.8443" in last) == (width >= 120)


def test_a_line_is_shown_as_it_is():
    console = Console(file=io.StringIO(), width=20)
    say(console, "runs/a[/x] :x: [b]not bold[/b], and longer than the line")
    assert console.file.getvalue() == "runs/a[/x] :x: [b]not bold[/b], and longer than the line\n"
