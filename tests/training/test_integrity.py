"""Damaged, crafted and blocking files of a run, and sizes that no machine can hold: one line each."""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from time_limit import time_limit
from training_runs import SMALL, TEXT, default_jax, run_command, train, write_config

from jaxlstm import checksum
from jaxlstm.json_types import from_json
from jaxlstm.training import config, memory, run_directory, train_step
from jaxlstm.training.checkpointing import CheckpointError, Checkpoints
from jaxlstm.training.config import Options, load_config
from jaxlstm.training.data.text import CharVocabulary, DataError, WordVocabulary
from jaxlstm.training.optimizer import learning_rate_schedule, make_optimizer
from jaxlstm.training.params_file import BEST, load_params, save_params
from jaxlstm.training.run_directory import RunRecord, lock_run_dir
from jaxlstm.training.tasks import TASKS
from jaxlstm.training.tasks.language import build_language_model

PARAMS = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.ones(2, jnp.float32)}
SMALL_OPTIONS = Options(hidden=8, embedding=4)
CHARACTERS = '\n "()abc'


def init(key):
    return jax.tree.map(jnp.zeros_like, PARAMS)


def flip(content, bit):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


@pytest.fixture
def no_hang():
    with time_limit(60):
        yield


@pytest.fixture
def written_run(tmp_path):
    """A run directory with a configuration and initial parameters."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, SMALL_OPTIONS, vocabulary=CHARACTERS)
    save_params(folder / BEST, build_language_model(SMALL_OPTIONS, len(CHARACTERS)).init(jax.random.key(0)))
    return folder


def test_flipped_bits_of_a_configuration_are_detected(tmp_path):
    path = tmp_path / "config.json"
    checksum.write_checked_json(path, {"options": {"hidden": 8, "layers": 1}, "about": "Ж"})
    content = path.read_bytes()
    assert checksum.read_checked_json(path) == {"options": {"hidden": 8, "layers": 1}, "about": "Ж"}
    for bit in random.Random(0).sample(range(8 * len(content)), 200):
        path.write_bytes(flip(content, bit))
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            checksum.read_checked_json(path)


def test_flipped_bits_of_the_parameters_are_detected(tmp_path):
    path = tmp_path / BEST
    save_params(path, PARAMS)
    content = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), 200):
        path.write_bytes(flip(content, bit))
        with pytest.raises(ValueError, match=r"best.safetensors is damaged"):
            load_params(path, init)


def test_parameters_load_without_this_package(written_run):
    arrays = safetensors.numpy.load_file(written_run / BEST)
    params = build_language_model(SMALL_OPTIONS, len(CHARACTERS)).init(jax.random.key(0))
    np.testing.assert_array_equal(arrays["lstm.layers.0.forward.w_x"], params.lstm.layers[0].forward.w_x)
    np.testing.assert_array_equal(arrays["embedding"], params.embedding)
    assert len(arrays) == len(jax.tree.leaves(params))


def test_documented_check_of_a_checksum_works_without_this_package(written_run):
    content = (written_run / "config.json").read_bytes()
    digest = json.loads(content)["sha256"]
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64, 1)).hexdigest() == digest
    content = (written_run / BEST).read_bytes()
    digest = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["sha256"]
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64, 1)).hexdigest() == digest


@pytest.mark.parametrize(
    ("params", "message"),
    [
        *(
            (PARAMS | {"w": np.zeros((2, 3), dtype)}, rf"w is {dtype}\[2,3\], expected float32\[2,3\]")
            for dtype in ("int32", "bool", "uint8", "float16", "float64", "complex64")
        ),
        (
            PARAMS | {"w": jnp.zeros((3, 2), jnp.float32)},
            r"of another model: w is float32\[3,2\], expected float32\[2,3",
        ),
        (PARAMS | {"w": jnp.zeros((), jnp.float32)}, r"of another model: w is float32\[\], expected float32\[2,3"),
        (PARAMS | {"x": jnp.zeros(2)}, "of another model: x is .*, expected absent"),
        ({"w": PARAMS["w"]}, "of another model: b is absent, expected float32"),
        *(
            (PARAMS | {"w": PARAMS["w"].at[1, 2].set(value)}, "best.safetensors: w has values that are not finite")
            for value in (np.nan, np.inf, -np.inf)
        ),
    ],
)
def test_load_params_refuses_other_dtypes_shapes_names_and_non_finite_values(tmp_path, params, message):
    save_params(tmp_path / BEST, params)
    with pytest.raises(ValueError, match=message):
        load_params(tmp_path / BEST, init)


def sealed(header, data=b""):
    """Returns a file in the safetensors format with any header and the SHA-256 of its contents."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return checksum.insert_digest(len(text).to_bytes(8, "little") + text + data)


