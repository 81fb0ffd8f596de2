"""Studies come, change and go: only the shards that hold them are written again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anycontrast_datasets.ledger import read_ledger
from anycontrast_datasets.manifest import (
    manifest_fingerprint,
    read_locations,
    read_manifest,
    write_locations,
    write_manifest,
)
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, ShardSummary, run_shard
from anycontrast_datasets.shard_plan import Layout, deal, study_key
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import ContrastVote, ShardError, Study

PREPARE = PrepareConfig(spacing_mm=(10.0, 10.0, 10.0), box_multiple_vox=8)
CONFIG = ShardConfig(studies_per_shard=3)


def scan(folder: Path, num_studies: int) -> Path:
    """Scan phantom studies of 10 mm; more of them leave the first ones as they are."""
    config = ScanConfig(
        source="phantom",
        dataset="phantom",
        root=str(folder / f"source-{num_studies}"),
        check_pictures=False,
        phantom=PhantomConfig(num_studies=num_studies, spacing_mm=(10.0, 10.0, 10.0)),
    )
    run_scan(config, folder / f"manifest-{num_studies}")
    return folder / f"manifest-{num_studies}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of 7 and of 11 studies, and the shards of the 7."""
    folder = tmp_path_factory.mktemp("append")
    run_shard(scan(folder, 7), folder / "shards", PREPARE, CONFIG)
    scan(folder, 11)
    return folder


@pytest.fixture
def shards(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the shards of 7 studies."""
    return Path(shutil.copytree(pristine / "shards", tmp_path / "shards"))


@pytest.fixture
def seven(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the manifest of 7 studies."""
    return Path(shutil.copytree(pristine / "manifest-7", tmp_path / "manifest"))


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "sharding.json"
    }


def tars(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.glob("*.tar"))
    }


def edit(manifest: Path, change: Callable[[Study], Study | None]) -> None:
    """Write a manifest again with some studies changed, or left out."""
    locations = read_locations(manifest)
    studies = read_manifest(manifest / "manifest.parquet")
    kept = [new for study in studies if (new := change(study)) is not None]
    write_manifest(kept, manifest / "manifest.parquet")
    fingerprint = manifest_fingerprint(manifest / "manifest.parquet")
    write_locations(locations, manifest, fingerprint=fingerprint)


def shard_of(folder: Path, study_id: str) -> str:
    layout = json.loads((folder / "layout.json").read_text())
    return next(str(name) for name, held in layout["shards"].items() if study_id in held)


def append(pristine: Path, shards: Path) -> ShardSummary:
    return run_shard(pristine / "manifest-11", shards, PREPARE, CONFIG)


def test_new_studies_go_into_new_shards(pristine: Path, shards: Path) -> None:
    before = tars(shards)
    summary = append(pristine, shards)
    after = tars(shards)
    assert {name: after[name] for name in before} == before
    assert (summary.num_sharded, summary.num_prepared) == (11, 4)
    assert (summary.num_reused, summary.num_shards) == (3, 5)
    assert open_store(shards).verify() == []
    assert (
        summary.fingerprint
        == run_shard(pristine / "manifest-11", shards.parent / "fresh", PREPARE, CONFIG).fingerprint
    )
    names = [study.study_id for study in read_manifest(pristine / "manifest-11/manifest.parquet")]
    assert [r.study_id for r in open_store(shards).records] == names


def test_old_data_set_stays_readable_while_studies_are_added(pristine: Path, shards: Path) -> None:
    seen = []
    run_shard(
        pristine / "manifest-11",
        shards,
        PREPARE,
        CONFIG,
        on_progress=lambda done, total: seen.append(len(open_store(shards).records)),
    )
    assert seen == [7] * 11


def test_an_append_stopped_between_shards_ends_the_same(
    pristine: Path, shards: Path, tmp_path: Path
) -> None:
    stopped = Path(shutil.copytree(shards, tmp_path / "stopped"))
    append(pristine, shards)

    def stop(done: int, total: int) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_shard(pristine / "manifest-11", stopped, PREPARE, CONFIG, on_progress=stop)
    # The fourth shard is lost too, as when tasks end out of order.
    (stopped / "shard-000003.json").unlink()
    append(pristine, stopped)
    assert content(stopped) == content(shards)


