"""Finetune a pretrained encoder with a segmentation head, or the same from scratch beside it.

Comes in: labelled studies of the shards and a pretraining checkpoint. Goes out: a run folder of the
training loop, `<run>/finetune/<pretrained|scratch>/`, whose `best.json` names the checkpoint with
the best validation Dice. With `from_scratch` only the weights differ: data, order, crops, steps and
schedule are the same, so the two can be compared study by study.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from anycontrast.models.segmenter import (
    Segmenter,
    SegmenterConfig,
    build_segmenter,
    region_targets,
    segmentation_loss,
    segmenter_model_config,
)
from anycontrast.training.loop import LoopConfig
from anycontrast.training.optim import OptimConfig
from anycontrast.training.task import Micro, Parts, Validation
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.study import StudyArrays, StudyRecord

if TYPE_CHECKING:
    from anycontrast.models.amae import AMAEConfig
    from anycontrast.training.config import Config
    from anycontrast_datasets.stream import StreamConfig

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
    """Contrasts to train and validate on; empty means all."""
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
        # Checks the fields it shares; without labels the crop fraction could not be set.
        self.stream_config()

    @property
    def variant(self) -> str:
        """Folder name under `<run>/finetune/`."""
        return "scratch" if self.from_scratch else "pretrained"

    def stream_config(self) -> "StreamConfig":
        """What the training stream serves: labelled windows with every patch present."""
        from anycontrast_datasets.stream import StreamConfig

        return StreamConfig(
            studies_per_step=self.studies_per_step,
            packs_per_step=self.packs_per_step,
            contrasts=self.contrasts,
            drop_empty=False,
            crop_vox=self.segmenter.window_vox,
            flip_axes=self.flip_axes,
            labels=True,
            foreground_crop_fraction=self.foreground_crop_fraction,
            drop_contrasts=self.drop_contrasts,
        )


class LabelledStore:
    """The labelled studies of a store, as a store of their own.

    Raises:
        ManifestError: no study of split train has a label and one of the contrasts.
    """

    def __init__(self, store: StudyStore, contrasts: Sequence[str] = ()) -> None:
        from anycontrast.evaluation.evaluate import labelled_indices

        labelled_indices(store, "train", contrasts)
        self._store = store
        self._indices = [i for i, record in enumerate(store.records) if record.has_label]
        self.records: tuple[StudyRecord, ...] = tuple(store.records[i] for i in self._indices)
        self.fingerprint = f"{store.fingerprint}:labelled"

    def read(
        self, index: int, *, contrasts: Sequence[str] | None = None, label: bool = False
    ) -> StudyArrays:
        """See `StudyStore.read`; `index` counts labelled studies."""
        return self._store.read(self._indices[index], contrasts=contrasts, label=label)

    def verify(self) -> list[str]:
        """See `StudyStore.verify`; the whole store is read."""
        return self._store.verify()


class FinetuneTask:
    """Segmentation as the training loop sees it; the loss is normalised by studies.

    Args:
        config: head, loss, validation.
        model_config: the pretraining model's config.
        store: labelled studies, for validation.
        pretrained: state dict of an `AMAE`; None starts from scratch.

    Raises:
        ValueError: the pretrained weights do not fit.
    """

    kind = "segmenter"

    def __init__(
        self,
        config: FinetuneConfig,
        model_config: "AMAEConfig",
        store: StudyStore,
        *,
        pretrained: Mapping[str, Tensor] | None,
    ) -> None:
        self.config = config
        self.segmenter: Segmenter = build_segmenter(config.segmenter, model_config)
        self.model: nn.Module = self.segmenter
        self.model_config: Mapping[str, Any] = segmenter_model_config(
            config.segmenter, model_config
        )
        self._store = store
        self._best = float("-inf")
        self._validation = self._validation_indices()
        if pretrained is not None:
            report = self.segmenter.load_pretrained(pretrained)
            logger.info(
                "took over %d pretrained tensors; %d of the head start fresh; %d of the "
                "pretraining decoder and the like are not used",
                len(report.loaded),
                len(report.fresh),
                len(report.unused),
            )

    def prepare(self, batch: PackedBatch, *, step: int, device: torch.device) -> Micro:
        """Move a pack with its labels to the device."""
        return Micro(
            inputs=batch.to(device, non_blocking=True),
            count=batch.num_studies,
            num_tokens=batch.num_tokens,
            study_ids=batch.study_ids,
        )

    def loss(self, model: nn.Module, micro: Micro) -> tuple[Tensor, Parts]:
        """Sum the loss over the pack's studies; parts: soft Dice per region at threshold 0.5."""
        batch: PackedBatch = micro.inputs
        labels = [label for label in batch.labels if label is not None]
        assert len(labels) == batch.num_studies, "the stream serves labelled studies only"
        target_SRXYZ = region_targets(torch.stack(labels), self.segmenter.regions)
        logits_SRXYZ = model(batch)
        loss_S = segmentation_loss(logits_SRXYZ, target_SRXYZ, kind=self.config.loss)
        return loss_S.sum(), self._parts(logits_SRXYZ.detach(), target_SRXYZ)

    def _parts(self, logits_SRXYZ: Tensor, target_SRXYZ: Tensor) -> Parts:
        """Dice per region, pooled over the voxels of all studies between two log lines."""
        predicted_SRXYZ = (logits_SRXYZ > 0).float()
        both_R = (predicted_SRXYZ * target_SRXYZ).sum(dim=(0, 2, 3, 4))
        size_R = (predicted_SRXYZ + target_SRXYZ).sum(dim=(0, 2, 3, 4))
        return {
            f"dice/{name}": (2 * both_R[number], size_R[number])
            for number, name in enumerate(self.segmenter.regions)
        }

    def panels(self, model: nn.Module, micro: Micro, *, step: int, folder: Path) -> None:
        """Draw nothing: segmentations are judged by validation and `anycontrast evaluate`."""

    def _validation_indices(self) -> list[int]:
        from anycontrast.evaluation.evaluate import labelled_indices
        from anycontrast_datasets.study import ManifestError

        limit = self.config.max_validation_studies
        if limit == -1:
            return []
        try:
            indices = labelled_indices(self._store, "val", self.config.contrasts)
        except ManifestError as error:
            logger.warning("no validation, so the last checkpoint counts as the best: %s", error)
            return []
        return indices[:limit] if limit else indices

    def validate(self, model: nn.Module, *, step: int) -> Validation | None:
        """Dice of whole validation studies with all their contrasts, averaged over the studies.

        Without validation studies the newest validated step counts as the best.
        """
        if not self._validation:
            return Validation({}, is_best=True)
        from anycontrast.evaluation.inference import sliding_window
        from anycontrast.evaluation.metrics import dice_per_region

        device = next(self.segmenter.parameters()).device
        sums = dict.fromkeys(self.segmenter.regions, 0.0)
        for index in self._validation:
            record = self._store.records[index]
            shown = [c for c in record.contrasts if c in (self.config.contrasts or [c])]
            arrays = self._store.read(index, contrasts=shown, label=True)
            assert arrays.label is not None
            probability_RXYZ = sliding_window(
                model,
                arrays,
                patch_vox=self.segmenter.patch_vox,
                window_vox=self.segmenter.window_vox,
                overlap=self.config.overlap,
                device=device,
            )
            found = dice_per_region(probability_RXYZ, arrays.label, self.segmenter.regions)
            for name, value in found.items():
                sums[name] += value / len(self._validation)
        mean = sum(sums.values()) / len(sums)
        is_best = mean > self._best
        self._best = max(self._best, mean)
        metrics = {"val/dice": mean, **{f"val/dice/{name}": v for name, v in sums.items()}}
        return Validation(metrics, is_best)