METADATA = {"__metadata__": {"sha256": checksum.PLACEHOLDER}}
ARRAY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"nonsense" * 20,
        b"\xff" * 8,  # a header of 2**64 - 1 bytes
        (2**62).to_bytes(8, "little") + b"{}",
        sealed(b"[" * 100_000),
        sealed([]),
        sealed({}),
        sealed({"__metadata__": 3}),
        sealed({"__metadata__": {"sha256": 3}}),
        sealed(METADATA | {"w": 3}),
        sealed(METADATA | {"w": ARRAY | {"dtype": "F33"}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"dtype": None}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"shape": [2**62, 2**62]}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"shape": "x"}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"data_offsets": [24, 0]}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY}, bytes(23)),
        sealed(METADATA | {"w": ARRAY}, bytes(25)),
        sealed(METADATA | {"w": ARRAY | {"dtype": "F4", "shape": [48]}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"dtype": "F8_E4M3", "shape": [24]}}, bytes(24)),
        sealed(METADATA | {"w": ARRAY | {"dtype": "C64", "shape": [3]}}, bytes(24)),
    ],
)
def test_load_params_refuses_crafted_files_in_one_line(tmp_path, content):
    (tmp_path / BEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"best.safetensors is (damaged|of another model)") as error:
        load_params(tmp_path / BEST, init)
    assert "\n" not in str(error.value)


CRAFTED_TEXTS = [
    "", "null", "[]", "3", '"x"', "{", "{}", '{"sha256": 3}', '{"sha256": null, "options": {}}', "[" * 100_000,
    '{"options":' * 100_000, "9" * 5000, "\x00", "NaN", '{"sha256": "\\ud800"}', '{"sha256": ["' + "0" * 64 + '"]}',
]  # fmt: skip


