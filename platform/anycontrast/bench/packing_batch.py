"""Batches of studies with differing contrasts and sizes, made of noise, for `bench packing`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast_datasets.contrast import ContrastDescriptor
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.study import StudyArrays, StudyRecord, VolumeRecord
from anycontrast_kernels.bench.mixed import CLINICAL, SIZES

CONTRASTS = ("T1w", "T1wCE", "T2w", "FLAIR", "DWI", "ADC", "SWI")
DISTRIBUTIONS = {
    "uniform": (1 / 7,) * 7,
    "skewed": (0.30, 0.20, 0.15, 0.12, 0.10, 0.08, 0.05),
    "clinical": CLINICAL,
    "halves": (0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5),
}
"""Share of studies with 1 to 7 contrasts: all alike, mostly few, as a clinic has them, 1 or 7."""
PATCH_VOX = (16, 16, 16)
BATCHES_DRAWN = 101


class Plan(NamedTuple):
    """A batch before it has voxels."""

    counts: tuple[int, ...]
    """Contrasts per study."""
    grids: tuple[int, ...]
    """Patches along each side, per study."""

    @property
    def tokens(self) -> list[int]:
        """Per study."""
        return [count * grid**3 for count, grid in zip(self.counts, self.grids, strict=True)]

    @property
    def waste(self) -> float:
        """Tokens of the padded batch over the real ones."""
        return len(self.counts) * max(self.tokens) / sum(self.tokens)


def draw_plan(num_studies: int, distribution: str, grid: int, *, mixed: bool, seed: int) -> Plan:
    """Draw many batches and return the one of median waste, so that luck does not decide.

    Args:
        num_studies: of a batch.
        distribution: of the number of contrasts, one of `DISTRIBUTIONS`.
        grid: patches along each side of a volume of size 1.
        mixed: whether sizes differ.
        seed: of the draw.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    factors, shares = zip(*SIZES, strict=True)
    grids = [round(grid * factor ** (1 / 3)) for factor in factors]
    plans = []
    for _ in range(BATCHES_DRAWN):
        counts = rng.choice(len(CONTRASTS), num_studies, p=DISTRIBUTIONS[distribution]) + 1
        drawn = rng.choice(grids, num_studies, p=shares)
        chosen = drawn if mixed else np.full(num_studies, grid)
        plans.append(Plan(tuple(map(int, counts)), tuple(map(int, chosen))))
    return sorted(plans, key=lambda plan: plan.waste)[BATCHES_DRAWN // 2]


def masked_pack(studies: Sequence[StudyArrays], masking: MaskingConfig) -> MaskedPack:
    """Pack whole studies and hide tokens."""
    batch = pack_studies(studies, PATCH_VOX, epochs=[0] * len(studies), drop_empty=False)
    return mask_batch(batch, masking, seed=0)


def noise_study(number: int, num_contrasts: int, grid: int) -> StudyArrays:
    """Make a study of noise; what is in it does not change the work."""
    shape = (grid * PATCH_VOX[0], grid * PATCH_VOX[1], grid * PATCH_VOX[2])
    rng = np.random.default_rng(number)
    codes = {
        name: rng.integers(1, 4000, size=shape, dtype=np.int16)
        for name in CONTRASTS[:num_contrasts]
    }
    volumes = tuple(
        VolumeRecord(
            contrast=name,
            scale=1.0,
            offset=0.0,
            p0_5=0.0,
            p99_5=4000.0,
            mean=2000.0,
            std=1150.0,
            num_foreground=int(codes[name].size),
            occupancy="",
            source_spacing_mm=(1.0, 1.0, 1.0),
            descriptor=ContrastDescriptor(),
        )
        for name in codes
    )
    record = StudyRecord(
        study_id=f"noise-{number}",
        dataset="noise",
        subject_id=f"noise-{number}",
        session_id="1",
        split="train",
        shape=shape,
        spacing_mm=(1.0, 1.0, 1.0),
        affine=((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0)),
        volumes=volumes,
    )
    return StudyArrays(record, codes)
