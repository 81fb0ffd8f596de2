"""Heads for the phantom: the MNI152 tissue maps, deformed, with a pose in the scanner.

In: a spacing and a random generator. Out: a `Head`, tissue fractions on an upright working grid
and the pose that carries it into the scanner. Costs: the atlas once per process and spacing
(about a second), then about 0.1 s of CPU a head at 3 mm. Gives up: individual folding patterns;
every head is a smooth deformation of one average anatomy.

Legend: K tissue classes in the order of `phantom_physics.TISSUE_NAMES`, XYZ voxels along R, A, S.

Source: ICBM 2009a nonlinear symmetric tissue maps and T1 template, as nilearn's wheel carries them.
"""

import functools
import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from anycontrast_datasets.sources.phantom_physics import BRAIN_TISSUES, TISSUE_NAMES
from anycontrast_datasets.study import ManifestError
from anycontrast_datasets.volume import LoadedVolume, read_volume

FloatArray = npt.NDArray[np.float32]
MatrixArray = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]

_ATLAS_TISSUES = ("gm", "wm", "csf", "bone", "scalp")
_MARGIN_MM = 14.0
_SHELL_MM = 16.0
# Lateral and third ventricles in MNI mm: centre and reach of their enlargement.
_VENTRICLES_MM = (0.0, -12.0, 14.0)
_VENTRICLES_REACH_MM = (20.0, 34.0, 18.0)
# Threads that start together would each read the atlas.
_ATLAS_LOCK = threading.Lock()


@dataclass(frozen=True)
class Atlas:
    """Tissue fractions of the average head."""

    fractions: dict[str, FloatArray]
    """Per tissue `[X, Y, Z]` in 0 .. 1."""
    affine: MatrixArray
    """Voxel ijk -> MNI mm (RAS+)."""
    box_mm: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
    """Lowest and highest corner of the brain in MNI mm."""


@dataclass(frozen=True)
class Head:
    """One head on its working grid."""

    fractions_KXYZ: FloatArray
    spacing_mm: Spacing
    affine: MatrixArray
    """Voxel ijk of the working grid -> upright head frame, mm."""
    pose: MatrixArray
    """Upright head frame -> scanner frame (RAS+ mm), rigid."""

    def tissue(self, *names: str) -> FloatArray:
        """Summed fraction of the named tissues, [X, Y, Z]."""
        rows = [TISSUE_NAMES.index(name) for name in names]
        return np.asarray(self.fractions_KXYZ[rows].sum(axis=0), dtype=np.float32)

    @property
    def brain(self) -> FloatArray:
        """Fraction of everything inside the skull, [X, Y, Z]."""
        return self.tissue(*BRAIN_TISSUES)


def smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: Spacing, *, correlation_mm: float
) -> FloatArray:
    """Gaussian random field `[X, Y, Z]` of zero mean and unit variance at every voxel.

    Args:
        rng: consumed once; the number of draws depends on the extent only.
        shape: voxels per axis.
        spacing_mm: of the grid.
        correlation_mm: distance of the control points; detail below it is absent.
    """
    bases = []
    for size, step in zip(shape, spacing_mm, strict=True):
        position = np.arange(size) * step / correlation_mm
        control = np.arange(-1, int(np.ceil(position[-1])) + 2)
        weight = np.exp(-0.5 * ((position[:, None] - control[None, :]) / 0.7) ** 2)
        bases.append(weight / np.sqrt((weight**2).sum(axis=1, keepdims=True)))
    field = rng.standard_normal([basis.shape[1] for basis in bases])
    for basis in bases:
        # Contracts the leading axis and appends the fine one: three turns restore the order.
        field = np.tensordot(field, basis, axes=([0], [1]))
    return np.asarray(field, dtype=np.float32)


