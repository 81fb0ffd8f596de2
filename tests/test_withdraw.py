"""Withdrawing a subject: nothing of it is left, nothing else changes, and a kill loses nothing."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anycontrast_datasets.ledger import read_ledger, refuse, write_ledger
from anycontrast_datasets.manifest import read_locations, read_manifest
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.pseudonym import PseudonymNaming, SplitRule, load_key
from anycontrast_datasets.scan import ScanConfig, run_scan
from anycontrast_datasets.shard import ShardConfig, run_shard
from anycontrast_datasets.sources.phantom_config import PhantomConfig
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.withdraw import (
    WithdrawSummary,
    which_models,
    withdraw_subject,
)
from anycontrast_datasets.withdraw_rows import withdrawn_subjects

PREPARE = PrepareConfig(spacing_mm=(10.0, 10.0, 10.0), box_multiple_vox=8)
CONFIG = ShardConfig(studies_per_shard=3)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five subjects with two sessions each, scanned under pseudonyms and sharded."""
    folder = tmp_path_factory.mktemp("five")
    phantom = PhantomConfig(num_studies=10, num_sessions=2, spacing_mm=(10.0, 10.0, 10.0))
    plain = ScanConfig(
        source="phantom", root=str(folder / "source"), check_pictures=False, phantom=phantom
    )
    run_scan(plain, folder / "plain")
    run_scan(bids(folder), folder / "manifest")
    run_shard(folder / "manifest", folder / "shards", PREPARE, CONFIG)
    fingerprint = open_store(folder / "shards").fingerprint
    write_models(folder / "models", fingerprint)
    return folder


def bids(folder: Path) -> ScanConfig:
    """Scan the phantom's files as if they were people's."""
    return ScanConfig(
        source="bids", dataset="made", root=str(folder / "source"), check_pictures=False
    )


