"""Grouped patches give back the patches of the volume, and nothing damaged."""

import numpy as np
import numpy.typing as npt
import pytest

from anycontrast.bench.patch_groups import GROUP_PATCHES, decode_groups, encode_groups
from anycontrast_datasets.store.partial import gather_patches
from anycontrast_datasets.study import ShardError

PATCH = (4, 4, 8)


@pytest.fixture
def codes() -> npt.NDArray[np.int16]:
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 4096, (18, 16, 24)).astype(np.int16)
    codes[:8] = 0
    return codes


def test_groups_hold_every_patch_that_is_not_empty_once(codes: npt.NDArray[np.int16]) -> None:
    member, table = encode_groups(codes, PATCH, seed=1)
    assert sorted(table.order_N) == list(range(2 * 4 * 3, 5 * 4 * 3))
    assert not np.array_equal(table.order_N, np.sort(table.order_N)), "shuffled"
    assert len(table.group_bytes) == -(-len(table.order_N) // GROUP_PATCHES)
    out = np.empty((len(table.order_N), 128), dtype=np.int16)
    index = decode_groups(member, table, range(len(table.group_bytes)), out)
    np.testing.assert_array_equal(out, gather_patches(codes, PATCH, index))


def test_some_groups_fill_the_first_rows(codes: npt.NDArray[np.int16]) -> None:
    member, table = encode_groups(codes, PATCH, seed=1, codec="lz4")
    out = np.full((40, 128), -7, dtype=np.int16)
    index = decode_groups(member, table, [2, 0], out)
    assert len(index) == len(table.order_N) - GROUP_PATCHES
    np.testing.assert_array_equal(out[: len(index)], gather_patches(codes, PATCH, index))
    assert (out[len(index) :] == -7).all()
    assert len(decode_groups(member, table, [], out)) == 0


def test_damaged_group_is_found_and_others_are_read(codes: npt.NDArray[np.int16]) -> None:
    member, table = encode_groups(codes, PATCH, seed=1)
    damaged = bytearray(member)
    damaged[table.offsets[1] + 40] ^= 1
    out = np.empty((64, 128), dtype=np.int16)
    with pytest.raises(ShardError, match="patch group 1"):
        decode_groups(bytes(damaged), table, [0, 1], out)
    decode_groups(bytes(damaged), table, [0, 2], out)
