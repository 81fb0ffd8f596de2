"""A stream over real shards: damaged in many ways, nothing is lost; one augmentation a study."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anycontrast.models.patches import patch_codes
from anycontrast_datasets.augment import StudyView, augment_study
from anycontrast_datasets.order import study_rng
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store import volume_store
from anycontrast_datasets.store.byte_source import LocalSource
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.store.volume_index import member_from_dict, read_index
from anycontrast_datasets.stream import StreamConfig, StudyStream
from anycontrast_datasets.study import ShardError

PATCH = (4, 4, 4)
NUM_STUDIES = 12
SHARDS = 3
SKIP = StreamConfig(studies_per_step=3, on_corrupt="skip", max_corrupt_fraction=0.5)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, memory_store: Callable[..., Any]) -> Path:
    folder: Path = tmp_path_factory.mktemp("stream") / "shards"
    studies = memory_store(NUM_STUDIES, contrasts=(("T1w", "FLAIR"), ("DWI",))).studies
    write_arrays(folder, [studies[n::SHARDS] for n in range(SHARDS)])
    return folder


@pytest.fixture
def shards(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "shards")


def members(shards: Path) -> list[Any]:
    dataset = json.loads((shards / "dataset.json").read_text())
    table = read_index(LocalSource(shards), dataset["index_sha256"])
    return [member_from_dict(row) for row in table.to_pylist()]


def flip(content: bytearray, row: Any, rng: np.random.Generator) -> None:
    content[row.offset + int(rng.integers(row.bytes))] ^= 1 << int(rng.integers(8))


def zero(content: bytearray, row: Any, rng: np.random.Generator) -> None:
    content[row.offset : row.offset + row.bytes] = bytes(row.bytes)


def shift(content: bytearray, row: Any, rng: np.random.Generator) -> None:
    part = slice(row.offset, row.offset + row.bytes)
    content[part] = content[part][7:] + content[part][:7]


def exchange(content: bytearray, row: Any, rng: np.random.Generator) -> None:
    half = row.bytes // 2
    head = slice(row.offset, row.offset + half)
    tail = slice(row.offset + half, row.offset + 2 * half)
    content[head], content[tail] = content[tail], content[head]


@pytest.mark.parametrize("kind", [flip, zero, shift, exchange])
@pytest.mark.parametrize("draw", range(2))
def test_emitted_and_quarantined_studies_are_the_manifest(
    shards: Path, kind: Callable[..., None], draw: int
) -> None:
    rng = np.random.default_rng(draw)
    rows = members(shards)
    hit = [rows[n] for n in rng.choice(len(rows), 3, replace=False)]
    for row in hit:
        content = bytearray((shards / row.shard).read_bytes())
        kind(content, row, rng)
        (shards / row.shard).write_bytes(content)
    served: set[str] = set()
    with StudyStream(open_store(shards), SKIP, PATCH, seed=draw) as stream:
        for _ in range(NUM_STUDIES // 3):
            step = next(stream)
            for pack in step.packs:
                named = zip(pack.study_ids, pack.draws, pack.contrasts, strict=True)
                for study_id, number, contrasts in named:
                    whole = ("T1w", "FLAIR") if int(study_id[1:]) % 2 == 0 else ("DWI",)
                    assert contrasts == whole, "no contrast may vanish"
                    served |= {study_id} if number == 0 else set()
        damages = stream.damages
        audit = stream.close_epoch(0, stream.tally(0))
    assert served == {f"s{n:03d}" for n in range(NUM_STUDIES)} - {row.study_id for row in hit}
    assert (audit.served, audit.quarantined) == (len(served), NUM_STUDIES - len(served))
    places = {(row.shard, row.study_id, row.contrast) for row in hit}
    assert {(d.shard, d.study_id, d.member) for d in damages} <= places
    assert {d.study_id for d in damages} == {row.study_id for row in hit}


def test_a_shard_that_vanishes_meanwhile_is_named(shards: Path) -> None:
    store = open_store(shards)
    gone = members(shards)[0].shard
    (shards / gone).unlink()
    with StudyStream(store, SKIP, PATCH, seed=0) as stream:
        while len(stream.damages) < NUM_STUDIES // SHARDS:
            next(stream)
    assert {damage.shard for damage in stream.damages} == {gone}
    with (
        StudyStream(store, StreamConfig(studies_per_step=NUM_STUDIES), PATCH, seed=0) as stream,
        pytest.raises(ShardError, match=gone),
    ):
        next(stream)


def test_all_contrasts_of_a_study_are_augmented_alike(
    memory_store: Callable[..., Any],
) -> None:
    store = memory_store(6, contrasts=(("T1w", "FLAIR", "ADC"),))
    for study in store.studies:
        study.codes["FLAIR"][:] = study.codes["T1w"]
        study.codes["ADC"][:] = study.codes["T1w"]
    config = StreamConfig(
        studies_per_step=3, flip_axes=[0, 1, 2], crop_vox=(4, 8, 8), draws_per_study=2
    )
    seen = set()
    with StudyStream(store, config, PATCH, seed=0) as stream:
        for _ in range(6):
            (pack,) = next(stream).packs
            codes_TP = patch_codes(pack)
            for study in range(pack.num_studies):
                first, last = pack.offsets[study : study + 2]
                volumes = codes_TP[first:last].reshape(3, -1)
                assert torch.equal(volumes[0], volumes[1])
                assert torch.equal(volumes[0], volumes[2])
                seen.add((pack.study_ids[study], tuple(volumes[0][:9].tolist())))
    assert len(seen) > 12, "and differently from one serving to the next"


def test_the_disk_is_told_of_every_step_ahead_and_of_nothing_else(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        LocalSource, "announce", lambda self, name, start, stop: told.append((name, start, stop))
    )
    monkeypatch.setattr(volume_store, "_NEAR_BYTES", 0)
    store = open_store(pristine)
    config = StreamConfig(studies_per_step=2, prefetch_steps=2, num_threads=1, contrasts=["T1w"])
    with StudyStream(store, config, PATCH, seed=0) as stream:
        served = list(next(stream).packs[0].study_ids)
        deadline = time.monotonic() + 10
        while len(told) < 2 * 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):
            served += next(stream).packs[0].study_ids
    table = read_index(LocalSource(pristine), store.dataset["index_sha256"])  # type: ignore[attr-defined]
    rows = [member_from_dict(row) for row in table.to_pylist()]
    wanted = [
        (row.shard, row.offset, row.offset + row.bytes)
        for study_id in served
        for row in rows
        if row.study_id == study_id and row.contrast in ("T1w", rows[-1].contrast)
    ]
    assert told[:12] == wanted


def test_crops_are_read_alone_and_are_those_of_the_whole_study(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(pristine)
    whole = {store.records[n].study_id: store.read(n) for n in range(len(store))}
    monkeypatch.setattr(volume_store.VolumeStore, "read", None)
    options: dict[str, Any] = {"flip_axes": [0, 1, 2], "crop_vox": (5, 12, 10)}
    seen = set()
    with StudyStream(store, StreamConfig(studies_per_step=3, **options), PATCH, seed=2) as stream:
        for _ in range(8):
            (pack,) = next(stream).packs
            views: list[StudyView] = []
            for study_id, epoch in zip(pack.study_ids, pack.epochs, strict=True):
                rng = study_rng(2, epoch, study_id, "augment", draw=pack.draws[len(views)])
                views.append(augment_study(whole[study_id], rng, **options))
                seen.add(views[-1].origin_vox)
            expected = pack_studies(views, PATCH, epochs=pack.epochs)
            assert torch.equal(pack.codes_B, expected.codes_B)
            assert torch.equal(pack.position_mm_T3, expected.position_mm_T3)
    assert len(seen) > 8