def write_models(folder: Path, fingerprint: str) -> None:
    """Two checkpoints and a release of these shards, and one checkpoint of others."""
    states = {
        "pretrain/step-1": {"kind": "amae", "stream": {"fingerprint": fingerprint}},
        "finetune/step-2": {"kind": "segmenter", "stream": {"fingerprint": fingerprint + ":x"}},
        "pretrain/old": {"kind": "amae", "stream": {"fingerprint": "of other shards"}},
    }
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text(json.dumps(state))
    facts = {"anycontrast_version": "1", "training": {"dataset_fingerprint": fingerprint}}
    (folder / "release").mkdir()
    (folder / "release" / "config.json").write_text(json.dumps(facts))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the five subjects, without their source: it may be gone by now."""
    for name in ("manifest", "shards", "models"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path


def subjects_of(folder: Path) -> list[str]:
    return sorted({s.subject_id for s in read_manifest(folder / "manifest" / "manifest.parquet")})


def studies_of(folder: Path, subject: str) -> set[str]:
    studies = read_manifest(folder / "manifest" / "manifest.parquet")
    return {study.study_id for study in studies if study.subject_id == subject}


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "sharding.json"
    }


def voxels(folder: Path) -> dict[str, dict[str, str]]:
    store = open_store(folder / "shards")
    reads = [store.read(n) for n in range(len(store.records))]
    return {
        r.record.study_id: {c: hashlib.sha256(a.tobytes()).hexdigest() for c, a in r.codes.items()}
        for r in reads
    }


def withdraw(folder: Path, subject: str) -> WithdrawSummary:
    return withdraw_subject(
        folder / "manifest", folder / "shards", subject, checkpoints_dirs=[folder / "models"]
    )


def test_nothing_of_the_subject_is_left_and_no_other_study_changes(folder: Path) -> None:
    subject = subjects_of(folder)[1]
    gone = studies_of(folder, subject)
    held = {
        path
        for path in (folder / "shards").glob("shard-*.tar")
        if any(study.encode() in path.read_bytes() for study in gone)
    }
    others = {p: p.stat() for p in (folder / "shards").glob("shard-*.tar") if p not in held}
    converted = folder / "manifest" / "private" / "converted" / min(gone)
    converted.mkdir(parents=True)
    (converted / "volume.nii.gz").write_bytes(b"voxels")
    table = folder / "manifest" / "private" / "corrected.csv"
    table.write_text(f"file;study_id;decision\nb.nii;another;FLAIR\na.nii;{min(gone)};T1w\n")
    inspected = folder / "manifest" / "private" / "inspected.jsonl"
    inspected.write_text(f"{subject}")
    ledger = folder / "manifest" / "private" / "ledger.csv"
    rows = read_ledger(ledger)
    write_ledger([*rows, refuse("sub-1_x.nii", "not_3d", "4D", study_id=min(gone))], ledger)
    before = voxels(folder)

    summary = withdraw(folder, subject)

    assert len(gone) == 2 and held and others
    after = voxels(folder)
    assert after == {study: hashes for study, hashes in before.items() if study not in gone}
    assert {p: p.stat() for p in others} == others
    kept = {"manifest/private/withdrawn.csv", "manifest/private/withdrawals.json"}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        if str(path.relative_to(folder)) not in kept:
            found = [name for name in {subject, *gone} if name.encode() in path.read_bytes()]
            assert not found, f"{path} still names {found}"
    assert not converted.exists() and not inspected.exists() and read_ledger(ledger) == rows
    assert table.read_text() == "file;study_id;decision\nb.nii;another;FLAIR\n"
    assert not {study for study, _ in read_locations(folder / "manifest")} & gone
    assert open_store(folder / "shards").verify() == []
    assert withdrawn_subjects(folder / "manifest") == {subject}
    assert summary.num_studies == 2 and summary.num_shards == len(held)
    counts = json.loads((folder / "manifest" / "summary.json").read_text())
    assert counts["subjects"] == 4 and counts["studies"] == 8


def test_the_shards_are_those_that_sharding_the_smaller_manifest_makes(
    folder: Path, pristine: Path
) -> None:
    subject = subjects_of(folder)[0]
    withdraw(folder, subject)
    before = content(folder / "shards")
    again = run_shard(folder / "manifest", folder / "shards", PREPARE, CONFIG)
    assert again.num_prepared == 0 and content(folder / "shards") == before
    fresh = run_shard(folder / "manifest", folder / "fresh", PREPARE, CONFIG)
    assert fresh.fingerprint == again.fingerprint
    assert fresh.fingerprint != open_store(pristine / "shards").fingerprint


def test_models_trained_with_the_subject_are_named(folder: Path) -> None:
    subject = subjects_of(folder)[2]
    models = folder / "models"
    asked = which_models(
        folder / "manifest", folder / "shards", subject, checkpoints_dirs=[folder / "models"]
    )
    summary = withdraw(folder, subject)
    expected = tuple(str(models / n) for n in ("finetune/step-2", "pretrain/step-1", "release"))
    assert asked.affected == summary.affected == expected
    assert summary.uncertain == (str(models / "pretrain/old"),)
    (record,) = json.loads((folder / "manifest" / "private" / "withdrawals.json").read_text())
    assert record["affected"] == list(expected) and record["is_done"]
    assert all(len(shard["sha256"]) == 64 for shard in record["shards"])


def test_five_subjects_can_be_withdrawn_one_by_one(folder: Path) -> None:
    names = subjects_of(folder)
    for number, subject in enumerate(names):
        withdraw(folder, subject)
        assert subjects_of(folder) == names[number + 1 :]
        if number < 4:
            assert len(open_store(folder / "shards").records) == 8 - 2 * number
    assert not list((folder / "shards").glob("*.tar"))
    assert not (folder / "shards" / "dataset.json").exists()
    with (folder / "manifest" / "private" / "withdrawn.csv").open() as file:
        assert [row["subject_id"] for row in csv.DictReader(file)] == names


@pytest.mark.parametrize("spelling", ["0002", "sub-0002"])
def test_the_id_of_the_source_will_do_if_the_key_is_there(folder: Path, spelling: str) -> None:
    key_file = folder / "manifest" / "private" / "pseudonym.key"
    key = load_key(key_file, key_file)
    naming = PseudonymNaming(key, "made", SplitRule("made", "", (1.0, 0.0, 0.0)))
    expected = naming("0002", "").subject_id
    summary = withdraw(folder, spelling)
    assert summary.subject_ids == (expected,)
    for name in ("withdrawn.csv", "withdrawals.json"):
        text = (folder / "manifest" / "private" / name).read_text()
        assert not re.search(r"sub-0002|\b0002\b", text)
    assert withdraw(folder, spelling) == withdraw(folder, expected)


def test_a_later_scan_leaves_the_subject_out(folder: Path, pristine: Path) -> None:
    subject = subjects_of(folder)[4]
    withdraw(folder, subject)
    before = content(folder / "shards")
    run_scan(bids(pristine), folder / "manifest")
    assert subjects_of(folder) == [name for name in subjects_of(pristine) if name != subject]
    assert run_shard(folder / "manifest", folder / "shards", PREPARE, CONFIG).num_prepared == 0
    assert content(folder / "shards") == before


def test_a_list_that_a_spreadsheet_saved_is_read_and_a_spoilt_one_is_named(folder: Path) -> None:
    subjects = subjects_of(folder)
    listed = folder / "manifest" / "private" / "withdrawn.csv"
    listed.write_bytes(b"\xef\xbb\xbfsubject_id\r\n" + subjects[0].encode() + b"\r\n")
    assert withdrawn_subjects(folder / "manifest") == {subjects[0]}
    listed.write_text(f"{subjects[0]}\n{subjects[2]}\n")
    with pytest.raises(ManifestError, match="a column subject_id is needed"):
        withdraw(folder, subjects[1])
    assert subjects_of(folder) == subjects


def test_a_subject_that_is_not_there_changes_nothing(folder: Path) -> None:
    before = content(folder)
    with pytest.raises(ManifestError, match="found none"):
        withdraw(folder, "nobody")
    assert content(folder) == before


def test_an_unfinished_folder_loses_the_subject_and_waits_for_sharding(folder: Path) -> None:
    subject = subjects_of(folder)[3]
    gone = studies_of(folder, subject)
    first = min((folder / "shards").glob("shard-*.json"))
    first.unlink()
    first.with_suffix(".tar").unlink()
    (folder / "shards" / "dataset.json").unlink()
    assert withdraw(folder, subject).fingerprint == ""
    for path in (folder / "shards").iterdir():
        assert not any(study.encode() in path.read_bytes() for study in gone)
    # Compressed, it would hide them from the search above.
    assert not (folder / "shards" / "index.parquet").exists()


CRASH = """
import os, shutil, sys
from pathlib import Path
from anycontrast_datasets.withdraw import withdraw_subject

