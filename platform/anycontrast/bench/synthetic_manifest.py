"""Manifests of any size without voxels: studies as a hospital has them, 2.6 volumes on average.

Made column by column, so that a million studies take seconds. For benchmarks and tests of what has
to work at scale; the hashes in it are random, and no file stands behind a row.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.manifest_file import write_table
from anycontrast_datasets.manifest_schema import DESCRIPTOR, LABEL, SCHEMA, VOLUME, VOTE

CONTRASTS: tuple[tuple[str, float, str], ...] = (
    ("T1w", 0.72, "t1"),
    ("T1wCE", 0.36, "t1"),
    ("T2w", 0.52, "t2"),
    ("FLAIR", 0.5, "flair"),
    ("DWI", 0.25, "diffusion"),
    ("ADC", 0.2, "diffusion_map"),
)
"""Name, share of the studies that have it, family; in the order of the vocabulary."""
_GRIDS = (
    ((176, 256, 256), (1.0, 1.0, 1.0)),
    ((192, 256, 256), (0.9, 0.9, 0.9)),
    ((160, 192, 160), (1.2, 1.2, 1.2)),
    ((240, 240, 155), (1.0, 1.0, 1.0)),
    ((512, 512, 28), (0.45, 0.45, 5.5)),
    ((320, 320, 26), (0.7, 0.7, 5.5)),
    ((128, 128, 30), (1.8, 1.8, 5.0)),
)
_BATCH = 65536
_NUM_SITES = 50

Ints = npt.NDArray[np.int64]


def write_synthetic_manifest(path: Path, num_studies: int, *, seed: int = 0) -> None:
    """Write a manifest of `num_studies` studies that no source has."""
    write_table(synthetic_batches(num_studies, seed=seed), SCHEMA, path)


def synthetic_batches(num_studies: int, *, seed: int = 0) -> Iterator[pa.Table]:
    """Yield the rows of `write_synthetic_manifest`, in order, batch by batch."""
    for number, first in enumerate(range(0, num_studies, _BATCH)):
        rng = np.random.default_rng([seed, number])
        yield _batch(rng, first, min(_BATCH, num_studies - first))


def _batch(rng: np.random.Generator, first: int, count: int) -> pa.Table:
    has = rng.random((count, len(CONTRASTS))) < [share for _, share, _ in CONTRASTS]
    has[~has.any(axis=1), 0] = True
    study, contrast = np.nonzero(has)
    bits = np.array([1 << contrast_id(name) for name, _, _ in CONTRASTS], dtype=np.uint64)
    number = np.arange(first, first + count)
    ids = pa.array([f"synthetic-{n:08d}" for n in number])
    columns = {
        "study_id": ids,
        "dataset": _names(["north", "south", "east"], rng.integers(0, 3, count)),
        "subject_id": pa.array([f"subject-{n // 2:08d}" for n in number]),
        "session_id": ids,
        "split": _names(["train", "val", "test"], _split(number // 2)),
        "volumes": _lists(_volumes(rng, study, contrast), has.sum(axis=1), VOLUME),
        "label": _no_labels(count),
        "site": _names(
            [f"{n:016x}" for n in range(_NUM_SITES)], rng.integers(0, _NUM_SITES, count)
        ),
        "contrast_set": pa.array(has.astype(np.uint64) @ bits),
    }
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _split(subject: Ints) -> Ints:
    """0 train, 1 val, 2 test; 8 : 1 : 1 by subject."""
    digit = subject * 7919 % 10
    return np.where(digit < 8, 0, digit - 7)


def _volumes(rng: np.random.Generator, study: Ints, contrast: Ints) -> pa.StructArray:
    count = len(study)
    names = [name for name, _, _ in CONTRASTS]
    shape, spacing = _grids(rng, count)
    affine = np.zeros((count, 4, 4))
    affine[:, [0, 1, 2], [0, 1, 2]] = spacing
    affine[:, :3, 3] = rng.uniform(-150, -50, (count, 3)).round(2)
    affine[:, 3, 3] = 1
    vote = np.arange(2 * count) % 2
    votes = _structs(
        VOTE,
        source=_names(["name", "physics"], vote),
        contrast=_names(names, np.repeat(contrast, 2)),
        confidence=pa.array(np.array([0.9, 0.8])[vote]),
        evidence=_names(["file name token", "TE and TR of this contrast"], vote),
    )
    zeros, three = np.zeros(count, dtype=np.int64), np.full(count, 3)
    return _structs(
        VOLUME,
        contrast=_names(names, contrast),
        shape=_lists(pa.array(shape.reshape(-1).astype(np.int32)), three, pa.int32()),
        spacing_mm=_lists(pa.array(spacing.reshape(-1)), three, pa.float64()),
        affine=_lists(pa.array(affine.reshape(-1)), np.full(count, 16), pa.float64()),
        descriptor=_descriptors(rng, contrast),
        flags=_lists(pa.array([], pa.string()), zeros, pa.string()),
        evidence=_lists(_names(["file name token"], zeros), zeros + 1, pa.string()),
        sha256=_hexadecimal(rng, count, 64),
        confidence=pa.array(np.full(count, 0.97)),
        votes=_lists(votes, zeros + 2, VOTE),
        face=_names(["stripped", "unknown"], rng.integers(0, 2, count)),
        voxels_sha256=_hexadecimal(rng, count, 64),
        image_hash=_hexadecimal(rng, count, 128),
        intensity=_lists(
            pa.array(np.sort(rng.uniform(0, 1000, (count, 3)).round(1)).reshape(-1)),
            three,
            pa.float64(),
        ),
        noise_sigma=pa.array(rng.uniform(1, 20, count).round(2)),
    )


def _grids(
    rng: np.random.Generator, count: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return shapes and spacings [V, 3]: a protocol each, its field of view varied by a tenth."""
    kind = rng.integers(0, len(_GRIDS), count)
    scale = rng.uniform(0.9, 1.1, (count, 1))
    spacing = np.array([spacing for _, spacing in _GRIDS])[kind]
    return np.array([shape for shape, _ in _GRIDS])[kind], (spacing * scale).round(3)


