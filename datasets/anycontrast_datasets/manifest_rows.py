"""Studies to the columns of the manifest and back, column by column.

In: `Study` objects, or an Arrow table of the manifest's schema. Nothing is turned into a dictionary
per row on the way, which is what makes twenty thousand studies a matter of a second or two.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from anycontrast_datasets.contrast import ContrastDescriptor, contrast_id
from anycontrast_datasets.manifest_schema import DESCRIPTOR, LABEL, SCHEMA, VOLUME, VOTE
from anycontrast_datasets.study import Affine, ContrastVote, Label, Study, Volume

_TEXTS = ("study_id", "dataset", "subject_id", "session_id", "split", "site")
_PLAIN = ("contrast", "sha256", "confidence", "face", "voxels_sha256", "image_hash", "noise_sigma")
"""Fields of a volume that are one text or number each."""
_LISTS = ("shape", "spacing_mm", "flags", "evidence", "intensity")


def contrast_set(contrasts: Iterable[str]) -> int:
    """Return a set of contrasts as bits: bit n stands for the contrast with vocabulary id n."""
    return sum({1 << contrast_id(name) for name in contrasts})


def studies_to_table(studies: Sequence[Study]) -> pa.Table:
    """Return one row per study, in the order given; locations are left out."""
    volumes = [volume for study in studies for volume in study.volumes]
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(s, name) for s in studies], pa.string()) for name in _TEXTS
    }
    columns["volumes"] = _lists([s.volumes for s in studies], _volume_structs(volumes), VOLUME)
    columns["label"] = _label_structs([study.label for study in studies])
    columns["contrast_set"] = pa.array([contrast_set(s.contrasts) for s in studies], pa.uint64())
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def table_to_studies(
    table: pa.Table, on_error: Callable[[int, ValueError], Exception]
) -> list[Study]:
    """Return the studies of a table; locations are empty.

    Args:
        table: Of the manifest's schema.
        on_error: Makes the exception to raise for row n, which is not a valid study.
    """
    columns = {name: table.column(name).to_pylist() for name in _TEXTS}
    nested = _combined(table.column("volumes"))
    bounds = np.concatenate(([0], np.cumsum(nested.value_lengths().to_numpy()))).tolist()
    volumes = _columns_of(nested.flatten())
    labels = table.column("label").to_pylist()
    studies: list[Study] = []
    for row in range(table.num_rows):
        try:
            own = [_volume(volumes, place) for place in range(bounds[row], bounds[row + 1])]
            texts = {name: values[row] for name, values in columns.items()}
            studies.append(Study(**texts, volumes=tuple(own), label=_label(labels[row])))
        except ValueError as error:
            raise on_error(row, error) from error
    return studies


def affine_rows(affine: np.typing.ArrayLike) -> Affine:
    """Return a 4 x 4 affine (or its 16 values, row by row) as nested tuples of floats."""
    rows = np.asarray(affine, dtype=np.float64).reshape(4, 4).tolist()
    return tuple(tuple(row) for row in rows)  # type: ignore[misc]


def _volume_structs(volumes: Sequence[Volume]) -> pa.StructArray:
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(v, name) for v in volumes], VOLUME.field(name).type)
        for name in (*_PLAIN, *_LISTS)
    }
    columns["affine"] = _affines([volume.affine for volume in volumes])
    descriptors = [volume.descriptor for volume in volumes]
    columns["descriptor"] = _structs(descriptors, DESCRIPTOR)
    votes = [vote for volume in volumes for vote in volume.votes]
    columns["votes"] = _lists([v.votes for v in volumes], _structs(votes, VOTE), VOTE)
    return pa.StructArray.from_arrays([columns[f.name] for f in VOLUME], fields=list(VOLUME))


def _label_structs(labels: Sequence[Label | None]) -> pa.StructArray:
    # What stands under a missing label does not count; it only has to be of the type.
    filled = [
        label or Label(location="", shape=(0, 0, 0), affine=(), grid_of="") for label in labels
    ]
    columns: dict[str, pa.Array] = {
        "shape": pa.array([label.shape for label in filled], LABEL.field("shape").type),
        "affine": pa.array(
            [[x for row in label.affine for x in row] for label in filled],
            LABEL.field("affine").type,
        ),
        "grid_of": pa.array([label.grid_of for label in filled], pa.string()),
        "sha256": pa.array([label.sha256 for label in filled], pa.string()),
    }
    return pa.StructArray.from_arrays(
        [columns[f.name] for f in LABEL],
        fields=list(LABEL),
        mask=pa.array([label is None for label in labels], pa.bool_()),
    )


def _structs(values: Sequence[object], kind: pa.StructType) -> pa.StructArray:
    arrays = [pa.array([getattr(v, f.name) for v in values], f.type) for f in kind]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _lists(groups: Sequence[Sequence[Any]], flat: pa.Array, kind: pa.DataType) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum([len(group) for group in groups]))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=pa.list_(kind))


def _affines(affines: Sequence[Affine]) -> pa.ListArray:
    values = np.asarray(affines, dtype=np.float64).reshape(-1)
    offsets = np.arange(len(affines) + 1, dtype=np.int32) * 16
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _combined(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _columns_of(volumes: pa.StructArray) -> Mapping[str, list[Any]]:
    children = {f.name: a for f, a in zip(VOLUME, volumes.flatten(), strict=True)}
    columns: dict[str, list[Any]] = {
        name: children[name].to_pylist() for name in (*_PLAIN, *_LISTS, "affine", "votes")
    }
    parts = [child.to_pylist() for child in children["descriptor"].flatten()]
    columns["descriptor"] = list(zip(*parts, strict=True))
    return columns


def _volume(columns: Mapping[str, list[Any]], place: int) -> Volume:
    values = {name: columns[name][place] for name in _PLAIN}
    lists = {name: tuple(columns[name][place]) for name in ("shape", "spacing_mm")}
    for name, triple in lists.items():
        if len(triple) != 3:
            raise ValueError(f"{name} must have three values, found {len(triple)}")
    intensity = columns["intensity"][place]
    return Volume(
        location="",
        affine=_affine(columns["affine"][place]),
        descriptor=_descriptor(columns["descriptor"][place]),
        flags=tuple(columns["flags"][place]),
        evidence=tuple(columns["evidence"][place]),
        votes=tuple(ContrastVote(**vote) for vote in columns["votes"][place]),
        intensity=None if intensity is None else tuple(intensity),
        **lists,  # type: ignore[arg-type]
        **values,
    )


def _label(label: Mapping[str, Any] | None) -> Label | None:
    if label is None:
        return None
    i, j, k = label["shape"]
    return Label(
        location="",
        shape=(i, j, k),
        affine=_affine(label["affine"]),
        grid_of=label["grid_of"],
        sha256=label["sha256"],
    )


def _affine(values: Sequence[float]) -> Affine:
    if len(values) != 16:
        raise ValueError(f"affine must have 16 values, found {len(values)}")
    return tuple(tuple(values[i : i + 4]) for i in (0, 4, 8, 12))  # type: ignore[misc]


# Scanners repeat their protocols: a few thousand different descriptors cover a large manifest.
@lru_cache(maxsize=65536)
def _descriptor(values: tuple[Any, ...]) -> ContrastDescriptor:
    names = [field.name for field in DESCRIPTOR]
    return ContrastDescriptor(**dict(zip(names, values, strict=True)))
