"""Character ids of large texts: the cache, its checks, and processes that build it at once."""

import multiprocessing
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxlstm.checksum import read_checked_json, write_checked_json
from jaxlstm.training.data import token_cache
from jaxlstm.training.data.text import CharVocabulary, DataError, evaluation_windows
from jaxlstm.training.data.token_cache import load_characters, map_characters


@pytest.fixture
def memory_mapped(tmp_path, monkeypatch):
    """Makes `load_characters` use a memory map for files of a thousand bytes or more; returns the cache folder."""
    monkeypatch.setattr("jaxlstm.training.data.token_cache.MEMORY_MAP_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_load_characters_of_a_large_file_equal_those_of_its_text(tmp_path, memory_mapped):
    text = "The quick brown fox: Привет, мир! 世界\r\n" * 30_000  # read in two pieces
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + text, encoding="utf-8", newline="")
    ids, vocabulary = load_characters(str(path))
    assert isinstance(ids, np.memmap)
    assert ids.dtype == np.uint16
    assert vocabulary == CharVocabulary.from_text(text)
    np.testing.assert_array_equal(ids, vocabulary.encode(text))
    assert next(evaluation_windows(ids, 8, 32)).inputs.dtype == np.int32


def test_load_characters_encodes_a_large_file_again_only_if_its_content_changed(tmp_path, memory_mapped):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 1000)
    assert len(load_characters(str(path))[0]) == 3000
    (ids_path,) = memory_mapped.rglob("*.ids")
    written = ids_path.stat().st_mtime_ns
    (tmp_path / "copy.txt").write_text("abc" * 1000)
    load_characters(str(tmp_path / "copy.txt"))
    assert ids_path.stat().st_mtime_ns == written
    path.write_text("abd" * 900)
    ids, vocabulary = load_characters(str(path))
    assert (len(ids), vocabulary.characters) == (2700, "abd")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a" * 2000 + b"\xe9", "is not UTF-8 text: unexpected end of data"), (b"\xe9" * 2000, "is not UTF-8 text")],
)
def test_load_characters_leaves_no_files_for_a_damaged_large_file(tmp_path, memory_mapped, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_characters(str(path))
    assert [path.suffix for path in memory_mapped.rglob("*.*")] == [".lock"]


def test_unwritable_cache_folder_raises_one_line(tmp_path, memory_mapped):
    memory_mapped.touch()  # a file in place of the folder
    path = tmp_path / "text.txt"
    path.write_text("abc" * 1000)
    with pytest.raises(DataError, match=r"cannot create .*jaxlstm: "):
        load_characters(str(path))


@pytest.fixture
def cached(tmp_path):
    """A text, its cache folder and the file of ids in it."""
    path, folder = tmp_path / "text.txt", tmp_path / "cache"
    path.write_text("abc" * 1000)
    map_characters(path, folder)
    (ids_path,) = folder.glob("*.ids")
    return path, folder, ids_path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def change_description(ids_path, **changes):
    path = ids_path.with_suffix(".json")
    write_checked_json(path, read_checked_json(path) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda ids: flip(ids, 0),
        lambda ids: flip(ids, 5001),  # an id outside the vocabulary
        lambda ids: ids.write_bytes(ids.read_bytes()[:-2]),
        lambda ids: ids.write_bytes(ids.read_bytes()[:-1]),
        lambda ids: ids.write_bytes(b""),
        lambda ids: ids.unlink(),
        lambda ids: ids.with_suffix(".json").unlink(),
        lambda ids: ids.with_suffix(".json").write_text("{}"),
        lambda ids: ids.with_suffix(".json").write_text('{"characters": 3, "length": [], "ids_sha256": null}'),
        lambda ids: ids.with_suffix(".json").write_text("[" * 100_000),
        lambda ids: ids.with_suffix(".json").write_text(ids.with_suffix(".json").read_text().replace("abc", "ab")),
        lambda ids: ids.with_suffix(".json").write_text(ids.with_suffix(".json").read_text().replace("abc", "abb")),
        lambda ids: flip(ids.with_suffix(".json"), ids.with_suffix(".json").read_bytes().index(b"abc") + 2),
        lambda ids: change_description(ids, characters="cba"),
        lambda ids: change_description(ids, characters=""),
    ],
)
def test_map_characters_replaces_a_damaged_cache(cached, damage):
    path, folder, ids_path = cached
    damage(ids_path)
    assert token_cache.read_entry(ids_path) is None
    ids, vocabulary = map_characters(path, folder)
    assert vocabulary.characters == "abc"
    np.testing.assert_array_equal(ids, np.arange(3000) % 3)
    assert token_cache.read_entry(ids_path) is not None


def test_map_characters_reads_an_undamaged_cache_only(cached, monkeypatch):
    path, folder, _ = cached
    monkeypatch.setattr(token_cache, "_encode_file", None)
    np.testing.assert_array_equal(map_characters(path, folder)[0], np.arange(3000) % 3)


@pytest.mark.parametrize("later", ["abd" * 1000, "cba" * 1000, "abc" * 1001])
@pytest.mark.parametrize("reads", [0, 1])
def test_map_characters_refuses_a_text_that_changes_while_it_is_read(tmp_path, monkeypatch, later, reads):
    path, read_pieces = tmp_path / "text.txt", token_cache._read_pieces
    path.write_text("abc" * 1000)
    calls = []

    def change_and_read(*arguments):
        if len(calls) == reads:
            path.write_text(later)
        calls.append(arguments)
        return read_pieces(*arguments)

    monkeypatch.setattr(token_cache, "_read_pieces", change_and_read)
    with pytest.raises(DataError, match=r"text\.txt changed while it was read"):
        map_characters(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.ids"))


@pytest.mark.parametrize(
    ("text", "failing"), [("abc" * 100_000, "ids"), ("".join(map(chr, range(0x4E00, 0x4E00 + 3500))), "json")]
)
def test_map_characters_on_a_full_disk_is_one_line_and_leaves_no_files(tmp_path, text, failing):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a write past it fails, as on a full disk
    try:
        with pytest.raises(DataError, match=rf"cannot write .*\.{failing}: File too large"):
            map_characters(path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]
    ids, vocabulary = map_characters(path, tmp_path / "cache")
    assert vocabulary.decode(ids) == text


def test_map_characters_is_built_once_while_others_wait(tmp_path, monkeypatch):
    path, builds, encode_file = tmp_path / "text.txt", [], token_cache._encode_file
    path.write_text("abc" * 1000)

    def encode_slowly(*arguments):
        builds.append(arguments)
        time.sleep(0.1)
        return encode_file(*arguments)

    monkeypatch.setattr(token_cache, "_encode_file", encode_slowly)
    with ThreadPoolExecutor(4) as pool:  # each thread opens the lock itself, as a process does
        found = [pool.submit(map_characters, path, tmp_path / "cache") for _ in range(4)]
        assert all(len(future.result()[0]) == 3000 for future in found)
    assert len(builds) == 1


def encode_in_process(path, folder, start, results):
    builds, encode_file = [], token_cache._encode_file
    token_cache._encode_file = lambda *arguments: builds.append(1) or encode_file(*arguments)
    start.wait()
    ids, _ = map_characters(path, folder)
    results.put((len(builds), int(np.asarray(ids).sum())))


@pytest.mark.slow
def test_map_characters_is_built_by_one_of_several_processes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 300_000)
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    arguments = (path, tmp_path / "cache", start, results)
    processes = [context.Process(target=encode_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(0, 900_000), (0, 900_000), (1, 900_000)]
