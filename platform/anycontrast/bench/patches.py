"""Do groups of patches pay, end to end? `anycontrast bench patches`.

A cross decoder that predicts a sample of the hidden patches needs a share of a study's patches
only. Measured here, in one process and in alternating rounds: the CPU time until that share of
every contrast lies in the rows of a batch, from whole volumes (decoded for one mask, or for two)
and from groups of 16 shuffled patches; the bytes on disk; and the CPU time of a training step on
such a batch, beside which any gain must show.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anycontrast.bench.patch_groups import (
    GROUP_PATCHES,
    PatchGroups,
    decode_groups,
    encode_groups,
)
from anycontrast.bench.studies import bench_studies
from anycontrast.bench.timing import alternate, markdown_table
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.store.codec import DEFAULT_CODEC, DEFAULT_LEVEL, CodecName
from anycontrast_datasets.store.partial import gather_patches
from anycontrast_datasets.store.reader import StudyStore, open_store
from anycontrast_datasets.study import StudyArrays

PATCH_VOX = (16, 16, 16)
VISIBLE_SHARE = 0.3
TARGET_SHARE = 0.25
VOLUMES = f"volumes {DEFAULT_CODEC}-{DEFAULT_LEVEL}, one mask a decode"
TWO_DRAWS = f"volumes {DEFAULT_CODEC}-{DEFAULT_LEVEL}, two masks a decode"
PACKED = f"volumes {DEFAULT_CODEC}-{DEFAULT_LEVEL}, all packed"
CODECS: tuple[CodecName, ...] = ("zstd", "lz4hc")
Way = Callable[[int], object]
Patches = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class PatchesBenchConfig:
    """What is measured, and where."""

    folder: str = "runs/bench"
    """Keeps the studies between runs."""
    num_studies: int = 2
    rounds: int = 5
    shares: tuple[float, ...] = (0.3, 0.55, 1.0)
    """Shares of the non-empty patches to deliver; visible 0.3 and predicted 0.25 make 0.55."""
    preset: Literal["tiny", "small", "base"] = "tiny"
    """Size of the model of the training step."""

    def __post_init__(self) -> None:
        if self.num_studies < 1 or self.rounds < 1:
            raise ValueError(
                f"num_studies and rounds: must be at least 1, got {self.num_studies} and "
                f"{self.rounds}"
            )
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares: must lie in 0 .. 1, got {self.shares}")


@dataclass(frozen=True)
class _Grouped:
    """A study as members of patch groups."""

    members: dict[str, tuple[bytes, PatchGroups]]
    rows_NP: npt.NDArray[np.int16]
    """Room for every patch of the study."""

    @property
    def num_bytes(self) -> int:
        # An index of 2 bytes a patch, and size and checksum of 12 bytes a group.
        return sum(
            len(member) + 2 * len(table.order_N) + 12 * len(table.group_bytes)
            for member, table in self.members.values()
        )

    def read(self, share: float, seed: int) -> int:
        """Decode a random share of the groups of every contrast; return the rows filled."""
        rng, filled = np.random.default_rng(seed), 0
        for member, table in self.members.values():
            num_groups = len(table.group_bytes)
            chosen = rng.permutation(num_groups)[: math.ceil(share * num_groups)]
            index = decode_groups(member, table, chosen.tolist(), self.rows_NP[filled:])
            filled += len(index)
        return filled


def run(config: PatchesBenchConfig) -> dict[str, Any]:
    """Measure; returns CPU ms per study of every layout and share, MB per study, and a step.

    Raises:
        ManifestError: If nilearn, whose tissue maps the studies are made from, is not installed.
    """
    import torch

    made = bench_studies(Path(config.folder).resolve(), config.num_studies)
    store = open_store(made.store)
    studies = [store.read(n) for n in range(config.num_studies)]
    grouped = {codec: [_group(arrays, codec) for arrays in studies] for codec in CODECS}
    ways: dict[tuple[str, float], Way] = {(PACKED, 1.0): _packed(store)}
    for share in config.shares:
        chosen = [_chosen(arrays, share) for arrays in studies]
        ways[VOLUMES, share] = _gathered(store, chosen)
        ways[TWO_DRAWS, share] = _gathered_twice(store, chosen)
        for codec, members in grouped.items():
            ways[f"groups {codec}-5", share] = _from_groups(members, share)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = alternate(ways, config.num_studies, config.rounds)
        step = alternate({"step": _train_step(studies[0], config.preset)}, 1, 2)["step"]
    finally:
        torch.set_num_threads(threads)
    sizes = {
        f"groups {codec}-5": sum(group.num_bytes for group in members) / config.num_studies
        for codec, members in grouped.items()
    }
    shard_bytes = sum(path.stat().st_size for path in made.store.glob("*.tar"))
    for name in (PACKED, VOLUMES, TWO_DRAWS):
        sizes[name] = shard_bytes / config.num_studies
    rows: dict[str, dict[str, Any]] = {}
    for (name, share), timing in timings.items():
        row = rows.setdefault(name, {"mb_per_study": round(sizes[name] / 1e6, 2)})
        per_call = 2 if name == TWO_DRAWS else 1
        row.setdefault("cpu_ms", {})[str(share)] = round(timing.cpu_ms / per_call, 2)
    return {
        "layouts": rows,
        "step": {"preset": config.preset, "decoder": "cross", "cpu_ms": round(step.cpu_ms, 1)},
        "markdown": _table(rows, config.shares),
    }


def _group(arrays: StudyArrays, codec: CodecName) -> _Grouped:
    members = {
        name: encode_groups(codes, PATCH_VOX, seed=number, codec=codec)
        for number, (name, codes) in enumerate(arrays.codes.items())
    }
    total = sum(len(table.order_N) for _, table in members.values())
    return _Grouped(members, np.zeros((total, math.prod(PATCH_VOX)), dtype=np.int16))


def _from_groups(members: list[_Grouped], share: float) -> Way:
    return lambda item: members[item].read(share, item)


def _chosen(arrays: StudyArrays, share: float) -> Patches:
    """Choose as many patches of every contrast as the groups of that share hold."""
    chosen = {}
    for number, (name, codes) in enumerate(arrays.codes.items()):
        _, table = encode_groups(codes, PATCH_VOX, seed=number, codec="lz4", level=1)
        count = math.ceil(share * len(table.group_bytes)) * GROUP_PATCHES
        chosen[name] = np.sort(table.order_N[:count])
    return chosen


def _gathered(store: StudyStore, chosen: list[Patches]) -> Way:
    """Decode whole volumes, then copy the patches."""
    return lambda item: store.read_patches(item, PATCH_VOX, chosen[item])


def _gathered_twice(store: StudyStore, chosen: list[Patches]) -> Way:
    """Decode whole volumes once for two masks."""
    slots = {name: np.zeros(store.records[0].shape, dtype=np.int16) for name in chosen[0]}

    def read(item: int) -> list[npt.NDArray[np.int16]]:
        codes = store.read(item, out=slots).codes
        return [
            gather_patches(codes[name], PATCH_VOX, index)
            for _ in range(2)
            for name, index in chosen[item].items()
        ]

    return read


def _packed(store: StudyStore) -> Way:
    """Read and pack every non-empty patch, as the trainer does for a joint decoder."""
    return lambda item: pack_studies([store.read(item)], PATCH_VOX, epochs=[0])


def _train_step(arrays: StudyArrays, preset: Literal["tiny", "small", "base"]) -> Way:
    """Return mask, forward and backward of a cross decoder on one study."""
    from anycontrast.models.amae import AMAE, AMAEConfig
    from anycontrast.models.masking import MaskingConfig, mask_batch

    model = AMAE(AMAEConfig(preset=preset, decoder="cross", patch_vox=PATCH_VOX))
    masking = MaskingConfig(
        hidden_fraction=1 - VISIBLE_SHARE, target_fraction=TARGET_SHARE / (1 - VISIBLE_SHARE)
    )
    batch = pack_studies([arrays], PATCH_VOX, epochs=[0])

    def step(item: int) -> None:
        model.zero_grad()
        output = model(mask_batch(batch, masking, seed=item))
        output.loss_M.mean().backward()

    return step


def _table(rows: dict[str, dict[str, Any]], shares: tuple[float, ...]) -> str:
    header = ["layout", "MB/study", *(f"{share:.0%} of the patches, ms" for share in shares)]
    body = [
        [name, str(row["mb_per_study"])]
        + [str(row["cpu_ms"].get(str(share), "")) for share in shares]
        for name, row in rows.items()
    ]
    return markdown_table(header, body)
