"""The manifest as columns: a million studies opened, filtered and counted without one object each.

In: a manifest file. Out: numpy and Arrow columns, one row per study or per volume. Opening decodes
and verifies the few columns that filtering needs; every other column is decoded and
verified when it is first asked for. Row n is study n of `read_manifest`.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from anycontrast_datasets.contrast import (
    CONTRAST_NAMES,
    NUM_CONTRAST_IDS,
    UnknownContrastError,
    contrast_id,
)
from anycontrast_datasets.manifest_file import ColumnHashes, VerifiedFile, fingerprint_of
from anycontrast_datasets.manifest_rows import contrast_set, studies_to_table, table_to_studies
from anycontrast_datasets.manifest_schema import SCHEMA, VOLUME
from anycontrast_datasets.study import SPLITS, ManifestError, Study

OPENED = (
    "study_id",
    "dataset",
    "split",
    "site",
    "contrast_set",
    "volumes.contrast",
)
"""Columns that `ManifestTable.open` decodes and verifies."""


class ManifestTable:
    """Columns of a manifest; make one with `open` or `from_studies`."""

    def __init__(self, name: str, source: VerifiedFile | pa.Table, fingerprint: str) -> None:
        self.name = name
        """For messages."""
        self.fingerprint = fingerprint
        """Content hash of the manifest."""
        self._source = source
        self._cache: dict[str, pa.Array] = {}
        self._load(OPENED)
        self._check()

    @classmethod
    def open(cls, path: Path) -> "ManifestTable":
        """Open a manifest file, decoding the columns of `OPENED` only.

        Raises:
            ManifestError: as `read_manifest`; damage to other columns is found when they are read.
        """
        file = VerifiedFile(path, SCHEMA)
        file.check_fingerprint()
        return cls(str(path), file, file.fingerprint)

    @classmethod
    def from_studies(cls, studies: Iterable[Study]) -> "ManifestTable":
        """Return the table of studies in memory, ordered by study id as in a file."""
        table = studies_to_table(sorted(studies, key=lambda s: s.study_id))
        hashes = ColumnHashes(SCHEMA)
        hashes.update(table)
        return cls("(in memory)", table, fingerprint_of(hashes.digests()))

    def __len__(self) -> int:
        return len(self.study_ids)

    @property
    def table(self) -> pa.Table:
        """All columns, in the manifest's schema: for a million studies, gigabytes."""
        return self._source if isinstance(self._source, pa.Table) else self._source.read()

    @property
    def study_ids(self) -> pa.StringArray:
        """[N] text, ascending."""
        return self.column("study_id")

    @cached_property
    def datasets(self) -> pa.DictionaryArray:
        """[N] name of the collection, dictionary-encoded."""
        return self.column("dataset").dictionary_encode()

    @cached_property
    def splits(self) -> pa.DictionaryArray:
        """[N] train, val or test, dictionary-encoded."""
        return self.column("split").dictionary_encode()

    @cached_property
    def sites(self) -> pa.DictionaryArray:
        """[N] keyed hash of the scanner, empty when not known, dictionary-encoded."""
        return self.column("site").dictionary_encode()

    @cached_property
    def contrast_sets(self) -> npt.NDArray[np.uint64]:
        """[N], bit n stands for the contrast with vocabulary id n."""
        return np.asarray(self.column("contrast_set"))

    @cached_property
    def num_volumes(self) -> npt.NDArray[np.int64]:
        """[N] volumes of each study."""
        return np.diff(self._volume_bounds)

    @cached_property
    def volumes(self) -> "VolumeColumns":
        """Columns with one row per volume."""
        return VolumeColumns(self)

    def column(self, name: str) -> pa.Array:
        """Return one column in one piece, verified: `site`, or per volume e.g. `volumes.face`.

        Raises:
            ManifestError: damaged, or changed since it was written.
        """
        if name not in self._cache:
            self._load((name,))
        return self._cache[name]

    def select(
        self,
        *,
        split: str | None = None,
        datasets: Sequence[str] = (),
        any_of: Sequence[str] = (),
        all_of: Sequence[str] = (),
        none_of: Sequence[str] = (),
    ) -> npt.NDArray[np.int64]:
        """Return the rows that satisfy every condition, ascending; an empty one is none.

        Args:
            split: train, val or test.
            datasets: One of these collections.
            any_of: At least one of these contrasts is there.
            all_of: All of these contrasts are there.
            none_of: None of these contrasts is there.

        Raises:
            UnknownContrastError: a name is not in the vocabulary.
        """
        kept = np.ones(len(self), dtype=np.bool_)
        if split is not None:
            kept &= _is_one_of(self.splits, (split,))
        if datasets:
            kept &= _is_one_of(self.datasets, datasets)
        wanted, barred = np.uint64(contrast_set(all_of)), np.uint64(contrast_set(none_of))
        if any_of:
            kept &= (self.contrast_sets & np.uint64(contrast_set(any_of))) != 0
        if all_of:
            kept &= (self.contrast_sets & wanted) == wanted
        if none_of:
            kept &= (self.contrast_sets & barred) == 0
        return np.flatnonzero(kept)

    def count_by_contrast_set(self) -> dict[tuple[str, ...], int]:
        """Return how many studies have exactly these contrasts, most frequent first."""
        sets, counts = np.unique(self.contrast_sets, return_counts=True)
        order = np.lexsort((sets, -counts))
        return {contrasts_of(int(sets[i])): int(counts[i]) for i in order}

    def count_by_contrast(self) -> dict[str, int]:
        """Return how many volumes there are of each contrast, in the order of the vocabulary."""
        counts = np.bincount(self.volumes.contrast_id, minlength=len(CONTRAST_NAMES))
        return {n: int(counts[contrast_id(n)]) for n in CONTRAST_NAMES if counts[contrast_id(n)]}

    def study(self, row: int) -> Study:
        """Return one study as an object; its locations are empty.

        Raises:
            IndexError: no such row.
            ManifestError: damaged, or not a valid study.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"manifest {self.name}: no row {row}, it has {len(self)}")
        first = 0
        table = self._source
        if isinstance(table, VerifiedFile):
            table, first = table.read_rows(row)
        return table_to_studies(
            table.slice(row - first, 1),
            lambda _, error: ManifestError(f"reading {self.name}, row {row}: {error}; scan again"),
        )[0]

    @cached_property
    def _volume_bounds(self) -> npt.NDArray[np.int64]:
        return np.concatenate(([0], np.cumsum(self._cache["volumes#"].to_numpy(), dtype=np.int64)))

    def _load(self, names: Sequence[str]) -> None:
        table = self._source
        if isinstance(table, VerifiedFile):
            table = table.read(names)
        for name in names:
            top, *rest = name.split(".")
            chunks = table.column(top).chunks
            if rest and "volumes#" not in self._cache:
                lengths = [chunk.value_lengths() for chunk in chunks]
                self._cache["volumes#"] = _joined(lengths, pa.int32())
            if rest:
                chunks = [pc.struct_field(chunk.flatten(), rest) for chunk in chunks]
            self._cache[name] = _joined(chunks, VOLUME.field(rest[0]).type if rest else None)

    def _check(self) -> None:
        """Check what `Study` checks of a row, over all rows at once."""
        strange = set(self.splits.dictionary.to_pylist()) - set(SPLITS)
        if strange:
            raise ManifestError(
                f"reading {self.name}: split must be one of {SPLITS}, found {sorted(strange)}; "
                "scan again"
            )
        if not pc.all(pc.less(self.study_ids[:-1], self.study_ids[1:]), min_count=0).as_py():
            raise ManifestError(
                f"reading {self.name}: study ids must be unique and ascending; scan again"
            )
        bit = np.uint64(1) << np.arange(NUM_CONTRAST_IDS, dtype=np.uint64)
        has_volumes = self.num_volumes > 0
        found = np.zeros(len(self), dtype=np.uint64)
        if has_volumes.any():
            firsts = self._volume_bounds[:-1][has_volumes]
            found[has_volumes] = np.bitwise_or.reduceat(bit[self.volumes.contrast_id], firsts)
        if not np.array_equal(found, self.contrast_sets):
            row = int(np.flatnonzero(found != self.contrast_sets)[0])
            raise ManifestError(
                f"reading {self.name}, row {row}: contrast_set must be the set of the volumes' "
                f"contrasts {contrasts_of(int(found[row]))}; scan again"
            )


class VolumeColumns:
    """Columns with one row per volume, V in all, in the order of the studies."""

    def __init__(self, table: ManifestTable) -> None:
        self._table = table

    @cached_property
    def study_row(self) -> npt.NDArray[np.int64]:
        """[V] row of the volume's study."""
        return np.repeat(np.arange(len(self._table)), self._table.num_volumes)

    @cached_property
    def contrast_id(self) -> npt.NDArray[np.uint8]:
        """[V] vocabulary id."""
        encoded = self._table.column("volumes.contrast").dictionary_encode()
        try:
            ids = [contrast_id(name) for name in encoded.dictionary.to_pylist()]
        except UnknownContrastError as error:
            raise ManifestError(
                f"reading {self._table.name}: {error}; upgrade anycontrast"
            ) from error
        chosen: npt.NDArray[np.uint8] = np.asarray(ids, dtype=np.uint8)[encoded.indices.to_numpy()]
        return chosen

    @cached_property
    def shape(self) -> npt.NDArray[np.int32]:
        """[V, 3] voxels along the axes of the file."""
        return _triples(self._table, "volumes.shape").astype(np.int32, copy=False)

    @cached_property
    def spacing_mm(self) -> npt.NDArray[np.float64]:
        """[V, 3] mm along the same axes."""
        return _triples(self._table, "volumes.spacing_mm").astype(np.float64, copy=False)

    @cached_property
    def intensity(self) -> npt.NDArray[np.float64]:
        """[V, 3] 1st, 50th and 99th percentile of the foreground, NaN when not known."""
        column = self._table.column("volumes.intensity")
        values = np.full((len(column), 3), np.nan)
        is_known = column.is_valid().to_numpy(zero_copy_only=False)
        values[is_known] = _triples(self._table, "volumes.intensity")
        return values

    @cached_property
    def noise_sigma(self) -> npt.NDArray[np.float64]:
        """[V] standard deviation of the background noise, NaN when not known."""
        return np.asarray(self._table.column("volumes.noise_sigma").fill_null(np.nan))

    @cached_property
    def confidence(self) -> npt.NDArray[np.float64]:
        """[V] confidence of the contrast, 0 .. 1."""
        return np.asarray(self._table.column("volumes.confidence"))

    @cached_property
    def face(self) -> pa.DictionaryArray:
        """[V] what is known of a face, dictionary-encoded."""
        return self._table.column("volumes.face").dictionary_encode()

    @property
    def flags(self) -> pa.ListArray:
        """[V] lists of quality flags."""
        return self._table.column("volumes.flags")

    @property
    def image_hash(self) -> pa.StringArray:
        """[V] 128 hexadecimal digits, or empty."""
        return self._table.column("volumes.image_hash")

    @property
    def voxels_sha256(self) -> pa.StringArray:
        """[V] hash of the picture, or empty."""
        return self._table.column("volumes.voxels_sha256")


def contrasts_of(bits: int) -> tuple[str, ...]:
    """Return the names of a set of contrasts given as bits, in the order of the vocabulary."""
    return tuple(name for name in CONTRAST_NAMES if bits >> contrast_id(name) & 1)


def _triples(table: ManifestTable, name: str) -> npt.NDArray[Any]:
    """Return the lists of three of a column, missing ones left out: [V, 3]."""
    column = table.column(name)
    values = np.asarray(column.flatten())
    lengths = column.value_lengths().drop_null()
    if len(lengths) and pc.min_max(lengths).as_py() != {"min": 3, "max": 3}:
        raise ManifestError(f"reading {table.name}: a volume has three axes; scan again")
    return values.reshape(-1, 3)


def _is_one_of(column: pa.DictionaryArray, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    wanted = np.isin(np.asarray(column.dictionary.to_pylist(), dtype=object), list(names))
    chosen: npt.NDArray[np.bool_] = wanted[column.indices.to_numpy()]
    return chosen


def _joined(chunks: list[pa.Array], kind: pa.DataType | None) -> pa.Array:
    return pa.concat_arrays(chunks or [pa.array([], kind)])
