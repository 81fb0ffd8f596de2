"""Sharding: same bytes whatever happened before, nothing lost, refusals counted."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import (
    manifest_fingerprint,
    read_locations,
    read_manifest,
    write_locations,
    write_manifest,
)
from anycontrast_datasets.prepare import PrepareConfig, prepare_study
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import (
    Affine,
    Label,
    ManifestError,
    ShardError,
    Study,
    StudyArrays,
    Volume,
)
from anycontrast_datasets.volume import write_volume

CONTRASTS = (("T1w", "FLAIR"), ("T1w",), ("T2w", "ADC", "FLAIR"), ("T1wCE", "T2starw"), ("FLAIR",))
PREPARE = PrepareConfig(spacing_mm=(2.0, 2.0, 2.0), box_multiple_vox=8)
CONFIG = ShardConfig(studies_per_shard=2)
MEMBER_NAME = re.compile(r"[a-z0-9_-]+\.([a-z0-9]+\.(i16b2|u8b2)|study\.json)")


def volume_file(
    path: Path, seed: int, spacing: tuple[float, float, float]
) -> tuple[tuple[int, int, int], Affine]:
    rng = np.random.default_rng(seed)
    shape = (20, 22, 24)
    ijk = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    ball = (ijk**2).sum(0) < 0.8
    matrix = np.diag([*spacing, 1.0])
    write_volume(path, (ball * rng.normal(300, 30, size=shape)).astype(np.float32), matrix)
    return shape, tuple(map(tuple, matrix.tolist()))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five studies as files, with a manifest; the third has a label."""
    files, studies = {}, []
    for number, names in enumerate(CONTRASTS):
        study_id, volumes, label = f"case-{number}", [], None
        for place, name in enumerate(names):
            path = tmp_path / f"{study_id}_{name}.nii"
            spacing = (2.0, 2.0, 2.0 + place)
            shape, matrix = volume_file(path, 10 * number + place, spacing)
            files[study_id, name] = path
            volumes.append(
                Volume(
                    contrast=name,
                    location=path.name,
                    shape=shape,
                    spacing_mm=spacing,
                    affine=matrix,
                    sha256=sha256_file(path),
                )
            )
        if number == 2:
            files[study_id, "label"] = tmp_path / f"{study_id}_label.nii"
            values = np.zeros((20, 22, 24), np.uint8)
            values[8:12, 8:12, 8:12] = 3
            write_volume(files[study_id, "label"], values, np.diag([2.0, 2.0, 2.0, 1.0]))
            label = Label(location="", shape=values.shape, affine=volumes[0].affine, grid_of="T2w")
        studies.append(
            Study(
                study_id=study_id,
                dataset="made",
                subject_id=study_id,
                session_id="1",
                split="train",
                volumes=tuple(volumes),
                label=label,
            )
        )
    return write(tmp_path, studies, files)


def write(tmp_path: Path, studies: list[Study], files: dict[tuple[str, str], Path]) -> Path:
    folder = tmp_path / "manifest"
    (folder / "private").mkdir(parents=True, exist_ok=True)
    write_manifest(studies, folder / "manifest.parquet")
    fingerprint = manifest_fingerprint(folder / "manifest.parquet")
    write_locations(files, folder, fingerprint=fingerprint)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Hash every file but the one that says what the work cost."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).iterdir())
        if path.name != "sharding.json"
    }


def test_two_runs_give_the_same_bytes(manifest: Path, tmp_path: Path) -> None:
    first = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    second = run_shard(manifest, tmp_path / "b", PREPARE, CONFIG)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert first == second
    cost = json.loads((tmp_path / "a" / "sharding.json").read_text())
    assert cost["studies"] == 5 and cost["cpu_s_per_study"] > 0 and cost["wall_s_per_study"] > 0
    assert (first.num_studies, first.num_sharded, first.num_refused) == (5, 5, 0)
    assert (first.num_shards, first.num_reused) == (3, 0)


def test_rerun_keeps_every_shard(manifest: Path, tmp_path: Path) -> None:
    run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    before = content(tmp_path / "a")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("shard-*")}
    summary = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    assert summary.num_reused == 3
    assert content(tmp_path / "a") == before
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("shard-*")}


def remove_receipt(out: Path) -> None:
    (out / "shard-000001.json").unlink()


def remove_tar(out: Path) -> None:
    (out / "shard-000000.tar").unlink()


def flip_bit(out: Path) -> None:
    path = out / "shard-000001.tar"
    damaged = bytearray(path.read_bytes())
    damaged[700] ^= 1
    path.write_bytes(damaged)


