"""Read whole shards, wherever they lie: every byte as written, and no member the index leaves out.

We read by the index alone, but other readers walk through the tar, and may extract what they meet
there. So the bytes between the members must be the headers that our writer puts before them.
"""

import hashlib
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from anycontrast_datasets.store.byte_source import ByteSource
from anycontrast_datasets.store.volume_index import AGAIN
from anycontrast_datasets.store.volume_writer import member_header
from anycontrast_datasets.study import ShardError

PIECE_BYTES = 8 * 2**20
_BLOCK = tarfile.BLOCKSIZE
_MAX_END_BYTES = 2 * _BLOCK + tarfile.RECORDSIZE


def verify_shards(
    source: ByteSource, shards: Sequence[Mapping[str, Any]], index: pa.Table
) -> list[str]:
    """Return one line per shard that is not what was written: missing, cut, or changed.

    Args:
        source: Where the shards lie; a cache in front of it is passed by.
        shards: name, bytes and sha256 of each, from `dataset.json`.
        index: Columns of `INDEX_SCHEMA`, checked.
    """
    members = dict(_by_shard(index))
    found = {s["name"]: _problem(source, s, members.get(s["name"], [])) for s in shards}
    return [f"shard {name}: {line}" for name, line in found.items() if line]


def _by_shard(index: pa.Table) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the members of each shard in the order of the tar."""
    columns = index.select(["study_id", "contrast", "offset", "bytes"])
    names = pc.dictionary_encode(index["shard"]).combine_chunks()
    shard_R = names.indices.to_numpy()
    order = np.lexsort((index["offset"].to_numpy(), shard_R))
    edges = np.searchsorted(shard_R[order], np.arange(len(names.dictionary) + 1))
    for number, name in enumerate(names.dictionary.to_pylist()):
        yield name, columns.take(order[edges[number] : edges[number + 1]]).to_pylist()


def _problem(
    source: ByteSource, shard: Mapping[str, Any], members: Sequence[Mapping[str, Any]]
) -> str:
    name, num_bytes = shard["name"], shard["bytes"]
    expected = _between(members, num_bytes)
    if expected is None:
        return f"the members in the index do not fill it; {AGAIN}"
    try:
        found_bytes = source.size(name)
        if found_bytes != num_bytes:
            return f"must have {num_bytes} bytes, found {found_bytes}; {AGAIN}"
        digest, between = _read_through(source, name, num_bytes, members)
        if digest != shard["sha256"] and not source.is_local:
            # A wrong byte on the way is no damage.
            digest, between = _read_through(source, name, num_bytes, members)
    except FileNotFoundError:
        return f"missing from {source.shown}; {AGAIN}"
    except ShardError as error:
        return str(error)
    if digest != shard["sha256"]:
        return f"must have sha256 {shard['sha256'][:16]}, found {digest[:16]}; {AGAIN}"
    if between != expected:
        return f"holds other members than the index lists: extract nothing from it; {AGAIN}"
    return ""


def _between(members: Sequence[Mapping[str, Any]], num_bytes: int) -> bytes | None:
    """Return the bytes around the members in a tar of ours; None if they cannot be those of one."""
    parts, position = [], 0
    for member in members:
        padding = member["offset"] - _BLOCK - position
        if padding != -position % _BLOCK:
            return None
        header = member_header(member["study_id"], member["contrast"], member["bytes"])
        parts += [bytes(padding), header]
        position = member["offset"] + member["bytes"]
    if not 0 <= num_bytes - position <= _MAX_END_BYTES:
        return None
    return b"".join([*parts, bytes(num_bytes - position)])


def _read_through(
    source: ByteSource, name: str, num_bytes: int, members: Sequence[Mapping[str, Any]]
) -> tuple[str, bytes]:
    """Return the sha256 of a shard, and its bytes outside of the members."""
    digest, between = hashlib.sha256(), bytearray()
    starts = [0, *(member["offset"] + member["bytes"] for member in members)]
    stops = [*(member["offset"] for member in members), num_bytes]
    gaps = deque(zip(starts, stops, strict=True))
    for start in range(0, num_bytes, PIECE_BYTES):
        end = min(start + PIECE_BYTES, num_bytes)
        piece = source.read(name, start, end)
        digest.update(piece)
        while gaps and gaps[0][0] < end:
            first, stop = gaps[0]
            between += piece[max(first - start, 0) : min(stop, end) - start]
            if stop > end:
                break
            gaps.popleft()
    return digest.hexdigest(), bytes(between)
