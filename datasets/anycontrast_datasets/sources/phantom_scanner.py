"""The simulated scanner: one head and one protocol in, one image on its own grid out.

Tissue signals are mixed on the working grid, sampled on the acquisition grid (averaged over the
slice thickness), turned into a magnitude, shaded by the receive field, given noise and stored as
int16 in the orientation of the protocol. All images of a study share the head's pose in scanner
mm. Gives up: motion, distortion, k-space artefacts, fat suppression; the main field runs along the
head.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from anycontrast_datasets.sources.phantom_anatomy import (
    FloatArray,
    Head,
    MatrixArray,
    make_head,
    smooth_field,
)
from anycontrast_datasets.sources.phantom_config import (
    PHANTOM_CONTRASTS,
    PhantomConfig,
    Stream,
    StudyPlan,
    stream_rng,
)
from anycontrast_datasets.sources.phantom_lesions import lesion_label, plant_lesion, vary_tissues
from anycontrast_datasets.sources.phantom_physics import (
    LESION_VALUES,
    TISSUE_NAMES,
    Protocol,
    Tissue,
    phase_weight,
    signals,
    site_protocols,
    susceptibility_phase,
)

# Nobody plans thicker slices; matters only where the configured spacing is coarse.
_MAX_THICKNESS_MM = 8.0
_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True)
class Grid:
    """Where an acquisition puts its voxels."""

    shape: tuple[int, int, int]
    affine: MatrixArray
    """Voxel ijk -> upright head frame, mm."""
    num_slabs: int
    """Samples averaged along the last axis of every voxel."""


@dataclass(frozen=True)
class ScannedImage:
    """One image as it will be stored."""

    array: npt.NDArray[np.int16] | npt.NDArray[np.uint8]
    affine: MatrixArray
    """Stored voxel ijk -> scanner frame, RAS+ mm."""
    sidecar: dict[str, object]


@dataclass(frozen=True)
class ScannedStudy:
    """All images of one session, and the lesion mask on the grid of `label_grid_of`.

    The mask of a healthy study is all 0.
    """

    images: dict[str, ScannedImage]
    label: ScannedImage
    label_grid_of: str


def scan_study(config: PhantomConfig, plan: StudyPlan) -> ScannedStudy:
    """Make every image of a planned study. A pure function of the configuration and the plan."""
    tissue_rng = stream_rng(config.seed, Stream.LESION, plan.index, 1)
    head = make_head(
        config.spacing_mm,
        head_rng=stream_rng(config.seed, Stream.HEAD, plan.subject),
        pose_rng=stream_rng(config.seed, Stream.POSE, plan.index),
        skull=config.skull,
    )
    if plan.lesion:
        head = plant_lesion(head, plan.lesion, stream_rng(config.seed, Stream.LESION, plan.index))
    tissues = vary_tissues(tissue_rng)
    protocols = site_protocols(config.seed, plan.site)
    grids = {name: _plan_grid(config, plan, head, protocols[name]) for name in plan.contrasts}
    images = {
        name: _acquire(config, plan, head, protocols[name], grids[name], tissues)
        for name in plan.contrasts
    }
    grid_of = next((n for n in ("DWI", "FLAIR") if n in images), plan.contrasts[0])
    shares = {name: _sample(head, head.tissue(name), grids[grid_of]) for name in LESION_VALUES}
    values: dict[str, object] = {str(value): name for name, value in LESION_VALUES.items()}
    label = _store(
        head, lesion_label(shares), grids[grid_of], protocols[grid_of], {"Values": values}
    )
    return ScannedStudy(images, label, grid_of)


def _plan_grid(config: PhantomConfig, plan: StudyPlan, head: Head, protocol: Protocol) -> Grid:
    """Lay the protocol's box around the head: along the scanner (3D) or along the head (2D)."""
    # DWI and ADC come from one acquisition, hence one grid.
    source = "DWI" if protocol.contrast == "ADC" else protocol.contrast
    key = PHANTOM_CONTRASTS.index(source)
    rng = stream_rng(config.seed, Stream.ACQUISITION, plan.index, key, 1)
    nod, roll, turn = rng.normal(0.0, 1.0, 3) * (4.0, 1.0, 1.0)
    if protocol.is_scanner_aligned:
        axes = np.linalg.inv(head.pose[:3, :3])
    else:
        axes = Rotation.from_euler("xyz", [nod, roll, turn], degrees=True).as_matrix()
    work_shape = np.array(head.fractions_KXYZ.shape[1:])
    extent_mm = work_shape * head.spacing_mm
    spacing = np.array(head.spacing_mm) * protocol.spacing_factor
    spacing[2] = max(head.spacing_mm[2], min(spacing[2], _MAX_THICKNESS_MM))
    shape = np.ceil(extent_mm / spacing).astype(int)
    centre = head.affine[:3, :3] @ ((work_shape - 1) / 2.0) + head.affine[:3, 3]
    centre = centre + axes @ (rng.uniform(-0.5, 0.5, 3) * spacing)
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2.0)
    num_slabs = math.ceil(spacing[2] / head.spacing_mm[2] - 1e-6)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine, num_slabs)


def _sample(head: Head, values: npt.NDArray[np.floating], grid: Grid) -> FloatArray:
    """Sample a map of the working grid on an acquisition grid, averaging over the slices."""
    fine = grid.affine.copy()
    fine[:3, 2] /= grid.num_slabs
    fine[:3, 3] -= fine[:3, 2] * (grid.num_slabs - 1) / 2.0
    to_work = np.linalg.inv(head.affine) @ fine
    shape = (*grid.shape[:2], grid.shape[2] * grid.num_slabs)
    sampled = ndimage.affine_transform(
        np.asarray(values, dtype=np.float32), to_work[:3, :3], to_work[:3, 3],
        output_shape=shape, order=1, prefilter=False, output=np.float32,
    )  # fmt: skip
    if grid.num_slabs > 1:
        sampled = sampled.reshape(*grid.shape, grid.num_slabs).mean(axis=3)
    return np.asarray(sampled, dtype=np.float32)


