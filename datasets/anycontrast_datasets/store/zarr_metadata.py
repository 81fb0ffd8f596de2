"""Every `zarr.json` of a study: Zarr v3 groups and sharded arrays, OME-NGFF 0.5 images.

A pure function of the record and the layout, so a reader never has to believe a metadata file: it
makes the text again and compares. A study is a group with consolidated metadata; a contrast in it
is an OME image of one array per resolution; the label lies under the reference contrast as an OME
label image. Axes are x, y, z in that order, as everywhere here: [X, Y, Z] in C order, RAS+.

OME transformations hold a scale and a translation only; the true affine is our own attribute.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anycontrast_datasets.record_json import record_to_json
from anycontrast_datasets.store.codec import BLOCK_BYTES, CodecName
from anycontrast_datasets.store.partial import Vox3
from anycontrast_datasets.study import StudyRecord, VolumeRecord

HIERARCHY = "studies.zarr"
"""Folder of the Zarr hierarchy; the tables of the store lie beside it, not in it."""
LABEL = "label"
CHUNK_KEY = "c/0/0/0"
"""The one shard of an array."""
FILL_CODE = -1
"""No code is negative: a shard that is not there cannot pass for background."""
MAX_CODE = 4095
OME_VERSION = "0.5"
ATTRIBUTE = "anycontrast"
ATTRIBUTE_VERSION = 1
_COLORS = (
    (230, 75, 53, 255),
    (77, 187, 213, 255),
    (0, 160, 135, 255),
    (243, 155, 127, 255),
    (132, 145, 180, 255),
)


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """How one array lies on disk."""

    shape: Vox3
    dtype: Literal["int16", "uint8"]
    chunk: Vox3
    """Voxels of an inner chunk; the last one of an axis may reach beyond the array."""
    fill: int
    codec: CodecName
    level: int
    """Of the compressor, 1..9."""

    @property
    def grid(self) -> Vox3:
        """Inner chunks along each axis."""
        x, y, z = (-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))
        return (x, y, z)

    @property
    def num_chunks(self) -> int:
        """Of the shard."""
        return math.prod(self.grid)

    @property
    def shard(self) -> Vox3:
        """Voxels of the one shard: whole inner chunks that cover the array."""
        x, y, z = (g * c for g, c in zip(self.grid, self.chunk, strict=True))
        return (x, y, z)


def chunk_shape(shape: Vox3, max_vox: int) -> Vox3:
    """Return inner chunks of equal size, at most `max_vox` a side, that waste next to nothing.

    Args:
        shape: Voxels of the array.
        max_vox: Longest side of a chunk; 0 makes the whole volume one chunk.

    Returns:
        Sides whose multiples exceed the array by less than one voxel per chunk.
    """
    if max_vox == 0:
        return shape
    x, y, z = (-(-n // -(-n // max_vox)) for n in shape)
    return (x, y, z)


def level_shape(shape: Vox3, resolution: int) -> Vox3:
    """Return the shape after halving `resolution` times, odd sides rounded up."""
    x, y, z = (-(-n // 2**resolution) for n in shape)
    return (x, y, z)


def label_fill(record: StudyRecord) -> int:
    """Return the largest value that the study's label does not use."""
    return max(set(range(1, 256)) - set(record.label_values), default=0)


def array_layouts(
    record: StudyRecord, *, chunk_vox: int, num_levels: int, codec: CodecName, level: int
) -> dict[tuple[str, int], ArrayLayout]:
    """Lay out every array of a study: (contrast or "label", resolution) -> layout."""
    names = [*record.contrasts, *([LABEL] if record.has_label else [])]
    layouts = {}
    for name in names:
        for resolution in range(num_levels):
            shape = level_shape(record.shape, resolution)
            layouts[name, resolution] = ArrayLayout(
                shape=shape,
                dtype="uint8" if name == LABEL else "int16",
                chunk=chunk_shape(shape, chunk_vox),
                fill=label_fill(record) if name == LABEL else FILL_CODE,
                codec=codec,
                level=level,
            )
    return layouts


def image_path(record: StudyRecord, name: str) -> str:
    """Return where the image of a contrast, or the label, lies within the hierarchy."""
    if name == LABEL:
        return f"{record.study_id}/{_label_home(record)}/labels/{LABEL}"
    return f"{record.study_id}/{name}"


