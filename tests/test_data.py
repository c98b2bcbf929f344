import functools
import hashlib
import http.server
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlstm import data


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
    with pytest.raises(
        data.DataError, match="40 characters to train on are fewer than batch x window \\+ window = 500"
    ):
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
