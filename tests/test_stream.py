"""The same packs for any world size, thread count and place of resume; honest errors."""

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.store.partial import Vox3, crop_arrays
from anycontrast_datasets.store.slots import slot_array
from anycontrast_datasets.stream import StepPacks, StreamConfig, StudyStream
from anycontrast_datasets.study import (
    ManifestError,
    ShardError,
    StudyArrays,
    StudyRecord,
    VolumeRecord,
)

PATCH = (4, 4, 4)
IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
CONTRASTS = ("T1w", "FLAIR", "T2w", "DWI")
SHAPES = ((8, 16, 8), (16, 8, 8), (8, 8, 8), (16, 16, 8))


class MemoryStore:
    """Studies held in memory; damaged ones are refused like a store on disk refuses them."""

    def __init__(
        self, studies: Sequence[StudyArrays], damaged: Sequence[str] = (), delay_s: float = 0
    ) -> None:
        self.studies = tuple(studies)
        self.damaged = set(damaged)
        self.delay_s = delay_s
        self.reads: list[tuple[str, tuple[str, ...]]] = []
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    @property
    def records(self) -> tuple[StudyRecord, ...]:
        return tuple(study.record for study in self.studies)

    @property
    def fingerprint(self) -> str:
        return "memory-" + "-".join(record.study_id for record in self.records)

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: Mapping[str, npt.NDArray[np.int16]] | None = None,
    ) -> StudyArrays:
        time.sleep(self.delay_s)
        study = self.studies[index]
        record = study.record
        names = tuple(record.contrasts if contrasts is None else contrasts)
        with self._lock:
            self.reads.append((record.study_id, names))
            self.threads.add(threading.current_thread().name)
        if record.study_id in self.damaged:
            raise ShardError(f"shard memory, study {record.study_id}, member T1w: xxh3 differs")
        kept = tuple(volume for volume in record.volumes if volume.contrast in names)
        codes = {volume.contrast: study.codes[volume.contrast] for volume in kept}
        if out is not None:
            for name, array in codes.items():
                slot_array(out, name, array.shape)[...] = array
        return StudyArrays(replace(record, volumes=kept), codes, study.label if label else None)

    def read_crop(self, index: int, start: Vox3, size: Vox3, **options: Any) -> StudyArrays:
        return crop_arrays(self.read(index, **options), start, size)

    def verify(self) -> list[str]:
        return [f"study {study_id} is damaged" for study_id in sorted(self.damaged)]