def _descriptors(rng: np.random.Generator, contrast: Ints) -> pa.StructArray:
    times = {
        name: pa.array(rng.choice(values, len(contrast)))
        for name, values in (
            ("te_s", [0.003, 0.09, 0.1]),
            ("tr_s", [0.6, 4.0, 9.0]),
            ("ti_s", [0.9, 2.5]),
            ("flip_deg", [9.0, 90.0]),
            ("b_value_s_mm2", [0.0, 1000.0]),
            ("field_t", [1.5, 3.0]),
        )
    }
    families = [family for _, _, family in CONTRASTS]
    unknown = pa.nulls(len(contrast), pa.bool_())
    return _structs(DESCRIPTOR, family=_names(families, contrast), has_agent=unknown, **times)


def _no_labels(count: int) -> pa.StructArray:
    none = np.zeros(count, dtype=np.int64)
    arrays = [
        _lists(pa.array([], f.type.value_type), none, f.type.value_type)
        if pa.types.is_list(f.type)
        else _names([""], none)
        for f in LABEL
    ]
    missing = pa.array(np.ones(count, dtype=np.bool_))
    return pa.StructArray.from_arrays(arrays, fields=list(LABEL), mask=missing)


def _structs(kind: pa.StructType, **columns: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays([columns[f.name] for f in kind], fields=list(kind))


def _names(names: Sequence[str], which: Ints) -> pa.StringArray:
    indices = pa.array(which.astype(np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names))).cast(pa.string())


def _lists(values: pa.Array, lengths: Ints, kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(kind))


def _hexadecimal(rng: np.random.Generator, count: int, digits: int) -> pa.StringArray:
    text = pa.py_buffer(rng.bytes(count * digits // 2).hex().encode())
    offsets = pa.py_buffer((np.arange(count + 1) * digits).astype(np.int32))
    return pa.StringArray.from_buffers(count, offsets, text)
