"""The volume store: what was written comes back, and nothing else passes for it."""

import json
import multiprocessing
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anycontrast_datasets.files import sha256_file
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.record_json import record_to_json
from anycontrast_datasets.shard_commit import write_arrays
from anycontrast_datasets.shard_receipt import ShardReceipt
from anycontrast_datasets.store.codec import checksum, decode_into, encode
from anycontrast_datasets.store.reader import open_store
from anycontrast_datasets.store.volume_index import MemberRow
from anycontrast_datasets.store.volume_writer import ShardWriter
from anycontrast_datasets.study import (
    ShardError,
    StudyArrays,
    StudyRecord,
    VolumeRecord,
)

AFFINE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
Pristine = tuple[Path, list[ShardReceipt]]
SETS = (("T1w", "FLAIR", "ADC"), ("T2w",), ("T1wCE", "T2starw"))
MEMBERS = ("T1w", "FLAIR", "ADC", "label", "study.json")
"""Of case-0, the only study with a label."""


def arrays_of(number: int) -> StudyArrays:
    rng = np.random.default_rng(number)
    shape = (16, 8 * (number + 1), 24)
    codes = {
        name: (rng.integers(1, 4096, size=shape) * (rng.random(shape) < 0.7)).astype(np.int16)
        for name in SETS[number]
    }
    label = (rng.random(shape) < 0.1).astype(np.uint8) * 3 if number == 0 else None
    volumes = tuple(
        VolumeRecord(
            contrast=name,
            scale=0.1,
            offset=-0.1,
            p0_5=1.0,
            p99_5=99.0,
            mean=50.0,
            std=10.0,
            num_foreground=int(np.count_nonzero(codes[name])),
            occupancy=pack_occupancy(codes[name]),
            source_spacing_mm=(1.0, 1.0, 1.0),
        )
        for name in codes
    )
    record = StudyRecord(
        study_id=f"case-{number}",
        dataset="made",
        subject_id=f"case-{number}",
        session_id="1",
        split="train",
        shape=shape,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=AFFINE,
        volumes=volumes,
        has_label=label is not None,
        label_values=(3,) if label is not None else (),
        reference=SETS[number][0],
    )
    return StudyArrays(record=record, codes=codes, label=label)


def write_store(
    folder: Path, layout: tuple[tuple[int, ...], ...] = ((2, 0), (1,)), **codec: Any
) -> list[ShardReceipt]:
    """Write the three studies into shards; the manifest's order is 0, 1, 2."""
    receipts = write_arrays(folder, [[arrays_of(n) for n in group] for group in layout], **codec)
    assert [r.sha256 for r in receipts] == [sha256_file(folder / r.shard) for r in receipts]
    return receipts


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Pristine:
    folder = tmp_path_factory.mktemp("store") / "shards"
    return folder, write_store(folder)


@pytest.fixture
def folder(pristine: Pristine, tmp_path: Path) -> Path:
    return shutil.copytree(pristine[0], tmp_path / "shards")


def member_row(pristine: Pristine, study_id: str, contrast: str) -> MemberRow:
    rows = [row for receipt in pristine[1] for row in receipt.members]
    return next(r for r in rows if (r.study_id, r.contrast) == (study_id, contrast))


def assert_same(read: StudyArrays, written: StudyArrays, *, label: bool = True) -> None:
    assert read.record == written.record
    assert list(read.codes) == list(written.codes)
    for name, codes in written.codes.items():
        assert read.codes[name].dtype == np.int16 and read.codes[name].flags.c_contiguous
        np.testing.assert_array_equal(read.codes[name], codes)
    if label and written.label is not None:
        np.testing.assert_array_equal(read.label, written.label)
    else:
        assert read.label is None


