"""Studies straight from a store into the memory of their pack.

In: requests, that is studies by their records. Out: the same tokens, bit for bit, that reading,
flipping and `pack_studies` give. How many voxels a pack holds is known from the records before
anything is read, so its memory is taken once and every volume is decoded into its own place of it;
no voxel is copied after that, a flip is a flag, and several draws of a study share its voxels.
Which patches hold foreground follows from the record, or is looked up in the voxels where the
record does not tell.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.intensity import BLOCK_VOX
from anycontrast_datasets.pack import MIN_PATCHES, occupied_patches, occupied_voxels
from anycontrast_datasets.pack_tables import StudyTokens, packed_batch
from anycontrast_datasets.store.partial import patch_grid
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.store.slots import recycled_bytes
from anycontrast_datasets.study import StudyRecord, VolumeRecord

Vox3 = tuple[int, int, int]
Codes = npt.NDArray[np.int16]
Kept = tuple[npt.NDArray[np.int64], ...]


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """One study of a pack, and what is done to it."""

    index: int
    """In the store."""
    record: StudyRecord
    """As the store has it, with all volumes."""
    contrasts: tuple[str, ...]
    epoch: int
    draws: tuple[int, ...] = (0,)
    """One copy of the study goes into the pack for each."""
    flips: tuple[tuple[int, ...], ...] = ((),)
    """Axes flipped, for every draw."""

    @property
    def volumes(self) -> tuple[VolumeRecord, ...]:
        """The volumes asked for, in stored order."""
        return tuple(v for v in self.record.volumes if v.contrast in self.contrasts)


class DirectPack:
    """A pack under construction: `read` every request, in any threads, then `finish`.

    Args:
        store: Where the studies are read from.
        requests: In the order of the pack; at least one. Whole studies without labels.
        patch_vox: Voxels of a patch along i, j, k.
        drop_empty: Leave out patches that are all code 0 in their volume, see `pack_studies`.
    """

    def __init__(
        self,
        store: StudyStore,
        requests: Sequence[StudyRequest],
        patch_vox: Vox3,
        *,
        drop_empty: bool = True,
    ) -> None:
        self._store = store
        self._requests = tuple(requests)
        self._patch_vox = patch_vox
        self._drop_empty = drop_empty
        sizes = [math.prod(r.record.shape) * len(r.volumes) for r in requests]
        self._edges = [0, *accumulate(sizes)]
        self._parts: list[list[StudyTokens]] = [[] for _ in requests]
        self._lock = threading.Lock()
        self._codes_B: Codes | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def read(self, number: int) -> None:
        """Read one request into its place; may run in several threads at once.

        Raises:
            ShardError: As the store raises it; the pack can be finished without this request.
        """
        request, start = self._requests[number], self._edges[number]
        size = math.prod(request.record.shape)
        place_B = self._memory()[start : self._edges[number + 1]]
        slots = {
            volume.contrast: place_B[n * size : (n + 1) * size]
            for n, volume in enumerate(request.volumes)
        }
        arrays = self._store.read(request.index, contrasts=request.contrasts, out=slots)
        starts = tuple(start + n * size for n in range(len(request.volumes)))
        kept: dict[tuple[int, ...], Kept] = {}
        for draw, flips in zip(request.draws, request.flips, strict=True):
            if flips not in kept:
                kept[flips] = self._kept(request, [arrays.codes[name] for name in slots], flips)
            self._parts[number].append(
                StudyTokens(
                    record=request.record,
                    epoch=request.epoch,
                    draw=draw,
                    patch_grid=patch_grid(request.record.shape, self._patch_vox),
                    origin_vox=(0, 0, 0),
                    volumes=request.volumes,
                    kept=kept[flips],
                    starts=starts,
                    shape=request.record.shape,
                    flips=flips,
                )
            )

    def finish(self, numbers: Sequence[int] | None = None) -> PackedBatch:
        """Return the pack of all requests, or of those that could be read.

        Args:
            numbers: Requests to keep, ascending and at least one; None keeps all.
        """
        codes_B, parts = self._memory(), []
        if numbers is None or len(numbers) == len(self):
            parts = [part for draws in self._parts for part in draws]
            return packed_batch(parts, codes_B, self._patch_vox, labels=False)
        pieces, place = [], 0
        for number in numbers:
            first, stop = self._edges[number], self._edges[number + 1]
            pieces.append(codes_B[first:stop])
            for part in self._parts[number]:
                starts = tuple(start - first + place for start in part.starts)
                parts.append(replace(part, starts=starts))
            place += stop - first
        return packed_batch(parts, np.concatenate(pieces), self._patch_vox, labels=False)

    def _memory(self) -> Codes:
        with self._lock:
            if self._codes_B is None:
                self._codes_B = recycled_bytes(2 * self._edges[-1]).view(np.int16)
            return self._codes_B

    def _kept(self, request: StudyRequest, codes: Sequence[Codes], flips: tuple[int, ...]) -> Kept:
        """Return, per volume, which patches of the grid as seen are tokens."""
        if not self._drop_empty:
            num_patches = math.prod(patch_grid(request.record.shape, self._patch_vox))
            return (np.arange(num_patches),) * len(codes)
        recorded = _recorded(request, self._patch_vox, flips)
        if recorded is not None:
            return recorded
        return tuple(occupied_voxels(np.flip(c, flips), self._patch_vox) for c in codes)


def _recorded(request: StudyRequest, patch_vox: Vox3, flips: Sequence[int]) -> Kept | None:
    """Look up in the record which patches hold foreground; None if it does not tell.

    It does not where patches are not made of whole occupancy blocks, or a volume is almost without
    foreground and keeps patches that hold none.
    """
    if any(n % BLOCK_VOX for n in (*request.record.shape, *patch_vox)):
        return None
    if not all(volume.occupancy for volume in request.volumes):
        return None
    bits = occupied_patches(request.record, request.contrasts, patch_vox, flips=flips)
    if bits.sum(axis=(1, 2, 3)).min() < MIN_PATCHES:
        return None
    return tuple(np.flatnonzero(volume) for volume in bits)
