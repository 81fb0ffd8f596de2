"""Segmentation as a task of the training loop: labelled windows in, Dice out.

The loss is summed over studies and normalised by their global count, so a study weighs the same
however many contrasts it shows. Validation predicts whole studies, not windows.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from anycontrast.evaluation.evaluate import labelled_indices
from anycontrast.evaluation.inference import sliding_window
from anycontrast.evaluation.metrics import dice_per_region
from anycontrast.models.segmenter import (
    Segmenter,
    build_segmenter,
    region_targets,
    segmentation_loss,
    segmenter_model_config,
)
from anycontrast.training.task import Micro, Parts, Validation
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.store.reader import Announcer, Codes, StudyStore, Vox3
from anycontrast_datasets.study import ManifestError, StudyArrays, StudyRecord

if TYPE_CHECKING:
    from anycontrast.models.amae import AMAEConfig
    from anycontrast.training.finetune import FinetuneConfig

logger = logging.getLogger(__name__)


class LabelledStore:
    """The labelled studies of a store, as a store of their own.

    Raises:
        ManifestError: no study of split train has a label and one of the contrasts.
    """

    def __init__(self, store: StudyStore, contrasts: Sequence[str] = ()) -> None:
        labelled_indices(store, "train", contrasts)
        self._store = store
        self._indices = [i for i, record in enumerate(store.records) if record.has_label]
        self.records: tuple[StudyRecord, ...] = tuple(store.records[i] for i in self._indices)
        self.fingerprint = f"{store.fingerprint}:labelled"

    def __len__(self) -> int:
        return len(self._indices)

    def read(
        self,
        index: int,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
        out: Mapping[str, Codes] | None = None,
    ) -> StudyArrays:
        """See `StudyStore.read`; `index` counts labelled studies, here and below."""
        return self._store.read(self._indices[index], contrasts=contrasts, label=label, out=out)

    def read_crop(
        self,
        index: int,
        start_vox: Vox3,
        size_vox: Vox3,
        *,
        contrasts: Sequence[str] | None = None,
        label: bool = False,
    ) -> StudyArrays:
        """See `StudyStore.read_crop`."""
        place = self._indices[index]
        return self._store.read_crop(place, start_vox, size_vox, contrasts=contrasts, label=label)

    def read_patches(
        self, index: int, patch_vox: Vox3, patches: Mapping[str, npt.NDArray[np.int64]]
    ) -> dict[str, Codes]:
        """See `StudyStore.read_patches`."""
        return self._store.read_patches(self._indices[index], patch_vox, patches)

    def announce(self, index: int, contrasts: Sequence[str]) -> None:
        """See `Announcer.announce`."""
        if isinstance(self._store, Announcer):
            self._store.announce(self._indices[index], contrasts)

    def close(self) -> None:
        """See `StudyStore.close`."""
        self._store.close()

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
        best_dice: best validation Dice so far, of a run that is resumed.

    Raises:
        ValueError: the pretrained weights do not fit.
    """

    kind = "segmenter"

    def __init__(
        self,
        config: "FinetuneConfig",
        model_config: "AMAEConfig",
        store: StudyStore,
        *,
        pretrained: Mapping[str, Tensor] | None,
        best_dice: float = float("-inf"),
    ) -> None:
        self.config = config
        self.segmenter: Segmenter = build_segmenter(config.segmenter, model_config)
        self.model: nn.Module = self.segmenter
        self.model_config: Mapping[str, Any] = segmenter_model_config(
            config.segmenter, model_config
        )
        self._store = store
        self._best = best_dice
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
        limit = self.config.max_validation_studies
        if limit == -1:
            return []
        try:
            indices = labelled_indices(self._store, "val", self.config.shown_contrasts)
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
        device = next(self.segmenter.parameters()).device
        sums = dict.fromkeys(self.segmenter.regions, 0.0)
        for index in self._validation:
            record = self._store.records[index]
            shown = [c for c in record.contrasts if c in (self.config.shown_contrasts or [c])]
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
