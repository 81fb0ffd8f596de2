"""The cache of a node: fetched once, kept under its limit, and never the reason for a loss."""

import errno
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store import cache as cache_module
from anycontrast_datasets.store.cache import FOLDER, MARK, CacheConfig, CachedSource
from anycontrast_datasets.store.volume_store import VolumeStore
from anycontrast_datasets.study import ShardError, StudyArrays

HASH = "ab" * 32
UNIT = 1000


class CountingSource:
    """A file of known bytes that writes down, in a file, every range it is asked for."""

    shown = "origin"
    is_local = False
    tries = 2

    def __init__(self, log: Path, delay_s: float = 0.0) -> None:
        self.log = log
        self.delay_s = delay_s

    def read(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        unit: tuple[int, int] | None = None,
        again: bool = False,
    ) -> memoryview:
        with self.log.open("a") as file:
            file.write(f"{start} {stop}\n")
        time.sleep(self.delay_s)
        return memoryview(content_of(start, stop))

    def read_all(self, name: str, max_bytes: int) -> bytes:
        raise FileNotFoundError(name)

    def size(self, name: str) -> int:
        raise FileNotFoundError(name)

    def close(self) -> None:
        pass

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def content_of(start: int, stop: int) -> bytes:
    return np.arange(start, stop, dtype=np.uint32).astype(np.uint8).tobytes()


def make_cache(tmp_path: Path, max_bytes: int = 10 * UNIT, delay_s: float = 0.0) -> CachedSource:
    config = CacheConfig(folder=str(tmp_path / "node"), max_bytes=max_bytes)
    return CachedSource(CountingSource(tmp_path / "log", delay_s), config, {"a.tar": HASH}, UNIT)


def origin(cached: CachedSource) -> CountingSource:
    source = cached._source
    assert isinstance(source, CountingSource)
    return source


def read_unit(cached: CachedSource, number: int, **options: Any) -> bool:
    """Read the middle of a unit; say whether the bytes are right."""
    first = number * UNIT
    unit = (first, first + UNIT)
    part = cached.read("a.tar", first + 100, first + 900, unit=unit, **options)
    return bytes(part) == content_of(first + 100, first + 900)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "node" / FOLDER).glob("*/*.bytes"))


def test_a_unit_is_fetched_whole_and_once(tmp_path: Path) -> None:
    cached = make_cache(tmp_path)
    assert all(read_unit(cached, n) for n in (3, 4, 3, 3))
    assert bytes(cached.read("a.tar", 3999, 4000, unit=(3000, 4000))) == content_of(3999, 4000)
    assert origin(cached).asked == ["3000 4000", "4000 5000"]
    assert [p.stat().st_size for p in entries(tmp_path)] == [UNIT, UNIT]
    assert read_unit(make_cache(tmp_path), 4)
    assert len(origin(cached).asked) == 2


def test_files_without_a_known_hash_are_read_through(tmp_path: Path) -> None:
    cached = make_cache(tmp_path)
    for _ in range(2):
        cached.read("b.tar", 0, 10)
    assert origin(cached).asked == ["0 10"] * 2
    assert entries(tmp_path) == []


def test_the_least_recently_used_go_first_and_the_limit_holds(tmp_path: Path) -> None:
    cached = make_cache(tmp_path, max_bytes=5 * UNIT)
    for number in range(5):
        read_unit(cached, number)
    for path in entries(tmp_path):
        os.utime(path, (1, 1 + int(path.stem.split("-")[1], 16)))
    read_unit(cached, 0)  # used again, so that 1 and 2 are the oldest
    for number in range(5, 30):
        assert read_unit(cached, number)
        assert sum(p.stat().st_size for p in entries(tmp_path)) <= 5 * UNIT
        if number == 5:
            kept = {int(p.stem.split("-")[1], 16) // UNIT for p in entries(tmp_path)}
            assert {0, 5} <= kept and 1 not in kept


def test_nothing_is_evicted_that_the_cache_did_not_write(tmp_path: Path) -> None:
    cached = make_cache(tmp_path, max_bytes=2 * UNIT)
    root = tmp_path / "node" / FOLDER
    strangers = [root / "notes.txt", root / "ab" / "photo.jpg", root / "zz" / "x", root / ".tmp-1"]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / f"{'cd' * 20}-0-3e8.bytes"
    precious.write_bytes(bytes(UNIT))
    (root / "cd").symlink_to(outside)
    for number in range(12):
        read_unit(cached, number)
    assert all(path.read_bytes() == b"mine" for path in strangers)
    assert precious.exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "node" / FOLDER
    root.mkdir(parents=True)
    (root / "thesis.tex").write_text("x")
    with pytest.raises(ShardError, match="not the mark of a cache"):
        make_cache(tmp_path)
    (root / MARK).touch()
    make_cache(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "node").write_text("a file")
    with pytest.raises(ShardError, match=r"cache\.folder: cannot use .*null"):
        make_cache(tmp_path)


def test_a_limit_below_one_study_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"cache\.max_bytes=999 is below the 1000 bytes"):
        make_cache(tmp_path, max_bytes=999)
    with pytest.raises(ValueError, match=r"cache\.max_bytes must be >= 1"):
        CacheConfig(max_bytes=0)
    with pytest.raises(ValueError, match=r"cache\.folder"):
        CacheConfig(folder=" ")