def run_finetune(config: "Config") -> dict[str, Any]:
    """Finetune as `config.finetune` says, in this process; resumes by itself.

    Returns:
        The loop's result.

    Raises:
        CheckpointError: no pretraining checkpoint, or it does not fit the model.
        ManifestError: no labelled study in split train.
    """
    from anycontrast.training.config import config_to_dict
    from anycontrast.training.loop import run_loop
    from anycontrast.training.process_group import process_group, rank, world_size
    from anycontrast_datasets.store.reader import open_store
    from anycontrast_datasets.stream import StudyStream

    finetune = config.finetune
    store = LabelledStore(open_store(config.paths.shards), finetune.contrasts)
    torch.manual_seed(config.seed)
    task = make_task(config, store)

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
        return run_loop(
            task,
            open_stream,
            finetune,
            folder=config.paths.finetune / finetune.variant,
            run_config=config_to_dict(config),
        )


def make_task(config: "Config", store: StudyStore) -> FinetuneTask:
    """Build the task, with the pretrained weights unless `from_scratch`.

    The architecture is the pretraining checkpoint's, so a config changed since cannot disagree
    with it; from scratch, without a checkpoint, it is `config.model`.

    Raises:
        CheckpointError: no pretraining checkpoint, or its weights do not fit.
    """
    from anycontrast.models.amae import AMAEConfig
    from anycontrast.training.checkpoint import CheckpointError, load_weights

    finetune = config.finetune
    if finetune.from_scratch:
        return FinetuneTask(finetune, config.model, store, pretrained=None)
    source = Path(finetune.checkpoint or config.paths.pretrain / "checkpoints")
    tensors, state = load_weights(source)
    if state["kind"] != "amae":
        raise CheckpointError(
            f"finetune: checkpoint {source} holds a model of kind {state['kind']!r}, expected a "
            "pretrained amae; set finetune.checkpoint to a pretraining checkpoint"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in state["model_config"].items()}
    model_config = AMAEConfig(**values)
    try:
        return FinetuneTask(finetune, model_config, store, pretrained=tensors)
    except ValueError as error:
        raise CheckpointError(f"finetune: checkpoint {source}: {error}") from error
