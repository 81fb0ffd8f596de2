"""Crop, flip and contrast dropout: functions of (study, rng) that return views.

In: a prepared study and a generator that depends on (seed, epoch, study id) alone. Out: a
`StudyView`, the arrays plus where they lie in the stored box. Flips and crops are NumPy views;
only a crop that reaches over the edge of the box copies.
"""

from dataclasses import dataclass

from anycontrast_datasets.study import StudyArrays


@dataclass(frozen=True)
class StudyView:
    """Arrays that may be a part of their study's stored box."""

    arrays: StudyArrays
    """`record.shape` stays that of the whole stored box; the arrays may be smaller or larger."""
    origin_vox: tuple[int, int, int] = (0, 0, 0)
    """Voxel of the (flipped) stored box at array index 0; negative where the crop was padded."""
