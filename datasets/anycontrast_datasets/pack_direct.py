"""Studies straight from a store into the row of tokens of their pack.

In: requests, that is studies by their records. Out: the same PackedBatch, bit for bit, that
reading, flipping and `pack_studies` make. Which patches hold foreground is known from the records
before anything is read, so the row is allocated once and every volume is decoded into the same
memory of its thread and gathered from there while it is in the processor's cache; a flip is a
matter of indices. Only where the records tell enough, see `plan_direct_pack`.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.intensity import BLOCK_VOX
from anycontrast_datasets.pack import MIN_PATCHES, occupied_patches
from anycontrast_datasets.pack_tables import StudyTokens, packed_batch
from anycontrast_datasets.store.partial import copy_patches, gather_patches, patch_grid
from anycontrast_datasets.store.reader import SlabStore
from anycontrast_datasets.store.slots import recycled_bytes
from anycontrast_datasets.study import StudyRecord

Vox3 = tuple[int, int, int]

LAYERS = 2
"""Layers of patches decoded at a time."""


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


class DirectPack:
    """A pack under construction: `read` every request, in any threads, then `finish`.

    Made by `plan_direct_pack`.

    Args:
        store: Where the studies are read from.
        requests: In the order of the pack.
        parts: Per request, what of it is kept for every draw.
        patch_vox: Voxels of a patch along i, j, k.
    """

    def __init__(
        self,
        store: SlabStore,
        requests: Sequence[StudyRequest],
        parts: Sequence[list[StudyTokens]],
        patch_vox: Vox3,
    ) -> None:
        self._store = store
        self._requests = tuple(requests)
        self._patch_vox = patch_vox
        self._parts = tuple(parts)
        lengths = [sum(part.num_tokens for part in draws) for draws in parts]
        self._start_S = [0, *accumulate(lengths)]
        self._lock = threading.Lock()
        self._codes_TP: npt.NDArray[np.int16] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def announce(self) -> None:
        """Let the disk fetch all requests while the first ones are being decoded."""
        for request in self._requests:
            self._store.announce(request.index)

    def read(self, number: int) -> None:
        """Read one request into its place in the row; may run in several threads at once.

        Raises:
            ShardError: As the store raises it; the pack can be finished without this request.
        """
        request, parts = self._requests[number], self._parts[number]
        codes_TP = self._row()
        places = {volume.contrast: n for n, volume in enumerate(parts[0].volumes)}
        starts, edges = self._starts(number), [_layer_edges(part) for part in parts]
        depth = self._patch_vox[0]
        is_whole = _is_whole(request.record, self._patch_vox)
        for contrast, plane, codes_XYZ in self._store.slabs(
            request.index, request.contrasts, LAYERS * depth
        ):
            place = places[contrast]
            layers = range(plane // depth, -(-(plane + len(codes_XYZ)) // depth))
            for part, flips, start_V, edges_V in zip(
                parts, request.flips, starts, edges, strict=True
            ):
                first, index_N = _patches_of(part, edges_V[place], place, layers, flips)
                first += start_V[place]
                out = codes_TP[first : first + len(index_N)]
                if is_whole:
                    copy_patches(codes_XYZ, self._patch_vox, index_N, out, mirrored=flips)
                else:
                    gather_patches(codes_XYZ, self._patch_vox, index_N, out)

    def finish(self, numbers: Sequence[int] | None = None) -> PackedBatch:
        """Return the pack of all requests, or of those that could be read.

        Args:
            numbers: Requests to keep, ascending and at least one; None keeps all.
        """
        kept = range(len(self)) if numbers is None else numbers
        parts = [part for number in kept for part in self._parts[number]]
        codes_TP = self._row()
        if len(kept) < len(self):
            rows = [codes_TP[self._start_S[n] : self._start_S[n + 1]] for n in kept]
            codes_TP = np.concatenate(rows)
        return packed_batch(parts, codes_TP, self._patch_vox, labels=False)

    def _row(self) -> npt.NDArray[np.int16]:
        with self._lock:
            if self._codes_TP is None:
                num_tokens, num_voxels = self._start_S[-1], math.prod(self._patch_vox)
                memory = recycled_bytes(2 * num_tokens * num_voxels)
                self._codes_TP = memory.view(np.int16).reshape(num_tokens, num_voxels)
            return self._codes_TP

    def _starts(self, number: int) -> list[list[int]]:
        """Return the first token of every volume of every draw of a request."""
        start, found = self._start_S[number], []
        for part in self._parts[number]:
            lengths = [len(kept_N) for kept_N in part.kept]
            found.append((start + np.cumsum([0, *lengths[:-1]])).tolist())
            start += sum(lengths)
        return found


def plan_direct_pack(
    store: object, requests: Sequence[StudyRequest], patch_vox: Vox3, *, drop_empty: bool = True
) -> DirectPack | None:
    """Plan a pack of whole studies, without labels, from their records.

    Args:
        store: Where the studies are read from.
        requests: In the order of the pack; at least one.
        patch_vox: Voxels of a patch along i, j, k.
        drop_empty: Leave out patches that are all code 0 in their volume.

    Returns:
        The plan; None if the store cannot hand out slabs or the tokens of a study do not follow
        from its record: patches that are not made of whole occupancy blocks, a volume almost
        without foreground, a flip of a box that is not made of whole patches.
    """
    if not isinstance(store, SlabStore):
        return None
    parts = []
    for request in requests:
        draws = _draws(request, patch_vox, drop_empty)
        if draws is None:
            return None
        parts.append(draws)
    return DirectPack(store, requests, parts, patch_vox)


def _draws(request: StudyRequest, patch_vox: Vox3, drop_empty: bool) -> list[StudyTokens] | None:
    """Return what of a study is kept, per draw; None if its record does not tell."""
    record = request.record
    volumes = tuple(v for v in record.volumes if v.contrast in request.contrasts)
    grid = patch_grid(record.shape, patch_vox)
    if any(request.flips) and not _is_whole(record, patch_vox):
        return None
    bits = np.ones((len(volumes), *grid), dtype=np.bool_)
    if drop_empty:
        if any(n % BLOCK_VOX for n in (*record.shape, *patch_vox)):
            return None
        if not all(volume.occupancy for volume in volumes):
            return None
        bits = occupied_patches(record, request.contrasts, patch_vox)
        if bits.sum(axis=(1, 2, 3)).min() < MIN_PATCHES:
            return None
    assert bits.shape[1:] == grid, (bits.shape, grid)
    return [
        StudyTokens(
            record=record,
            epoch=request.epoch,
            draw=draw,
            patch_grid=grid,
            origin_vox=(0, 0, 0),
            volumes=volumes,
            kept=tuple(np.flatnonzero(np.flip(volume, flips)) for volume in bits),
        )
        for draw, flips in zip(request.draws, request.flips, strict=True)
    ]


def _is_whole(record: StudyRecord, patch_vox: Vox3) -> bool:
    """Say whether the grid needs no padding."""
    return not any(n % p for n, p in zip(record.shape, patch_vox, strict=True))


def _patches_of(
    part: StudyTokens, edges: Sequence[int], place: int, layers: range, flips: Sequence[int]
) -> tuple[int, npt.NDArray[np.int64]]:
    """Return the kept patches of stored layers of patches: the first token, and where they lie.

    Tokens are ordered by the flipped grid, so those of neighbouring layers follow each other
    whatever is flipped.
    """
    x, y, z = part.patch_grid
    first_layer = x - layers.stop if 0 in flips else layers.start
    first, stop = edges[first_layer], edges[first_layer + len(layers)]
    index_N = part.kept[place][first:stop] - first_layer * y * z
    if flips:
        stored = np.arange(len(layers) * y * z).reshape(len(layers), y, z)
        index_N = np.flip(stored, tuple(flips)).reshape(-1)[index_N]
    return first, index_N


def _layer_edges(part: StudyTokens) -> list[list[int]]:
    """Return, per volume, before which of its tokens each layer of patches begins, and the end."""
    x, y, z = part.patch_grid
    firsts = np.arange(x + 1) * (y * z)
    return [np.searchsorted(kept_N, firsts).tolist() for kept_N in part.kept]
