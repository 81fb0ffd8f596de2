"""An experiment in layout: the non-empty patches of a volume, shuffled once, in groups of a frame.

In: int16 codes and a patch size. Out: one member of blosc frames, `GROUP_PATCHES` patches each, and
a table of which patch lies where. A reader that needs a share of the patches decodes that share of
the groups, straight into the rows of a batch, and no volume. Gives up: any other patch size, grid,
crop or shift; and which patches are ever seen together is settled when the member is written.

Kept for `bench patches`, which measures whether it pays; `docs/stores.md` says why it is not used.
Letters: N patches of a volume, P voxels per patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.store.codec import CodecName, checksum, decode_into, encode
from anycontrast_datasets.store.partial import Vox3, gather_patches, patch_grid
from anycontrast_datasets.study import ShardError

GROUP_PATCHES = 16


@dataclass(frozen=True)
class PatchGroups:
    """What lies in a member of patch groups."""

    patch_vox: Vox3
    order_N: npt.NDArray[np.int64]
    """[N] flat index into the patch grid of every patch, in stored order."""
    group_bytes: tuple[int, ...]
    xxh3_64: tuple[str, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First byte of every group, then the end."""
        return (0, *accumulate(self.group_bytes))

    def rows(self, group: int) -> slice:
        """Which of the N patches a group holds."""
        start = group * GROUP_PATCHES
        return slice(start, min(start + GROUP_PATCHES, len(self.order_N)))


def encode_groups(
    codes_XYZ: npt.NDArray[np.int16],
    patch_vox: Vox3,
    seed: int,
    *,
    codec: CodecName = "zstd",
    level: int = 5,
) -> tuple[bytes, PatchGroups]:
    """Shuffle the patches that are not all 0 and compress them group by group.

    Args:
        codes_XYZ: [X, Y, Z] int16.
        patch_vox: Voxels of a patch along i, j, k.
        seed: Of the shuffle.
        codec: Compressor.
        level: Of the compressor.
    """
    total = int(np.prod(patch_grid(codes_XYZ.shape, patch_vox)))
    patches_LP = gather_patches(codes_XYZ, patch_vox, np.arange(total))
    order_N = np.random.default_rng(seed).permutation(np.flatnonzero(patches_LP.any(axis=1)))
    frames = [
        encode(patches_LP[order_N[start : start + GROUP_PATCHES]], name=codec, level=level)
        for start in range(0, len(order_N), GROUP_PATCHES)
    ]
    sizes = tuple(len(frame) for frame in frames)
    table = PatchGroups(patch_vox, order_N, sizes, tuple(checksum(frame) for frame in frames))
    return b"".join(frames), table


def decode_groups(
    member: bytes | memoryview,
    table: PatchGroups,
    groups: Sequence[int],
    out_NP: npt.NDArray[np.int16],
) -> npt.NDArray[np.int64]:
    """Decode some groups into the first rows of `out_NP`.

    Returns:
        Flat index into the patch grid of every row written.

    Raises:
        ShardError: If a group is not the one that was written.
    """
    offsets, start = table.offsets, 0
    written = []
    for group in groups:
        frame = memoryview(member)[offsets[group] : offsets[group + 1]]
        if checksum(frame) != table.xxh3_64[group]:
            raise ShardError(f"patch group {group}: was damaged after it was written")
        index = table.order_N[table.rows(group)]
        decode_into(frame, out_NP[start : start + len(index)])
        written.append(index)
        start += len(index)
    return np.concatenate(written) if written else np.zeros(0, dtype=np.int64)