def cut_tar(out: Path) -> None:
    path = out / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:1000])


def leave_temporaries(out: Path) -> None:
    (out / "dataset.json").unlink()
    (out / "shard-000002.json").unlink()
    (out / "shard-000002.tar").rename(out / "shard-000002.tar.tmp-99999")
    (out / ".shard-000002.json.tmp-99999").write_text("{")


def damage_receipt(out: Path) -> None:
    (out / "shard-000000.json").write_text('{"schema_version": 1}')


def remove_dataset(out: Path) -> None:
    (out / "dataset.json").unlink()
    (out / "index.parquet").unlink()


def add_stale_shard(out: Path) -> None:
    (out / "shard-000007.tar").write_bytes(b"x")


@pytest.mark.parametrize(
    "damage",
    [
        remove_receipt,
        remove_tar,
        flip_bit,
        cut_tar,
        leave_temporaries,
        damage_receipt,
        remove_dataset,
        add_stale_shard,
    ],
)
def test_rerun_mends_what_an_accident_left(
    manifest: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "a"
    run_shard(manifest, out, PREPARE, CONFIG)
    before = content(out)
    damage(out)
    assert run_shard(manifest, out, PREPARE, CONFIG).num_sharded == 5
    assert content(out) == before
    assert open_store(out).verify() == []


def test_studies_and_members_are_where_webdataset_and_tar_expect_them(
    manifest: Path, tmp_path: Path
) -> None:
    run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    names, keys = [], []
    for path in sorted((tmp_path / "a").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert re.fullmatch(
                    r"[a-z0-9_-]+\.[a-z0-9]+\.(i16b2|u8b2)|[a-z0-9_-]+\.study\.json", member.name
                )
                names.append(member.name)
                keys.append(member.name.split(".")[0])
    assert len(names) == len(set(names)) == sum(map(len, CONTRASTS)) + 1 + len(CONTRASTS)
    assert [k for n, k in enumerate(keys) if n == 0 or keys[n - 1] != k] == list(
        dict.fromkeys(keys)
    )
    assert [n for n in names if n.startswith("case-2.")] == [
        "case-2.t2w.i16b2",
        "case-2.adc.i16b2",
        "case-2.flair.i16b2",
        "case-2.label.u8b2",
        "case-2.study.json",
    ]


def test_records_are_in_manifest_order_whatever_the_layout(manifest: Path, tmp_path: Path) -> None:
    orders = []
    for size in (1, 2, 5):
        run_shard(manifest, tmp_path / str(size), PREPARE, ShardConfig(studies_per_shard=size))
        orders.append([r.study_id for r in open_store(tmp_path / str(size)).records])
    assert orders == [[f"case-{n}" for n in range(5)]] * 3


def test_a_bad_study_is_refused_counted_and_named(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "case-1_T1w.nii").write_bytes(b"no volume")
    summary = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    assert (summary.num_studies, summary.num_sharded, summary.num_refused) == (5, 4, 1)
    rejects = read_ledger(tmp_path / "a" / "rejects.csv")
    assert [r.study_id for r in rejects] == ["case-1"] and rejects[0].reason
    assert "case-1" not in [r.study_id for r in open_store(tmp_path / "a").records]
    dataset = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert dataset["refused"] == [{"study_id": "case-1", "code": rejects[0].code}]
    assert dataset["counts"]["refused_by_code"] == {rejects[0].code: 1}


def test_an_id_that_cannot_be_a_member_name_is_refused(manifest: Path, tmp_path: Path) -> None:
    long = "x" * 200
    locations = read_locations(manifest)
    studies = read_manifest(manifest / "manifest.parquet")
    renamed = [replace(studies[0], study_id=long), *studies[1:]]
    files = {(long if i == studies[0].study_id else i, n): p for (i, n), p in locations.items()}
    write(tmp_path, renamed, files)
    summary = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    assert summary.refused_by_code == {"bad_study_id": 1} and summary.num_sharded == 4


def test_no_path_of_a_source_is_in_any_output(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "case-1_T1w.nii").write_bytes(b"no volume")
    run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    for path in (tmp_path / "a").iterdir():
        assert b".nii" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


def test_a_study_that_was_mended_enters_at_the_next_run(manifest: Path, tmp_path: Path) -> None:
    run_shard(manifest, tmp_path / "whole", PREPARE, CONFIG)
    path = tmp_path / "case-1_T1w.nii"
    good = path.read_bytes()
    path.unlink()
    assert run_shard(manifest, tmp_path / "a", PREPARE, CONFIG).num_refused == 1
    again = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    assert (again.num_refused, again.num_reused) == (1, again.num_shards)
    path.write_bytes(good)
    mended = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    assert (mended.num_refused, mended.num_reused) == (0, 2)
    assert content(tmp_path / "a") == content(tmp_path / "whole")


def test_shard_whose_every_study_is_refused_is_left_out(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "case-1_T1w.nii").unlink()
    summary = run_shard(manifest, tmp_path / "a", PREPARE, ShardConfig(studies_per_shard=1))
    assert (summary.num_shards, len(list((tmp_path / "a").glob("*.tar")))) == (4, 4)
    assert len(open_store(tmp_path / "a").records) == 4


def test_nothing_left_is_an_error_after_the_reasons_are_written(
    manifest: Path, tmp_path: Path
) -> None:
    run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    for path in tmp_path.glob("*.nii"):
        path.unlink()
    other = PrepareConfig(spacing_mm=None, box_multiple_vox=8)
    with pytest.raises(ShardError, match="refused all 5"):
        run_shard(manifest, tmp_path / "a", other, CONFIG)
    assert len(read_ledger(tmp_path / "a" / "rejects.csv")) == 5
    with pytest.raises(ShardError, match=r"dataset\.json"):
        open_store(tmp_path / "a")


def test_another_config_makes_other_shards_and_removes_the_old(
    manifest: Path, tmp_path: Path
) -> None:
    first = run_shard(manifest, tmp_path / "a", PREPARE, ShardConfig(studies_per_shard=1))
    second = run_shard(manifest, tmp_path / "a", replace(PREPARE, box_multiple_vox=16), CONFIG)
    assert second.num_reused == 0 and second.fingerprint != first.fingerprint
    assert len(list((tmp_path / "a").glob("*.tar"))) == 3
    assert open_store(tmp_path / "a").verify() == []


def test_data_set_is_withdrawn_while_its_shards_change(manifest: Path, tmp_path: Path) -> None:
    run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total, (tmp_path / "a" / "dataset.json").is_file()))

    run_shard(
        manifest,
        tmp_path / "a",
        replace(PREPARE, box_multiple_vox=16),
        CONFIG,
        on_progress=progress,
    )
    assert [s[:2] for s in seen] == [(n, 5) for n in range(1, 6)]
    assert seen[-1][2] is False


