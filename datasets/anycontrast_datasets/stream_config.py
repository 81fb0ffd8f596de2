"""What of a store is served, and how: the options of a stream."""

from dataclasses import dataclass, field
from typing import Literal

from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.cost import CostModel
from anycontrast_datasets.mixing import MixingConfig
from anycontrast_datasets.study import SPLITS


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What of a store is served, and how."""

    studies_per_step: int = 4
    """Studies in one optimiser step, over all ranks, where `pack_tokens` is not set."""
    packs_per_step: int = 1
    """Packs in one optimiser step, over all ranks; a multiple of the world size. Keep it when the
    world size changes, and the packs stay the same."""
    split: str = "train"
    """Which split of the manifest: train, val or test."""
    contrasts: list[str] = field(default_factory=list)
    """Serve only these contrasts; empty serves all. Studies with none of them are left out."""
    drop_empty: bool = True
    """Leave out patches without foreground."""
    crop_vox: tuple[int, int, int] | None = None
    """Cut or pad every study to this many voxels; None serves the whole box."""
    flip_axes: list[int] = field(default_factory=lambda: [0])
    """Axes flipped with probability 1/2: 0 left-right, 1 back-front, 2 down-up."""
    labels: bool = False
    """Also serve the labels."""
    foreground_crop_fraction: float = 0.0
    """Share of crops centred on a labelled voxel, 0 .. 1."""
    drop_contrasts: bool = False
    """Serve a random non-empty subset of each study's contrasts."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """How often studies are served relative to each other; by default each once an epoch. May
    change when a run goes on at an epoch edge."""
    pack_tokens: int | None = None
    """Fill every pack up to about this many tokens instead of taking `studies_per_step` studies;
    an epoch is then planned as a whole and ends with a step."""
    pool_studies: int = 2048
    """Studies among which packs are filled, where `pack_tokens` is set; larger fills better and
    keeps less of the random order."""
    cost: CostModel = field(default_factory=CostModel)
    """What packs and ranks are balanced by; `anycontrast plan` says what fits the model, and
    measures it with `plan.fit=true`."""
    draws_per_study: int = 1
    """Times every study that is read goes into its pack, each time with a mask and an augmentation
    of its own: reading is paid for once (repeated sampling, arXiv 2205.09113, section 3)."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """What to do about a study whose bytes are damaged: end the run, or leave the study out, name
    it in `quarantine.jsonl` and go on."""
    max_corrupt_fraction: float = 0.01
    """Share of the studies served that may be damaged before the run stops all the same."""
    num_threads: int = 2
    """Threads that read, augment and pack."""
    prefetch_steps: int = 2
    """Steps made ready ahead of the one in use; 0 reads on demand."""

    def __post_init__(self) -> None:
        for name, least in (
            ("studies_per_step", 1),
            ("packs_per_step", 1),
            ("num_threads", 1),
            ("prefetch_steps", 0),
            ("pool_studies", 1),
            ("draws_per_study", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"stream.{name} must be >= {least}, got {getattr(self, name)}")
        if self.pack_tokens is not None and self.pack_tokens < 1:
            raise ValueError(
                f"stream.pack_tokens must be >= 1, got {self.pack_tokens}; leave it out to take "
                "studies_per_step studies"
            )
        if self.pack_tokens is None and self.packs_per_step > self.studies_per_step:
            raise ValueError(
                f"stream.packs_per_step must be <= studies_per_step ({self.studies_per_step}), "
                f"got {self.packs_per_step}; raise studies_per_step"
            )
        if self.split not in SPLITS:
            raise ValueError(f"stream.split must be one of {SPLITS}, got {self.split!r}")
        for name in self.contrasts:
            contrast_id(name)
        self._check_augmentation()
        if self.on_corrupt not in ("stop", "skip"):
            raise ValueError(f"stream.on_corrupt must be stop or skip, got {self.on_corrupt!r}")
        if not 0.0 <= self.max_corrupt_fraction <= 1.0:
            raise ValueError(
                f"stream.max_corrupt_fraction must be in 0 .. 1, got {self.max_corrupt_fraction}"
            )

    def _check_augmentation(self) -> None:
        if self.crop_vox is not None and any(n < 1 for n in self.crop_vox):
            raise ValueError(f"stream.crop_vox must be positive, got {self.crop_vox}")
        if sorted(set(self.flip_axes) & {0, 1, 2}) != sorted(self.flip_axes):
            raise ValueError(
                f"stream.flip_axes must be different axes of 0, 1, 2, got {self.flip_axes}"
            )
        if not 0.0 <= self.foreground_crop_fraction <= 1.0:
            raise ValueError(
                "stream.foreground_crop_fraction must be in 0 .. 1, "
                f"got {self.foreground_crop_fraction}"
            )
        if self.foreground_crop_fraction > 0 and (self.crop_vox is None or not self.labels):
            raise ValueError(
                "stream.foreground_crop_fraction > 0 needs crop_vox and labels=true, "
                f"got crop_vox={self.crop_vox} and labels={self.labels}"
            )
