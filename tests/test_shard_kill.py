"""Killed anywhere, or out of disk: the next run ends the same, and nothing half written shows."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.shard_ray import _result, load_ray, progress_path
from anycontrast_datasets.shard_receipt import read_receipt, settle
from anycontrast_datasets.shard_task import ShardTask, build_shard
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import ShardError

PREPARE = PrepareConfig(spacing_mm=(10.0, 10.0, 10.0), box_multiple_vox=8)
CONFIG = ShardConfig(studies_per_shard=2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of 5 and of 11 phantom studies, shards of the 5, and of the 11 after those."""
    folder = tmp_path_factory.mktemp("kill")
    for num_studies in (5, 11):
        scan = ScanConfig(
            source="phantom",
            dataset="phantom",
            root=str(folder / f"source-{num_studies}"),
            check_pictures=False,
            phantom=PhantomConfig(num_studies=num_studies, spacing_mm=(10.0, 10.0, 10.0)),
        )
        run_scan(scan, folder / f"manifest-{num_studies}")
    run_shard(folder / "manifest-5", folder / "shards-5", PREPARE, CONFIG)
    shutil.copytree(folder / "shards-5", folder / "shards-11")
    run_shard(folder / "manifest-11", folder / "shards-11", PREPARE, CONFIG)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "sharding.json"
    }


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import ShardError

home, out, num_kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
prepare = PrepareConfig(spacing_mm=(10.0, 10.0, 10.0), box_multiple_vox=8)

def run(folder, kill_after_s=None):
    start_s = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            run_shard(home / "manifest-11", folder, prepare, ShardConfig(studies_per_shard=2))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, time.perf_counter() - start_s

code, duration_s = run(out / "timed")
assert code == 0
random.seed(7)
num_killed = 0
for number in range(num_kills):
    folder = out / f"killed-{number}"
    shutil.copytree(home / "shards-5", folder)
    code, _ = run(folder, random.uniform(0, duration_s))
    num_killed += code == -signal.SIGKILL
    try:
        assert len(open_store(folder).records) in (5, 11)
    except ShardError:
        assert not (folder / "dataset.json").exists() or code != 0
    assert run(folder)[0] == 0
print(num_killed)
"""


@pytest.mark.parametrize(
    "num_kills", [8, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_an_append_killed_at_random_moments_ends_the_same(
    pristine: Path, tmp_path: Path, num_kills: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(pristine), str(tmp_path), str(num_kills)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= num_kills // 4, "hardly any run was killed before its end"
    expected = content(pristine / "shards-11")
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) == num_kills
    for folder in killed:
        assert content(folder) == expected, folder.name


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_data_set(
    pristine: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(pristine / "shards-5", tmp_path / "shards"))
    old = content(out)
    largest = max(path.stat().st_size for path in (pristine / "shards-11").iterdir())
    for number in range(10):
        limit = 300 + number * largest // 10
        with pytest.raises(ShardError) as caught, largest_file(limit):
            run_shard(pristine / "manifest-11", out, PREPARE, CONFIG)
        assert caught.value.code == "disk_full"
        assert str(out) in str(caught.value)
        assert "more bytes" in str(caught.value) and "free" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not [path for path in out.iterdir() if ".tmp" in path.name]
        assert len(open_store(out).records) == 5
        kept = content(out)
        assert {name: kept[name] for name in old if name != "layout.json"} == {
            name: sha256 for name, sha256 in old.items() if name != "layout.json"
        }
    run_shard(pristine / "manifest-11", out, PREPARE, CONFIG)
    assert content(out) == content(pristine / "shards-11")


def test_a_kill_between_tar_and_receipt_is_settled(pristine: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(pristine / "shards-5", tmp_path / "shards"))
    tar, receipt = out / "shard-000000.tar", out / "shard-000000.json"
    pending = out / "shard-000000.json.next"
    whole = receipt.read_bytes()
    # The new tar is in place, its receipt is not: the pair is completed.
    receipt.rename(pending)
    settle(tar)
    assert receipt.read_bytes() == whole and not pending.exists()
    # The new receipt is there, its tar is not: the old pair stays.
    pending.write_bytes((out / "shard-000001.json").read_bytes())
    settle(tar)
    assert receipt.read_bytes() == whole and not pending.exists()
    assert read_receipt(tar) is not None


def task_of(pristine: Path, out: Path, **changes: object) -> ShardTask:
    studies = tuple(read_manifest(pristine / "manifest-5" / "manifest.parquet")[:2])
    files = pristine / "source-5"
    task = ShardTask(
        path=out / "shard-000000.tar",
        studies=studies,
        keys={study.study_id: "key" for study in studies},
        locations={
            study.study_id: {
                v.contrast: next(p for p in files.rglob("*.nii.gz") if _is_file_of(p, v.sha256))
                for v in study.volumes
            }
            for study in studies
        },
        prepare=PREPARE,
        codec="zstd",
        level=5,
    )
    return replace(task, **changes)  # type: ignore[arg-type]


def _is_file_of(path: Path, sha256: str) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_a_study_that_workers_die_over_is_refused_and_not_tried_again(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = load_ray()
    task = task_of(pristine, tmp_path)
    task = replace(task, studies=tuple(replace(s, label=None) for s in task.studies))
    progress_path(task.path).write_bytes(b".")

    def crashed(reference: object) -> object:
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "get", crashed)
    retried = _result(None, task)
    assert isinstance(retried, ShardTask) and retried.lost == (task.studies[1].study_id,)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        _result(None, retried)
    receipt = build_shard(retried)
    assert [r.code for r in receipt.refused] == ["worker_lost"]
    assert len(receipt.rows_by_study()) == 1
    assert build_shard(task).is_reused


@pytest.mark.cluster
def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(
    pristine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    shutil.copytree(pristine / "shards-5", out)
    killed: list[int] = []
    steps: list[int] = []

    def kill_one(done: int, total: int) -> None:
        steps.append(done)
        for path in out.glob("*.tar.tmp-*"):
            if not killed:
                killed.append(int(path.name.rpartition("-")[2]))
                os.kill(killed[0], signal.SIGKILL)

    config = replace(CONFIG, num_workers=2)
    summary = run_shard(pristine / "manifest-11", out, PREPARE, config, on_progress=kill_one)
    assert summary.num_sharded == 11 and steps[-1] == 11
    assert content(out) == content(pristine / "shards-11")
    assert not read_ledger(out / "rejects.csv")