@pytest.mark.parametrize("codec", [{}, {"codec": "lz4", "level": 9}, {"codec": "lz4hc"}])
def test_every_study_comes_back_to_the_bit(tmp_path: Path, codec: dict[str, Any]) -> None:
    write_store(tmp_path / "shards", **codec)
    store = open_store(tmp_path / "shards")
    assert [r.study_id for r in store.records] == ["case-0", "case-1", "case-2"]
    for number in range(3):
        assert_same(store.read(number, label=True), arrays_of(number))
        assert_same(store.read(number), arrays_of(number), label=False)
    assert store.verify() == []


@pytest.mark.parametrize("names", [("T1w",), ("ADC", "T1w"), ("FLAIR", "ADC")])
def test_only_the_named_contrasts_are_read_in_stored_order(
    folder: Path, names: tuple[str, ...]
) -> None:
    read, whole = open_store(folder).read(0, contrasts=names), arrays_of(0)
    kept = [name for name in SETS[0] if name in names]
    assert list(read.codes) == kept == list(read.record.contrasts)
    for name in kept:
        np.testing.assert_array_equal(read.codes[name], whole.codes[name])


@pytest.mark.parametrize("names", [(), ("T2w",), ("T1w", "T2w")])
def test_contrast_that_the_study_has_not_is_an_error(folder: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ShardError, match=r"case-0: has \['T1w'"):
        open_store(folder).read(0, contrasts=names)


@pytest.mark.parametrize("index", [-1, 3])
def test_study_out_of_range(folder: Path, index: int) -> None:
    with pytest.raises(IndexError):
        open_store(folder).read(index)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("member", MEMBERS)
def test_one_flipped_bit_in_any_member_is_found_and_named(
    folder: Path, pristine: Pristine, member: str, place: str
) -> None:
    row = member_row(pristine, "case-0", member)
    at = {"first": 0, "middle": row.bytes // 2, "last": row.bytes - 1}[place]
    path = folder / row.shard
    content = bytearray(path.read_bytes())
    content[row.offset + at] ^= 4
    path.write_bytes(content)
    store = open_store(folder)
    with pytest.raises(ShardError) as caught:
        store.read(0, label=True)
    for word in (row.shard, "case-0", f"member {member}:", row.xxh3_64, "anycontrast shard"):
        assert word in str(caught.value)
    assert len(store.verify()) == 1 and row.shard in store.verify()[0]
    assert_same(store.read(1), arrays_of(1), label=False)


def test_flipped_bit_between_members_is_found_by_verify(folder: Path, pristine: Pristine) -> None:
    row = member_row(pristine, "case-0", "T1w")
    path = folder / row.shard
    content = bytearray(path.read_bytes())
    content[row.offset - 500] ^= 1
    path.write_bytes(content)
    assert_same(open_store(folder).read(0), arrays_of(0), label=False)
    assert len(open_store(folder).verify()) == 1


@pytest.mark.parametrize("hostile", ["../../evil", "link", "renamed", "resized"])
def test_members_that_the_index_does_not_list_are_named(
    folder: Path, pristine: Pristine, hostile: str
) -> None:
    row = member_row(pristine, "case-0", "T1w")
    path = folder / row.shard
    content = bytearray(path.read_bytes())
    member = tarfile.TarInfo("case-0.t1w.i16b2")
    member.size, member.mode = row.bytes, 0o644
    if hostile in ("renamed", "resized"):
        member.name = "../case-0.t1w.i16b2" if hostile == "renamed" else member.name
        member.size += hostile == "resized"
        content[row.offset - 512 : row.offset] = member.tobuf(tarfile.USTAR_FORMAT)
        path.write_bytes(content)
    else:
        member = tarfile.TarInfo(hostile)
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        with tarfile.open(path, "a") as archive:
            archive.addfile(member)
    dataset = json.loads((folder / "dataset.json").read_text())
    for shard in dataset["shards"]:
        shard |= {
            "bytes": (folder / shard["name"]).stat().st_size,
            "sha256": sha256_file(folder / shard["name"]),
        }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    store = open_store(folder)
    (problem,) = store.verify()
    assert problem.startswith(f"shard {row.shard}: holds other members than the index lists")
    assert_same(store.read(0), arrays_of(0), label=False)


@pytest.mark.parametrize("cut", ["in_member", "at_member", "at_study", "tail"])
def test_cut_shard_is_found_at_opening_and_at_reading(
    folder: Path, pristine: Pristine, cut: str
) -> None:
    row = member_row(pristine, "case-0", "FLAIR")
    first = member_row(pristine, "case-0", "T1w")
    keep = {
        "in_member": row.offset + row.bytes // 2,
        "at_member": row.offset - 512,
        "at_study": first.offset - 512,
        "tail": (folder / row.shard).stat().st_size - 1,
    }[cut]
    early = open_store(folder)
    path = folder / row.shard
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match=r"shard-000000\.tar: must have \d+ bytes"):
        open_store(folder)
    assert len(early.verify()) == 1
    if cut != "tail":
        with pytest.raises(ShardError, match=r"case-0.*(ends at|checksum).*anycontrast shard"):
            early.read(0)