def _acquire(
    config: PhantomConfig,
    plan: StudyPlan,
    head: Head,
    protocol: Protocol,
    grid: Grid,
    tissues: dict[str, Tissue],
) -> ScannedImage:
    """Run one protocol: signal, receive field, noise, gain."""
    key = PHANTOM_CONTRASTS.index(protocol.contrast)
    rng = stream_rng(config.seed, Stream.ACQUISITION, plan.index, key)
    spacing = _grid_spacing(grid)
    if protocol.contrast == "ADC":
        image = _diffusivity(head, protocol, grid, tissues)
        image += rng.normal(0.0, 1.0, grid.shape).astype(np.float32) * (1000.0 * config.noise)
        gain = 1.0
    else:
        signal_K = signals(protocol, tissues)
        image = np.abs(_sample(head, _mix(head, signal_K, protocol, tissues), grid))
        shading = smooth_field(rng, grid.shape, spacing, correlation_mm=90.0)
        image *= np.exp(np.float32(config.bias) * shading)
        brightest = float(np.abs(signal_K[[TISSUE_NAMES.index(n) for n in ("gm", "wm")]]).max())
        noise = rng.standard_normal((2, *grid.shape), dtype=np.float32) * np.float32(
            config.noise * brightest
        )
        # Magnitude of a complex signal: Rician noise.
        image = np.asarray(np.hypot(image + noise[0], noise[1]), dtype=np.float32)
        gain = _site_gain(config, plan) / brightest
    if not config.skull:
        image *= (_sample(head, head.brain, grid) > 0.5).astype(np.float32)
    stored = np.clip(np.rint(image * gain), 0, np.iinfo(np.int16).max).astype(np.int16)
    sidecar = {
        **protocol.sidecar(),
        "SkullStripped": not config.skull,
        "InstitutionName": f"Phantom {plan.site + 1}",
    }
    return _store(head, stored, grid, protocol, sidecar)


def _mix(
    head: Head, signal_K: npt.NDArray[np.float64], protocol: Protocol, tissues: dict[str, Tissue]
) -> FloatArray:
    """Signal of every working voxel: the fractions' weighted sum; SWI also weighs by phase."""
    mixed: FloatArray = np.tensordot(signal_K.astype(np.float32), head.fractions_KXYZ, axes=1)
    if protocol.contrast == "SWI":
        ppm_K = np.array([tissues[n].susceptibility_ppm for n in TISSUE_NAMES], dtype=np.float32)
        ppm = np.tensordot(ppm_K, head.fractions_KXYZ, axes=1)
        phase = susceptibility_phase(
            ppm, head.spacing_mm, field_t=protocol.field_t, te_s=protocol.te_s
        )
        mixed = mixed * phase_weight(phase).astype(np.float32)
    return np.asarray(mixed)


def _diffusivity(
    head: Head, protocol: Protocol, grid: Grid, tissues: dict[str, Tissue]
) -> FloatArray:
    """Apparent diffusion coefficient `[X, Y, Z]` in 1e-6 mm^2/s from b = 0 and b = b_value."""
    b_value = protocol.b_value_s_mm2
    assert b_value, "the ADC map needs the b-value of its diffusion images"
    weighted_K = signals(protocol, tissues)
    adc_K = np.array([tissues[n].adc_um2_s for n in TISSUE_NAMES]) * 1e-6
    with_b = _sample(head, _mix(head, weighted_K, protocol, tissues), grid)
    without = _sample(
        head, _mix(head, weighted_K * np.exp(b_value * adc_K), protocol, tissues), grid
    )
    is_signal = with_b > 1e-5
    ratio = np.divide(without, with_b, out=np.ones_like(with_b), where=is_signal)
    return np.asarray(np.log(ratio) / b_value * 1e6, dtype=np.float32)


def _site_gain(config: PhantomConfig, plan: StudyPlan) -> float:
    """Stored value of the brightest healthy tissue: the site's own, off by some per study."""
    site = stream_rng(config.seed, Stream.SITE, plan.site, 1).uniform(math.log(250), math.log(1500))
    study = stream_rng(config.seed, Stream.ACQUISITION, plan.index).normal(0.0, 0.1)
    return math.exp(site + study)


def _grid_spacing(grid: Grid) -> tuple[float, float, float]:
    x, y, z = np.linalg.norm(grid.affine[:3, :3], axis=0)
    return (float(x), float(y), float(z))


def _store(
    head: Head,
    array: npt.NDArray[np.int16] | npt.NDArray[np.uint8],
    grid: Grid,
    protocol: Protocol,
    sidecar: dict[str, object],
) -> ScannedImage:
    """Turn the array into the protocol's stored orientation; voxels keep their place in mm."""
    order = [_DIRECTIONS[letter][0] for letter in protocol.orientation]
    signs = [_DIRECTIONS[letter][1] for letter in protocol.orientation]
    turned = np.transpose(array, order)[tuple(slice(None, None, sign) for sign in signs)]
    to_grid = np.zeros((4, 4))
    to_grid[3, 3] = 1.0
    for stored_axis, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        to_grid[axis, stored_axis] = sign
        to_grid[axis, 3] = array.shape[axis] - 1 if sign < 0 else 0
    return ScannedImage(np.ascontiguousarray(turned), head.pose @ grid.affine @ to_grid, sidecar)
