"""The records of a store as a sequence that parses a record when it is asked for.

A record is a few kilobytes of JSON; parsing all of a store of 45,000 studies takes seconds and
gigabytes, and most callers want their splits and contrasts only, which are read here by column.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from anycontrast_datasets.record_json import record_from_json
from anycontrast_datasets.study import ShardError, StudyRecord

MAX_PARSED = 8192
"""Records kept parsed; the least recently used go first."""


class StudyRecords(Sequence[StudyRecord]):
    """Records in manifest order; may be shared by threads.

    Args:
        texts: One JSON text per study.
        contrasts: Computes the contrasts of every study, called once if they are asked for.
    """

    def __init__(
        self, texts: pa.ChunkedArray, contrasts: Callable[[], tuple[tuple[str, ...], ...]]
    ) -> None:
        self._texts = texts
        self._contrasts = contrasts
        # No lock of ours, which a process forked meanwhile would never get.
        self._parsed = lru_cache(MAX_PARSED)(self._parse)

    def __getstate__(self) -> dict[str, Any]:
        return {"texts": self._texts, "contrasts": self.contrasts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["texts"], lambda: state["contrasts"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> StudyRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StudyRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> StudyRecord | tuple[StudyRecord, ...]:
        """Parse one record, or find it parsed; a slice gives a tuple."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"study {index} of {len(self)}")
        return self._parsed(place)

    def __iter__(self) -> Iterator[StudyRecord]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _parse(self, index: int) -> StudyRecord:
        return record_from_json(self.text(index))

    def text(self, index: int) -> str:
        """Return the JSON of a record."""
        return self._texts[index].as_py() or ""

    def field(self, name: str) -> npt.NDArray[np.str_]:
        """Return a text field of every record, e.g. `split` or `dataset`, without parsing them.

        Raises:
            ShardError: If a record lacks it.
        """
        pattern = rf'"{name}":"(?P<value>(?:[^"\\]|\\.)*)"'
        found = pc.struct_field(pc.extract_regex(self._texts, pattern=pattern), "value")
        if found.null_count:
            raise ShardError(
                f"opening shards: a record has no {name}; run `anycontrast shard` again"
            )
        unique = pc.dictionary_encode(found).combine_chunks()
        values = [json.loads(f'"{text}"') for text in unique.dictionary.to_pylist()]
        codes = unique.indices.to_numpy()
        fields: npt.NDArray[np.str_] = np.array(values, dtype=np.str_)[codes]
        return fields

    @cached_property
    def contrasts(self) -> tuple[tuple[str, ...], ...]:
        """Contrasts of every study in stored order, without parsing the records."""
        return self._contrasts()