home, subject = Path(sys.argv[1]), sys.argv[2]
calls = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir", "fsync")}

def withdraw(folder, die_at):
    left = die_at
    def dying(name):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return calls[name](*args, **kwargs)
        return call
    for name in calls:
        setattr(os, name, dying(name))
    withdraw_subject(folder / "manifest", folder / "shards", subject)
    os._exit(0)

def run(folder, die_at):
    pid = os.fork()
    if pid == 0:
        try:
            withdraw(folder, die_at)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

point, step = 0, int(sys.argv[3])
while True:
    point += step
    folder = home / f"killed-{point}"
    for name in ("manifest", "shards"):
        shutil.copytree(home / name, folder / name)
    first = run(folder, point)
    assert first in (0, 9), first
    assert run(folder, -1) == 0, point
    if first == 0:
        break
print(point)
"""


@pytest.mark.parametrize(
    "step", [29, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_killed_at_any_step_the_next_run_completes_it(folder: Path, step: int) -> None:
    subject = subjects_of(folder)[1]
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(folder), subject, str(step)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    withdraw_subject(folder / "manifest", folder / "shards", subject)
    expected = {name: content(folder / name) for name in ("manifest", "shards")}
    killed = sorted(folder.glob("killed-*"))
    assert int(done.stdout) >= 30 and len(killed) == int(done.stdout) // step
    for path in killed:
        assert {name: content(path / name) for name in expected} == expected, path.name