def make_study(number: int, *, split: str = "train", contrasts: Sequence[str] = ()) -> StudyArrays:
    rng = np.random.default_rng(number)
    names = tuple(contrasts) or CONTRASTS[: 1 + number % len(CONTRASTS)]
    shape = SHAPES[number % len(SHAPES)]
    codes = {}
    for name in names:
        mask = (rng.random([n // 4 for n in shape]) < 0.7).repeat(4, 0).repeat(4, 1).repeat(4, 2)
        codes[name] = (rng.integers(1, 4096, shape) * mask).astype(np.int16)
    label = (codes[names[0]] > 3000).astype(np.uint8) if number % 3 else None
    record = StudyRecord(
        study_id=f"s{number:03d}",
        dataset="d",
        subject_id=f"p{number}",
        session_id="1",
        split=split,
        shape=shape,
        spacing_mm=(1.0, 1.0, 2.0),
        affine=IDENTITY,
        volumes=tuple(
            VolumeRecord(
                contrast=name,
                scale=1.0,
                offset=0.0,
                p0_5=0.0,
                p99_5=4000.0,
                mean=2000.0,
                std=500.0,
                num_foreground=int((codes[name] != 0).sum()),
                occupancy=pack_occupancy(codes[name]),
                source_spacing_mm=(1.0, 1.0, 1.0),
            )
            for name in names
        ),
        has_label=label is not None,
    )
    return StudyArrays(record, codes, label)


def make_store(num_studies: int, **kwargs: Any) -> Any:
    return MemoryStore([make_study(n) for n in range(num_studies)], **kwargs)


def serve(store: Any, config: StreamConfig, num_steps: int, **kwargs: Any) -> list[StepPacks]:
    with StudyStream(store, config, PATCH, seed=kwargs.pop("seed", 5), **kwargs) as stream:
        return [next(stream) for _ in range(num_steps)]


def same_value(a: object, b: object) -> bool:
    if isinstance(a, PackedBatch):
        return all(same_value(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def same_steps(a: Sequence[StepPacks], b: Sequence[StepPacks]) -> bool:
    return same_value(
        tuple((x.step, x.epoch, x.packs) for x in a), tuple((x.step, x.epoch, x.packs) for x in b)
    )


FULL = StreamConfig(
    studies_per_step=6,
    packs_per_step=4,
    flip_axes=[0, 2],
    crop_vox=(8, 8, 8),
    labels=True,
    foreground_crop_fraction=0.5,
    drop_contrasts=True,
)


@pytest.mark.parametrize("num_studies", [1, 5, 8])
@pytest.mark.parametrize(
    ("studies_per_step", "world_size"), [(1, 1), (3, 1), (3, 2), (4, 1), (4, 4), (11, 2)]
)
def test_every_study_is_served_once_per_epoch_over_all_ranks(
    num_studies: int, studies_per_step: int, world_size: int
) -> None:
    config = StreamConfig(studies_per_step=studies_per_step, packs_per_step=world_size)
    store = make_store(num_studies)
    num_steps = -(-2 * num_studies // studies_per_step)
    served = [
        (epoch, study_id)
        for rank in range(world_size)
        for step in serve(store, config, num_steps, rank=rank, world_size=world_size)
        for pack in step.packs
        for epoch, study_id in zip(pack.epochs, pack.study_ids, strict=True)
    ]
    everyone = sorted(record.study_id for record in store.records)
    for epoch in range(2):
        assert sorted(study_id for e, study_id in served if e == epoch) == everyone
    assert len(served) == num_steps * studies_per_step


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_exactly_the_packs_of_a_single_rank(world_size: int) -> None:
    alone = serve(make_store(9), FULL, 5)
    shares = [
        serve(make_store(9), FULL, 5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [
        replace(one, packs=tuple(pack for share in shares for pack in share[n].packs))
        for n, one in enumerate(alone)
    ]
    assert same_steps(alone, joined)
    assert all(len(step.packs) == 4 for step in alone)


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 7])
def test_a_resumed_stream_continues_bit_for_bit(stop: int) -> None:
    whole = serve(make_store(7), FULL, 8)
    rest = serve(make_store(7), FULL, 8 - stop, start_step=stop)
    assert same_steps(whole[stop:], rest)
    assert [step.step for step in rest] == list(range(stop, 8))


def test_threads_and_prefetching_do_not_change_a_bit() -> None:
    plain = serve(make_store(7), replace(FULL, num_threads=1, prefetch_steps=0), 5)
    busy = serve(make_store(7), replace(FULL, num_threads=4, prefetch_steps=3), 5)
    assert same_steps(plain, busy)


def test_another_seed_or_another_epoch_gives_other_crops_and_orders() -> None:
    store = make_store(6)
    config = replace(FULL, packs_per_step=1)
    first, second = serve(store, config, 2)
    assert sorted(first.packs[0].study_ids) == sorted(second.packs[0].study_ids)
    assert first.packs[0].study_ids != second.packs[0].study_ids
    (other,) = serve(store, config, 1, seed=6)
    assert not same_value(first.packs[0], other.packs[0])


def test_a_study_is_cropped_and_flipped_anew_in_every_epoch() -> None:
    config = StreamConfig(studies_per_step=1, crop_vox=(4, 4, 4), flip_axes=[0, 1, 2])
    steps = serve(MemoryStore([make_study(3)]), config, 8)
    assert [step.epoch for step in steps] == list(range(8))
    places = {tuple(step.packs[0].position_mm_T3[0].tolist()) for step in steps}
    assert len(places) > 1


def test_packs_of_a_step_are_balanced_by_their_tokens() -> None:
    sizes = [
        make_study(n, contrasts=CONTRASTS[: 1 + n % 2 * 3]) for n in (2, 6, 10, 14, 7, 11, 3, 15)
    ]
    config = StreamConfig(studies_per_step=8, packs_per_step=4, flip_axes=[])
    (step,) = serve(MemoryStore(sizes), config, 1)
    tokens = [pack.num_tokens for pack in step.packs]
    largest_study = max(length for pack in step.packs for length in pack.lengths)
    assert max(tokens) - min(tokens) <= largest_study
    assert max(tokens) <= 4 / 3 * max(sum(tokens) / 4, largest_study) * 1.1


def test_epoch_of_a_step_is_that_of_its_first_study_on_every_rank() -> None:
    config = StreamConfig(studies_per_step=3, packs_per_step=2)
    for rank in range(2):
        steps = serve(make_store(5), config, 5, rank=rank, world_size=2)
        assert [step.epoch for step in steps] == [0, 0, 1, 1, 2]


def test_split_and_contrasts_choose_what_is_served(caplog: pytest.LogCaptureFixture) -> None:
    studies = [
        make_study(0, contrasts=("T1w",)),
        make_study(1, contrasts=("T1w", "FLAIR")),
        make_study(2, contrasts=("FLAIR", "DWI")),
        make_study(3, contrasts=("DWI",), split="val"),
    ]
    config = StreamConfig(studies_per_step=2, contrasts=["DWI", "FLAIR"])
    store: Any = MemoryStore(studies)
    with caplog.at_level(logging.INFO), StudyStream(store, config, PATCH, seed=0) as stream:
        assert stream.num_studies == 2
        assert stream.steps_per_epoch == 1.0
        pack = next(stream).packs[0]
    assert "2 studies served, 1 left out" in caplog.text
    found = dict(zip(pack.study_ids, pack.contrasts, strict=True))
    assert found == {"s001": ("FLAIR",), "s002": ("FLAIR", "DWI")}
    assert all(names in {("FLAIR",), ("FLAIR", "DWI")} for _, names in store.reads)


def test_a_dropped_contrast_is_never_read() -> None:
    store = make_store(8)
    config = StreamConfig(studies_per_step=4, drop_contrasts=True, prefetch_steps=0)
    served = [
        (study_id, names)
        for step in serve(store, config, 6)
        for study_id, names in zip(step.packs[0].study_ids, step.packs[0].contrasts, strict=True)
    ]
    assert sorted(served) == sorted(store.reads)
    whole = {record.study_id: record.contrasts for record in store.records}
    assert any(names != whole[study_id] for study_id, names in served)


def test_labels_are_served_only_when_asked_for() -> None:
    (with_labels,) = serve(make_store(4), StreamConfig(labels=True), 1)
    pack = with_labels.packs[0]
    for study_id, label, grid in zip(pack.study_ids, pack.labels, pack.patch_grids, strict=True):
        if study_id in ("s000", "s003"):
            assert label is None
        else:
            assert label is not None
            assert label.shape == tuple(4 * g for g in grid)
    (without,) = serve(make_store(4), StreamConfig(), 1)
    assert without.packs[0].labels == ()


def test_every_crop_has_the_asked_shape() -> None:
    config = StreamConfig(crop_vox=(12, 12, 12), drop_empty=False)
    for step in serve(make_store(6), config, 3):
        assert set(step.packs[0].patch_grids) == {(3, 3, 3)}
        assert set(step.packs[0].volume_lengths) == {27}


def test_a_store_error_reaches_the_consumer_untouched_and_is_not_passed_over() -> None:
    store = make_store(4, damaged=["s002"])
    config = StreamConfig(studies_per_step=1, prefetch_steps=2)
    served: list[str] = []
    with StudyStream(store, config, PATCH, seed=5) as stream:
        for _ in range(2):
            with pytest.raises(ShardError, match="shard memory, study s002, member T1w"):
                while True:
                    served.extend(next(stream).packs[0].study_ids)
    assert "s002" not in served
    assert len(served) == len(set(served))


def test_closing_joins_the_threads_and_ends_the_stream() -> None:
    before = threading.active_count()
    store = make_store(8)
    stream = StudyStream(store, StreamConfig(num_threads=3, prefetch_steps=5), PATCH, seed=0)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert threading.current_thread().name not in store.threads
    with pytest.raises(ValueError, match="closed stream"):
        next(stream)


def test_closing_drops_what_was_queued() -> None:
    store = make_store(8, delay_s=0.1)
    config = StreamConfig(studies_per_step=4, num_threads=1, prefetch_steps=20)
    with StudyStream(store, config, PATCH, seed=0) as stream:
        next(stream)
    assert len(store.reads) < 20


def test_prefetching_stays_within_its_window() -> None:
    store = make_store(8)
    config = StreamConfig(studies_per_step=2, prefetch_steps=3)
    with StudyStream(store, config, PATCH, seed=0) as stream:
        assert store.reads == []
        for step in range(4):
            # A new loop over the stream goes on where the last one stopped.
            assert next(iter(stream)).step == step
            deadline = time.monotonic() + 5
            while len(store.reads) < 2 * (step + 1 + 3) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.02)
            assert len(store.reads) == 2 * (step + 1 + 3)


def test_data_wait_is_what_the_consumer_waited() -> None:
    store = make_store(4, delay_s=0.1)
    config = StreamConfig(studies_per_step=1, num_threads=1, prefetch_steps=1)
    with StudyStream(store, config, PATCH, seed=0) as stream:
        first_wait_s = next(stream).data_wait_s
        time.sleep(0.5)
        assert first_wait_s >= 0.1
        assert next(stream).data_wait_s < first_wait_s / 2


def test_state_survives_json_and_ignores_threads() -> None:
    stream = StudyStream(make_store(4), FULL, PATCH, seed=3)
    state = json.loads(json.dumps(stream.state_dict(17)))
    assert state["next_step"] == 17
    faster = replace(FULL, num_threads=8, prefetch_steps=7)
    StudyStream(make_store(4), faster, PATCH, seed=3, world_size=4, rank=2).check_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"store": make_store(5)}, "fingerprint was 'memory-s000-s001-s002-s003'"),
        ({"patch_vox": (8, 8, 8)}, r"patch_vox was \[4, 4, 4\], is \[8, 8, 8\]"),
        ({"config": replace(FULL, studies_per_step=8)}, "stream.studies_per_step was 6, is 8"),
        (
            {"config": replace(FULL, crop_vox=(8, 8, 4))},
            r"stream.crop_vox was \[8, 8, 8\], is \[8, 8, 4\]",
        ),
    ],
)
def test_a_state_of_another_stream_is_refused(changes: dict[str, Any], message: str) -> None:
    saved = json.loads(json.dumps(StudyStream(make_store(4), FULL, PATCH, seed=3).state_dict(2)))
    settings = {"store": make_store(4), "config": FULL, "patch_vox": PATCH, "seed": 3, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        StudyStream(**settings).check_state(saved)
    assert str(caught.value).count(" was ") == 1
    with pytest.raises(ValueError, match="seed was 'not saved'"):
        StudyStream(**settings).check_state({})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be in 0 .. world_size - 1, got 2 of 2"),
        ({"world_size": 0}, "got 0 of 0"),
        ({"world_size": 3}, r"multiple of the world size \(3\), got 4"),
        ({"start_step": -1}, "start_step must be >= 0, got -1"),
    ],
)
def test_a_place_that_does_not_exist_is_refused(place: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyStream(make_store(4), FULL, PATCH, seed=0, **place)


def test_nothing_to_serve_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(ManifestError, match=r"split 'val'.*'train': 4, 'val': 0, 'test': 0"):
        StudyStream(make_store(4), StreamConfig(split="val"), PATCH, seed=0)
    with pytest.raises(ManifestError, match="SWI"):
        StudyStream(make_store(4), StreamConfig(contrasts=["SWI"]), PATCH, seed=0)
