"""How large studies are: tokens, voxels and bytes, from the manifest alone or from its shards.

In: the rows of a manifest that would be served, or the records of a store. Out: columns, one row
per study. Records say exactly what was stored. A manifest says shapes and spacings only, so what
preparing and packing will leave of a volume is assumed, see `SizeAssumptions`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.contrast import CONTRAST_NAMES, NUM_CONTRAST_IDS, contrast_id
from anycontrast_datasets.manifest_rows import contrast_set
from anycontrast_datasets.manifest_table import ManifestTable
from anycontrast_datasets.pack import MIN_PATCHES, estimate_tokens
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import SPLITS, ManifestError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SizeAssumptions:
    """What a manifest does not say."""

    box_share: float = 0.5
    """Share of a scan's field of view that the box around the head takes."""
    occupied_share: float = 0.75
    """Share of that box's patches with foreground, in one volume."""

    def __post_init__(self) -> None:
        for name in ("box_share", "occupied_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"plan.sizes.{name} must be in (0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class StudySizes:
    """The studies a stream serves, N of them, in the order of the manifest."""

    tokens_N: Floats
    volumes_N: Ints
    """Volumes that are served."""
    voxels_N: Floats
    """Of all volumes served, on the common grid."""
    dataset_N: Ints
    """Row of `dataset_names`."""
    contrast_set_N: npt.NDArray[np.uint64]
    """The contrasts served, bit n stands for vocabulary id n."""
    study_ids: Sequence[str]
    dataset_names: tuple[str, ...]
    basis: str
    """What the sizes rest on, for the reader of a plan."""

    def __len__(self) -> int:
        return len(self.tokens_N)


def sizes_from_store(
    store: StudyStore, stream: StreamConfig, patch_vox: tuple[int, int, int]
) -> StudySizes:
    """Return the sizes of the studies of a store that a stream serves.

    Raises:
        ManifestError: there is none.
    """
    wanted = set(stream.contrasts)
    rows: list[tuple[float, int, float, int, int]] = []
    names: list[str] = []
    datasets: dict[str, int] = {}
    for record in store.records:
        served = [c for c in record.contrasts if not wanted or c in wanted]
        if record.split != stream.split or not served:
            continue
        tokens = estimate_tokens(
            record, served, patch_vox, crop_vox=stream.crop_vox, drop_empty=stream.drop_empty
        )
        dataset = datasets.setdefault(record.dataset, len(datasets))
        voxels = float(math.prod(record.shape) * len(served))
        rows.append((tokens, len(served), voxels, dataset, contrast_set(served)))
        names.append(record.study_id)
    if not rows:
        raise _nothing_served(stream)
    tokens_N, volumes_N, voxels_N, dataset_N, sets_N = zip(*rows, strict=True)
    return StudySizes(
        tokens_N=np.array(tokens_N, dtype=np.float64),
        volumes_N=np.array(volumes_N, dtype=np.int64),
        voxels_N=np.array(voxels_N, dtype=np.float64),
        dataset_N=np.array(dataset_N, dtype=np.int64),
        contrast_set_N=np.array(sets_N, dtype=np.uint64),
        study_ids=names,
        dataset_names=tuple(datasets),
        basis="what the shards hold",
    )


def sizes_from_manifest(
    table: ManifestTable,
    stream: StreamConfig,
    prepare: PrepareConfig,
    patch_vox: tuple[int, int, int],
    assumptions: SizeAssumptions,
) -> StudySizes:
    """Estimate the sizes of the studies of a manifest that a stream serves.

    The common grid is the reference volume's field of view at the spacing of `prepare`; the box is
    its `box_share`, the same share along every axis, rounded up as `prepare` does.

    Raises:
        ManifestError: there is none.
    """
    rows = table.select(split=stream.split, any_of=stream.contrasts)
    rows = rows[table.num_volumes[rows] > 0]
    if len(rows) == 0:
        raise _nothing_served(stream)
    box_N3 = _boxes(table, prepare, assumptions.box_share)[rows]
    wanted = np.uint64(contrast_set(stream.contrasts or CONTRAST_NAMES))
    sets_N = table.contrast_sets[rows] & wanted
    volumes_N = np.bitwise_count(sets_N).astype(np.int64)
    served_N3 = box_N3 if stream.crop_vox is None else np.array([stream.crop_vox])
    patches_N = np.ceil(served_N3 / np.array(patch_vox)).prod(axis=1)
    if stream.drop_empty:
        patches_N = np.maximum(np.rint(patches_N * assumptions.occupied_share), MIN_PATCHES)
    return StudySizes(
        tokens_N=patches_N * volumes_N,
        volumes_N=volumes_N,
        voxels_N=box_N3.prod(axis=1) * volumes_N,
        dataset_N=np.asarray(table.datasets.indices)[rows].astype(np.int64),
        contrast_set_N=sets_N,
        study_ids=table.study_ids.take(rows),
        dataset_names=tuple(table.datasets.dictionary.to_pylist()),
        basis=(
            f"the manifest, assuming a head box of {assumptions.box_share:.0%} of the field of "
            f"view and foreground in {assumptions.occupied_share:.0%} of its patches"
        ),
    )


def _boxes(table: ManifestTable, prepare: PrepareConfig, box_share: float) -> Floats:
    """Estimate the box of every study of a manifest in voxels: [N, 3]."""
    volumes = table.volumes
    # As `prepare` chooses: the first of its list; without any, the first volume of the study.
    rank = np.full(NUM_CONTRAST_IDS, len(prepare.reference))
    for place, name in reversed(list(enumerate(prepare.reference))):
        rank[contrast_id(name)] = place
    order = np.lexsort((rank[volumes.contrast_id], volumes.study_row))
    filled = table.num_volumes > 0
    first = np.cumsum(table.num_volumes)[filled] - table.num_volumes[filled]
    reference = order[first]
    grid = volumes.shape[reference].astype(np.float64)
    if prepare.spacing_mm is not None:
        grid = grid * volumes.spacing_mm[reference] / np.array(prepare.spacing_mm)
    multiple = prepare.box_multiple_vox
    boxes = np.zeros((len(table), 3))
    boxes[filled] = np.ceil(grid * box_share ** (1 / 3) / multiple) * multiple
    return boxes


def _nothing_served(stream: StreamConfig) -> ManifestError:
    return ManifestError(
        f"planning: no study to serve from split {stream.split!r} with contrasts "
        f"{stream.contrasts or 'any'}; splits are {', '.join(SPLITS)}; change the split, its "
        "fractions at scanning, or the contrasts"
    )
