"""Writing the Zarr store: whole or not at all, the same bytes whatever happened before."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.store.zarr_config import ZarrConfig
from anycontrast_datasets.store.zarr_writer import write_zarr_store
from anycontrast_datasets.study import ShardError, StudyArrays

SHAPE = (16, 24, 16)
CONFIG = ZarrConfig(chunk_vox=16)


@pytest.fixture
def made(study_of: Callable[..., StudyArrays]) -> Callable[..., StudyArrays]:
    def make(number: int, contrasts: tuple[str, ...] = ("T1w", "FLAIR")) -> StudyArrays:
        rng = np.random.default_rng(number)
        codes = {n: rng.integers(0, 4096, SHAPE).astype(np.int16) for n in contrasts}
        return study_of(codes, f"case-{number}")

    return make


@pytest.fixture
def source(made: Callable[..., StudyArrays], tmp_path: Path) -> StudyStore:
    write_arrays(tmp_path / "shards", [[made(n) for n in range(4)]])
    return open_store(tmp_path / "shards")


class FailingStore:
    """A store whose study 2 cannot be read."""

    def __init__(self, store: StudyStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, index: int, **options: Any) -> StudyArrays:
        if index == 2:
            raise ShardError("shard x, study case-2: damaged")
        return self._store.read(index, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_rerun_and_threads_leave_the_same_bytes(source: StudyStore, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    first = write_zarr_store(
        source, tmp_path / "a", CONFIG, on_progress=lambda d, n: progress.append((d, n))
    )
    assert first["num_studies"] == 4 and first["num_reused"] == 0
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before, inode = tree(tmp_path / "a"), (tmp_path / "a" / "dataset.json").stat().st_ino
    again = write_zarr_store(source, tmp_path / "a", CONFIG)
    assert again == {**first, "num_reused": 4}
    assert tree(tmp_path / "a") == before
    assert (tmp_path / "a" / "dataset.json").stat().st_ino == inode, "nothing to do, not touched"
    write_zarr_store(source, tmp_path / "b", replace(CONFIG, num_threads=4))
    assert tree(tmp_path / "b") == before
    assert json.loads(before["dataset.json"])["fingerprint"] == source.fingerprint
    assert str(tmp_path).encode() not in b"".join(before.values()), "no path of this machine"


def test_study_that_cannot_be_read_stops_it_and_a_rerun_goes_on(
    source: StudyStore, tmp_path: Path
) -> None:
    failing: Any = FailingStore(source)
    one_thread = replace(CONFIG, num_threads=1)
    with pytest.raises(ShardError, match="case-2: damaged"):
        write_zarr_store(failing, tmp_path / "a", one_thread)
    assert not (tmp_path / "a" / "dataset.json").exists()
    with pytest.raises(ShardError, match=r"dataset\.json"):
        open_store(tmp_path / "a")
    assert write_zarr_store(source, tmp_path / "a", CONFIG)["num_reused"] >= 2
    write_zarr_store(source, tmp_path / "b", CONFIG)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_killed_while_writing_ends_the_same(source: StudyStore, tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from anycontrast_datasets.store import zarr_writer
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.store.zarr_config import ZarrConfig
calls = 0
def killing(path, content):
    global calls
    calls += 1
    if calls == 4:  # root, receipt, receipt, then mid-way: renamed, but without its receipt
        os.kill(os.getpid(), signal.SIGKILL)
    checked(path, content)
checked, zarr_writer.write_checked = zarr_writer.write_checked, killing
config = ZarrConfig(chunk_vox=16, num_threads=1)
zarr_writer.write_zarr_store(open_store(Path(sys.argv[1])), Path(sys.argv[2]), config)
"""
    roots = os.pathsep.join(str(Path(__file__).parents[1] / n) for n in ("datasets", "platform"))
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "shards"), str(tmp_path / "a")],
        env={**os.environ, "PYTHONPATH": roots},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    (tmp_path / "a" / ".partial" / "case-3").mkdir()
    assert write_zarr_store(source, tmp_path / "a", CONFIG)["num_reused"] == 2
    write_zarr_store(source, tmp_path / "b", CONFIG)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_damaged_file_is_written_again(source: StudyStore, tmp_path: Path) -> None:
    write_zarr_store(source, tmp_path / "a", CONFIG)
    before = tree(tmp_path / "a")
    hierarchy = tmp_path / "a" / "studies.zarr"
    shard = hierarchy / "case-0" / "T1w" / "0" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (hierarchy / "case-1" / "FLAIR" / "zarr.json").unlink()
    (hierarchy / "case-2" / "stray").write_text("x")
    (tmp_path / "a" / "receipts" / "case-3.json").write_text("{")
    assert write_zarr_store(source, tmp_path / "a", CONFIG)["num_reused"] == 0
    assert tree(tmp_path / "a") == before


