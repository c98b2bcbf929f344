"""Texts, vocabularies, windows of streams, time series and shuffled batches."""

import functools
import hashlib
import http.server
import itertools
import os
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlstm.training.data.text import (
    DOWNLOADS,
    CharVocabulary,
    DataError,
    Download,
    WordVocabulary,
    cache_folder,
    embedded_text,
    evaluation_windows,
    fetch_cached,
    load_text,
    read_text,
    training_windows,
)


def test_load_text_returns_the_embedded_language_reference():
    text = load_text("python-reference")
    assert len(text) > 400_000
    assert "Assert statements are a convenient way to insert debugging assertions" in text
    assert text == embedded_text()


@settings(deadline=None)
@given(st.text(min_size=1))
def test_char_vocabulary_decodes_what_it_encodes(text):
    vocabulary = CharVocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert ids.max() < len(vocabulary) == len(set(text))
    assert vocabulary.decode(ids) == text


def test_char_vocabulary_names_unknown_characters():
    with pytest.raises(DataError, match="not in the vocabulary of 3 characters: 'ß', '🎈'"):
        CharVocabulary.from_text("abc").encode("aßb🎈cß")


@settings(deadline=None, max_examples=50)
@given(length=st.integers(30, 200), batch=st.integers(1, 4), window=st.integers(1, 6), seed=st.integers(0, 9))
def test_training_windows_are_contiguous_streams(length, batch, window, seed):
    ids = np.arange(length, dtype=np.int32)
    windows = training_windows(ids, batch, window, seed)
    next_inputs = None
    num_restarts = 0
    for _ in range(30):
        inputs, targets, restart = next(windows)
        assert inputs.shape == targets.shape == (window, batch)
        np.testing.assert_array_equal(targets, inputs + 1)  # each id is the previous one plus 1
        np.testing.assert_array_equal(np.diff(inputs, axis=0), 1)
        if restart:
            num_restarts += 1
        else:
            np.testing.assert_array_equal(inputs[0], next_inputs)
        next_inputs = targets[-1]
    assert num_restarts >= 1


@settings(deadline=None, max_examples=50)
@given(length=st.integers(2, 200), batch=st.integers(1, 7), window=st.integers(1, 9))
def test_evaluation_windows_predict_every_token_but_the_first_once(length, batch, window):
    ids = np.arange(length, dtype=np.int32)
    windows = list(evaluation_windows(ids, batch, window))
    inputs, targets, loss_mask, resets = (np.concatenate(arrays) for arrays in zip(*windows))
    assert sorted(targets[loss_mask]) == list(range(1, length))
    np.testing.assert_array_equal(targets[loss_mask], inputs[loss_mask] + 1)
    # The predicted part of a stream is contiguous; up to a window of the tokens before it precede it as context.
    for b in range(batch):
        steps = np.flatnonzero(loss_mask[:, b])
        if steps.size:
            assert steps[-1] - steps[0] + 1 == steps.size
            begin = inputs[steps[0], b]
            context = min(window, begin)
            np.testing.assert_array_equal(inputs[steps[0] - context : steps[0], b], np.arange(begin - context, begin))
            if begin <= window:
                assert resets[steps[0] - context, b]


def test_training_windows_need_one_window_of_every_stream():
    message = "40 words to train on are too few for --batch 4 and --window 100, which need 500: use a longer text"
    with pytest.raises(DataError, match=message):
        training_windows(np.zeros(40, np.int32), 4, 100, 0, unit_name="words")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "neither a file nor one of the known names python-reference, tinyshakespeare"), (b"", "is empty"),
     (b"caf\xe9", "is not UTF-8 text: byte 3 is 0xe9")],
)  # fmt: skip
def test_load_text_rejects_files_that_are_not_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(str(path))


def test_load_text_refuses_a_text_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("abc")
    fstat = os.fstat

    def stat_and_append(descriptor):
        stat = fstat(descriptor)
        path.write_text("abcd")
        return stat

    monkeypatch.setattr(os, "fstat", stat_and_append)
    with pytest.raises(DataError, match=r"text\.txt changed while it was read; start again once no program writes it"):
        load_text(str(path))


@pytest.mark.parametrize("read", [read_text, lambda path: load_text(str(path))])
def test_text_in_a_named_pipe_or_a_folder_is_one_line(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is not a regular file; expected a text file"):
        read(tmp_path / "pipe")
    with pytest.raises(DataError, match=f"{tmp_path} is a folder; expected a text file"):
        read(tmp_path)


def test_load_text_keeps_every_character_but_the_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffпривет, 世界\r\n🎈".encode())
    assert load_text(str(path)) == "привет, 世界\r\n🎈"


@settings(deadline=None, max_examples=50)
@given(length=st.integers(30, 200), batch=st.integers(1, 4), window=st.integers(1, 6), start=st.integers(0, 150))
def test_training_windows_resume_after_skipped_windows(length, batch, window, start):
    ids = np.arange(length, dtype=np.int32)
    whole = itertools.islice(training_windows(ids, batch, window, 3), start, start + 5)
    resumed = itertools.islice(training_windows(ids, batch, window, 3, start), 5)
    for a, b in zip(whole, resumed, strict=True):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


def test_windows_of_a_memory_map_read_only_what_they_return(tmp_path):
    ids = np.lib.format.open_memmap(tmp_path / "zeros.npy", "w+", np.uint16, (50_000_000,))
    tracemalloc.start()
    training, evaluation = training_windows(ids, 8, 32, 0), evaluation_windows(ids, 8, 32)
    for _ in range(3):
        next(training), next(evaluation)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_word_vocabulary_replaces_rare_words():
    text = "the cat sat on the mat \n the cat ran \n"
    words = WordVocabulary.from_text(text)
    assert words.words == ("<eos>", "<unk>", "the", "cat")
    ids = words.encode("the dog sat\nthe cat\n")
    assert ids.tolist() == [2, 1, 1, 0, 2, 3, 0]
    assert ids.dtype == np.int32
    assert words.decode(ids) == "the <unk> <unk>\nthe cat \n"


@pytest.fixture
def server(tmp_path):
    """A file server on loopback: its folder, its address and the paths requested so far."""
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


def test_download_is_cached_and_fetched_again_if_damaged(tmp_path, monkeypatch, server):
    folder, address, requests = server
    content = b"To be, or not to be" * 1000
    (folder / "input.txt").write_bytes(content)
    download = Download(f"{address}/input.txt", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(DOWNLOADS, "tinyshakespeare", download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert load_text("tinyshakespeare").encode() == content
    assert requests == ["/input.txt"]
    cached = cache_folder() / "tinyshakespeare.txt"
    cached.write_bytes(content[:-1])
    assert load_text("tinyshakespeare").encode() == content
    assert len(requests) == 2
    assert sorted(p.name for p in cached.parent.iterdir()) == ["tinyshakespeare.txt"]


def test_download_with_a_wrong_hash_or_address_raises(tmp_path, server):
    folder, address, _ = server
    (folder / "input.txt").write_bytes(b"something else")
    expected = DOWNLOADS["tinyshakespeare"].sha256
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=f"sent 14 bytes of SHA-256 [0-9a-f]+, expected {expected}"):
        fetch_cached("t", Download(f"{address}/input.txt", expected), cache)
    with pytest.raises(DataError, match=r"cannot fetch t from .*; pass a file with --data FILE"):
        fetch_cached("t", Download(f"{address}/none.txt", expected), cache)
    with pytest.raises(DataError, match=r"cannot fetch t from .*refused"):
        fetch_cached("t", Download("http://127.0.0.1:9/input.txt", expected), cache)
    assert not cache.exists()
