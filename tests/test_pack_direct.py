"""Packs read straight from a store hold, bit for bit, the tokens of reading and packing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from anycontrast.models.patches import patch_codes
from anycontrast_datasets.augment import StudyView
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.pack_direct import DirectPack, StudyRequest
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.codec import CodecName, encode
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.store.slabs import decode_planes
from anycontrast_datasets.stream import StudyStream
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import ShardError, StudyArrays, VolumeRecord

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((32, 16, 48), (16, 16, 16), (8, 24, 40), (24, 8, 16), (13, 9, 22))
SETS = (("T1w", "FLAIR", "ADC"), ("T2w", "T1w"), ("T1w",), ("T1w", "FLAIR"), ("ADC", "T1w"))


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, study_of: Callable[..., StudyArrays]
) -> StudyStore:
    """Studies with background; a volume of one is nearly empty, the last has no bitmaps."""
    folder = tmp_path_factory.mktemp("direct") / "shards"
    studies = []
    for number, (shape, names) in enumerate(zip(SHAPES, SETS, strict=True)):
        rng = np.random.default_rng(number)
        codes = {}
        for name in names:
            blocks = rng.random([-(-n // 8) for n in shape]) < 0.6
            if number == 3 and name == "T1w":
                blocks = np.arange(6).reshape(3, 1, 2) == 4
            mask = blocks.repeat(8, 0).repeat(8, 1).repeat(8, 2)[tuple(map(slice, shape))]
            codes[name] = (rng.integers(1, 4000, size=shape) * mask).astype(np.int16)
        made = study_of(codes, f"case-{number}")
        volumes = made.record.volumes
        if number < 4:
            volumes = tuple(with_bitmap(v, codes[v.contrast]) for v in volumes)
        record = type(made.record)(**{**vars(made.record), "volumes": volumes})
        studies.append(StudyArrays(record, codes))
    write_arrays(folder, [studies])
    return open_store(folder)


def with_bitmap(volume: VolumeRecord, codes: npt.NDArray[np.int16]) -> VolumeRecord:
    return VolumeRecord(**{**vars(volume), "occupancy": pack_occupancy(codes)})


def request_of(
    store: StudyStore,
    index: int,
    flips: tuple[tuple[int, ...], ...] = ((),),
    contrasts: tuple[str, ...] | None = None,
) -> StudyRequest:
    record = store.records[index]
    return StudyRequest(
        index=index,
        record=record,
        contrasts=contrasts or record.contrasts,
        epoch=7 + index,
        draws=tuple(range(len(flips))),
        flips=flips,
    )


def packed_the_long_way(
    store: StudyStore, requests: list[StudyRequest], patch: Shape, drop_empty: bool
) -> PackedBatch:
    views, epochs = [], []
    for request in requests:
        arrays = store.read(request.index, contrasts=request.contrasts)
        for flips in request.flips:
            step = tuple(slice(None, None, -1 if axis in flips else 1) for axis in range(3))
            flipped = {name: codes[step] for name, codes in arrays.codes.items()}
            views.append(StudyView(StudyArrays(arrays.record, flipped)))
            epochs.append(request.epoch)
    return pack_studies(views, patch, epochs=epochs, drop_empty=drop_empty)


PLACES = ("codes_B", "volume_start_V", "volume_shape_V3", "flip_V3")
"""Where the voxels lie may differ; which voxels a token has may not."""


def assert_same(one: PackedBatch, two: PackedBatch) -> None:
    assert torch.equal(patch_codes(one), patch_codes(two))
    for field in fields(PackedBatch):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            if field.name not in PLACES:
                assert a.dtype == b.dtype and torch.equal(a, b), field.name
        elif field.name not in ("draws", "labels"):
            assert a == b, field.name


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 8, 16), (16, 16, 16), (8, 8, 40), (4, 5, 7)])
@pytest.mark.parametrize("drop_empty", [True, False])
def test_the_tokens_are_those_of_the_long_way(
    store: StudyStore, patch: Shape, drop_empty: bool
) -> None:
    requests = [request_of(store, 1), request_of(store, 0, contrasts=("T1w", "ADC"))]
    requests += [request_of(store, n) for n in (2, 3, 4)]
    direct = DirectPack(store, requests, patch, drop_empty=drop_empty)
    for number in (2, 0, 4, 1, 3):
        direct.read(number)
    assert_same(direct.finish(), packed_the_long_way(store, requests, patch, drop_empty))


@pytest.mark.parametrize(
    "flips", [((0,),), ((1,),), ((2,),), ((0, 1, 2),), ((), (0,), (0, 2), (1,))]
)
@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (5, 4, 8)])
@pytest.mark.parametrize("drop_empty", [True, False])
def test_flips_and_several_draws_are_those_of_the_long_way(
    store: StudyStore, flips: tuple[tuple[int, ...], ...], patch: Shape, drop_empty: bool
) -> None:
    requests = [request_of(store, n, flips) for n in (0, 2, 3, 4)]
    direct = DirectPack(store, requests, patch, drop_empty=drop_empty)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(direct.read, range(4)))
    batch = direct.finish()
    assert_same(batch, packed_the_long_way(store, requests, patch, drop_empty))
    assert batch.draws == tuple(range(len(flips))) * 4


def test_draws_share_the_voxels_that_were_decoded(store: StudyStore) -> None:
    request = request_of(store, 0, ((), (0,)))
    direct = DirectPack(store, [request], (8, 8, 8))
    direct.read(0)
    batch = direct.finish()
    assert batch.num_volumes == 6
    assert batch.volume_start_V[:3].tolist() == batch.volume_start_V[3:].tolist()
    expected = store.read(0).codes
    found = batch.codes_B.numpy().reshape(3, *request.record.shape)
    for name, codes in zip(request.record.contrasts, found, strict=True):
        np.testing.assert_array_equal(codes, expected[name])


def test_a_pack_is_finished_without_what_could_not_be_read(store: StudyStore) -> None:
    requests = [request_of(store, n, ((), (0,))) for n in (0, 1, 2)]
    direct = DirectPack(store, requests, (8, 8, 8))
    direct.read(1)
    direct.read(2)
    expected = packed_the_long_way(store, [requests[1], requests[2]], (8, 8, 8), True)
    assert_same(direct.finish([1, 2]), expected)
    assert_same(direct.finish([2]), packed_the_long_way(store, requests[2:], (8, 8, 8), True))


def test_errors_of_the_store_come_through(store: StudyStore, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_arrays(folder, [[store.read(n) for n in range(2)]])
    copy = open_store(folder)
    direct = DirectPack(copy, [request_of(copy, 1)], (8, 8, 8))
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[-12000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="case-1"):
        direct.read(0)


@pytest.mark.parametrize("flip_axes", [[0], [0, 1, 2]])
def test_a_stream_serves_what_is_packed_the_long_way(
    store: StudyStore, flip_axes: list[int]
) -> None:
    config = StreamConfig(studies_per_step=3, flip_axes=flip_axes, draws_per_study=2)
    served = []
    # With labels asked for, studies are read, flipped and packed one after the other.
    for options in (config, replace(config, labels=True)):
        with StudyStream(store, options, (8, 8, 8), seed=5) as stream:
            served.append([next(stream).packs[0] for _ in range(6)])
    for one, two in zip(*served, strict=True):
        assert_same(one, two)
        assert one.draws == two.draws
        assert two.flip_V3.sum() == 0
    assert any(pack.flip_V3.any() for pack in served[0])


@pytest.mark.parametrize("codec", ["zstd", "lz4", "lz4hc"])
@pytest.mark.parametrize("is_writeable", [True, False])
def test_planes_are_those_of_the_volume(codec: CodecName, is_writeable: bool) -> None:
    shape = (70, 96, 80)
    codes = np.random.default_rng(3).integers(0, 4000, size=shape).astype(np.int16)
    payload = encode(codes, name=codec)
    for first, stop in [(0, 1), (0, 70), (69, 70), (17, 18), (16, 48), (33, 70), (60, 69)]:
        frame = memoryview(bytearray(payload) if is_writeable else payload)
        found = decode_planes(frame, shape, first, stop)
        np.testing.assert_array_equal(found, codes[first:stop])
    small = codes[:2, :8, :8].copy()
    found = decode_planes(memoryview(encode(small)), (2, 8, 8), 1, 2)
    np.testing.assert_array_equal(found, small[1:])


def test_frames_that_are_not_of_the_volume_are_refused() -> None:
    shape = (64, 96, 80)
    payload = encode(np.zeros(shape, dtype=np.int16))
    for damaged in (payload[:-1], payload[:10], payload[:4] + b"\x01\0\0\0" + payload[8:]):
        with pytest.raises(ValueError, match="blosc frame"):
            decode_planes(memoryview(damaged), shape, 0, 16)
    with pytest.raises(ValueError, match="header says"):
        decode_planes(memoryview(payload), (64, 96, 82), 0, 16)
    twisted = bytearray(encode(np.arange(64 * 96 * 80, dtype=np.int16).reshape(shape)))
    twisted[20:24] = twisted[16:20]
    with pytest.raises(ValueError, match="blosc"):
        decode_planes(memoryview(twisted), shape, 0, 16)
