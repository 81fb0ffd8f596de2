"""Finetune a pretrained encoder with a segmentation head, or the same from scratch beside it.

Comes in: labelled studies of the shards and a pretraining checkpoint. Goes out: a run folder of the
training loop, `<run>/finetune/<pretrained|scratch>/`, whose `best.json` names the checkpoint with
the best validation Dice. With `from_scratch` only the weights differ: data, order, crops, steps and
schedule are the same, so the two can be compared study by study.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from anycontrast.models.segmenter import SegmenterConfig
from anycontrast.training.loop import LoopConfig
from anycontrast.training.optim import OptimConfig
from anycontrast.training.segmentation import FinetuneTask, LabelledStore
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.stream import StreamConfig

if TYPE_CHECKING:
    from anycontrast.training.config import Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """One finetuning run."""

    from_scratch: bool = False
    """Leave the pretrained weights out: same data, same order, fresh weights, own folder."""
    checkpoint: str | None = None
    """Pretraining checkpoint folder; None takes the newest valid one of this run."""
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    loss: Literal["dice", "dice_ce"] = "dice_ce"
    """Soft Dice per region, alone or plus binary cross-entropy."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, warmup_steps=50))
    steps: int = 1000
    """Optimiser steps; 0 means as many as `epochs` make."""
    validate_every: int = 100
    """Steps between validations; 0 means at the last step only."""
    studies_per_step: int = 4
    """Studies per optimiser step over all workers."""
    packs_per_step: int = 1
    """Packs those studies are cut into; divisible by the number of workers."""
    contrasts: list[str] = field(default_factory=list)
    """Contrasts to train and validate on; empty means all, or the channels of a `unetr` head."""
    drop_contrasts: bool = True
    """Show each study with a random non-empty subset of its contrasts."""
    foreground_crop_fraction: float = 0.5
    """Share of the crops centred on a labelled voxel."""
    flip_axes: list[int] = field(default_factory=lambda: [0])
    """Axes flipped at random: 0 left-right, 1 back-front, 2 down-up."""
    max_validation_studies: int = 0
    """Studies of split val used for validation; 0 means all, -1 means no validation."""
    overlap: float = 0.5
    """Overlap of the windows in whole-volume validation, 0 <= overlap < 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_validation_studies < -1:
            raise ValueError(
                "finetune.max_validation_studies must be >= -1, got "
                f"{self.max_validation_studies}; 0 means all, -1 means no validation"
            )
        if not 0 <= self.overlap < 1:
            raise ValueError(f"finetune.overlap must be in 0 <= overlap < 1, got {self.overlap}")
        channels = self.segmenter.contrasts
        if self.segmenter.head == "unetr" and not set(self.contrasts) <= set(channels):
            raise ValueError(
                f"finetune.contrasts must be among finetune.segmenter.contrasts {channels} when "
                f"the head is unetr, got {self.contrasts}; add channels, or leave them out"
            )
        # Checks the fields it shares; without labels the crop fraction could not be set.
        self.stream_config()

    @property
    def variant(self) -> str:
        """Folder name under `<run>/finetune/`."""
        return "scratch" if self.from_scratch else "pretrained"

    @property
    def shown_contrasts(self) -> list[str]:
        """`contrasts` with the default filled in: the channels of `unetr`, else empty for all."""
        is_fixed = self.segmenter.head == "unetr"
        return self.contrasts or (self.segmenter.contrasts if is_fixed else [])

    def stream_config(self) -> StreamConfig:
        """What the training stream serves: labelled windows with every patch present."""
        return StreamConfig(
            studies_per_step=self.studies_per_step,
            packs_per_step=self.packs_per_step,
            contrasts=self.shown_contrasts,
            drop_empty=False,
            crop_vox=self.segmenter.window_vox,
            flip_axes=self.flip_axes,
            labels=True,
            foreground_crop_fraction=self.foreground_crop_fraction,
            drop_contrasts=self.drop_contrasts,
        )


def run_finetune(config: "Config") -> dict[str, Any]:
    """Finetune as `config.finetune` says, in this process; resumes by itself.

    Returns:
        The loop's result, and which variant it is of.

    Raises:
        CheckpointError: no pretraining checkpoint, it does not fit, or the run to resume was
            started from other weights.
        ManifestError: no labelled study in split train.
    """
    from anycontrast.shards import open_shards
    from anycontrast.training.config import config_to_record
    from anycontrast.training.loop import run_loop
    from anycontrast.training.process_group import process_group, rank, world_size
    from anycontrast_datasets.stream import StudyStream

    finetune = config.finetune
    folder = config.paths.finetune / finetune.variant
    store = LabelledStore(open_shards(config), finetune.shown_contrasts)
    torch.manual_seed(config.seed)
    task, origin = make_task(config, store)
    _check_origin(folder, origin)

    def open_stream(start_step: int) -> StudyStream:
        return StudyStream(
            store,
            finetune.stream_config(),
            task.segmenter.patch_vox,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            start_step=start_step,
        )

    with process_group(timeout_s=config.cluster.timeout_s):
        result = run_loop(
            task,
            open_stream,
            finetune,
            folder=folder,
            run_config=config_to_record(config),
            extra_state={"from_scratch": finetune.from_scratch, "origin": origin},
        )
    return {"variant": finetune.variant, **result}


def make_task(config: "Config", store: StudyStore) -> tuple[FinetuneTask, dict[str, Any]]:
    """Build the task, with the pretrained weights unless `from_scratch`, and say where they are of.

    The architecture is the pretraining checkpoint's, so a config changed since cannot disagree
    with it; from scratch it is `config.model`.

    Raises:
        CheckpointError: no pretraining checkpoint, or its weights do not fit.
    """
    from anycontrast.models.amae import AMAEConfig
    from anycontrast.training.checkpoint import CheckpointError, load_weights

    finetune = config.finetune
    best_dice = _best_dice(config.paths.finetune / finetune.variant)
    if finetune.from_scratch:
        task = FinetuneTask(finetune, config.model, store, pretrained=None, best_dice=best_dice)
        return task, {"step": 0, "sha256": ""}
    source = Path(finetune.checkpoint or config.paths.pretrain / "checkpoints")
    tensors, state = load_weights(source)
    if state["kind"] != "amae":
        raise CheckpointError(
            f"finetune: checkpoint {source} holds a model of kind {state['kind']!r}, expected a "
            "pretrained amae; set finetune.checkpoint to a pretraining checkpoint"
        )
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in state["model_config"].items()
    }
    model = AMAEConfig(**values)
    try:
        task = FinetuneTask(finetune, model, store, pretrained=tensors, best_dice=best_dice)
    except ValueError as error:
        raise CheckpointError(f"finetune: checkpoint {source}: {error}") from error
    return task, {"step": int(state["step"]), "sha256": _encoder_digest(tensors)}


def _encoder_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith("encoder."):
            digest.update(name.encode())
            digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _best_dice(folder: Path) -> float:
    best = folder / "best.json"
    if not best.is_file():
        return float("-inf")
    return float(json.loads(best.read_text())["metrics"].get("val/dice", "-inf"))


def _check_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was started from other pretrained weights."""
    from anycontrast.training.checkpoint import CheckpointError, latest

    found = latest(folder / "checkpoints")
    if found is not None and found.state.get("origin", origin) != origin:
        raise CheckpointError(
            f"finetune: {folder} was started from the pretrained weights of step "
            f"{found.state['origin']['step']}, now those of step {origin['step']} are given and "
            f"they differ; remove {folder} to finetune again, or set finetune.checkpoint"
        )