def study_metadata(
    record: StudyRecord, layouts: Mapping[tuple[str, int], ArrayLayout]
) -> dict[str, bytes]:
    """Return every metadata file of a study: path within the hierarchy -> content."""
    num_levels = 1 + max(resolution for _, resolution in layouts)
    nodes: dict[str, dict[str, Any]] = {}
    for volume in record.volumes:
        path = image_path(record, volume.contrast)
        nodes[path] = _group(_image_attributes(record, volume, num_levels))
    if record.has_label:
        path = image_path(record, LABEL)
        nodes[path.rpartition("/")[0]] = _group(
            {"ome": {"version": OME_VERSION, "labels": [LABEL]}}
        )
        nodes[path] = _group(_label_attributes(record, num_levels))
    for (name, resolution), layout in layouts.items():
        nodes[f"{image_path(record, name)}/{resolution}"] = _array(layout)
    study = _group(
        {ATTRIBUTE: {"schema_version": ATTRIBUTE_VERSION, **json.loads(record_to_json(record))}}
    )
    prefix = f"{record.study_id}/"
    study["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {path.removeprefix(prefix): nodes[path] for path in sorted(nodes)},
    }
    nodes[record.study_id] = study
    return {f"{path}/zarr.json": _text(node) for path, node in nodes.items()}


def root_metadata() -> bytes:
    """Return the metadata of the hierarchy itself: a group of studies, not consolidated."""
    return _text(_group({ATTRIBUTE: {"schema_version": ATTRIBUTE_VERSION}}))


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array(layout: ArrayLayout) -> dict[str, Any]:
    item_bytes = np.dtype(layout.dtype).itemsize
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if item_bytes > 1:
        to_bytes["configuration"] = {"endian": "little"}
    blosc = {
        "typesize": item_bytes,
        "cname": layout.codec,
        "clevel": layout.level,
        "shuffle": "shuffle",
        "blocksize": BLOCK_BYTES,
    }
    sharding = {
        "chunk_shape": list(layout.chunk),
        "codecs": [to_bytes, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(layout.shape),
        "data_type": layout.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(layout.shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": layout.fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["x", "y", "z"],
        "attributes": {},
        "storage_transformers": [],
    }


def _image_attributes(record: StudyRecord, volume: VolumeRecord, num_levels: int) -> dict[str, Any]:
    start, end = (
        float(np.clip((value - volume.offset) / volume.scale, 0, MAX_CODE))
        for value in (volume.p0_5, volume.p99_5)
    )
    channel = {
        "label": volume.contrast,
        "color": "FFFFFF",
        "active": True,
        "window": {"min": 0, "max": MAX_CODE, "start": start, "end": end},
    }
    # The mean of two voxels lies half a voxel further than the first of them.
    scales = _multiscales(record, volume.contrast, num_levels, shift=0.5)
    return {
        "ome": {"version": OME_VERSION, "multiscales": [scales], "omero": {"channels": [channel]}},
        ATTRIBUTE: {
            "contrast": volume.contrast,
            "value": "code * scale + offset; code 0 is background",
            "scale": volume.scale,
            "offset": volume.offset,
            "affine_ras_mm": [list(row) for row in record.affine],
        },
    }


def _label_attributes(record: StudyRecord, num_levels: int) -> dict[str, Any]:
    colors = [
        {"label-value": value, "rgba": list(_COLORS[number % len(_COLORS)])}
        for number, value in enumerate(record.label_values)
    ]
    image_label: dict[str, Any] = {"source": {"image": "../../"}}
    if colors:
        image_label["colors"] = colors
    scales = _multiscales(record, LABEL, num_levels, shift=0.0)
    return {
        "ome": {"version": OME_VERSION, "multiscales": [scales], "image-label": image_label},
        ATTRIBUTE: {"affine_ras_mm": [list(row) for row in record.affine]},
    }


def _multiscales(
    record: StudyRecord, name: str, num_levels: int, *, shift: float
) -> dict[str, Any]:
    """Describe the resolutions of an image; `shift` is where halving moves the first voxel to."""
    affine = np.array(record.affine)
    datasets = []
    for resolution in range(num_levels):
        factor = 2**resolution
        first = affine[:3, :3] @ np.full(3, shift * (factor - 1)) + affine[:3, 3]
        scale = [s * factor for s in record.spacing_mm]
        datasets.append(
            {
                "path": str(resolution),
                "coordinateTransformations": [
                    {"type": "scale", "scale": scale},
                    {"type": "translation", "translation": [float(v) for v in first]},
                ],
            }
        )
    return {
        "name": name,
        "axes": [{"name": n, "type": "space", "unit": "millimeter"} for n in "xyz"],
        "datasets": datasets,
        "type": "mean" if shift else "subsample",
    }


def _label_home(record: StudyRecord) -> str:
    names = record.contrasts
    return record.reference if record.reference in names else names[0]


def _text(node: dict[str, Any]) -> bytes:
    return json.dumps(node, separators=(",", ":"), allow_nan=False).encode()