def test_appended_and_withdrawn_studies(
    source: StudyStore, made: Callable[..., StudyArrays], tmp_path: Path
) -> None:
    write_zarr_store(source, tmp_path / "a", CONFIG)
    write_arrays(tmp_path / "other", [[made(n) for n in (0, 2, 3, 5)]])
    other = open_store(tmp_path / "other")
    done = write_zarr_store(other, tmp_path / "a", CONFIG)
    assert (done["num_studies"], done["num_reused"]) == (4, 3)
    store = open_store(tmp_path / "a")
    assert [r.study_id for r in store.records] == ["case-0", "case-2", "case-3", "case-5"]
    assert store.fingerprint == other.fingerprint and store.verify() == []
    everything = b"".join(tree(tmp_path / "a").values())
    assert b"case-1" not in everything, "nothing of a withdrawn study is left"
    assert not list((tmp_path / "a").rglob("*case-1*"))


def test_another_layout_or_content_is_written_anew(
    source: StudyStore, made: Callable[..., StudyArrays], tmp_path: Path
) -> None:
    write_zarr_store(source, tmp_path / "a", CONFIG)
    assert write_zarr_store(source, tmp_path / "a", ZarrConfig())["num_reused"] == 0
    studies = [made(n) for n in range(4)]
    studies[1].codes["T1w"][0, 0, 0] += 1
    write_arrays(tmp_path / "other", [studies])
    done = write_zarr_store(open_store(tmp_path / "other"), tmp_path / "a", ZarrConfig())
    assert done["num_reused"] == 3


def test_second_writer_is_refused(source: StudyStore, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match="another process"):
            write_zarr_store(source, tmp_path / "a", CONFIG)


def test_what_is_not_ours_is_left_alone(source: StudyStore, tmp_path: Path) -> None:
    stray = tmp_path / "a" / "studies.zarr" / "Thesis"
    stray.mkdir(parents=True)
    with pytest.raises(ShardError, match="Thesis is not a study"):
        write_zarr_store(source, tmp_path / "a", CONFIG)
    assert stray.is_dir()


@pytest.mark.parametrize(
    ("codes", "label", "message"),
    [
        (np.full(SHAPE, -1, dtype=np.int16), None, "never negative"),
        (np.ones(SHAPE, dtype=np.int16), np.full(SHAPE, 9, dtype=np.uint8), "does not list"),
    ],
)
def test_voxels_that_cannot_be_told_from_fill_are_refused(
    study_of: Callable[..., StudyArrays], tmp_path: Path, codes: Any, label: Any, message: str
) -> None:
    write_arrays(tmp_path / "bad", [[study_of({"T1w": codes}, "case-0", label=label)]])
    with pytest.raises(ShardError, match=message):
        write_zarr_store(open_store(tmp_path / "bad"), tmp_path / "a", CONFIG)


@pytest.mark.parametrize(
    "options",
    [{"chunk_vox": 4}, {"chunk_vox": -1}, {"num_levels": 0}, {"level": 10}, {"num_threads": 0}],
)
def test_impossible_configuration_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"zarr\.{next(iter(options))}"):
        ZarrConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codec"):
        ZarrConfig(codec="gzip")  # type: ignore[arg-type]
