"""The Zarr store: what was written comes back to everyone, and nothing else passes for it."""

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.store.byte_source import LocalSource
from anycontrast_datasets.store.cache import CacheConfig
from anycontrast_datasets.store.partial import crop_arrays, gather_patches, patch_grid
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.store.zarr_config import ZarrConfig
from anycontrast_datasets.store.zarr_store import ZarrStore
from anycontrast_datasets.store.zarr_writer import write_zarr_store
from anycontrast_datasets.study import ShardError, StudyArrays

SETS = (("T1w", "FLAIR", "ADC"), ("T2w",), ("T1wCE", "T2starw"))
SHAPES = ((24, 40, 33), (16, 16, 16), (40, 24, 24))
Studies = list[StudyArrays]


@pytest.fixture(scope="module")
def studies(study_of: Callable[..., StudyArrays]) -> Studies:
    made = []
    for number, (names, shape) in enumerate(zip(SETS, SHAPES, strict=True)):
        rng = np.random.default_rng(number)
        codes = {
            name: (rng.integers(1, 4096, shape) * (rng.random(shape) < 0.7)).astype(np.int16)
            for name in names
        }
        arrays = study_of(codes, f"case-{number}")
        if number == 0:
            label = (rng.random(shape) < 0.1).astype(np.uint8) * 3
            record = study_of(codes, "case-0", label=label).record
            arrays = StudyArrays(replace(record, label_values=(3,)), codes, label)
        made.append(arrays)
    return made


