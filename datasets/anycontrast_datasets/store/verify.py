"""Hash whole shards, wherever they lie, in pieces of a few megabytes."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from anycontrast_datasets.store.byte_source import ByteSource
from anycontrast_datasets.store.volume_index import AGAIN
from anycontrast_datasets.study import ShardError

PIECE_BYTES = 8 * 2**20


def verify_shards(source: ByteSource, shards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per shard that is not what was written: missing, cut, or changed.

    Args:
        source: Where the shards lie; a cache in front of it is passed by.
        shards: name, bytes and sha256 of each, from `dataset.json`.
    """
    return [line for shard in shards if (line := _problem(source, shard))]


def _problem(source: ByteSource, shard: Mapping[str, Any]) -> str:
    name, num_bytes = shard["name"], shard["bytes"]
    try:
        found_bytes = source.size(name)
        if found_bytes != num_bytes:
            return f"shard {name}: must have {num_bytes} bytes, found {found_bytes}; {AGAIN}"
        found = _sha256(source, name, num_bytes)
        if found != shard["sha256"] and not source.is_local:
            found = _sha256(source, name, num_bytes)  # A wrong byte on the way is no damage.
    except FileNotFoundError:
        return f"shard {name}: missing from {source.shown}; {AGAIN}"
    except ShardError as error:
        return f"shard {name}: {error}"
    if found != shard["sha256"]:
        return f"shard {name}: must have sha256 {shard['sha256'][:16]}, found {found[:16]}; {AGAIN}"
    return ""


def _sha256(source: ByteSource, name: str, num_bytes: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, num_bytes, PIECE_BYTES):
        digest.update(source.read(name, start, min(start + PIECE_BYTES, num_bytes)))
    return digest.hexdigest()