def test_missing_shard_is_found_at_opening_and_at_reading(folder: Path) -> None:
    store = open_store(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"case-1.*cannot open"):
        store.read(1)
    assert "missing" in store.verify()[0]
    with pytest.raises(ShardError, match=r"shard-000001\.tar: missing"):
        open_store(folder)


def test_swapped_shards_are_found(folder: Path) -> None:
    size = (folder / "shard-000000.tar").stat().st_size
    other = (folder / "shard-000001.tar").read_bytes()
    (folder / "shard-000000.tar").write_bytes(other.ljust(size, b"\0")[:size])
    with pytest.raises(ShardError, match="case-0"):
        open_store(folder).read(0)


def test_threads_read_the_same(folder: Path) -> None:
    store = open_store(folder)
    with ThreadPoolExecutor(4) as pool:
        reads = list(pool.map(lambda n: store.read(n % 3), range(60)))
    for number, read in enumerate(reads):
        assert_same(read, arrays_of(number % 3), label=False)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_store_travels_to_another_process(folder: Path, method: str) -> None:
    store = open_store(folder)
    store.read(0)
    assert pickle.loads(pickle.dumps(store)).fingerprint == store.fingerprint
    with multiprocessing.get_context(method).Pool(1) as pool:
        record = pool.apply(store.read, (0,)).record
    assert record == arrays_of(0).record


def test_fingerprint_follows_content_and_not_the_layout(tmp_path: Path, pristine: Pristine) -> None:
    write_store(tmp_path / "same", layout=((0,), (2, 1)))
    write_store(tmp_path / "other", layout=((0, 2),))
    same, other = open_store(tmp_path / "same"), open_store(tmp_path / "other")
    assert same.fingerprint == open_store(pristine[0]).fingerprint != other.fingerprint


# webdataset 1.0.2 leaves the last shard to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_webdataset_iterates_the_same_members(folder: Path) -> None:
    import webdataset

    found = {}
    for path in sorted(folder.glob("*.tar")):
        dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        found.update({sample["__key__"]: sample for sample in dataset})
    assert sorted(found) == ["case-0", "case-1", "case-2"]
    for number in range(3):
        arrays, sample = arrays_of(number), found[f"case-{number}"]
        for name, codes in arrays.codes.items():
            out = np.empty_like(codes)
            decode_into(sample[f"{name.lower()}.i16b2"], out)
            np.testing.assert_array_equal(out, codes)
        assert sample["study.json"] == record_to_json(arrays.record).encode()
        assert ("label.u8b2" in sample) == (arrays.label is not None)