@pytest.mark.parametrize("text", [*CRAFTED_TEXTS, b"\xff\xfe", b"\xff" * 64])
def test_load_config_refuses_crafted_texts_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config.json is damaged") as error:
        load_config(tmp_path, "--sample")
    assert "\n" not in str(error.value)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 32.5}, "options: hidden must be int, got 32.5"),
        ({"hidden": "32"}, "hidden must be int, got '32'"),
        ({"hidden": True}, "hidden must be int, got True"),
        ({"hidden": None}, "hidden must be int, got None"),
        ({"hidden": -1}, "--hidden must be greater than 0, got -1"),
        ({"hidden": 10**100}, "--hidden must be at most 2,147,483,647, got 1000"),
        ({"layers": 10**9}, "--layers must be at most 100, got 1000000000"),
        ({"task": "x"}, "task must be one of 'charlm', .*, got 'x'"),
        ({"task": None}, "task must be one of 'charlm', .*, got None"),
        ({"task": ["charlm"]}, r"task must be one of 'charlm', .*, got \['charlm'\]"),
        ({"data": None}, "data must be str, got None"),
        ({"data": nested(900)}, r"data must be str, got \[\[\[\[\[\[\[...\]+"),
        ({"dtype": "int8"}, "dtype must be one of 'float32', 'bfloat16', got 'int8'"),
        ({"dropout": "0.5"}, "dropout must be float, got '0.5'"),
        ({"dropout": float("nan")}, r"--dropout must lie in \[0, 1\), got nan"),
        ({"clip": 1e999}, "--clip must be greater than 0, got inf"),
        *(
            ({name: 10**400}, rf"options: {name} must be float( \| None)?, got 1000\d+\.\.\.\d+$")
            for name in ("learning_rate", "clip", "weight_decay", "activation_regularization", "max_seconds")
        ),
        ({"tied": 1}, "tied must be bool, got 1"),
        ({"projection": 2.0}, r"projection must be int \| None, got 2.0"),
        ({"seed": 2**63}, "--seed must be less than"),
        ({"hiddem": 8}, "options has an unknown key 'hiddem'"),
        ({"x" * 9999: 8}, "options has an unknown key 'xxx"),
    ],
)
def test_load_config_refuses_crafted_options_in_one_line(tmp_path, options, message):
    values = config.to_json(SMALL_OPTIONS) | options
    entries = {"options": values, "about": "", "fingerprint": "", "versions": {}, "vocabulary": "ab"}
    checksum.write_checked_json(tmp_path / "config.json", entries)
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path, "--sample")
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert len(str(error.value)) < 400 + len(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": []}, r"options must be an object, got \[\]"),
        ({"options": None}, "options must be an object, got None"),
        ({"about": 3}, "about must be str, got 3"),
        ({"vocabulary": ["a"]}, r"vocabulary must be str, got \['a'\]"),
        ({"vocabulary": None}, "vocabulary must be str, got None"),
        ({"vocabularx": "ab"}, "has an unknown key 'vocabularx'"),
    ],
)
def test_load_config_refuses_crafted_entries(written_run, change, message):
    path = written_run / "config.json"
    entries = checksum.read_checked_json(path)
    checksum.write_checked_json(path, entries | change)
    with pytest.raises(ValueError, match=message):
        load_config(written_run, "--sample")
    for name in ("options", "about", "fingerprint", "vocabulary"):
        checksum.write_checked_json(path, {key: value for key, value in entries.items() if key != name})
        with pytest.raises(ValueError, match=f"{name} must be an object|has no key '{name}'"):
            load_config(written_run, "--sample")
    for name in ("hidden", "seed"):
        options = {key: value for key, value in entries["options"].items() if key != name}
        checksum.write_checked_json(path, entries | {"options": options})
        with pytest.raises(ValueError, match=f"options has no key '{name}'"):
            load_config(written_run, "--sample")


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 4e-3), ({"optimizer": "asgd"}, 0.3), ({"optimizer": "asgd", "learning_rate": 2.0}, 2.0)],
)
def test_config_records_the_learning_rate_in_use(tmp_path, options, rate):
    write_config(tmp_path, Options(**options), vocabulary="ab")
    loaded, entries = load_config(tmp_path, "--resume")
    assert loaded.learning_rate == loaded.peak_learning_rate == entries["options"]["learning_rate"] == rate
    assert config.differences(config.to_json(loaded), config.to_json(Options(**options))) == []


def test_options_of_a_run_round_trip(tmp_path):
    options = Options(
        learning_rate=0.1, hidden=3, dropout=0.0, projection=2, mesh="data=2", tied=True, run_dir=tmp_path, length=7
    )
    write_config(tmp_path, options, vocabulary="ab")
    loaded, _ = load_config(tmp_path, "--resume")
    assert loaded == dataclasses.replace(options, run_dir=None, length=Options.length)


@pytest.mark.parametrize("characters", ["", "ba", "aa", "abb"])
def test_char_vocabulary_refuses_repeated_or_unsorted_characters(characters):
    with pytest.raises(DataError, match="must be one or more distinct characters in code point order"):
        CharVocabulary(characters)