def atlas_files() -> dict[str, Path]:
    """Paths of the tissue maps and the T1 template inside the installed nilearn, not importing it.

    Raises:
        ManifestError: nilearn is not installed, or its wheel no longer carries the maps.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ManifestError(
            "phantom: the tissue maps come with the nilearn package, which is not installed; "
            "install the train extra of anycontrast"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"
    names = ("gm", "wm", "t1")
    files = {n: folder / f"mni_icbm152_{n}_tal_nlin_sym_09a_converted.nii.gz" for n in names}
    missing = sorted(path.name for path in files.values() if not path.is_file())
    if missing:
        raise ManifestError(
            f"phantom: the installed nilearn lacks {missing}; install nilearn 0.12 or 0.13"
        )
    return files


@functools.lru_cache(maxsize=4)
def load_atlas(spacing_mm: float, *, skull: bool = False) -> Atlas:
    """Read the maps, derive CSF (and the shell) and average them onto an isotropic grid, once."""
    source = {name: read_volume(path) for name, path in atlas_files().items()}
    gm, wm = (source[name].array / source[name].array.max() for name in ("gm", "wm"))
    # The template is skull-stripped close to the cortex; the blurred hull closes the sulci.
    inside = source["t1"].array > 0
    hull = inside | (ndimage.uniform_filter(inside.astype(np.float32), 9) > 0.5)
    hull = ndimage.binary_fill_holes(hull)
    csf = np.clip(hull - gm - wm, 0.0, 1.0)
    corners = np.argwhere(hull.any(axis=2))
    heights = np.flatnonzero(hull.any(axis=(0, 1)))
    low = np.array([*corners.min(axis=0), heights[0]])
    high = np.array([*corners.max(axis=0), heights[-1]])
    maps = {"gm": gm * hull, "wm": wm * hull, "csf": csf}
    affine = source["t1"].affine
    fractions = {name: _average(array, source["t1"], spacing_mm) for name, array in maps.items()}
    box = (affine[:3, :3] @ low + affine[:3, 3], affine[:3, :3] @ high + affine[:3, 3])
    scale = np.diag([spacing_mm / s for s in source["t1"].spacing_mm])
    coarse = affine.copy()
    coarse[:3, :3] = affine[:3, :3] @ scale
    coarse[:3, 3] += affine[:3, :3] @ (np.diag(scale) - 1.0) / 2.0
    if skull:
        fractions |= _shell(np.stack(list(fractions.values())).sum(axis=0) > 0.5, spacing_mm)
    return Atlas(fractions=fractions, affine=coarse, box_mm=box)


def _average(array: npt.NDArray[np.float32], source: LoadedVolume, spacing_mm: float) -> FloatArray:
    """Average over coarse voxels, exactly, for any ratio of the spacings; edges padded with 0."""
    result: npt.NDArray[np.float32] = array.astype(np.float32)
    for step in source.spacing_mm:
        size = result.shape[0]
        ratio = spacing_mm / step
        edges = np.arange(int(np.ceil(size / ratio)) + 1) * ratio
        start, stop = edges[:-1, None], edges[1:, None]
        voxel = np.arange(size)[None, :]
        overlap = np.clip(np.minimum(stop, voxel + 1) - np.maximum(start, voxel), 0.0, None)
        weight = (overlap / ratio).astype(np.float32)
        result = np.tensordot(result, weight, axes=([0], [1]))
    return np.ascontiguousarray(result)


def _shell(brain: npt.NDArray[np.bool_], spacing_mm: float) -> dict[str, FloatArray]:
    """Bone 2 to 8 mm and scalp 8 to 14 mm outside the brain; the gap is left as air."""
    distance = ndimage.distance_transform_edt(~brain, sampling=spacing_mm)

    def within(low: float, high: float) -> FloatArray:
        return ((distance > low) & (distance <= high)).astype(np.float32)

    return {"bone": within(2.0, 8.0), "scalp": within(8.0, 14.0)}


def make_head(
    spacing_mm: Spacing,
    *,
    head_rng: np.random.Generator,
    pose_rng: np.random.Generator,
    skull: bool = False,
) -> Head:
    """Deform the atlas into one subject's head and lay it into the scanner.

    Args:
        spacing_mm: of the working grid along R, A, S.
        head_rng: decides the deformation and the veins: the same for all sessions of a subject.
        pose_rng: decides the rigid pose: fresh for every session.
        skull: add the shell of bone and scalp.
    """
    with _ATLAS_LOCK:
        atlas = load_atlas(max(1.0, min(spacing_mm) / 2.0), skull=skull)
    margin = _MARGIN_MM + (_SHELL_MM if skull else 0.0)
    low, high = atlas.box_mm[0] - margin, atlas.box_mm[1] + margin
    shape = tuple(int(n) for n in np.ceil((high - low) / np.array(spacing_mm)))
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing_mm)
    affine[:3, 3] = low
    coordinates = _deformed_coordinates(atlas, shape, spacing_mm, affine, head_rng)
    fractions_KXYZ = np.zeros((len(TISSUE_NAMES), *shape), dtype=np.float32)
    for name in _ATLAS_TISSUES:
        if name in atlas.fractions:
            fractions_KXYZ[TISSUE_NAMES.index(name)] = ndimage.map_coordinates(
                atlas.fractions[name], coordinates, order=1, prefilter=False, output=np.float32
            )
    _add_veins(fractions_KXYZ, spacing_mm, head_rng)
    return Head(fractions_KXYZ, spacing_mm, affine, _draw_pose(pose_rng, (low + high) / 2.0))


def _deformed_coordinates(
    atlas: Atlas,
    shape: tuple[int, ...],
    spacing_mm: Spacing,
    affine: MatrixArray,
    rng: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Atlas voxel coordinates `[3, X, Y, Z]` of every working voxel: affine plus displacement."""
    centre = (atlas.box_mm[0] + atlas.box_mm[1]) / 2.0
    stretch = np.diag(np.exp(rng.normal(0.0, 0.025) + rng.normal(0.0, 0.02, 3)))
    linear = stretch + np.clip(rng.normal(0.0, 0.015, (3, 3)), -0.03, 0.03)
    to_atlas: MatrixArray = np.asarray(np.linalg.inv(atlas.affine), dtype=np.float64)
    matrix = to_atlas[:3, :3] @ linear
    offset = matrix @ (affine[:3, 3] - centre) + to_atlas[:3, :3] @ centre + to_atlas[:3, 3]
    axes = [np.arange(n, dtype=np.float32) * s for n, s in zip(shape, spacing_mm, strict=True)]
    places = np.stack(
        [
            axes[0][:, None, None] * np.float32(matrix[row, 0])
            + axes[1][None, :, None] * np.float32(matrix[row, 1])
            + axes[2][None, None, :] * np.float32(matrix[row, 2])
            + np.float32(offset[row])
            for row in range(3)
        ]
    )
    for row in range(3):
        moved = smooth_field(rng, shape, spacing_mm, correlation_mm=40.0)
        places[row] += np.float32(3.0 * to_atlas[row, row]) * moved
    _enlarge_ventricles(places, to_atlas, np.float32(rng.uniform(0.05, 0.40)))
    return places


