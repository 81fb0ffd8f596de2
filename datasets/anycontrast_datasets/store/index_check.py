"""Refuse an index that no writer of ours makes, before any of it is used.

The index and `dataset.json` may come from anyone. Whoever changed both can make their hashes
agree, so every number in them is held against what a real one can be: names that stay in the
store, ranges inside their shard, members of a study in order in one shard, and volumes of a size
that can be, so that nothing here leads out of the folder or asks for memory without end.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from anycontrast_datasets.store.volume_index import AGAIN, RECORD_MEMBER
from anycontrast_datasets.study import ShardError

SHARD_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,80}\.tar")
MAX_SHARD_BYTES = 2**44
MAX_VOXELS = 2**30
"""Of one volume: 1024 along each axis, and the most that one blosc frame of int16 holds."""
MAX_RECORD_BYTES = 2**24
FRAME_OVERHEAD_BYTES = 4096
"""A blosc frame of data that cannot be compressed is this much larger at most."""
_ITEM_BYTES = {"int16": 2, "uint8": 1}

Ints = npt.NDArray[np.int64]


def check_shards(shards: Any, shown: str) -> dict[str, int]:
    """Return shard name -> bytes of the list in `dataset.json`.

    Raises:
        ShardError: If an entry is malformed, a name could lead out of the store, or one repeats.
    """
    try:
        found = {str(s["name"]): int(s["bytes"]) for s in shards}
        hashes = [str(s["sha256"]) for s in shards]
    except (TypeError, KeyError, ValueError) as error:
        raise _refusal(shown, f"the list of shards is malformed ({error})") from error
    for name, num_bytes in found.items():
        if not SHARD_NAME.fullmatch(name):
            raise _refusal(shown, f"{name[:80]!r} is no name of a shard")
        if not 0 <= num_bytes <= MAX_SHARD_BYTES:
            raise _refusal(shown, f"shard {name} cannot have {num_bytes} bytes")
    if len(found) != len(hashes):
        raise _refusal(shown, "a shard is listed twice")
    if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in hashes):
        raise _refusal(shown, "a shard has no sha256")
    return found


def check_index(index: pa.Table, shards: dict[str, int], shown: str) -> Ints:
    """Return the end row of every study after checking all rows.

    Args:
        index: Columns of `INDEX_SCHEMA`.
        shards: Shard name -> bytes, checked.
        shown: The store, for messages.

    Raises:
        ShardError: If a row is not one that a writer of ours makes; names the study.
    """
    is_record = _numpy(pc.equal(index["contrast"], RECORD_MEMBER)).astype(np.bool_)
    ends: Ints = (np.flatnonzero(is_record) + 1).astype(np.int64)
    if index.num_rows != (ends[-1] if len(ends) else 0):
        raise _refusal(shown, "the last study has no record")
    if not len(ends):
        return ends
    start_R, bytes_R = _numpy(index["offset"]), _numpy(index["bytes"])
    problems = {
        "a null value": _has_null(index),
        "a member of another study, or in another shard": _strays(index, ends),
        "a shard that is not listed, or bytes beyond its end": _outside(index, shards),
        "members out of order": _disordered(start_R, bytes_R, is_record),
        "a shape or type that cannot be": _impossible(index, is_record, bytes_R),
    }
    for what, bad_R in problems.items():
        if bad_R.any():
            row = int(np.flatnonzero(bad_R)[0])
            study_id = str(index["study_id"][row].as_py())[:80]
            raise _refusal(shown, f"study {study_id!r} has {what}")
    ids = index["study_id"].take(ends - 1)
    if pc.count_distinct(ids).as_py() != len(ends):
        raise _refusal(shown, "a study is listed twice")
    return ends


def study_spans(index: pa.Table, ends: Ints) -> tuple[Ints, Ints]:
    """Return first byte and end of every study in its shard."""
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    start_R, bytes_R = _numpy(index["offset"]), _numpy(index["bytes"])
    return start_R[starts], start_R[ends - 1] + bytes_R[ends - 1]


def _has_null(index: pa.Table) -> npt.NDArray[np.bool_]:
    bad = np.zeros(index.num_rows, dtype=np.bool_)
    for name in ("shard", "study_id", "contrast", "offset", "bytes", "xxh3_64", "shape", "dtype"):
        bad |= _numpy(pc.is_null(index[name])).astype(np.bool_)
    return bad


def _strays(index: pa.Table, ends: Ints) -> npt.NDArray[np.bool_]:
    last_R = np.repeat(ends - 1, np.diff(ends, prepend=0))
    bad = np.zeros(index.num_rows, dtype=np.bool_)
    for name in ("study_id", "shard"):
        code_R = _numpy(pc.dictionary_encode(index[name]).combine_chunks().indices)
        bad |= code_R != code_R[last_R]
    return bad


def _outside(index: pa.Table, shards: dict[str, int]) -> npt.NDArray[np.bool_]:
    known = pc.index_in(index["shard"], value_set=pa.array(list(shards), pa.string()))
    place_R = _numpy(pc.fill_null(known, -1))
    size_R = np.array([*shards.values(), -1], dtype=np.int64)[place_R]
    start_R, bytes_R = _numpy(index["offset"]), _numpy(index["bytes"])
    # By subtraction: the sum of two hostile numbers could wrap around.
    inside = (start_R >= 0) & (bytes_R > 0) & (bytes_R <= size_R) & (start_R <= size_R - bytes_R)
    outside: npt.NDArray[np.bool_] = ~inside
    return outside


def _disordered(
    start_R: Ints, bytes_R: Ints, is_record: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    bad = np.zeros(len(start_R), dtype=np.bool_)
    bad[1:] = (start_R[1:] < start_R[:-1] + bytes_R[:-1]) & ~is_record[:-1]
    return bad


def _impossible(
    index: pa.Table, is_record: npt.NDArray[np.bool_], bytes_R: Ints
) -> npt.NDArray[np.bool_]:
    rank_R = _numpy(pc.list_value_length(index["shape"]))
    dtypes = index["dtype"].to_pylist()
    item_R = np.array([_ITEM_BYTES.get(dtype, 0) for dtype in dtypes], dtype=np.int64)
    bad: npt.NDArray[np.bool_] = np.where(
        is_record, (rank_R != 0) | (bytes_R > MAX_RECORD_BYTES), (rank_R != 3) | (item_R == 0)
    )
    rows = np.flatnonzero(rank_R == 3)
    sides = _numpy(pc.list_flatten(index["shape"].take(rows))).reshape(-1, 3).astype(np.float64)
    voxels = sides.prod(axis=1)
    wrong = (sides < 1).any(axis=1) | (voxels > MAX_VOXELS)
    bad[rows] |= wrong | (bytes_R[rows] > voxels * item_R[rows] + FRAME_OVERHEAD_BYTES)
    return bad


def _numpy(values: Any) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = (
        values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
    )
    return found


def _refusal(shown: str, what: str) -> ShardError:
    return ShardError(
        f"opening shards: the tables of {shown} are not those of a writer of ours: {what}; {AGAIN}"
    )