def test_an_entry_that_proved_wrong_is_replaced(tmp_path: Path) -> None:
    cached = make_cache(tmp_path)
    read_unit(cached, 1)
    path = entries(tmp_path)[0]
    path.write_bytes(bytes(UNIT))
    assert not read_unit(cached, 1)
    assert read_unit(cached, 1, again=True)
    assert read_unit(cached, 1)
    path.write_bytes(b"torn")
    assert read_unit(cached, 1)
    assert len(origin(cached).asked) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_costs_a_warning_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    cached = make_cache(tmp_path)
    read_unit(cached, 0)
    written = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        written(self, content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", half)
    with caplog.at_level(logging.WARNING):
        assert all(read_unit(cached, n) for n in (1, 2, 1, 0))
    assert len(caplog.records) == 1 and "reading past the cache" in caplog.text
    assert len(entries(tmp_path)) == 1
    assert not list((tmp_path / "node" / FOLDER).glob(".tmp-*"))
    monkeypatch.undo()
    monkeypatch.setattr(cached, "_paused_until", 0.0)
    assert read_unit(cached, 1) and len(entries(tmp_path)) == 2


def test_what_a_killed_process_left_is_removed_and_never_seen(tmp_path: Path) -> None:
    cached = make_cache(tmp_path, max_bytes=3 * UNIT)
    root = tmp_path / "node" / FOLDER
    old, new = (root / f".tmp-{HASH[:40]}-{n:x}-{n + UNIT:x}-77-{n}" for n in (0, 5000))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    for number in range(8):
        assert read_unit(cached, number)
        # What is being written counts at the size it will have.
        assert sum(p.stat().st_size for p in entries(tmp_path)) <= 3 * UNIT
    assert not old.exists() and new.exists()
    make_cache(tmp_path, max_bytes=3 * UNIT)
    used = int((root / "usage").read_text())
    assert used == UNIT + sum(p.stat().st_size for p in entries(tmp_path))


def work(folder: Path, max_bytes: int, seed: int, queue: Any) -> None:
    cached = make_cache(folder, max_bytes=max_bytes, delay_s=0.005)
    numbers = np.random.default_rng(seed).permutation(np.repeat(np.arange(8), 4))
    queue.put(all(read_unit(cached, int(n)) for n in numbers))


@pytest.mark.parametrize(("max_units", "most"), [(8, 8), (3, None)])
def test_four_processes_share_a_cache(tmp_path: Path, max_units: int, most: int | None) -> None:
    """With room for all each unit is fetched once; without, the limit holds all the same."""
    context = multiprocessing.get_context("fork")  # quick, and safe: they only use files
    queue = context.Queue()
    processes = [
        context.Process(target=work, args=(tmp_path, max_units * UNIT, seed, queue))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        sizes = []
        for path in entries(tmp_path):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        assert all(size == UNIT for size in sizes)
        largest = max(largest, sum(sizes))
        time.sleep(0.002)
    assert [queue.get(timeout=10) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
        process.close()
    assert largest <= max_units * UNIT
    asked = CountingSource(tmp_path / "log").asked
    assert len(asked) == most if most else len(asked) > 8
    used = int((tmp_path / "node" / FOLDER / "usage").read_text())
    assert used == sum(p.stat().st_size for p in entries(tmp_path))
    queue.close()


def read_for_ever(folder: Path) -> None:
    cached = make_cache(folder, max_bytes=4 * UNIT)
    for number in itertools.cycle(range(9)):
        read_unit(cached, number)


def test_a_kill_leaves_no_torn_entry_and_no_lock(tmp_path: Path) -> None:
    for number in range(6):
        process = multiprocessing.get_context("fork").Process(
            target=read_for_ever, args=(tmp_path,)
        )
        process.start()
        time.sleep(0.03 + 0.01 * number)
        process.kill()
        process.join()
        process.close()
        for path in entries(tmp_path):
            first = int(path.stem.split("-")[1], 16)
            assert path.read_bytes() == content_of(first, first + UNIT)
    cached = make_cache(tmp_path, max_bytes=4 * UNIT)
    assert all(read_unit(cached, number) for number in range(9))
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= 4 * UNIT


def test_a_reader_keeps_what_it_opened_when_it_is_evicted(tmp_path: Path) -> None:
    cached = make_cache(tmp_path)
    read_unit(cached, 0)
    path = entries(tmp_path)[0]
    with path.open("rb") as file:
        path.unlink()
        assert file.read() == content_of(0, UNIT)
    assert read_unit(cached, 0)
    assert len(origin(cached).asked) == 2


def test_a_store_reads_through_its_cache_and_asks_again_for_damaged_entries(
    tmp_path: Path, study_of: Callable[..., StudyArrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {
        name: np.random.default_rng(n).integers(0, 4000, size=(8, 16, 8)).astype(np.int16)
        for n, name in enumerate(("T1w", "FLAIR"))
    }
    write_arrays(tmp_path / "shards", [[study_of(codes, "case-0")]])
    config = CacheConfig(folder=str(tmp_path / "node"))
    store = VolumeStore(tmp_path / "shards", cache=config)
    assert store.read(0, contrasts=["FLAIR"]).codes["FLAIR"].shape == (8, 16, 8)
    (path,) = entries(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    for name, stored in store.read(0).codes.items():
        np.testing.assert_array_equal(stored, codes[name])
    assert path.read_bytes() != damaged
    monkeypatch.setattr(cache_module, "_read_entry", lambda *args: pytest.fail("not from here"))
    assert store.verify() == []
