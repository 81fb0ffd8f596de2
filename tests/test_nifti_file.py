"""Files are read to their last byte: damage, false sizes and bombs are refused, and cheaply."""

import gzip
import os
import stat
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast_datasets.study import VolumeError
from anycontrast_datasets.volume import (
    LoadedVolume,
    read_header,
    read_volume,
    write_volume,
)


def test_a_flipped_bit_anywhere_in_a_gzip_file_is_refused_or_harmless(
    tmp_path: Path,
    same_volume: Callable[[LoadedVolume, LoadedVolume], bool],
    nifti_array: Callable[..., npt.NDArray[Any]],
    nifti_affine: npt.NDArray[np.float64],
) -> None:
    path = tmp_path / "v.nii.gz"
    write_volume(path, nifti_array()[:5, :4, :3], nifti_affine)
    original, content = read_volume(path), path.read_bytes()
    some = np.arange(len(content)) * 8 + np.random.default_rng(1).integers(0, 8, len(content))
    trailer = range(8 * len(content) - 64, 8 * len(content))  # checksum and length: every bit
    harmless = 0
    for position in (*some.tolist(), *trailer):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = read_volume(path)
        except VolumeError:
            continue
        assert same_volume(loaded, original), f"bit {position} changed the volume unnoticed"
        harmless += 1
    assert harmless < 15  # gzip's own header (time, system) and a few unused bits of deflate


@pytest.mark.parametrize("kept", [0, 1, 5, 10, 30, 100, 0.5, 0.9, -9, -8, -5, -1])
def test_cut_gzip_files_are_refused(
    tmp_path: Path,
    kept: float,
    refusal_code: Callable[..., str],
    nifti_array: Callable[..., npt.NDArray[Any]],
    nifti_affine: npt.NDArray[np.float64],
) -> None:
    path = tmp_path / "v.nii.gz"
    write_volume(path, nifti_array(), nifti_affine)
    content = path.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    path.write_bytes(content[:length])
    assert refusal_code(path) in ("truncated", "empty_file", "gzip_corrupt", "header_data_mismatch")


@pytest.mark.parametrize("kept", [0, 4, 347, 352, -1])
def test_cut_plain_files_are_refused(
    plain_nifti: Path, kept: int, refusal_code: Callable[..., str]
) -> None:
    plain_nifti.write_bytes(plain_nifti.read_bytes()[:kept])
    assert refusal_code(plain_nifti) == ("empty_file" if kept == 0 else "truncated")


def test_bytes_after_the_voxels_are_refused(
    plain_nifti: Path, tmp_path: Path, refusal_code: Callable[..., str]
) -> None:
    longer = plain_nifti.read_bytes() + b"\0"
    packed = tmp_path / "longer.nii.gz"
    packed.write_bytes(gzip.compress(longer))
    plain_nifti.write_bytes(longer)
    assert refusal_code(plain_nifti) == refusal_code(packed) == "header_data_mismatch"
    packed.write_bytes(gzip.compress(longer[:-1]) + b"junk")
    assert refusal_code(packed) == "gzip_corrupt"


def test_gzip_of_several_members_is_read_whole(
    plain_nifti: Path, tmp_path: Path, same_volume: Callable[[LoadedVolume, LoadedVolume], bool]
) -> None:
    content = plain_nifti.read_bytes()
    packed = tmp_path / "members.nii.gz"
    packed.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    assert same_volume(read_volume(packed), read_volume(plain_nifti))


# Lies and bombs


@pytest.fixture
def huge_header(plain_nifti: Path, patch_bytes: Callable[..., Path]) -> Callable[..., bytes]:
    """Make the header of `plain_nifti` claim other dimensions."""

    def make(*dims: int) -> bytes:
        patch_bytes(plain_nifti, 40, "8h", len(dims), *dims, *[1] * (7 - len(dims)))
        return plain_nifti.read_bytes()[:352]

    return make


def _measure(call: Callable[[], object]) -> tuple[float, int]:
    tracemalloc.start()
    start = time.monotonic()
    try:
        call()
        return time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reader", [read_header, read_volume])
def test_one_kilobyte_that_claims_15_gb_costs_nothing(
    huge_header: Callable[..., bytes], tmp_path: Path, reader: Callable[[Path], object]
) -> None:
    path = tmp_path / "claim.nii.gz"
    path.write_bytes(gzip.compress(huge_header(2000, 2000, 2000) + os.urandom(700)))

    def attempt() -> None:
        with pytest.raises(VolumeError) as caught:
            reader(path)
        assert caught.value.code == "too_large"

    seconds, peak_bytes = _measure(attempt)
    assert seconds < 1.0
    assert peak_bytes < 2**20


def test_claim_below_the_limit_but_beyond_deflate_is_refused(
    huge_header: Callable[..., bytes], tmp_path: Path, refusal_code: Callable[..., str]
) -> None:
    path = tmp_path / "claim.nii.gz"
    path.write_bytes(gzip.compress(huge_header(600, 600, 600) + os.urandom(700)))
    seconds, peak_bytes = _measure(lambda: refusal_code(path))
    assert refusal_code(path) == "header_data_mismatch"
    assert seconds < 1.0
    assert peak_bytes < 2**20


def _bomb(head: bytes, num_bytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(2**20)
    parts = [packer.compress(head), *(packer.compress(block) for _ in range(num_bytes >> 20))]
    return b"".join([*parts, packer.flush()])


def test_bombs_are_refused_within_their_limits(
    plain_nifti: Path,
    huge_header: Callable[..., bytes],
    tmp_path: Path,
    refusal_code: Callable[..., str],
) -> None:
    small = plain_nifti.read_bytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(_bomb(small, 64 * 2**20))  # small header, huge tail
    seconds, peak_bytes = _measure(lambda: refusal_code(path))
    assert refusal_code(path) == "header_data_mismatch"
    assert peak_bytes < 4 * 2**20
    path.write_bytes(_bomb(huge_header(320, 320, 320), 64 * 2**20))  # honest, too large
    assert refusal_code(path, max_bytes=32 * 2**20) == "too_large"
    assert seconds < 2.0


def test_limit_counts_the_float32_array_too(
    tmp_path: Path,
    refusal_code: Callable[..., str],
    nifti_array: Callable[..., npt.NDArray[Any]],
    nifti_affine: npt.NDArray[np.float64],
) -> None:
    path = tmp_path / "v.nii"
    write_volume(path, nifti_array("uint8"), nifti_affine)
    assert refusal_code(path, max_bytes=4 * 504 - 1) == "too_large"
    read_volume(path, max_bytes=4 * 504)


def test_other_files_are_refused_by_kind(tmp_path: Path, refusal_code: Callable[..., str]) -> None:
    assert refusal_code(tmp_path / "absent.nii") == "missing_file"
    (tmp_path / "folder.nii").mkdir()
    assert refusal_code(tmp_path / "folder.nii") == "missing_file"
    os.mkfifo(tmp_path / "pipe.nii")
    assert stat.S_ISFIFO((tmp_path / "pipe.nii").stat().st_mode)
    assert refusal_code(tmp_path / "pipe.nii") == "missing_file"  # and does not wait for a writer
    (tmp_path / "pair.hdr").write_bytes(bytes(348))
    assert refusal_code(tmp_path / "pair.hdr") == "unsupported_format"
    (tmp_path / "text.nii").write_bytes(b"<html>" * 100)
    assert refusal_code(tmp_path / "text.nii") == "unreadable_header"
    (tmp_path / "text.nii.gz").write_bytes(b"<html>" * 100)
    assert refusal_code(tmp_path / "text.nii.gz") == "gzip_corrupt"
