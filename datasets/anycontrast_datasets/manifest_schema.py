"""The columns of the manifest: names, types and what may be missing."""

import pyarrow as pa

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.parquet"
SOURCES_NAME = "private/sources.parquet"

_text = pa.string()
# Plain lists: a fixed-size list inside a null struct (a study without label) cannot be read back.
_shape = pa.list_(pa.int32())
_affine = pa.list_(pa.float64())
DESCRIPTOR: pa.StructType = pa.struct(
    [
        pa.field("family", _text),
        pa.field("te_s", pa.float64()),
        pa.field("tr_s", pa.float64()),
        pa.field("ti_s", pa.float64()),
        pa.field("flip_deg", pa.float64()),
        pa.field("b_value_s_mm2", pa.float64()),
        pa.field("field_t", pa.float64()),
        pa.field("has_agent", pa.bool_()),
    ]
)
VOTE: pa.StructType = pa.struct(
    [
        pa.field("source", _text, nullable=False),
        pa.field("contrast", _text, nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("evidence", _text, nullable=False),
    ]
)
VOLUME: pa.StructType = pa.struct(
    [
        pa.field("contrast", _text, nullable=False),
        pa.field("shape", _shape, nullable=False),
        pa.field("spacing_mm", pa.list_(pa.float64()), nullable=False),
        pa.field("affine", _affine, nullable=False),
        pa.field("descriptor", DESCRIPTOR, nullable=False),
        pa.field("flags", pa.list_(_text), nullable=False),
        pa.field("evidence", pa.list_(_text), nullable=False),
        pa.field("sha256", _text, nullable=False),
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field("votes", pa.list_(VOTE), nullable=False),
        pa.field("face", _text, nullable=False),
        pa.field("voxels_sha256", _text, nullable=False),
        pa.field("image_hash", _text, nullable=False),
        pa.field("intensity", pa.list_(pa.float64())),
        pa.field("noise_sigma", pa.float64()),
    ]
)
LABEL: pa.StructType = pa.struct(
    [
        pa.field("shape", _shape, nullable=False),
        pa.field("affine", _affine, nullable=False),
        pa.field("grid_of", _text, nullable=False),
        pa.field("sha256", _text, nullable=False),
    ]
)
SCHEMA: pa.Schema = pa.schema(
    [
        pa.field("study_id", _text, nullable=False),
        pa.field("dataset", _text, nullable=False),
        pa.field("subject_id", _text, nullable=False),
        pa.field("session_id", _text, nullable=False),
        pa.field("split", _text, nullable=False),
        pa.field("volumes", pa.list_(VOLUME), nullable=False),
        pa.field("label", LABEL),
        pa.field("site", _text, nullable=False),
        pa.field("contrast_set", pa.uint64(), nullable=False),
    ]
)
"""Shapes in voxels as in the file, spacing in mm, affines row by row (voxel ijk -> RAS+ mm)."""

SOURCES_SCHEMA: pa.Schema = pa.schema(
    [pa.field(name, _text, nullable=False) for name in ("study_id", "role", "path")]
)
