"""Packs read straight from a store are, bit for bit, those that reading and packing make."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from anycontrast_datasets.augment import StudyView
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.pack_direct import StudyRequest, plan_direct_pack
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.codec import CodecName, encode
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.store.slabs import decode_planes, decode_slabs
from anycontrast_datasets.stream import StudyStream
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import ShardError, StudyArrays, VolumeRecord

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((32, 16, 48), (16, 16, 16), (8, 24, 40), (24, 8, 16))
SETS = (("T1w", "FLAIR", "ADC"), ("T2w", "T1w"), ("T1w",), ("T1w", "FLAIR"))


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, study_of: Callable[..., StudyArrays]
) -> StudyStore:
    """Four studies with background; the first volume of the last one has a single block."""
    folder = tmp_path_factory.mktemp("direct") / "shards"
    studies = []
    for number, (shape, names) in enumerate(zip(SHAPES, SETS, strict=True)):
        rng = np.random.default_rng(number)
        codes = {}
        for name in names:
            blocks = rng.random([n // 8 for n in shape]) < 0.6
            if number == 3 and name == "T1w":
                blocks = np.arange(6).reshape(3, 1, 2) == 4
            mask = blocks.repeat(8, 0).repeat(8, 1).repeat(8, 2)
            codes[name] = (rng.integers(1, 4000, size=shape) * mask).astype(np.int16)
        made = study_of(codes, f"case-{number}")
        volumes = tuple(with_bitmap(v, codes[v.contrast]) for v in made.record.volumes)
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


def assert_same(one: PackedBatch, two: PackedBatch) -> None:
    for field in fields(PackedBatch):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        elif field.name != "draws":
            assert a == b, field.name


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 8, 16), (16, 16, 16), (8, 8, 40)])
@pytest.mark.parametrize("drop_empty", [True, False])
def test_the_tokens_are_those_of_the_long_way(
    store: StudyStore, patch: Shape, drop_empty: bool
) -> None:
    requests = [request_of(store, 1), request_of(store, 0, contrasts=("T1w", "ADC"))]
    requests.append(request_of(store, 2))
    direct = plan_direct_pack(store, requests, patch, drop_empty=drop_empty)
    if direct is None:
        assert drop_empty
        short = [pack_studies([store.read(r.index)], patch, epochs=[0]) for r in requests]
        assert any(n <= 2 for batch in short for n in batch.volume_lengths)
        return
    for number in (2, 0, 1):
        direct.read(number)
    assert_same(direct.finish(), packed_the_long_way(store, requests, patch, drop_empty))


@pytest.mark.parametrize(
    "flips", [((0,),), ((1,),), ((2,),), ((0, 1, 2),), ((), (0,), (0, 2), (1,))]
)
def test_flips_and_several_draws_are_those_of_the_long_way(
    store: StudyStore, flips: tuple[tuple[int, ...], ...]
) -> None:
    requests = [request_of(store, 0, flips), request_of(store, 2, flips)]
    direct = plan_direct_pack(store, requests, (8, 8, 8))
    assert direct is not None
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(direct.read, range(2)))
    batch = direct.finish()
    assert_same(batch, packed_the_long_way(store, requests, (8, 8, 8), True))
    assert batch.draws == tuple(range(len(flips))) * 2


def test_a_pack_is_finished_without_what_could_not_be_read(store: StudyStore) -> None:
    requests = [request_of(store, n, ((), (0,))) for n in (0, 1, 2)]
    direct = plan_direct_pack(store, requests, (8, 8, 8))
    assert direct is not None
    direct.read(0)
    direct.read(2)
    expected = packed_the_long_way(store, [requests[0], requests[2]], (8, 8, 8), True)
    assert_same(direct.finish([0, 2]), expected)


def test_errors_of_the_store_come_through(store: StudyStore, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_arrays(folder, [[store.read(n) for n in range(2)]])
    copy = open_store(folder)
    direct = plan_direct_pack(copy, [request_of(copy, 1)], (8, 8, 8))
    assert direct is not None
    path = folder / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[-12000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="case-1"):
        direct.read(0)


class WithoutSlabs:
    """A store that hands out whole studies only."""


def test_what_a_record_does_not_tell_is_left_to_the_long_way(store: StudyStore) -> None:
    whole = [request_of(store, 0)]
    assert plan_direct_pack(WithoutSlabs(), whole, (8, 8, 8)) is None
    assert plan_direct_pack(store, whole, (4, 8, 8)) is None
    assert plan_direct_pack(store, [*whole, request_of(store, 3)], (8, 8, 8)) is None
    assert plan_direct_pack(store, [request_of(store, 3)], (8, 8, 8), drop_empty=False) is not None
    assert plan_direct_pack(store, [request_of(store, 2)], (16, 16, 16)) is not None
    flipped = request_of(store, 2, ((0,),))
    assert plan_direct_pack(store, [flipped], (16, 16, 16)) is None
    bare = request_of(store, 0)
    volumes = tuple(VolumeRecord(**{**vars(v), "occupancy": ""}) for v in bare.record.volumes)
    record = type(bare.record)(**{**vars(bare.record), "volumes": volumes})
    bare = StudyRequest(**{**vars(bare), "record": record})
    assert plan_direct_pack(store, [bare], (8, 8, 8)) is None


def slabs_of(
    payload: bytes | bytearray, shape: Shape, planes: int
) -> Iterator[npt.NDArray[np.int16]]:
    return (slab.copy() for slab in decode_slabs(memoryview(payload), shape, planes))


@pytest.mark.parametrize("shape", [(64, 96, 80), (33, 96, 80), (2, 2, 2)])
@pytest.mark.parametrize("planes", [1, 16, 100])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_slabs_put_together_are_the_volume(shape: Shape, planes: int, kind: str) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(-32768, 32767, size=shape).astype(np.int16)
    if kind == "smooth":
        codes >>= 9
    for payload in (encode(codes), bytearray(encode(codes)), encode(codes, name="lz4", level=9)):
        slabs = list(slabs_of(payload, shape, planes))
        assert [len(s) for s in slabs[:-1]] == [planes] * (len(slabs) - 1)
        np.testing.assert_array_equal(np.concatenate(slabs), codes)


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
    payload = encode(np.zeros((64, 96, 80), dtype=np.int16))
    for damaged in (payload[:-1], payload[:10], payload[:4] + b"\x01\0\0\0" + payload[8:]):
        with pytest.raises(ValueError, match="blosc frame"):
            list(slabs_of(damaged, (64, 96, 80), 16))
    with pytest.raises(ValueError, match="header says"):
        list(slabs_of(payload, (64, 96, 82), 16))
    twisted = bytearray(encode(np.arange(64 * 96 * 80, dtype=np.int16).reshape(64, 96, 80)))
    twisted[20:24] = twisted[16:20]
    with pytest.raises(ValueError, match="blosc"):
        list(slabs_of(twisted, (64, 96, 80), 16))


@pytest.mark.parametrize("flip_axes", [[0], [0, 1, 2]])
def test_a_stream_serves_the_same_with_and_without_slabs(
    store: StudyStore, flip_axes: list[int]
) -> None:
    config = StreamConfig(studies_per_step=3, flip_axes=flip_axes, draws_per_study=2)
    served = []
    for source in (store, PlainStore(store)):
        with StudyStream(source, config, (8, 8, 8), seed=5) as stream:
            served.append([next(stream).packs[0] for _ in range(6)])
    for one, two in zip(*served, strict=True):
        assert_same(one, two)
        assert one.draws == two.draws


class PlainStore:
    """Another store's studies, whole only."""

    def __init__(self, store: StudyStore) -> None:
        self.records = store.records
        self.fingerprint = store.fingerprint
        self.read = store.read
        self.read_crop = store.read_crop
        self.read_patches = store.read_patches
        self.verify = store.verify
        self.close = store.close

    def __len__(self) -> int:
        return len(self.records)
