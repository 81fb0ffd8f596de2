"""Duplicates: equal voxels, thumbnails that survive what copies go through, and the pair search."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from anycontrast_datasets.duplicates import (
    NEAR_BITS,
    image_hash,
    join_duplicates,
    near_duplicates,
    voxels_sha256,
)
from anycontrast_datasets.study import Study, Volume
from anycontrast_datasets.work_copy import make_work_copy

FloatArray = npt.NDArray[np.float32]


def head(seed: int, shape: tuple[int, int, int] = (60, 70, 56)) -> FloatArray:
    """A smooth random object in an ellipsoid, zero outside."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum((axis / 0.8) ** 2 for axis in axes) < 1
    folds = ndimage.gaussian_filter(rng.standard_normal(shape), 3.0)
    return np.where(inside, 500 + 200 * folds / folds.std(), 0.0).astype(np.float32)


def bits_of(array: FloatArray, spacing: float = 3.0) -> str:
    return image_hash(make_work_copy(np.ascontiguousarray(array), (spacing,) * 3))


def differ(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def test_voxel_hash_follows_shape_and_values_only() -> None:
    voxels = head(1)
    assert voxels_sha256(voxels) == voxels_sha256(voxels.copy())
    assert voxels_sha256(voxels) != voxels_sha256(voxels.reshape(70, 60, 56))
    changed = voxels.copy()
    changed[30, 30, 30] += 1
    assert voxels_sha256(changed) != voxels_sha256(voxels)


def test_copies_stay_near_and_other_heads_far() -> None:
    voxels = head(1)
    own = bits_of(voxels)
    assert len(own) == 128
    rng = np.random.default_rng(5)
    eight_bit = np.round(voxels / voxels.max() * 255).astype(np.float32)
    noisy = voxels + np.where(voxels > 0, rng.normal(0, 5, voxels.shape), 0).astype(np.float32)
    padded = np.pad(voxels, 7)
    for copy in (voxels * 3, eight_bit, noisy, padded):
        assert differ(own, bits_of(copy)) <= NEAR_BITS
    assert differ(own, bits_of(np.repeat(np.repeat(np.repeat(voxels, 2, 0), 2, 1), 2, 2), 1.5)) == 0
    assert min(differ(own, bits_of(head(seed))) for seed in range(2, 8)) > 5 * NEAR_BITS


def test_an_empty_picture_has_no_hash() -> None:
    assert bits_of(np.zeros((20, 20, 20), dtype=np.float32)) == ""


def brute(hashes: list[str], max_bits: int) -> list[tuple[int, int, int]]:
    numbers = [int(text, 16) if text else None for text in hashes]
    pairs = []
    for i, a in enumerate(numbers):
        for j in range(i + 1, len(numbers)):
            b = numbers[j]
            if a is not None and b is not None and (a ^ b).bit_count() <= max_bits:
                pairs.append((i, j, (a ^ b).bit_count()))
    return pairs


@pytest.mark.parametrize("max_bits", [0, 3, 12])
def test_search_finds_what_trying_all_pairs_finds(max_bits: int) -> None:
    rng = np.random.default_rng(0)
    base = rng.random(512) < 0.4
    bits = base ^ (rng.random((400, 512)) < 0.08)
    bits[100:180] = bits[50]  # a bucket larger than the search walks place by place
    for row in range(180, 260):
        bits[row] = bits[row - 180]
        bits[row, rng.integers(0, 512, rng.integers(0, 16))] ^= True
    hashes = [np.packbits(row).tobytes().hex() for row in bits]
    hashes[7] = ""
    found = near_duplicates(hashes, max_bits)
    assert found == brute(hashes, max_bits)
    assert len(found) > 3000


def test_few_and_malformed_hashes() -> None:
    assert near_duplicates([]) == near_duplicates(["", ""]) == near_duplicates(["0" * 128]) == []
    with pytest.raises(ValueError, match="hash 1 must have 128"):
        near_duplicates(["0" * 128, "abc"])


def study(subject: str, session: str, split: str, *contents: str) -> Study:
    names = ("T1w", "T2w", "FLAIR")
    volumes = tuple(
        Volume(
            contrast=name,
            location="x",
            shape=(2, 2, 2),
            spacing_mm=(1.0, 1.0, 1.0),
            affine=((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0)),
            voxels_sha256=content,
        )
        for name, content in zip(names, contents, strict=False)
    )
    return Study(
        study_id=f"{subject}{session}",
        dataset="d",
        subject_id=subject,
        session_id=session,
        split=split,
        volumes=volumes,
    )


def test_subjects_that_share_voxels_share_a_split_and_are_flagged() -> None:
    studies = [
        study("a", "1", "test", "x", "only"),
        study("b", "1", "val", "x", "y"),
        study("c", "1", "train", "y"),
        study("d", "1", "test", "z"),
        study("d", "2", "test", "z"),
        study("e", "1", "val", ""),
        study("f", "1", "test", ""),
    ]
    joined = {s.study_id: s for s in join_duplicates(studies)}
    assert [joined[i].split for i in ("a1", "b1", "c1")] == ["train"] * 3
    assert [joined[i].split for i in ("d1", "d2", "e1", "f1")] == ["test", "test", "val", "test"]
    flags = {i: [volume.flags for volume in s.volumes] for i, s in joined.items()}
    assert flags["a1"] == [("duplicate_of_other_subject",), ()]
    assert flags["c1"] == [("duplicate_of_other_subject",)]
    assert flags["d2"] == [("duplicate_of_other_session",)]
    assert flags["e1"] == [()]
    assert join_duplicates(studies[::-1]) == join_duplicates(studies)[::-1]
    assert replace(joined["d1"], volumes=studies[3].volumes) == studies[3]
