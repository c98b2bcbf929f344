"""`--task classify`: reading of files, split, batches, pooling and weights; a run with predictions; the example."""

import csv
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import ENVIRONMENT, ROOT, default_jax, read_summary, run_command, train

import jaxlstm
from jaxlstm.training.cli import parse
from jaxlstm.training.data import labeled_sequences
from jaxlstm.training.data.text import DataError
from jaxlstm.training.models.linear_baseline import linear_predictions
from jaxlstm.training.models.sequence_regressor import SequenceRegressor
from jaxlstm.training.tasks import classify

SMALL = ["--hidden", "12", "--embedding", "6", "--batch", "16", "--learning-rate", "0.02", "--diagnose", "0"]


def brackets(rng, count):
    """Strings of x and two brackets, labeled by the order of the brackets, which no count of characters tells."""
    rows = []
    for _ in range(count):
        letters = ["x"] * int(rng.integers(2, 18))
        first, second = sorted(rng.choice(len(letters), 2, replace=False))
        is_open = bool(rng.integers(2))
        letters[first], letters[second] = "()" if is_open else ")("
        rows.append({"text": "".join(letters), "label": "open" if is_open else "closed"})
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_npz_is_read_without_padding(tmp_path):
    values = np.arange(24.0).reshape(3, 4, 2)
    values[1, 2:] = np.nan  # in the padding
    np.savez(tmp_path / "a.npz", values=values, lengths=[4, 2, 1], labels=[7, 8, 7])
    data = labeled_sequences.load_labeled(str(tmp_path / "a.npz"))
    assert [a.shape for a in data.sequences] == [(4, 2), (2, 2), (1, 2)]
    np.testing.assert_array_equal(data.sequences[1], values[1, :2])
    assert data.labels == ("7", "8", "7")
    assert not data.is_regression
    np.savez(tmp_path / "b.npz", values=values[..., 0, :], labels=np.array([0.5, 1, 2]))
    data = labeled_sequences.load_labeled(str(tmp_path / "b.npz"))
    assert [a.shape for a in data.sequences] == [(2, 1)] * 3
    assert data.is_regression


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", "b"], ("a", "b")),
        ([1, 2], ("1", "2")),
        (["1", "2.5"], [1.0, 2.5]),
        ([1, 2.5], [1.0, 2.5]),
        (["1.5", "b"], ("1.5", "b")),
        ([True, False], ("true", "false")),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_labels_that_are_fractions_make_regression(tmp_path, labels, expected, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [{"text": "x, y", "label": label} for label in labels])
    else:
        cells = [label if isinstance(label, str) else json.dumps(label) for label in labels]
        path.write_text("text,label\n" + "".join(f'"x, y",{cell}\n' for cell in cells))
    data = labeled_sequences.load_labeled(str(path))
    assert data.sequences == ("x, y", "x, y")
    assert data.is_regression == isinstance(expected, list)
    assert list(data.labels) == list(expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 must be an object with text and label"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "", "label": 1}\n', "line 2: text must be a text of at least"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: label must be a text or a number, got None"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1 has half of a surrogate pair"),
        ("a.jsonl", '{"text": "a"}\n', "has no labels; expected a column label"),
        ("a.csv", "words,label\na,1\n", "expected columns text and label, got words, label"),
        ("a.csv", "text,label,text\na,1,b\n", "two columns are named 'text'"),
        ("a.csv", "text,label\na,1\nb,c,2\n", "line 3 has another number of cells than the header"),
        ("a.csv", 'text,label\n"a,1\n', "line 2: unexpected end of data"),
        ("a.csv", "text,label\na,1\nb,\n", "line 3: label must be a text or a number, got ''"),
        ("a.csv", "text,label\na,1.5\nb,1e999\n", "the label of row 1 must be finite, got inf"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "label": 1}\n', "line 1: label must be a text or a number, got None"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n',
            "label of row 1 must be a finite number",
        ),
        ("a.csv", "text,label\na,NA\nb,2.5\n", "the label of row 0 must be a finite number as the others are, got NA"),
        ("a.npz", "text", "cannot read"),
    ],
)
def test_wrong_file_is_refused_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        labeled_sequences.load_labeled(str(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_file_of_texts_alone_is_read_for_predictions(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"two\nlines"\n b\n')
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    for name, texts in (("a.csv", ("two\nlines", " b")), ("a.jsonl", ("a\u2028b",))):
        data = labeled_sequences.load_labeled(str(tmp_path / name), needs_labels=False)
        assert data == labeled_sequences.LabeledSequences(texts, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": "ba"}, "vocabulary"),
        ({"scaling": {"input_mean": [], "input_std": [], "target_mean": [0.0]}}, "target_std"),
        ({"scaling": {"input_mean": [], "input_std": [1.0], "target_mean": [0.0], "target_std": [1.0]}}, "lengths"),
    ],
)
def test_damaged_encoding_is_refused(change, message):
    scaling = {"input_mean": [], "input_std": [], "target_mean": [0.0], "target_std": [1.0]}
    config = {"classes": ["x", "y"], "vocabulary": "ab", "scaling": scaling}
    assert classify.Encoding.from_config(config).vocabulary == "ab"
    with pytest.raises(ValueError, match=message):
        classify.Encoding.from_config(config | change)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"xs": np.ones((2, 3))}, "expected arrays values, lengths and labels, got xs"),
        ({"values": np.ones(3)}, r"values must be numbers of shape \(N, T\) or \(N, T, features\), got float64\[3\]"),
        ({"values": np.ones((2, 3)), "lengths": np.array([3])}, "lengths must be 2 integers"),
        ({"values": np.ones((2, 3)), "lengths": np.array([3, 4])}, "lengths must be in 1 to 3, got 4 in row 1"),
        ({"values": np.array([[1.0, np.nan]])}, "values of row 0 must be finite up to its length"),
        ({"values": np.array([[1.0, 1e300]])}, "values of row 0 must be finite up to its length"),
        ({"values": np.ones((2, 3)), "labels": np.array([1, 2, 3])}, "labels must be 2 integers, texts or"),
        ({"values": np.ones((2, 3)), "labels": np.array([1.0, np.nan])}, "the label of row 1 must be finite, got nan"),
        ({"values": np.ones((2, 3))}, "has no labels; expected an array labels"),
    ],
)
def test_wrong_arrays_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        labeled_sequences.load_labeled(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 5, "expected at least 6 sequences, got 5"),
        (["a"] * 9, "all labels are 'a'"),
        ([1.5] * 9, "all labels are 1.5; expected"),
        (list("abcdef"), "the validation part is empty: no class has 6 sequences"),
    ],
)
def test_task_refuses_labels_that_cannot_be_learned(tmp_path, labels, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": label} for label in labels])
    with pytest.raises(DataError, match=message):
        classify.make(parse(["--task", "classify", "--data", str(path)]))


def test_fingerprint_changes_with_every_text_and_label(tmp_path):
    def fingerprint(change):
        rows = [{"text": f"{n} ", "label": n + 0.5} for n in range(2000)]
        rows[1000] |= change
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        return classify.make(parse(["--task", "classify", "--data", str(path)])).fingerprint

    assert len({fingerprint(change) for change in ({}, {"text": "1000é"}, {"label": 7.25})}) == 3


def test_split_gives_each_class_the_same_shares():
    labels = ("a",) * 60 + ("b",) * 12 + ("c",) * 2
    parts = labeled_sequences.split_indices(labels)
    assert sorted(np.concatenate(parts).tolist()) == list(range(74))
    assert [[labels[n] for n in part].count("a") for part in parts] == [40, 10, 10]
    assert [[labels[n] for n in part].count("b") for part in parts] == [8, 2, 2]
    assert [[labels[n] for n in part].count("c") for part in parts] == [2, 0, 0]
    numbers = np.linspace(0, 1, 600)
    for part, size in zip(labeled_sequences.split_indices(numbers), (400, 100, 100)):
        assert len(part) == size
        assert np.abs(np.quantile(numbers[part], [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.01


def test_bucketed_batches_have_similar_lengths_and_draw_every_example_once():
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    batches = labeled_sequences.bucketed_batches(lengths, 8, seed=3)
    drawn = [batches(number) for number in range(80)]
    assert sorted(np.concatenate(drawn).tolist()) == list(range(640))
    spread = [np.ptp(lengths[batch]) for batch in drawn]
    assert np.mean(spread) < 20 < np.mean([np.ptp(lengths[n : n + 8]) for n in range(0, 640, 8)])
    np.testing.assert_array_equal(batches(77), labeled_sequences.bucketed_batches(lengths, 8, seed=3)(77))
    assert np.abs(np.corrcoef([lengths[batch].mean() for batch in drawn], np.arange(80))[0, 1]) < 0.3  # random order


def test_pad_cuts_and_rounds_to_powers_of_two():
    sequences = [np.arange(1, n + 1) for n in (3, 17, 40)]
    batch = labeled_sequences.pad(sequences[:2], np.array([0, 1]), window=100)
    assert batch.inputs.shape == (32, 2)
    np.testing.assert_array_equal(batch.inputs[:4, 0], [1, 2, 3, 0])
    batch = labeled_sequences.pad(sequences, np.array([0, 1, 2]), window=20)
    assert batch.inputs.shape == (20, 3)
    np.testing.assert_array_equal(batch.lengths, [3, 17, 20])


@pytest.mark.parametrize("with_lengths", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_pooling_equals_numpy_over_valid_steps(pooling, with_lengths):
    rng = np.random.default_rng(0)
    lengths = [3, 1, 0, 5] if with_lengths else [5] * 4
    ys = rng.standard_normal((5, 4, 6)) - 2
    ys = np.where((np.arange(5)[:, None] < lengths)[..., None], ys, 0)
    model = SequenceRegressor(jaxlstm.LSTM(2, 3, bidirectional=True), 1, pooling=pooling)
    pooled = model.pool(jnp.asarray(ys), np.array(lengths) if with_lengths else None)
    for b, length in enumerate(lengths):
        valid = ys[:length, b]
        wanted = {
            "last": lambda a: np.concatenate([a[-1, :3], a[0, 3:]]),
            "mean": lambda a: a.mean(0),
            "max": lambda a: a.max(0),
        }[pooling](valid) if length else np.zeros(6)  # fmt: skip
        np.testing.assert_allclose(pooled[b], wanted, rtol=1e-6)


def test_balanced_weights_give_each_class_the_same_sum():
    classes = np.array([0] * 6 + [1] * 3 + [2])
    options = parse(["--task", "classify", "--class-weights", "balanced"])
    weights = classify.class_weights(options, classes, 3)
    np.testing.assert_allclose(weights * np.bincount(classes), 10 / 3)
    np.testing.assert_array_equal(classify.class_weights(parse(["--task", "classify"]), classes, 3), 1)


def test_encoding_maps_characters_seen_twice_and_scales_numbers():
    data = labeled_sequences.LabeledSequences(("abba", "caé", "b"), ("y", "x", "y"))
    encoding = classify.Encoding.fit(data, np.array([0, 1]))
    assert encoding.vocabulary == "ab"
    assert [ids.tolist() for ids in encoding.sequences(data)] == [[1, 2, 2, 1], [0, 1, 0], [2]]
    assert encoding.targets(data.labels).tolist() == [1, 0, 1]
    arrays = tuple(np.array([[0.0, 5], [2, 5]], np.float32) + n for n in range(3))
    data = labeled_sequences.LabeledSequences(arrays, np.array([1.0, 3.0, 9.0]))
    encoding = classify.Encoding.fit(data, np.array([0, 1]))
    first = encoding.sequences(data)[0]
    np.testing.assert_allclose(first[:, 0], (np.array([0, 2]) - 1.5) / np.std([0, 2, 1, 3]), rtol=1e-6)
    np.testing.assert_allclose(encoding.targets(data.labels), [-1, 1, 7])
    np.testing.assert_allclose(encoding.unscale(np.array([[-1.0], [7.0]])), [1, 9])


def test_labels_of_other_data_take_the_form_of_the_training_data():
    """Integers alone are names, and numbers beside a fraction; texts and numbers are compared as in training."""
    names = classify.Encoding(("0", "1", "x"), "ab", {})
    assert names.labels_as_trained(("1", "0", "x")).tolist() == ["1", "0", "x"]
    assert names.labels_as_trained(np.array([1.0, 0.0, 2.5])).tolist() == ["1", "0", "2.5"]
    numbers = classify.Encoding((), "ab", {})
    assert numbers.labels_as_trained(("3", "-4")).tolist() == [3.0, -4.0]
    assert numbers.labels_as_trained(np.array([3.0, 2.5])).tolist() == [3.0, 2.5]
    with pytest.raises(DataError, match="the label 'x' is not a number, as the labels of the run are"):
        numbers.labels_as_trained(("3", "x"))


def test_scores_of_known_predictions():
    truth, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 0])
    found = classify.scores(truth, predicted)
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["macro_f1"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 3 + 0) / 3)
    assert classify.errors(np.array([1.0, 5]), np.array([1.0, 2])) == pytest.approx({"rmse": 4.5**0.5, "mae": 1.5})


def test_embedded_lines_are_distinct_and_of_every_package():
    data = labeled_sequences.python_lines()
    assert len(set(data.sequences)) == len(data.sequences) > 20_000
    assert set(data.labels) == set(labeled_sequences.PACKAGES)


def test_linear_baseline_learns_texts_and_arrays():
    texts, classes = ["spam egg", "egg", "ham", "ham ham"] * 5, np.array([0, 0, 1, 1] * 5)
    np.testing.assert_array_equal(linear_predictions(texts, classes, ["egg spam", "ham"]), [0, 1])
    arrays = [np.full((n, 1), n, float) for n in range(1, 21)]
    predicted = linear_predictions(arrays, np.arange(1.0, 21), [np.full((30, 1), 30.0)])
    np.testing.assert_allclose(predicted, 30, atol=1)


@pytest.mark.slow
def test_classification_learns_order_resumes_and_predicts(tmp_path):
    rng = np.random.default_rng(0)
    write_jsonl(tmp_path / "train.jsonl", brackets(rng, 900))
    arguments = ["--task", "classify", "--data", str(tmp_path / "train.jsonl"), *SMALL, "--class-weights", "balanced"]
    train([*arguments, "--max-steps", "120", "--valid-every", "40", "--run-dir", str(tmp_path / "run")])
    train(["--resume", str(tmp_path / "run"), "--max-steps", "200"])
    summary = read_summary(tmp_path / "run")
    assert summary["test_accuracy"] > 0.95
    assert summary["test_macro_f1"] > 0.95
    assert summary["test_majority_accuracy"] < 0.6
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    new = brackets(rng, 50)
    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(new)
    printed = run_command("--predict", "run", "--data", "new.csv", "--out", "labels.csv", cwd=tmp_path)
    assert "labels.csv: 50 labels; accuracy " in printed
    assert "no class of the run" not in printed
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert np.mean([row["label"] == wanted["label"] for row, wanted in zip(rows, new)]) > 0.95
    for row in rows:
        chances = {name: float(row[f"p_{name}"]) for name in ("open", "closed")}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-3)
        assert max(chances, key=chances.get) == row["label"]
    write_jsonl(tmp_path / "renamed.jsonl", [new[0], new[1] | {"label": "ajar"}])
    printed = run_command("--predict", "run", "--data", "renamed.jsonl", "--out", "o.csv", cwd=tmp_path)
    assert "1 of the file's labels are no class of the run, such as 'ajar'" in printed
    np.savez(tmp_path / "wrong.npz", values=np.ones((2, 3)))
    printed = run_command("--predict", "run", "--data", "wrong.npz", "--out", "p.csv", cwd=tmp_path, fails=True)
    assert "wrong.npz: the data are arrays of 1 features, expected texts" in printed


@pytest.mark.slow
def test_regression_learns_sums_and_predicts_in_units_of_labels(tmp_path):
    rng = np.random.default_rng(0)
    values, lengths = rng.uniform(0, 10, (600, 9, 2)), rng.integers(1, 10, 600)
    valid = np.arange(9) < lengths[:, None]
    labels = 100 + np.where(valid, values[..., 0], 0).sum(1)
    np.savez(tmp_path / "a.npz", values=values, lengths=lengths, labels=labels)
    arguments = ["--task", "classify", "--data", str(tmp_path / "a.npz"), *SMALL, "--dropout", "0", "--pooling", "last"]
    train([*arguments, "--max-steps", "300", "--valid-every", "100", "--run-dir", str(tmp_path / "run")])
    summary = read_summary(tmp_path / "run")
    assert summary["test_rmse"] < 0.2 * summary["test_mean_rmse"]
    assert summary["test_mean_rmse"] == pytest.approx(labels.std(), rel=0.2)
    assert (tmp_path / "run" / "predictions.png").exists()
    printed = run_command("--predict", "run", "--out", "labels.csv", cwd=tmp_path)
    assert "labels.csv: 600 labels; rmse " in printed
    np.savez(tmp_path / "new.npz", values=values, lengths=lengths, labels=labels.round().astype(int))
    printed = run_command("--predict", "run", "--data", "new.npz", "--out", "labels.csv", cwd=tmp_path)
    assert "labels.csv: 600 labels; rmse " in printed
    predicted = [float(row["label"]) for row in csv.DictReader((tmp_path / "labels.csv").read_text().splitlines())]
    assert np.sqrt(np.mean((predicted - labels) ** 2)) < 0.2 * labels.std()


@pytest.mark.slow
def test_default_data_learn(tmp_path):
    arguments = ["--task", "classify", "--max-steps", "250", "--hidden", "48", "--valid-every", "250"]
    train([*arguments, "--diagnose", "0", "--run-dir", str(tmp_path / "run")])
    summary = read_summary(tmp_path / "run")
    assert summary["test_accuracy"] > summary["test_majority_accuracy"] + 0.1


@pytest.mark.slow
def test_example_learns():
    command = [sys.executable, "examples/classify.py", "120"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracy, majority = (float(line.rpartition(" ")[2]) for line in done.stdout.splitlines())
    assert accuracy > majority + 0.15


@pytest.mark.slow
def test_draws_confusion_of_many_classes(tmp_path):
    rng = np.random.default_rng(0)
    classes = tuple(f"${n}" for n in range(40))
    classify.draw_confusion(tmp_path / "c.png", rng.integers(0, 40, 99), rng.integers(0, 40, 99), classes, "many")
    assert (tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.slow
def test_outputs_of_batches_are_in_order_of_sequences():
    options = parse(["--task", "classify", "--batch", "4", "--hidden", "3", "--embedding", "2"])
    data = labeled_sequences.LabeledSequences(("abab", "b", "aabbaabb" * 5, "ba", "aab"), tuple("xyxyx"))
    encoding = classify.Encoding.fit(data, np.arange(5))
    model = classify.build_model(options, encoding)
    with default_jax():
        params = model.init(jax.random.key(0))
        sequences = encoding.sequences(data)
        found = classify.make_outputs(model, options)(params, sequences)
        wanted = [model(params, sequence[:, None])[0] for sequence in sequences]
    np.testing.assert_allclose(found, np.stack(wanted), rtol=2e-5, atol=1e-6)