def _enlarge_ventricles(
    places: npt.NDArray[np.float32], to_atlas: MatrixArray, shrink: np.float32
) -> None:
    """Spread the atlas ventricles over a larger part of the head, as in the old; in place.

    Args:
        places: atlas voxel coordinates [3, X, Y, Z].
        to_atlas: MNI mm -> atlas voxel.
        shrink: by which share the coordinates draw together at the centre, below 1.
    """
    centre = to_atlas[:3, :3] @ np.array(_VENTRICLES_MM) + to_atlas[:3, 3]
    reach = np.abs(np.diag(to_atlas)[:3]) * _VENTRICLES_REACH_MM
    exponent = np.zeros(places.shape[1:], dtype=np.float32)
    for row in range(3):
        exponent += ((places[row] - np.float32(centre[row])) / np.float32(reach[row])) ** 2
    pull = shrink * np.exp(-0.5 * exponent)
    for row in range(3):
        places[row] -= pull * (places[row] - np.float32(centre[row]))


def _add_veins(fractions_KXYZ: FloatArray, spacing_mm: Spacing, rng: np.random.Generator) -> None:
    """Thread random thin veins through the brain: where two smooth fields are both near zero."""
    shape = fractions_KXYZ.shape[1:]
    first, second = (smooth_field(rng, shape, spacing_mm, correlation_mm=14.0) for _ in range(2))
    # A vein of 3.5 mm^2, blurred to what the grid can show; the fields fall by 0.11 per mm.
    blur_mm = max(0.6, 0.4 * max(spacing_mm))
    peak = min(0.8, 3.5 / (2.0 * np.pi * blur_mm**2))
    width = 0.11 * blur_mm
    brain = fractions_KXYZ[[TISSUE_NAMES.index(name) for name in ("gm", "wm", "csf")]].sum(axis=0)
    vein = peak * np.exp(-(first**2 + second**2) / (2.0 * width**2)) * (brain > 0.5)
    fractions_KXYZ *= 1.0 - vein
    fractions_KXYZ[TISSUE_NAMES.index("vein")] = vein * brain


def _draw_pose(rng: np.random.Generator, centre_mm: npt.NDArray[np.float64]) -> MatrixArray:
    """Rigid pose: a nod of up to 10 degrees, other turns up to 5, a shift of up to 15 mm."""
    nod, roll, turn = rng.uniform(-1.0, 1.0, 3) * (10.0, 5.0, 5.0)
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", [nod, roll, turn], degrees=True).as_matrix()
    pose[:3, 3] = rng.uniform(-15.0, 15.0, 3) + centre_mm - pose[:3, :3] @ centre_mm
    return pose