@pytest.mark.parametrize("words", [(), ("a", "b"), ("<unk>", "<eos>"), ("<eos>", "<unk>", "a", "a")])
def test_word_vocabulary_refuses_repeated_words_or_another_beginning(words):
    with pytest.raises(DataError, match="must be distinct words that begin with <eos> and <unk>"):
        WordVocabulary(words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 1.0}, "loop: step must be int, got 1.0"),
        ({"step": True}, "loop: step must be int, got True"),
        ({"valid_losses": 3}, r"loop: valid_losses must be list\[float\], got 3"),
        ({"valid_losses": [1, "2"]}, r"loop: valid_losses must be list\[float\], got \[1, '2'\]"),
        ({"losses": {}}, r"loop: losses must be list\[float\], got {}"),
        ({"more": 1}, "loop has an unknown key 'more'"),
        ({"seconds": 10**400}, r"loop: seconds must be float, got 1000"),
        ({"losses": [10**400]}, r"loop: losses must be list\[float\], got \[1000"),
        *(
            ({name: value}, f"{name} must be finite and not negative, got {value}")
            for name in ("seconds", "valid_seconds")
            for value in (float("nan"), float("inf"), -5.0)
        ),
        *(({name: -1}, f"{name} must be finite and not negative, got -1") for name in ("step", "rows", "best_step")),
        ({"best_step": 10**30}, "best_step must be at most step 3, got 1000"),
        ({"step": 10**30}, "step must be at most 2,147,483,647, got 1000"),
        ({"rows": 10**30}, "rows must be at most three per step of 3, got 1000"),
        ({"rows": 10}, "rows must be at most three per step of 3, got 10"),
        ({"valid_losses": [float("nan")]}, r"valid_losses must be finite, got \[nan\]"),
        ({"best_step": 3}, "best_loss must be one of valid_losses, .*, got None and best_step 3"),
        ({"best_step": 3, "best_loss": 1.0, "valid_losses": []}, "best_loss must be one of valid_losses, .*, got 1.0"),
        ({"best_loss": 1.0}, "best_loss must be .* None if best_step is 0, got 1.0 and best_step 0"),
        (None, "loop must be an object, got None"),
    ],
)
def test_record_of_a_checkpoint_is_typed(change, message):
    values = dataclasses.asdict(RunRecord(step=3, rows=9, valid_losses=[1.0, 2.0]))
    assert from_json(RunRecord, values, "loop") == RunRecord(step=3, rows=9, valid_losses=[1.0, 2.0])
    with pytest.raises(ValueError, match=message):
        from_json(RunRecord, None if change is None else values | change, "loop")
    with pytest.raises(ValueError, match="loop has no key 'rows'"):
        from_json(RunRecord, {name: value for name, value in values.items() if name != "rows"}, "loop")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of one checkpoint, of step 1."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    checkpoints.save(1, PARAMS, {"step": 1})
    checkpoints.wait()
    return checkpoints.folder / "1"


@pytest.fixture
def copied_checkpoint(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "1")
    return tmp_path / "1"


def restore(folder):
    return Checkpoints(folder.parent).restore(PARAMS)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_flipped_bits_in_every_file_of_a_checkpoint_are_detected(copied_checkpoint):
    rng = random.Random(0)
    checkpoints = Checkpoints(copied_checkpoint.parent)
    paths = files_of(copied_checkpoint)
    assert len(paths) > 5
    for path in paths:
        content = path.read_bytes()
        for bit in {0, 8 * len(content) - 1, *rng.choices(range(8 * len(content)), k=8)}:
            path.write_bytes(flip(content, bit))
            with pytest.raises(CheckpointError, match=rf"checkpoint .*/1 is damaged: |{path} is damaged") as error:
                checkpoints.latest_record()
            assert "\n" not in str(error.value)
        path.write_bytes(content)
    jax.tree.map(np.testing.assert_array_equal, restore(copied_checkpoint), PARAMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}}, "damaged: manifest.json does not list _METADATA; remove"),
        ({"files": []}, r"files must be dict\[str, str\], got \[\]"),
        ({"files": {"_METADATA": 3}}, r"files must be dict\[str, str\]"),
        ({"files": {"../../../../../../dev/zero": "0 0"}}, "damaged: .*dev/zero: not a regular file"),
        ({"files": {"/dev/tty": "0 0"}}, "damaged: /dev/tty: "),
        ({"files": {"\x00": "0 0"}}, "damaged: .*: embedded null byte"),
        ({"files": {"": "0 0"}}, "damaged: : Is a directory"),
        ({"arrays": 3}, r"arrays must be dict\[str, str\], got 3"),
        ({"arrays": {}}, r"of another model: b is absent, expected float32\[2\]"),
        ({"arrays": {"b": None}}, r"arrays must be dict\[str, str\]"),
        ({"record": []}, r"record must be dict\[str, typing.Any\], got \[\]"),
        ({"more": 3}, "has an unknown key 'more'"),
    ],
)
def test_crafted_manifests_are_refused_in_one_line(copied_checkpoint, change, message, no_hang):
    path = copied_checkpoint / "manifest.json"
    manifest = checksum.read_checked_json(path)
    checksum.write_checked_json(path, manifest | change)
    with pytest.raises(CheckpointError, match=message) as error:
        restore(copied_checkpoint)
    assert "\n" not in str(error.value)


