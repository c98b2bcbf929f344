"""Output of a run: metrics file, progress line, TensorBoard, profile."""

import gzip
import io
import json
import os

import pytest
from rich.console import Console
from rich.text import Text
from training_runs import SMALL, TEXT, read_metrics, train

from jaxlstm.training.metrics import Report, print_line, truncate_rows
from jaxlstm.training.profiling import StepProfiler

ROWS = [
    {"step": 1, "split": "train", "loss": 2.5},
    {"step": 1, "split": "diagnosis", "gate": None},
    {"step": 2, "split": "valid", "loss": 2.25},
]
LINES = [json.dumps(row).encode() for row in ROWS]


@pytest.mark.slow
def test_tensorboard_shows_the_metrics_of_a_resumed_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run_dir = tmp_path / "run"
    options = "--dropout 0.3 --save-every 10 --valid-every 15 --log-every 3 --tensorboard --max-steps 20 --profile 2"
    train(["--data", tmp_path / "text.txt", "--run-dir", run_dir, *SMALL, *options.split()])
    trace = next((run_dir / "profile").rglob("perfetto_trace.json.gz"))
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    train(["--resume", run_dir, "--max-steps", "30"])
    board = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for split in ("train", "valid"):
        expected = [(row["step"], row["loss"]) for row in read_metrics(run_dir) if row["split"] == split]
        shown = [(event.step, event.value) for event in board.Scalars(f"{split}/loss")]
        assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]


def test_profiler_that_cannot_write_names_its_folder(tmp_path):
    (tmp_path / "plugins").write_text("x")
    profiler = StepProfiler(tmp_path, 1)
    profiler.before_step(3)
    with pytest.raises(OSError, match=rf"^--profile cannot write to {tmp_path}: .*plugins"):
        profiler.before_step(4)
    profiler.stop()


@pytest.mark.parametrize("width", [50, 80, 120])
def test_report_shows_the_remaining_time_at_any_width(tmp_path, width):
    """The figures, which are also in the metrics, are shortened instead."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    report = Report(tmp_path, console, "characters", lambda loss: f"{loss:.4f} nats  {1.44 * loss:.4f} bits/char")
    report.start_clock(0.0)
    with report:
        report.training_row(3120, 0.9517, 45646.0, 0.5, 1e-3, 0)
        report.validation_row(3120, {"loss": 0.8443}, 1e6, is_best=True, sample="")
        report.training_row(3140, 0.9517, 45646.0, 0.6, 1e-3, 0)
    lines = Text.from_ansi(console.file.getvalue()).plain.replace("\r", "\n").split("\n")
    last = [line for line in lines if line.endswith(" left")][-1]
    assert sum(line.startswith("step  3,140  loss 0.9517 nats") for line in lines) >= 2  # also above the bar
    assert last.startswith("step  3,140  loss 0.9517 nats")
    assert last.endswith(":00 left")
    assert len(last) <= width
    assert ("valid 0.8443" in last) == (width >= 120)


def test_print_line_wraps_between_words_on_a_terminal():
    console = Console(file=io.StringIO(), width=24, force_terminal=True, color_system=None)
    print_line(console, "1,241,704 parameters on cpu (cpu)\n    | The sample of a model, one_word_longer_than_the_line")
    expected = "1,241,704 parameters on\ncpu (cpu)\n    | The sample of a\n    | model,\n"
    expected += "    | one_word_longer_than_the_line\n"
    assert console.file.getvalue() == expected
    print_line(console, "python train.py --resume runs/a_long_name", wrap=False)
    assert console.file.getvalue() == expected + "python train.py --resume runs/a_long_name\n"


def test_print_line_prints_text_literally():
    console = Console(file=io.StringIO(), width=20)
    print_line(console, "runs/a[/x] :x: [b]not bold[/b], and longer than the line")
    assert console.file.getvalue() == "runs/a[/x] :x: [b]not bold[/b], and longer than the line\n"


def test_truncate_rows_removes_rows_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*LINES, b'{"ste']))
    assert truncate_rows(path, 2, 1) == ROWS[:2]
    assert path.read_bytes() == b"\n".join(LINES[:2]) + b"\n"


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (None, []),
        (b"", []),
        (b"\0" * 4096, []),
        (b"\n".join(LINES)[:-5], ROWS[:2]),
        (b"\n".join([LINES[0], b"\xff" + LINES[1], LINES[2]]), [ROWS[0], ROWS[2]]),
        (b"\n".join([LINES[0], b"[" * 100_000, LINES[2]]), [ROWS[0], ROWS[2]]),
        (b"\n".join([b'{"step": "1", "split": "train", "loss": 1}', *LINES[1:]]), ROWS[1:]),
        (b"\n".join([b'{"step": 1, "split": "train"}', *LINES[1:]]), ROWS[1:]),
        (b"\n".join([b'{"step": 1, "split": "train", "loss": "a"}', *LINES[1:]]), ROWS[1:]),
        *(
            (b"\n".join([json.dumps(ROWS[0] | damage).encode(), *LINES[1:]]), ROWS[1:])
            for damage in ({"loss": 10**400}, {"loss": float("nan")}, {"step": 10**400}, {"step": -(10**400)})
        ),
        (b"\n".join([LINES[0] + LINES[1], LINES[2], b'{"step": 3, "split": "valid", "loss": 2}']), ROWS[2:]),
    ],
)
def test_report_keeps_the_whole_rows_of_a_damaged_file(tmp_path, content, kept):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    console = Console(file=io.StringIO(), width=200)
    with Report(tmp_path, console, "words", str, num_rows=3, last_step=2) as report:
        assert report.rows == kept
    lost = f"{3 - len(kept)} of 3 rows of {path} are damaged or missing; the others are kept, and training goes on\n"
    assert console.file.getvalue() == lost
    assert read_metrics(tmp_path) == kept


def test_report_refuses_metrics_that_are_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not a regular file"):
        Report(tmp_path, Console(quiet=True), "words", str)