@pytest.fixture(scope="module")
def pristine(studies: Studies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume store `shards`, and `zarr` made from it."""
    root = tmp_path_factory.mktemp("stores")
    write_arrays(root / "shards", [studies])
    write_zarr_store(open_store(root / "shards"), root / "zarr", ZarrConfig(chunk_vox=16))
    return root


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine / "zarr", tmp_path / "zarr")


class CountingSource(LocalSource):
    """Counts the bytes asked for."""

    num_bytes = 0

    def read(self, name: str, start: int, stop: int, **options: Any) -> memoryview:
        self.num_bytes += stop - start
        return super().read(name, start, stop, **options)


def assert_same(read: StudyArrays, written: StudyArrays) -> None:
    assert list(read.codes) == list(written.codes) and read.record == written.record
    for name, codes in written.codes.items():
        assert read.codes[name].dtype == np.int16 and read.codes[name].flags.c_contiguous
        np.testing.assert_array_equal(read.codes[name], codes)


@pytest.mark.parametrize("options", [{}, {"chunk_vox": 0, "codec": "lz4", "num_levels": 1}])
def test_every_study_comes_back_to_the_bit(
    pristine: Path, studies: Studies, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = open_store(pristine / "shards")
    write_zarr_store(source, tmp_path / "zarr", ZarrConfig(**options))
    store = open_store(tmp_path / "zarr")
    assert isinstance(store, ZarrStore) and len(store) == 3
    assert store.fingerprint == source.fingerprint
    assert list(store.records) == list(source.records)
    assert [r.contrasts for r in store.records] == list(SETS)
    for number, written in enumerate(studies):
        assert_same(store.read(number), written)
        read = store.read(number, label=True)
        assert (read.label is None) == (written.label is None)
        if written.label is not None:
            np.testing.assert_array_equal(read.label, written.label)
    assert store.verify() == []


def test_named_contrasts_and_slots(pristine: Path, studies: Studies) -> None:
    store = open_store(pristine / "zarr")
    slots = {name: np.full(24 * 40 * 33 + 7, -5, dtype=np.int16) for name in SETS[0]}
    read = store.read(0, contrasts=("ADC", "T1w"), out=slots)
    assert list(read.codes) == ["T1w", "ADC"] == list(read.record.contrasts)
    np.testing.assert_array_equal(read.codes["ADC"], studies[0].codes["ADC"])
    assert np.shares_memory(read.codes["ADC"], slots["ADC"]) and slots["FLAIR"][0] == -5
    with pytest.raises(ShardError, match=r"case-0: has \['T1w'"):
        store.read(0, contrasts=("T2w",))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.read(index)


def open_quietly(path: Path) -> Any:
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return zarr.open_group(str(path), mode="r")


def test_zarr_python_reads_the_same(pristine: Path, studies: Studies) -> None:
    for number, written in enumerate(studies):
        group = open_quietly(pristine / "zarr" / "studies.zarr" / f"case-{number}")
        assert group.metadata.consolidated_metadata is not None
        assert group.attrs["anycontrast"]["study_id"] == f"case-{number}"
        for name, codes in written.codes.items():
            np.testing.assert_array_equal(group[f"{name}/0"][...], codes)
            assert group[f"{name}/1"].shape == tuple(-(-n // 2) for n in codes.shape)
        if written.label is not None:
            label = group["T1w/labels/label/0"][...]
            np.testing.assert_array_equal(label, written.label)
            half = group["T1w/labels/label/1"][...]
            np.testing.assert_array_equal(half, written.label[::2, ::2, ::2])
    root = open_quietly(pristine / "zarr" / "studies.zarr")
    assert sorted(root.group_keys()) == ["case-0", "case-1", "case-2"]


def test_coarse_level_is_the_mean_of_eight(pristine: Path, studies: Studies) -> None:
    codes = studies[1].codes["T2w"]
    coarse = open_quietly(pristine / "zarr" / "studies.zarr" / "case-1")["T2w/1"][...]
    mean = codes.reshape(8, 2, 8, 2, 8, 2).mean(axis=(1, 3, 5))
    assert np.abs(coarse - mean).max() <= 0.5


def test_tensorstore_reads_the_same(pristine: Path, studies: Studies) -> None:
    import tensorstore

    for number, written in enumerate(studies):
        for name, codes in written.codes.items():
            path = pristine / "zarr" / "studies.zarr" / f"case-{number}" / name / "0"
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            array = tensorstore.open(spec, open=True, read=True).result()
            assert array.domain.labels == ("x", "y", "z")
            np.testing.assert_array_equal(array.read().result(), codes)


def test_crops_equal_those_of_the_whole_study(pristine: Path, studies: Studies) -> None:
    store = open_store(pristine / "zarr")
    rng = np.random.default_rng(0)
    for _ in range(30):
        start = tuple(int(n) for n in rng.integers(-5, 20, 3))
        size = tuple(int(n) for n in rng.integers(8, 30, 3))
        read = store.read_crop(0, start, size, label=True)  # type: ignore[arg-type]
        expected = crop_arrays(studies[0], start, size)
        assert_same(read, expected)
        np.testing.assert_array_equal(read.label, expected.label)
    with pytest.raises(ValueError, match="outside"):
        store.read_crop(0, (24, 0, 0), (1, 1, 1))


def test_crop_reads_only_the_chunks_it_touches(pristine: Path) -> None:
    source = CountingSource(pristine / "zarr")
    store = ZarrStore(source)
    store.read(0, contrasts=["T1w"])
    whole, source.num_bytes = source.num_bytes, 0
    store.read_crop(0, (0, 0, 0), (12, 14, 11), contrasts=["T1w"])
    assert 0 < source.num_bytes < whole / 10, "one chunk of 2 x 3 x 3"


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (5, 7, 40)])
def test_patches_equal_those_of_the_whole_volume(
    pristine: Path, studies: Studies, patch: tuple[int, int, int]
) -> None:
    store = open_store(pristine / "zarr")
    total = int(np.prod(patch_grid(SHAPES[0], patch)))
    rng = np.random.default_rng(3)
    for count in (1, max(total // 3, 1), total):
        index = {name: rng.permutation(total)[:count] for name in ("ADC", "T1w")}
        read = store.read_patches(0, patch, index)
        assert list(read) == ["T1w", "ADC"]
        for name, patches in read.items():
            expected = gather_patches(studies[0].codes[name], patch, index[name])
            np.testing.assert_array_equal(patches, expected)
    with pytest.raises(ValueError, match="indices"):
        store.read_patches(0, patch, {"T1w": np.array([total])})


def test_one_patch_reads_one_chunk(pristine: Path) -> None:
    source = CountingSource(pristine / "zarr")
    ZarrStore(source).read_patches(0, (8, 8, 8), {"T1w": np.array([0])})
    assert 0 < source.num_bytes < 2 * 12 * 14 * 11 + 100


def shard_path(folder: Path, study: int, contrast: str) -> Path:
    return folder / "studies.zarr" / f"case-{study}" / contrast / "0" / "c" / "0" / "0" / "0"


@pytest.mark.parametrize("place", [0, 0.3, 0.7, "crc"])
def test_one_flipped_bit_is_found_and_named(folder: Path, place: float | str) -> None:
    path = shard_path(folder, 0, "FLAIR")
    content = bytearray(path.read_bytes())
    index_bytes = 16 * 18 + 4
    last = len(content) - index_bytes - 1
    at = last if isinstance(place, str) else int(place * last)
    content[at] ^= 4
    path.write_bytes(content)
    store = open_store(folder)
    with pytest.raises(ShardError, match=r"case-0, array FLAIR/0, chunk \d+: xxh3.*anycontrast"):
        store.read(0)
    store.read(0, contrasts=["T1w", "ADC"])
    (problem,) = store.verify()
    assert "case-0/FLAIR/0/c/0/0/0" in problem


def test_flipped_bit_in_the_index_of_a_shard_is_found_by_verify(folder: Path) -> None:
    path = shard_path(folder, 0, "T1w")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    (problem,) = open_store(folder).verify()
    assert "case-0/T1w/0/c/0/0/0" in problem


def test_missing_shard_is_no_background(folder: Path) -> None:
    shard_path(folder, 0, "ADC").unlink()
    store = open_store(folder)
    with pytest.raises(ShardError, match="case-0, array ADC/0"):
        store.read(0)
    with pytest.raises(ShardError, match="case-0, array ADC/0"):
        store.read_patches(0, (8, 8, 8), {"ADC": np.array([0])})
    assert "missing" in store.verify()[0]
    # What a Zarr library returns in its place is nothing that could be taken for codes.
    group = open_quietly(folder / "studies.zarr" / "case-0")
    assert (group["ADC/0"][...] == -1).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_cut_shard_is_found(folder: Path, share: float) -> None:
    path = shard_path(folder, 2, "T1wCE")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    store = open_store(folder)
    if share < 0.9:
        with pytest.raises(ShardError, match="case-2, array T1wCE/0"):
            store.read(2)
    assert len(store.verify()) == 1


def test_swapped_contrasts_studies_and_chunks_are_found(folder: Path, studies: Studies) -> None:
    first, second = shard_path(folder, 2, "T1wCE"), shard_path(folder, 2, "T2starw")
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(ShardError, match=r"case-2, array T1wCE/0"):
        open_store(folder).read(2)
    hierarchy = folder / "studies.zarr"
    (hierarchy / "case-0").rename(hierarchy / "other")
    (hierarchy / "case-2").rename(hierarchy / "case-0")
    (hierarchy / "other").rename(hierarchy / "case-2")
    store = open_store(folder)
    for index in (0, 2):
        with pytest.raises(ShardError, match=f"case-{index}"):
            store.read(index)
    assert_same(store.read(1), studies[1])
    assert len(store.verify()) > 4


@pytest.mark.parametrize(
    "hostile",
    [
        {"shape": [10**9, 10**9, 10**9]},
        {"codecs": [{"name": "pickle"}]},
        {"fill_value": 0},
        {"chunk_key_encoding": {"name": "../../../etc"}},
    ],
)
def test_hostile_array_metadata_is_found_and_never_believed(
    folder: Path, studies: Studies, hostile: dict[str, Any]
) -> None:
    path = folder / "studies.zarr" / "case-1" / "T2w" / "0" / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **hostile}))
    store = open_store(folder)
    assert_same(store.read(1), studies[1])
    (problem,) = store.verify()
    assert "case-1/T2w/0/zarr.json" in problem


def test_files_that_the_store_did_not_write_are_found(folder: Path) -> None:
    (folder / "studies.zarr" / "case-1" / "T2w" / "0" / "c" / "9").write_bytes(b"")
    (folder / "studies.zarr" / "case-1" / "link").symlink_to("/etc")
    problems = open_store(folder).verify()
    assert len(problems) == 2 and all("not written by this store" in p for p in problems)
    (folder / "studies.zarr" / "zarr.json").write_text("{}")
    assert len(open_store(folder).verify()) == 3


def rewrite_index(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Replace the index by one that agrees with `dataset.json` but was never written by us."""
    table = pq.read_table(folder / "index.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "index.parquet")
    values = json.loads((folder / "dataset.json").read_text())
    values["index_sha256"] = hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**30, 2**30, 2**30]},
        {"shape": [24, 40]},
        {"shape": [24, 40, -33]},
        {"chunk": [0, 14, 11]},
        {"chunk": [2**20, 14, 11]},
        {"dtype": "object"},
        {"codec": "pickle"},
        {"chunk_bytes": [10**15] * 18},
        {"chunk_bytes": [100] * 17},
        {"chunk_xxh3": []},
        {"study_id": "../../etc"},
        {"contrast": "../../../etc/passwd"},
        {"study_id": "case-9"},
    ],
)
def test_hostile_index_is_refused(folder: Path, change: dict[str, Any]) -> None:
    rewrite_index(folder, lambda rows: rows[0].update(change))
    with pytest.raises(ShardError):
        open_store(folder).read(0)
    with pytest.raises(ShardError):
        open_store(folder).read_crop(0, (0, 0, 0), (8, 8, 8))