def test_manifest_lists_every_file(copied_checkpoint):
    path = copied_checkpoint / "manifest.json"
    manifest = checksum.read_checked_json(path)
    assert len(manifest["files"]) == len(files_of(copied_checkpoint)) - 1  # all but itself
    for name in manifest["files"]:
        files = {other: fingerprint for other, fingerprint in manifest["files"].items() if other != name}
        checksum.write_checked_json(path, manifest | {"files": files})
        with pytest.raises(CheckpointError, match=f"/1 is damaged: manifest.json does not list {name}; remove"):
            restore(copied_checkpoint)
    checksum.write_checked_json(path, manifest)
    (copied_checkpoint / "other").touch()
    with pytest.raises(CheckpointError, match="does not list other"):
        restore(copied_checkpoint)


@pytest.mark.parametrize("text", CRAFTED_TEXTS)
def test_crafted_texts_of_a_manifest_are_refused_in_one_line(copied_checkpoint, text):
    (copied_checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged.*; remove .*/1 to go on") as error:
        restore(copied_checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="no named pipes on Windows")
def test_named_pipes_and_devices_in_a_run_are_refused_without_waiting(written_run, checkpoint, tmp_path, no_hang):
    def replace_by_pipe(path):
        path.unlink()
        os.mkfifo(path)

    for n, path in enumerate(files_of(checkpoint)):
        copy = tmp_path / f"copy{n}" / "1"
        shutil.copytree(checkpoint, copy)
        replace_by_pipe(copy / path.relative_to(checkpoint))
        with pytest.raises(CheckpointError, match="not a regular file"):
            restore(copy)
    replace_by_pipe(written_run / BEST)
    output = run_command("--sample", "run", cwd=tmp_path, fails=True)
    assert output == "train.py: no checkpoint run/best.safetensors: not a regular file\n"
    (written_run / BEST).unlink()
    (written_run / BEST).symlink_to("/dev/zero")
    assert run_command("--sample", "run", cwd=tmp_path, fails=True) == output
    replace_by_pipe(written_run / "config.json")
    for option in ("--sample", "--resume"):
        output = run_command(option, "run", cwd=tmp_path, fails=True)
        assert output == f"train.py: {option} run is not the folder of a run: run/config.json: not a regular file\n"
    os.mkfifo(written_run / "lock")
    with pytest.raises(ValueError, match="lock is not a regular file"), lock_run_dir(written_run):
        pass


def test_lock_removes_temporary_files_of_a_killed_process(written_run):
    (written_run / "0123456789abcdef.partial").write_bytes(b"half")
    (written_run / "movie.mp4.partial").write_bytes(b"half")  # of another program
    (written_run / "fedcba9876543210.partial").mkdir()
    with lock_run_dir(written_run):
        names = {path.name for path in written_run.iterdir()}
    assert names == {"config.json", BEST, "lock", "movie.mp4.partial", "fedcba9876543210.partial"}


def test_non_finite_parameters_are_refused_on_sampling_and_resume(written_run, tmp_path):
    model = build_language_model(SMALL_OPTIONS, len(CHARACTERS))
    params = model.init(jax.random.key(0))
    params = params._replace(embedding=params.embedding.at[0, 0].set(jnp.nan))
    save_params(written_run / BEST, params)
    message = "embedding has values that are not finite\n"
    assert run_command("--sample", "run", cwd=tmp_path, fails=True).endswith(message)

    options = Options(task="adding", hidden=8, window=5)
    task = TASKS["adding"].make(options)
    params = task.init(jax.random.key(0))
    params = params._replace(w_out=params.w_out.at[0, 0].set(jnp.inf))
    state = train_step.init_train_state(params, optax.sgd(1.0), None, jax.random.key(0))
    record = {"loop": dataclasses.asdict(RunRecord(step=2))}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, state, run_directory.saved_config(options, task) | record)
    with pytest.raises(ValueError, match=r"checkpoint .*/2: w_out has values that are not finite"):
        run_directory.restore_run(checkpoints, options, task, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--hidden 1000000000", r"needs at least [\d,.]+ GiB of memory, and there are [\d,.]+ GiB; lower --hidden"),
        ("--hidden 1000000000 --projection 1 --layer-norm", r"needs at least [\d,.]+ GiB of memory"),
        ("--hidden 2147483647 --layers 2", r"needs at least [\d,.]+ GiB of memory"),
        ("--embedding 1000000000", r"needs at least [\d,.]+ GiB of memory"),
        ("--hidden 1000000000000", "--hidden must be at most 2,147,483,647, got 1000000000000"),
        ("--batch 1000000000000", "--batch must be at most 2,147,483,647"),
        ("--window 1000000000000", "--window must be at most 2,147,483,647"),
        ("--layers 100000000", "--layers must be at most 100, got 100000000"),
        ("--sample run --length 1000000000000", "--length must be at most 2,147,483,647, got 1000000000000"),
        ("--mesh data=100000 --batch 100000", "needs 100,000 devices per process, expected at most 1,024"),
        ("--mesh data=100000,model=100000", "needs 10,000,000,000 devices per process, expected at most 1,024"),
    ],
)
def test_sizes_are_checked_before_memory_is_allocated(tmp_path, arguments, message):
    (tmp_path / "text.txt").write_text(TEXT)
    data = [] if "--task" in arguments or "--sample" in arguments else ["--data", "text.txt", *SMALL]
    output = run_command(*data, "--run-dir", "new", *arguments.split(), cwd=tmp_path, fails=True)
    assert re.fullmatch(rf"train\.py: .*{message}.*\n", output)
    assert not (tmp_path / "new").exists()


