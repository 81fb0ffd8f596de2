"""Memory that is used again is never used twice at once."""

import gc
import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch

from anycontrast_datasets.store import slots
from anycontrast_datasets.store.slots import recycled_bytes, scratch_array, scratch_bytes

SIZE = 3 * 2**20


@pytest.fixture(autouse=True)
def nothing_free() -> None:
    """What other tests still held in cycles comes back now, not in the middle of a test."""
    gc.collect()
    slots._free.clear()


def address_of(array: npt.NDArray[np.uint8] | npt.NDArray[np.int16]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_only_when_nothing_refers_to_it() -> None:
    memory = recycled_bytes(SIZE)
    first = address_of(memory)
    tensor = torch.from_numpy(memory.view(np.int16).reshape(-1, 64))
    row = tensor[7:9]
    part = memory.data[5:6]
    del memory, tensor
    gc.collect()
    assert address_of(recycled_bytes(SIZE)) != first
    del row
    gc.collect()
    other = recycled_bytes(SIZE)
    assert address_of(other) != first
    del part
    gc.collect()
    again = [recycled_bytes(SIZE) for _ in range(2)]
    assert first in map(address_of, again)


def test_views_of_views_keep_the_memory() -> None:
    view = recycled_bytes(SIZE).view(np.int16).reshape(-1, 4)[3:].T[1:2]
    gc.collect()
    assert not slots._free
    del view
    gc.collect()
    assert len(slots._free) == 1


def test_much_larger_memory_is_not_wasted_on_a_small_wish_and_little_is_kept() -> None:
    del (held := [recycled_bytes(8 * SIZE)])[:]
    gc.collect()
    assert recycled_bytes(SIZE).base is not slots._free[0]
    assert recycled_bytes(100).size == 100
    held = [recycled_bytes(SIZE) for _ in range(20)]
    del held
    gc.collect()
    assert len(slots._free) <= 8


def test_threads_have_scratch_of_their_own() -> None:
    found: list[npt.NDArray[np.int16]] = []

    def take() -> None:
        found.append(scratch_array((4, 5, 6)))

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    mine = scratch_array((4, 5, 6))
    assert not np.shares_memory(mine, found[0])
    assert np.shares_memory(mine, scratch_array((2, 2, 2)))
    assert not np.shares_memory(mine, scratch_bytes(10))
