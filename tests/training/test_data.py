import functools
import hashlib
import http.server
import itertools
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import tolerance

from jaxlstm import packing
from jaxlstm.training.data import text as data


def test_the_embedded_text_is_the_language_reference():
    text = data.load_text("python-reference")
    assert len(text) > 400_000
    assert "Assert statements are a convenient way to insert debugging assertions" in text
    assert text == data.embedded_text()


@given(st.text(min_size=1))
def test_a_vocabulary_takes_any_text_apart_and_puts_it_together(text):
    vocabulary = data.Vocabulary.of(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert ids.max() < len(vocabulary) == len(set(text))
    assert vocabulary.decode(ids) == text


def test_strangers_are_named():
    with pytest.raises(data.DataError, match="not in the vocabulary of 3 characters: 'ß', '🎈'"):
        data.Vocabulary.of("abc").encode("aßb🎈cß")


@settings(deadline=None)
@given(length=st.integers(30, 200), batch=st.integers(1, 4), window=st.integers(1, 6), seed=st.integers(0, 9))
def test_training_windows_are_contiguous_streams(length, batch, window, seed):
    ids = np.arange(length, dtype=np.int32)
    windows = data.training_windows(ids, batch, window, seed)
    before = None
    beginnings = 0
    for _ in range(60):
        inputs, targets, first = next(windows)
        assert inputs.shape == targets.shape == (window, batch)
        np.testing.assert_array_equal(targets, inputs + 1)  # the text counts, so the next character is one more
        np.testing.assert_array_equal(np.diff(inputs, axis=0), 1)
        if first:
            beginnings += 1
        else:
            np.testing.assert_array_equal(inputs[0], before)
        before = targets[-1]
    assert beginnings >= 1


@settings(deadline=None)
@given(length=st.integers(2, 200), batch=st.integers(1, 7), window=st.integers(1, 9))
def test_evaluation_predicts_every_character_but_the_first_once(length, batch, window):
    ids = np.arange(length, dtype=np.int32)
    parts = list(data.evaluation_windows(ids, batch, window))
    inputs, targets, counted, resets = (np.concatenate(column) for column in zip(*parts))
    assert sorted(targets[counted]) == list(range(1, length))
    np.testing.assert_array_equal(targets[counted], inputs[counted] + 1)
    # What is counted in each stream is contiguous and led in by up to a window of the characters before it.
    for b in range(batch):
        rows = np.flatnonzero(counted[:, b])
        if rows.size:
            assert rows[-1] - rows[0] + 1 == rows.size
            begin = inputs[rows[0], b]
            lead = min(window, begin)
            np.testing.assert_array_equal(inputs[rows[0] - lead : rows[0], b], np.arange(begin - lead, begin))
            if begin <= window:
                assert resets[rows[0] - lead, b]


def test_a_text_too_short_says_how_short():
    with pytest.raises(data.DataError, match="40 tokens to train on are fewer than batch x window \\+ window = 500"):
        data.training_windows(np.zeros(40, np.int32), 4, 100, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "neither a file nor one of the known names python-reference, tinyshakespeare"), (b"", "is empty"),
     (b"caf\xe9", "is not UTF-8 text: byte 3 is 0xe9")],
)  # fmt: skip
def test_files_that_are_no_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.load_text(str(path))