def test_hostile_record_makes_nobody_allocate(folder: Path) -> None:
    def grow(rows: list[dict[str, Any]]) -> None:
        for row in rows[:8]:
            row["shape"] = [2**15] * 3
        record = next(row for row in rows if row["record"])
        record["record"] = record["record"].replace("[24,40,33]", str([2**15] * 3))

    rewrite_index(folder, grow)
    with pytest.raises(ShardError, match="at most"):
        open_store(folder).read(0)


def test_contrast_missing_from_the_index_is_found(folder: Path) -> None:
    def drop(rows: list[dict[str, Any]]) -> None:
        rows[:] = [r for r in rows if (r["study_id"], r["contrast"]) != ("case-0", "FLAIR")]

    rewrite_index(folder, drop)
    store = open_store(folder)
    with pytest.raises(ShardError, match=r"case-0: the index must list"):
        store.read(0)
    assert any("must list" in problem for problem in store.verify())


@pytest.mark.parametrize("name", ["dataset.json", "index.parquet"])
def test_missing_or_damaged_table_is_a_clear_error(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match=name.replace(".", r"\.")):
        open_store(folder)
    (folder / name).unlink()
    with pytest.raises(ShardError, match=name.replace(".", r"\.")):
        open_store(folder)


def test_newer_version_is_refused_with_the_remedy(folder: Path) -> None:
    values = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**values, "zarr_version": 99}))
    with pytest.raises(ShardError, match=r"newer than.*upgrade"):
        open_store(folder)


def test_threads_and_a_pickled_store_read_the_same(pristine: Path, studies: Studies) -> None:
    store = pickle.loads(pickle.dumps(open_store(pristine / "zarr")))
    with ThreadPoolExecutor(4) as pool:
        reads = list(pool.map(lambda n: store.read(n % 3), range(30)))
    for number, read in enumerate(reads):
        assert_same(read, studies[number % 3])


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder) + "/", "/zarr-test", recursive=True)
    yield "memory://zarr-test"
    memory.rm("/zarr-test", recursive=True)


def test_address_and_cache_give_the_same(address: str, studies: Studies, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    for store in (open_store(address), open_store(address, cache=cache)):
        for _ in range(2):
            assert_same(store.read(0), studies[0])
        crop = store.read_crop(0, (3, 4, 5), (9, 9, 9))
        assert_same(crop, crop_arrays(studies[0], (3, 4, 5), (9, 9, 9)))
        assert store.verify() == []
        store.close()
    assert len(list((tmp_path / "cache").rglob("*.bytes"))) == 3, (
        "one entry per array that was read"
    )
