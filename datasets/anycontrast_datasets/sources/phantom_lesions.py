"""Planted lesions: an acute infarct, or a tumour with core, enhancing rim and oedema.

In: a healthy `Head` and a random generator. Out: the head with part of its tissue replaced, so that
every contrast shows the lesion through its own physics. Gives up: vascular territories, mass
effect, haemorrhage, more than one lesion a study.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from anycontrast_datasets.sources.phantom_anatomy import FloatArray, Head, smooth_field
from anycontrast_datasets.sources.phantom_physics import (
    LESION_VALUES,
    TISSUE_NAMES,
    TISSUES,
    Tissue,
)

# Surfaces of a tumour as shares of its outer radius.
_CORE, _RIM = 0.42, 0.66


@dataclass(frozen=True)
class Lesion:
    """Where the lesion is and how it looks: distances and softness in shares of the radius."""

    distance: FloatArray
    """[X, Y, Z]; 1 at the outer surface."""
    softness: float

    def inside(self, surface: float) -> FloatArray:
        """Soft indicator `[X, Y, Z]` of everything within the surface."""
        steepness = 4.0 / self.softness
        exponent = np.clip((self.distance - surface) * steepness, -40.0, 40.0)
        return np.asarray(1.0 / (1.0 + np.exp(exponent)), dtype=np.float32)


def plant_lesion(head: Head, kind: str, rng: np.random.Generator) -> Head:
    """Replace tissue by a lesion.

    Args:
        head: a healthy head.
        kind: `infarct` or `tumour`.
        rng: decides place, size and shape.
    """
    brain = head.brain
    white = head.tissue("wm")
    lesion = _draw_lesion(head, kind, rng)
    if kind == "infarct":
        # Infarcts spare CSF: the fraction of a voxel that is tissue becomes infarct.
        shares = {"infarct": lesion.inside(1.0) * head.tissue("gm", "wm")}
    else:
        assert kind == "tumour", f"unknown lesion kind {kind!r}"
        core, solid = lesion.inside(_CORE), lesion.inside(_RIM)
        # Vasogenic oedema follows the white matter and leaves most of the cortex alone.
        oedema = (
            (lesion.inside(1.0) - solid) * np.minimum(1.0, 0.25 + white) * head.tissue("gm", "wm")
        )
        shares = {
            "oedema": np.clip(oedema, 0.0, 1.0),
            "core": core * brain,
            "enhancing": (solid - core) * brain,
        }
    fractions_KXYZ = head.fractions_KXYZ.copy()
    total = sum(shares.values(), np.zeros_like(brain))
    remaining = np.divide(brain - total, brain, out=np.ones_like(brain), where=brain > 1e-3)
    fractions_KXYZ *= np.clip(remaining, 0.0, 1.0)
    for name, share in shares.items():
        fractions_KXYZ[TISSUE_NAMES.index(name)] = share
    return replace(head, fractions_KXYZ=fractions_KXYZ)


def _draw_lesion(head: Head, kind: str, rng: np.random.Generator) -> Lesion:
    """Place a lumpy ellipsoid deep enough in the brain, large enough for thick slices."""
    spacing = np.array(head.spacing_mm)
    shape = head.fractions_KXYZ.shape[1:]
    low, high = (9.0, 20.0) if kind == "infarct" else (18.0, 30.0)
    radius_mm = max(rng.uniform(low, high), (2.5 if kind == "infarct" else 5.0) * spacing.max())
    axes_mm = radius_mm * np.exp(rng.normal(0.0, 0.15, 3))
    window_vox = [2 * max(1, round(14.0 / step)) + 1 for step in head.spacing_mm]
    is_deep = ndimage.uniform_filter(head.brain, window_vox) > 0.93
    candidates = np.flatnonzero(is_deep & (head.tissue("gm", "wm") > 0.8))
    assert candidates.size, "no place for a lesion: the atlas is not a brain"
    place = np.unravel_index(rng.choice(candidates), shape)
    turn = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix() / axes_mm
    offsets_mm = [
        ((np.arange(n) - centre) * step).astype(np.float32)
        for n, centre, step in zip(shape, place, spacing, strict=True)
    ]
    squared = np.zeros(shape, dtype=np.float32)
    for row in range(3):
        squared += (
            offsets_mm[0][:, None, None] * np.float32(turn[0, row])
            + offsets_mm[1][None, :, None] * np.float32(turn[1, row])
            + offsets_mm[2][None, None, :] * np.float32(turn[2, row])
        ) ** 2
    lumps = smooth_field(rng, shape, head.spacing_mm, correlation_mm=max(8.0, 0.6 * radius_mm))
    distance = np.sqrt(squared) * np.exp(0.15 * np.clip(lumps, -2.0, 2.0))
    softness = max(0.12, 0.6 * float(spacing.max()) / radius_mm)
    return Lesion(np.asarray(distance, dtype=np.float32), softness)


def vary_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """Constants of one study: every tissue's relaxation and diffusion off by a few per cent."""
    varied = {}
    for name, tissue in TISSUES.items():
        spread = 0.10 if name in LESION_VALUES else 0.02
        t1, t2, adc = np.exp(np.clip(rng.normal(0.0, spread, 3), -0.2, 0.2))
        varied[name] = replace(
            tissue,
            t1_s=_scaled(tissue.t1_s, t1),
            t2_s=_scaled(tissue.t2_s, t2),
            t2star_s=_scaled(tissue.t2star_s, t2),
            adc_um2_s=tissue.adc_um2_s * float(adc),
        )
    return varied


def _scaled(pair: tuple[float, float], factor: float) -> tuple[float, float]:
    return (pair[0] * float(factor), pair[1] * float(factor))


def lesion_label(shares: dict[str, FloatArray]) -> npt.NDArray[np.uint8]:
    """Label voxels by their largest lesion class where lesion fills half the voxel.

    Args:
        shares: per class of `LESION_VALUES`, fraction `[X, Y, Z]` on the label's grid. Where no
            voxel is half full, half the largest fraction is the limit, so no lesion goes unmarked.
    """
    names = list(shares)
    stack = np.stack([shares[name] for name in names])
    total = stack.sum(axis=0)
    values = np.array([LESION_VALUES[name] for name in names], dtype=np.uint8)
    limit = min(0.5, 0.5 * float(total.max()))
    return np.asarray(np.where(total > limit, values[stack.argmax(axis=0)], 0), dtype=np.uint8)