def test_a_changed_study_is_prepared_again_and_only_its_shard_written(
    pristine: Path, shards: Path, seven: Path
) -> None:
    victim = read_manifest(seven / "manifest.parquet")[3]
    before = tars(shards)

    def change(study: Study) -> Study:
        return replace(study, session_id="again") if study.study_id == victim.study_id else study

    edit(seven, change)
    summary = run_shard(seven, shards, PREPARE, CONFIG)
    after = tars(shards)
    assert (summary.num_prepared, summary.num_reused) == (1, 2)
    assert {n for n in before if before[n] != after[n]} == {shard_of(shards, victim.study_id)}
    sessions = {r.study_id: r.session_id for r in open_store(shards).records}
    assert sessions[victim.study_id] == "again"


def test_a_study_that_left_the_manifest_leaves_its_shard_and_no_source_is_read(
    pristine: Path, shards: Path, seven: Path
) -> None:
    victim = read_manifest(seven / "manifest.parquet")[2].study_id
    before = tars(shards)
    edit(seven, lambda study: None if study.study_id == victim else study)
    name = shard_of(shards, victim)
    summary = run_shard(seven, shards, PREPARE, CONFIG)
    assert (summary.num_sharded, summary.num_prepared) == (6, 0)
    assert {n for n, state in tars(shards).items() if before[n] != state} <= {name}
    for path in shards.iterdir():
        assert victim.encode() not in path.read_bytes()


def test_a_new_judgement_of_the_same_voxels_rewrites_nothing(
    pristine: Path, shards: Path, seven: Path
) -> None:
    before = tars(shards)

    def judge(study: Study) -> Study:
        vote = ContrastVote(source="picture", contrast="T1w", confidence=0.4, evidence="dark fluid")
        volumes = tuple(
            replace(
                volume,
                confidence=0.5,
                votes=(vote,),
                evidence=("another reason",),
                face="stripped",
                noise_sigma=3.0,
                intensity=(1.0, 2.0, 3.0),
                image_hash="00" * 64,
            )
            for volume in study.volumes
        )
        return replace(study, volumes=volumes, site="another")

    edit(seven, judge)
    summary = run_shard(seven, shards, PREPARE, CONFIG)
    assert (summary.num_prepared, summary.num_reused) == (0, 3)
    assert tars(shards) == before
    assert summary.fingerprint == open_store(pristine / "shards").fingerprint


def test_one_damaged_study_is_prepared_again_and_its_neighbours_copied(
    pristine: Path, shards: Path
) -> None:
    before = content(shards)
    index = json.loads((shards / "shard-000001.json").read_text())["members"]
    damaged = bytearray((shards / "shard-000001.tar").read_bytes())
    damaged[index[0]["offset"] + 20] ^= 4
    (shards / "shard-000001.tar").write_bytes(damaged)
    summary = run_shard(pristine / "manifest-7", shards, PREPARE, CONFIG)
    assert summary.num_prepared == 1
    assert content(shards) == before


def test_other_settings_deal_all_studies_anew(pristine: Path, shards: Path, tmp_path: Path) -> None:
    append(pristine, shards)
    config = ShardConfig(studies_per_shard=4)
    run_shard(pristine / "manifest-11", shards, PREPARE, config)
    run_shard(pristine / "manifest-11", tmp_path / "fresh", PREPARE, config)
    assert content(shards) == content(tmp_path / "fresh")


def test_shards_of_an_earlier_schema_say_what_to_do(pristine: Path, shards: Path) -> None:
    path = shards / "dataset.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 1}))
    with pytest.raises(ShardError, match=r"schema version 1.*run `anycontrast shard` again"):
        open_store(shards)


ORIGIN = {"prepare": {}, "shard": {"studies_per_shard": 2, "codec": "zstd", "level": 5}}