def test_any_script(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffпривет, 世界\r\n🎈".encode())
    assert data.load_text(str(path)) == "привет, 世界\r\n🎈"


@settings(deadline=None)
@given(length=st.integers(30, 200), batch=st.integers(1, 4), window=st.integers(1, 6), start=st.integers(0, 150))
def test_a_position_is_the_number_of_windows_taken(length, batch, window, start):
    ids = np.arange(length, dtype=np.int32)
    whole = itertools.islice(data.training_windows(ids, batch, window, 3), start, start + 5)
    resumed = itertools.islice(data.training_windows(ids, batch, window, 3, start), 5)
    for a, b in zip(whole, resumed, strict=True):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


def test_a_text_larger_than_memory_is_mapped_and_gives_the_same_windows(tmp_path, monkeypatch):
    text = "The quick brown fox: Привет, мир! 世界\r\n" * 60_000  # 3 MB
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + text, encoding="utf-8", newline="")
    wanted, vocabulary = data.characters(str(path))
    monkeypatch.setattr(data, "LARGE", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tracemalloc.start()
    ids, mapped_vocabulary = data.characters(str(path))
    window = next(data.training_windows(data.split(ids)[0], 8, 32, 0))
    scored = next(data.evaluation_windows(data.split(ids)[1], 8, 32))
    tracemalloc.stop()
    assert isinstance(ids, np.memmap)
    assert mapped_vocabulary == vocabulary
    np.testing.assert_array_equal(ids, wanted)
    for a, b in zip(window, next(data.training_windows(data.split(wanted)[0], 8, 32, 0))):
        np.testing.assert_array_equal(a, b)
    assert scored.inputs.dtype == np.int32
    # The second time it is found; a text that has changed is read anew.
    stamp = next((tmp_path / "cache").rglob("*.npy")).stat().st_mtime_ns
    data.characters(str(path))
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")] == [stamp]
    path.write_text(text[:70_000], encoding="utf-8", newline="")
    assert len(data.characters(str(path))[0]) == 70_000
    # Windows of a text much larger than what they hold take no more memory than they hold.
    tracemalloc.start()
    ids, _ = data.characters(str(path))
    ids = np.lib.format.open_memmap(tmp_path / "zeros.npy", "w+", np.uint16, (50_000_000,))
    windows, scored = data.training_windows(ids, 8, 32, 0), data.evaluation_windows(ids, 8, 32)
    for _ in range(3):
        next(windows), next(scored)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_words_of_a_treebank_file():
    text = "the cat sat on the mat \n the cat ran \n"
    words = data.Words.of(text)
    assert words.words == ("<eos>", "<unk>", "the", "cat")
    ids = words.encode("the dog sat\nthe cat\n")
    assert ids.tolist() == [2, 1, 1, 0, 2, 3, 0]
    assert ids.dtype == np.int32
    assert words.decode(ids) == "the <unk> <unk>\nthe cat \n"


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_packing_keeps_every_example_and_marks_where_it_begins(lengths):
    examples = [np.full((n, 2), k + 1) for k, n in enumerate(lengths)]
    packed = packing.pack(examples, 9)
    for example, (first, row) in zip(examples, packed.places):
        np.testing.assert_array_equal(packed.values[first : first + len(example), row], example)
        assert packed.resets[first, row]
    assert packed.resets.sum() == len(examples)
    assert packed.mask.sum() == sum(lengths)
    np.testing.assert_array_equal(packed.mask, packed.values[..., 0] > 0)
    # No two rows could be one.
    used = sorted(packed.mask.sum(0))
    assert len(used) == 1 or used[0] + used[1] > 9


@pytest.mark.slow  # a row packed by hand is in test_properties
def test_an_lstm_on_packed_rows_is_an_lstm_on_each_example():
    import jax

    import jaxlstm

    rng = np.random.default_rng(0)
    examples = [rng.normal(size=(n, 3)).astype(np.float32) for n in (5, 2, 7, 1, 4)]
    packed = packing.pack(examples, 7)
    lstm = jaxlstm.LSTM(3, 4, bidirectional=True)
    params = lstm.init(jax.random.key(0))
    ys, _ = lstm(params, packed.values, resets=packed.resets, mask=packed.mask)
    assert ys.shape[1] == 3
    for example, (first, row) in zip(examples, packed.places):
        alone, _ = lstm(params, example)
        np.testing.assert_allclose(
            ys[first : first + len(example), row], alone, **tolerance(np.float32, len(example) * 4)
        )
    for wrong in ([], [np.zeros((0, 3))], [np.zeros((8, 3))]):
        with pytest.raises(ValueError, match="must have 1 to 7 steps, got"):
            packing.pack(wrong, 7)
    for wrong in ([np.zeros((2, 3)), np.zeros((2, 4))], [np.zeros(2), np.zeros(2, int)]):
        with pytest.raises(ValueError, match=r"examples must differ in nothing but their length, got .* and "):
            packing.pack(wrong, 7)
    np.testing.assert_array_equal(packing.pack([[1, 2], [3]], 3).values, [[1], [2], [3]])


@pytest.fixture
def server(tmp_path):
    """A file server on loopback: ``(folder, address, requests so far)``."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}", requests
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_download_is_fetched_once_checked_and_kept(tmp_path, monkeypatch, server):
    folder, address, requests = server
    content = b"To be, or not to be" * 1000
    (folder / "input.txt").write_bytes(content)
    download = data.Download(f"{address}/input.txt", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(data.DOWNLOADS, "tinyshakespeare", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert data.load_text("tinyshakespeare").encode() == content
    assert requests == ["/input.txt"]
    kept = data.cache_folder() / "tinyshakespeare.txt"
    kept.write_bytes(content[:-1])  # a copy that was cut short is fetched again
    assert data.load_text("tinyshakespeare").encode() == content
    assert len(requests) == 2
    assert sorted(p.name for p in kept.parent.iterdir()) == ["tinyshakespeare.txt"]


def test_a_download_that_is_not_what_it_should_be(tmp_path, server):
    folder, address, _ = server
    (folder / "input.txt").write_bytes(b"something else")
    expected = data.DOWNLOADS["tinyshakespeare"].sha256
    cache = tmp_path / "cache"
    with pytest.raises(data.DataError, match=f"sent 14 bytes of SHA-256 [0-9a-f]+, expected {expected}"):
        data.cached("t", data.Download(f"{address}/input.txt", expected), cache)
    with pytest.raises(data.DataError, match=r"cannot fetch t from .*; pass a file with --data FILE"):
        data.cached("t", data.Download(f"{address}/none.txt", expected), cache)
    with pytest.raises(data.DataError, match=r"cannot fetch t from .*refused"):
        data.cached("t", data.Download("http://127.0.0.1:9/input.txt", expected), cache)
    assert not cache.exists()