def test_record_is_the_last_member_and_the_index_points_at_payloads(
    folder: Path, pristine: Pristine
) -> None:
    for receipt in pristine[1]:
        with tarfile.open(folder / receipt.shard) as tar:
            members = tar.getmembers()
        assert [m.offset_data for m in members] == [r.offset for r in receipt.members]
        assert [m.size for m in members] == [r.bytes for r in receipt.members]
        content = (folder / receipt.shard).read_bytes()
        assert len(content) % 10240 == 0 and not any(content[-1024:])
        for row in receipt.members:
            assert checksum(content[row.offset : row.offset + row.bytes]) == row.xxh3_64


@pytest.mark.parametrize("key", ["Case", "a.b", "../a", "", "a" * 65, "é", "a/b"])
def test_id_that_is_no_key_is_refused_before_anything_is_written(tmp_path: Path, key: str) -> None:
    arrays = arrays_of(1)
    arrays = replace(arrays, record=replace(arrays.record, study_id=key))
    with ShardWriter(tmp_path / "shard-000000.tar") as writer:
        with pytest.raises(ShardError) as caught:
            writer.add(arrays)
        assert caught.value.code == "bad_study_id" and writer.rows == []
    assert list(tmp_path.iterdir()) == []


def test_frame_of_another_size_is_refused_before_decoding() -> None:
    payload = encode(np.arange(512, dtype=np.int16))
    with pytest.raises(ValueError, match="header says"):
        decode_into(payload, np.empty(511, np.int16))
    with pytest.raises(ValueError, match="header says"):
        decode_into(payload[:-1], np.empty(512, np.int16))
    with pytest.raises(ValueError, match="at least"):
        decode_into(b"", np.empty(512, np.int16))


def test_studies_are_decoded_into_the_slots_of_the_caller(folder: Path) -> None:
    store = open_store(folder)
    slots = {name: np.empty(16 * 24 * 24, dtype=np.int16) for names in SETS for name in names}
    for number in range(3):
        read = store.read(number, out=slots)
        assert_same(read, arrays_of(number), label=False)
        assert all(np.shares_memory(read.codes[name], slots[name]) for name in read.codes)
    exact = {"T2w": np.empty((16, 16, 24), dtype=np.int16)}
    assert np.shares_memory(store.read(1, out=exact).codes["T2w"], exact["T2w"])


@pytest.mark.parametrize(
    "slot",
    [
        None,
        np.empty(16 * 16 * 24 - 1, np.int16),
        np.empty(99999, np.uint16),
        np.empty((16, 16, 48), np.int16)[:, :, ::2],
    ],
)
def test_slot_that_does_not_fit_is_refused(folder: Path, slot: Any) -> None:
    with pytest.raises(ValueError, match="`out` must hold"):
        open_store(folder).read(1, out={} if slot is None else {"T2w": slot})


def test_crops_and_patches_are_those_of_the_whole_study(folder: Path) -> None:
    store, whole = open_store(folder), arrays_of(0)
    crop = store.read_crop(0, (-2, 3, 20), (6, 4, 40), contrasts=["ADC"], label=True)
    np.testing.assert_array_equal(crop.codes["ADC"], whole.codes["ADC"][:4, 3:7, 20:])
    assert whole.label is not None
    np.testing.assert_array_equal(crop.label, whole.label[:4, 3:7, 20:])
    assert crop.record.shape == whole.record.shape
    with pytest.raises(ValueError, match="must overlap"):
        store.read_crop(0, (16, 0, 0), (4, 4, 4))
    wanted = {"FLAIR": np.array([5, 0]), "T1w": np.array([], np.int64)}
    patches = store.read_patches(0, (8, 8, 10), wanted)
    assert list(patches) == ["T1w", "FLAIR"] and patches["T1w"].shape == (0, 640)
    padded = np.pad(whole.codes["FLAIR"], ((0, 0), (0, 0), (0, 6)))
    expected = [padded[8:16, :, 20:30].ravel(), padded[:8, :, :10].ravel()]
    np.testing.assert_array_equal(patches["FLAIR"], expected)
    with pytest.raises(ValueError, match="indices must be"):
        store.read_patches(0, (8, 8, 10), {"T1w": np.array([6])})