def test_check_memory_compares_with_the_memory_of_the_machine():
    memory.check_memory(2**20, "--hidden")
    with pytest.raises(ValueError, match=r"needs at least 1,048,576.0 GiB of memory, .*; lower --hidden"):
        memory.check_memory(2**50, "--hidden")
    assert memory.num_bytes(PARAMS) == 32


@pytest.mark.slow
def test_a_thousand_flipped_bits_over_every_file_of_a_run_change_nothing_silently(tmp_path):
    """Each flip ends in one line that names the file, or reading the run gives the same bits."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    run_dir = tmp_path / "run"
    train(["--data", tmp_path / "text.txt", "--run-dir", run_dir, "--max-steps", 8, "--save-every", 8, *SMALL])
    options, _ = load_config(run_dir, "--resume")
    with default_jax():
        task = TASKS[options.task].make(options)
        params = task.init(jax.random.key(0))
    optimizer = make_optimizer(learning_rate_schedule("adamw", 1.0, 0.0), weight_decay=0.0, clip=1.0)
    with default_jax():
        template = train_step.init_train_state(params, optimizer, task.init_carry(params), jax.random.key(0))

    def read():
        options, entries = load_config(run_dir, "--resume")
        with default_jax():
            best = load_params(run_dir / BEST, task.init)
            checkpoints = Checkpoints(run_dir / "checkpoints")
            state, record, _ = run_directory.restore_run(checkpoints, options, task, template)
        summary = checksum.read_checked_json(run_dir / "summary.json")
        leaves = jax.tree.leaves((best, state._replace(key=jax.random.key_data(state.key))))
        return [options, entries, record, summary, *(np.asarray(leaf).tobytes() for leaf in leaves)]

    expected = read()
    rng = random.Random(0)
    latest = Checkpoints(run_dir / "checkpoints").steps()[-1]
    shutil.rmtree(run_dir / "checkpoints" / str(latest - 4))
    unread = {
        "curves.png",
        "metrics.jsonl",
        "diagnosis.jsonl",
        "lock",
    }  # drawn, or written to, but never read for a result
    paths = [path for path in files_of(run_dir) if path.name not in unread]
    num_detected = 0
    for n in range(1000):
        path = paths[n % len(paths)]
        content = path.read_bytes()
        path.write_bytes(flip(content, rng.randrange(8 * len(content))))
        with pytest.raises(ValueError, match=re.escape(path.name)) as error:
            read()
        assert "\n" not in str(error.value)
        path.write_bytes(content)
        num_detected += 1
    assert num_detected == 1000
    assert read() == expected