def test_second_writer_is_refused(manifest: Path, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        with pytest.raises(ShardError, match="another process"):
            run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)

    run_shard(manifest, tmp_path / "a", PREPARE, CONFIG, on_progress=progress)


def test_a_folder_that_cannot_be_one_is_a_clear_error(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ShardError, match="must be a folder that can be written to"):
            run_shard(manifest, place, PREPARE, CONFIG)


def test_missing_manifest_is_a_manifest_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        run_shard(tmp_path, tmp_path / "a", PREPARE, CONFIG)


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError, OSError])
def test_an_unforeseen_error_refuses_one_study_and_tells_nothing_private(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    def broken(study: Study, *rest: Any) -> StudyArrays:
        if study.study_id == "case-2":
            raise kind("/home/jane_doe/scan.nii")
        return prepare_study(study, *rest)

    monkeypatch.setattr("anycontrast_datasets.shard_task.prepare_study", broken)
    summary = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    assert summary.refused_by_code == {"prepare_failed": 1} and summary.num_sharded == 4
    (reject,) = read_ledger(tmp_path / "a" / "rejects.csv")
    assert reject.study_id == "case-2" and kind.__name__ in reject.reason
    assert kind.__name__ in caplog.text and "jane" not in caplog.text
    for path in (tmp_path / "a").iterdir():
        assert b"jane_doe" not in path.read_bytes()


@pytest.mark.parametrize(
    "values",
    [
        {"studies_per_shard": 0},
        {"num_workers": -1},
        {"codec": "gzip"},
        {"level": 10},
        {"faces": ""},
    ],
)
def test_bad_config_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"shard.{next(iter(values))}"):
        ShardConfig(**values)


@pytest.mark.cluster
def test_ray_gives_the_same_bytes(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "case-1_T1w.nii").unlink()
    here = run_shard(manifest, tmp_path / "a", PREPARE, CONFIG)
    steps = []
    there = run_shard(
        manifest,
        tmp_path / "b",
        PREPARE,
        replace(CONFIG, num_workers=2),
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert here == there
    assert steps[-1] == (5, 5) and steps == sorted(steps)
    import ray

    assert not ray.is_initialized()
    assert os.environ["RAY_AUTH_MODE"] == "token"
