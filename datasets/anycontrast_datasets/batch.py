"""PackedBatch: tokens of several studies in one row, nothing padded.

A token is a patch of a volume, named by volume and grid index. The batch carries the volumes as
they are stored; their patches are cut where they are needed, on the device of the model, by
`anycontrast_kernels.patchify.gather_zscores`.

Letters used in names here and in the model: T tokens, B voxels of all volumes, V volumes, S
studies, K descriptor values. Tokens are ordered by study, then volume (in the study's order), then
patch grid index in C order; so every study and every volume is one contiguous run.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Tokens of `S` studies. Tensors move with `.to(device)`; the rest stays on the host."""

    codes_B: Tensor
    """[B] int16, stored codes of whole volumes, each in C order of (i, j, k), not mirrored."""
    volume_start_V: Tensor
    """[V] int64, first voxel of each volume in `codes_B`; draws of a study share their voxels."""
    volume_shape_V3: Tensor
    """[V, 3] int64, voxels of each volume along i, j, k."""
    flip_V3: Tensor
    """[V, 3] bool, axes along which the volume is seen mirrored."""
    volume_T: Tensor
    """[T] int64, row of the per-volume tables."""
    position_mm_T3: Tensor
    """[T, 3] float32, patch centre in mm along the grid axes (R+, A+, S+), 0 at the box centre."""
    grid_T3: Tensor
    """[T, 3] int64, index of the patch in its study's patch grid, as seen. The grid is padded at
    its far end (as seen) with code 0 up to whole patches."""
    intensity_V4: Tensor
    """[V, 4] float32, (gain, bias, low, high): z-score = clip(code * gain + bias, low, high)."""
    contrast_V: Tensor
    """[V] int64, vocabulary id."""
    descriptor_VK: Tensor
    """[V, K] float32, see `ContrastDescriptor.vector`."""
    study_V: Tensor
    """[V] int64, which study of this batch the volume belongs to."""
    cu_seqlens: Tensor
    """[S + 1] int32, study s owns tokens cu_seqlens[s]:cu_seqlens[s + 1]."""
    lengths: tuple[int, ...]
    """Tokens per study, the same as cu_seqlens on the host (no device sync)."""
    volume_lengths: tuple[int, ...]
    """Tokens per volume, host."""
    study_ids: tuple[str, ...]
    epochs: tuple[int, ...]
    """Epoch each study is served for; masks and augmentation depend on (seed, epoch, study id)."""
    contrasts: tuple[tuple[str, ...], ...]
    """Contrast names per study, in volume order."""
    patch_grids: tuple[tuple[int, int, int], ...]
    """Patches along each axis, per study."""
    patch_vox: tuple[int, int, int]
    spacing_mm: tuple[tuple[float, float, float], ...]
    """Voxel spacing per study."""
    labels: tuple[Tensor | None, ...] = ()
    """Per study [X, Y, Z] uint8 on the padded patch grid; empty when labels were not asked for."""
    draws: tuple[int, ...] = ()
    """Per study, which serving within its epoch this is: a study served several times an epoch has
    a mask and an augmentation of its own in each. Left out means 0 for every study."""

    def __post_init__(self) -> None:
        if not self.draws:
            object.__setattr__(self, "draws", (0,) * len(self.lengths))

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.volume_T.shape[0])

    @property
    def num_studies(self) -> int:
        """S."""
        return len(self.lengths)

    @property
    def num_volumes(self) -> int:
        """V."""
        return int(self.contrast_V.shape[0])

    @property
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` as host integers, length S + 1."""
        return (0, *accumulate(self.lengths))

    @property
    def volume_offsets(self) -> tuple[int, ...]:
        """First token of every volume, then T; length V + 1."""
        return (0, *accumulate(self.volume_lengths))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """Return the batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["labels"] = tuple(
            None if label is None else label.to(device, non_blocking=non_blocking)
            for label in self.labels
        )
        return replace(self, **moved)
