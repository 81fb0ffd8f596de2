"""The columns of a manifest that a report counts, as arrays: no study object is made.

Letters: S studies, V volumes (S of them in a row), F flags given to volumes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from anycontrast_datasets.contrast import CONTRAST_NAMES
from anycontrast_datasets.manifest_table import ManifestTable

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Codes:
    """A column of names as integers."""

    names: tuple[str, ...]
    """In ascending order."""
    codes: Ints
    """Places in `names`, one per row."""


@dataclass(frozen=True)
class Columns:
    """What a report needs of a manifest."""

    study_ids: tuple[str, ...]
    person_S: Ints
    """The same number for the same subject of the same dataset."""
    dataset: Codes
    split: Codes
    site: Codes
    has_label_S: npt.NDArray[np.bool_]
    set_S: npt.NDArray[np.uint64]
    """Contrasts of a study as bits."""
    study_V: Ints
    """Row of the study that a volume belongs to."""
    contrast: Codes
    """`names` is the vocabulary in the order of its ids."""
    shape_V3: Ints
    spacing_V3: Floats
    """In mm."""
    confidence_V: Floats
    face: Codes
    evidence: Codes
    """What had the strongest vote on the contrast; `none` where nothing voted."""
    intensity_V3: Floats
    """1st, 50th and 99th percentile of the foreground, NaN where not known."""
    flag: Codes
    volume_F: Ints
    """Volume that a flag was given to."""
    image_hashes: tuple[str, ...]
    """One per volume, empty where not known."""
    voxels_hash: Codes
    """One per volume."""

    @property
    def person_V(self) -> Ints:
        """[V], whose volume it is."""
        return self.person_S[self.study_V]


def read_columns(table: ManifestTable) -> Columns:
    """Take the columns out of a manifest.

    Raises:
        ManifestError: damaged, or changed since it was written.
    """
    volumes = table.volumes
    person = pc.binary_join_element_wise(table.column("dataset"), table.column("subject_id"), "\0")
    votes = table.column("volumes.votes")
    voted = pc.greater(votes.value_lengths(), 0)
    strongest = np.full(len(votes), "none", dtype=object)
    first = pc.struct_field(pc.list_element(votes.filter(voted), 0), "source")
    strongest[voted.to_numpy(zero_copy_only=False)] = first.to_numpy(zero_copy_only=False)
    return Columns(
        study_ids=tuple(table.study_ids.to_pylist()),
        person_S=_codes(person).codes,
        dataset=_codes(table.column("dataset")),
        split=_codes(table.column("split")),
        site=_codes(table.column("site")),
        has_label_S=table.column("label").is_valid().to_numpy(zero_copy_only=False),
        set_S=table.contrast_sets,
        study_V=volumes.study_row,
        contrast=Codes(CONTRAST_NAMES, volumes.contrast_id.astype(np.int64)),
        shape_V3=volumes.shape.astype(np.int64),
        spacing_V3=volumes.spacing_mm,
        confidence_V=volumes.confidence,
        face=_codes(table.column("volumes.face")),
        evidence=_codes(pa.array(strongest, type=pa.string())),
        intensity_V3=volumes.intensity,
        flag=_codes(volumes.flags.flatten()),
        volume_F=np.asarray(pc.list_parent_indices(volumes.flags), dtype=np.int64),
        image_hashes=tuple(volumes.image_hash.to_pylist()),
        voxels_hash=_codes(volumes.voxels_sha256),
    )


def _codes(names: pa.Array) -> Codes:
    encoded = names.dictionary_encode()
    found = encoded.dictionary.to_pylist()
    order = sorted(range(len(found)), key=lambda i: found[i])
    rank = np.empty(len(found), dtype=np.int64)
    rank[order] = np.arange(len(found))
    codes = rank[encoded.indices.to_numpy()] if len(found) else np.empty(0, dtype=np.int64)
    return Codes(tuple(found[i] for i in order), codes)


def num_people(columns: Columns, volumes: Ints | npt.NDArray[np.bool_] | None = None) -> int:
    """Return how many different subjects the volumes (a mask or indices; None: all) are of."""
    people = columns.person_S if volumes is None else columns.person_V[volumes]
    return len(np.unique(people))


def people_per(codes: Ints, person: Ints, num_codes: int) -> Ints:
    """Return [num_codes], how many different people (one per row) each code has."""
    if not len(codes):
        return np.zeros(num_codes, dtype=np.int64)
    pairs = np.unique(codes * (int(person.max()) + 1) + person)
    return np.bincount(pairs // (int(person.max()) + 1), minlength=num_codes)
