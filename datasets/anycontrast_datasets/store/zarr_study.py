"""One study as the files of a Zarr hierarchy, and the hash of everything those bytes depend on."""

import hashlib

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.record_json import record_to_json
from anycontrast_datasets.store.codec import Codes, checksum
from anycontrast_datasets.store.volume_index import RECORD_MEMBER, sha256_json
from anycontrast_datasets.store.zarr_config import ZarrConfig
from anycontrast_datasets.store.zarr_index import ZARR_VERSION, ArrayRow
from anycontrast_datasets.store.zarr_metadata import (
    CHUNK_KEY,
    LABEL,
    array_layouts,
    image_path,
    study_metadata,
)
from anycontrast_datasets.store.zarr_shard import encode_shard
from anycontrast_datasets.study import ShardError, StudyArrays


def study_files(arrays: StudyArrays, config: ZarrConfig) -> tuple[dict[str, bytes], list[ArrayRow]]:
    """Return a study's files, by path within its folder, and its rows of the index."""
    record = arrays.record
    layouts = array_layouts(
        record,
        chunk_vox=config.chunk_vox,
        num_levels=config.num_levels,
        codec=config.codec,
        level=config.level,
    )
    metadata = study_metadata(record, layouts)
    files = dict(metadata)
    rows = []
    for name in [*record.contrasts, *([LABEL] if record.has_label else [])]:
        voxels = _voxels(arrays, name)
        for resolution in range(config.num_levels):
            layout = layouts[name, resolution]
            shard, table = encode_shard(voxels, layout)
            files[f"{image_path(record, name)}/{resolution}/{CHUNK_KEY}"] = shard
            rows.append(
                ArrayRow(
                    study_id=record.study_id,
                    contrast=name,
                    sha256=hashlib.sha256(shard).hexdigest(),
                    resolution=resolution,
                    dtype=layout.dtype,
                    shape=layout.shape,
                    chunk=layout.chunk,
                    fill=layout.fill,
                    codec=layout.codec,
                    level=layout.level,
                    chunk_bytes=table.num_bytes,
                    chunk_xxh3=table.xxh3_64,
                )
            )
            voxels = voxels[::2, ::2, ::2] if name == LABEL else _halved(voxels)
    rows.append(
        ArrayRow(
            study_id=record.study_id,
            contrast=RECORD_MEMBER,
            sha256=hashlib.sha256(metadata[f"{record.study_id}/zarr.json"]).hexdigest(),
            record=record_to_json(record),
        )
    )
    prefix = f"{record.study_id}/"
    return {path.removeprefix(prefix): content for path, content in files.items()}, rows


def _voxels(arrays: StudyArrays, name: str) -> Codes:
    """Return an array of a study after checking that it can be stored as the record says."""
    voxels = arrays.label if name == LABEL else arrays.codes[name]
    where = f"study {arrays.record.study_id}, {name}"
    if voxels is None or voxels.shape != arrays.record.shape:
        found = None if voxels is None else voxels.shape
        raise ShardError(f"{where}: must be {arrays.record.shape} as its record says, is {found}")
    if name == LABEL:
        unlisted = sorted(set(np.unique(voxels).tolist()) - {0, *arrays.record.label_values})
        if unlisted:
            raise ShardError(f"{where}: has values {unlisted[:5]} that its record does not list")
    elif voxels.min() < 0:
        raise ShardError(f"{where}: codes are never negative, found {voxels.min()}")
    return voxels


def _halved(codes: Codes) -> npt.NDArray[np.int16]:
    """Average cubes of two voxels a side; an odd far end is repeated."""
    even = np.pad(codes, [(0, n % 2) for n in codes.shape], mode="edge")
    total = np.zeros([n // 2 for n in even.shape], dtype=np.int32)
    for i in range(8):
        total += even[i // 4 :: 2, i // 2 % 2 :: 2, i % 2 :: 2].astype(np.int16)
    return ((total + 4) // 8).astype(np.int16)


def content_key(arrays: StudyArrays, config: ZarrConfig) -> str:
    """Hash everything that the bytes of a study depend on."""
    layout = [config.chunk_vox, config.num_levels, config.codec, config.level]
    voxels = {name: checksum(codes.data) for name, codes in arrays.codes.items()}
    label = None if arrays.label is None else checksum(arrays.label.data)
    return sha256_json([ZARR_VERSION, layout, record_to_json(arrays.record), voxels, label])