def test_dealing_is_stable_and_fills_new_shards_only() -> None:
    first = deal(None, ORIGIN, ["a", "b", "c"])
    assert sorted(len(held) for held in first.shards.values()) == [1, 2]
    assert deal(first, ORIGIN, ["c", "a", "b"]) == first
    grown = deal(first, ORIGIN, ["a", "b", "c", "d", "e", "f"])
    assert {n: grown.shards[n] for n in first.shards} == first.shards
    assert sorted(grown.shards) == [f"shard-{n:06d}.tar" for n in range(4)]
    assert deal(grown, ORIGIN, "abcdef") == grown == deal(grown, ORIGIN, list("fedcba"))
    emptied = deal(grown, ORIGIN, set("abcdef") - set(grown.shards["shard-000000.tar"]))
    assert list(emptied.shards) == ["shard-000001.tar", "shard-000002.tar", "shard-000003.tar"]
    other = {**ORIGIN, "prepare": {"spacing_mm": 2}}
    assert deal(grown, other, "abcdef") == deal(None, other, "abcdef")


def test_the_order_of_dealing_depends_on_ids_alone() -> None:
    ids = [f"study-{n}" for n in range(20)]
    assert deal(None, ORIGIN, ids) == deal(None, ORIGIN, reversed(ids))
    assert [i for held in deal(None, ORIGIN, ids).shards.values() for i in held] != ids


@pytest.mark.parametrize(
    "damage", ["{", '{"schema_version": 2, "origin": {}, "shards": {"../x": []}}']
)
def test_a_damaged_layout_is_dealt_anew(pristine: Path, shards: Path, damage: str) -> None:
    before = content(shards)
    (shards / "layout.json").write_text(damage)
    run_shard(pristine / "manifest-7", shards, PREPARE, CONFIG)
    assert content(shards) == before


def with_faces(manifest: Path, contrasts: dict[str, set[str]]) -> None:
    def show(study: Study) -> Study:
        volumes = tuple(
            replace(
                v, face="present" if v.contrast in contrasts.get(study.study_id, ()) else "unknown"
            )
            for v in study.volumes
        )
        return replace(study, volumes=volumes)

    edit(manifest, show)


def test_no_face_enters_a_shard_unless_it_is_allowed(seven: Path, tmp_path: Path) -> None:
    studies = read_manifest(seven / "manifest.parquet")
    coarse = {"DWI", "ADC", "b0"}
    mixed = next(s for s in studies if {*s.contrasts} & coarse and {*s.contrasts} - coarse)
    bare = next(s for s in studies if s != mixed and not {*s.contrasts} & coarse)
    with_faces(seven, {s.study_id: set(s.contrasts) for s in (mixed, bare)})
    summary = run_shard(seven, tmp_path / "a", PREPARE, CONFIG)
    assert summary.refused_by_code == {"face_present": 1} and summary.num_sharded == 6
    records = {r.study_id: r for r in open_store(tmp_path / "a").records}
    assert bare.study_id not in records
    assert set(records[mixed.study_id].contrasts) == {*mixed.contrasts} & coarse
    rejects = read_ledger(tmp_path / "a" / "rejects.csv")
    assert {(r.study_id, r.location) for r in rejects} == {(bare.study_id, "")} | {
        (mixed.study_id, name) for name in {*mixed.contrasts} - coarse
    }
    dataset = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert dataset["counts"]["volumes_left_out"] == {"face_present": len(rejects) - 1}
    allowed = run_shard(seven, tmp_path / "a", PREPARE, replace(CONFIG, faces="allow"))
    assert (allowed.num_sharded, allowed.num_prepared) == (7, 2)


def test_the_key_of_a_study_follows_what_enters_its_bytes(seven: Path) -> None:
    study = next(s for s in read_manifest(seven / "manifest.parquet") if s.label is not None)
    key = Layout(origin=ORIGIN, shards={}).key
    volume = study.volumes[0]
    assert study.label is not None
    others = [
        replace(study, split="val" if study.split != "val" else "test"),
        replace(study, volumes=study.volumes[1:]),
        replace(study, volumes=(replace(volume, sha256="0" * 64), *study.volumes[1:])),
        replace(study, volumes=(replace(volume, flags=("cut",)), *study.volumes[1:])),
        replace(study, label=None),
        replace(study, label=replace(study.label, sha256="0" * 64)),
    ]
    keys = [study_key(other, key) for other in others] + [study_key(study, "other settings")]
    assert len({study_key(study, key), *keys}) == 1 + len(keys)
