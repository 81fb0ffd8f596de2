"""Pretraining: AMAE on the packs of a stream.

Comes in: shards. Goes out: `<run>/pretrain/` with checkpoints, metrics and reconstruction panels.
The same worker runs in a plain process and inside each Ray worker.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anycontrast.models.amae import AMAE, AMAEConfig
from anycontrast.models.compiled import compile_blocks
from anycontrast.models.masking import MaskedPack, MaskingConfig, mask_batch
from anycontrast.shards import open_shards
from anycontrast.training.loop import LoopConfig, TrainingError, run_loop
from anycontrast.training.process_group import device, process_group, rank, world_size
from anycontrast.training.task import Micro, Parts, Validation
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.stream import StreamConfig, StudyStream
from anycontrast_datasets.study import ShardError
from anycontrast_kernels.backends import BACKENDS
from anycontrast_kernels.dispatch import order_backend

if TYPE_CHECKING:
    from anycontrast.training.config import Config

logger = logging.getLogger(__name__)

# V volumes of a batch, M decoded hidden tokens, G groups of volumes that share a log line.


_MAX_PANEL_CANDIDATES = 1000


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """One pretraining run."""

    stream: StreamConfig = field(default_factory=StreamConfig)
    init_from: str | None = None
    """Checkpoint folder to take weights from (not the optimiser, nor the step) where this run has
    no checkpoint of its own; None starts from random weights."""
    compile: bool | None = None
    """Compile the transformer blocks with `torch.compile`, padding their rows to few sizes. None:
    on CUDA where `engine.zero_stage` is below 3. On CPU it needs a C++ compiler."""
    attention: str | None = None
    """Back end of attention: fa4, fa3, torch, fa2, triton, flex or loop; None takes the first that
    can run and passes a check on the device. `ANYCONTRAST_ATTN` goes before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [backend.name for backend in BACKENDS]
        if self.attention is not None and self.attention not in names:
            raise ValueError(
                f"pretrain.attention must be one of {', '.join(names)}, got {self.attention!r}"
            )
        if self.compile and self.engine.zero_stage == 3:
            raise ValueError(
                "pretrain.compile needs engine.zero_stage below 3, which gathers weights in hooks "
                "that cannot be compiled; set pretrain.compile=false"
            )

    def compiles_on(self, device: torch.device) -> bool:
        """Whether blocks are compiled on `device`."""
        if self.compile is None:
            return device.type == "cuda" and self.engine.zero_stage < 3
        return self.compile


class PretrainTask:
    """Masked reconstruction of whatever contrasts each study has.

    Args:
        model: architecture.
        masking: what is hidden.
        seed: of weights and masks.
        store: where the study of the panels comes from.
    """

    kind = "amae"

    def __init__(
        self, model: AMAEConfig, masking: MaskingConfig, *, seed: int, store: StudyStore
    ) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = AMAE(model)
        self.model_config = asdict(model.resolved())
        self._patch_vox = model.patch_vox
        self._masking = masking
        self._seed = seed
        self._store = store

    def prepare(self, batch: PackedBatch, *, step: int, device: torch.device) -> Micro:
        """Hide tokens; the masks depend on (seed, epoch, study), not on the step."""
        pack = mask_batch(batch, self._masking, self._seed)
        return Micro(
            inputs=pack.to(device),
            count=sum(pack.target_lengths),
            num_tokens=batch.num_tokens,
            study_ids=batch.study_ids,
        )

    def loss(self, model: nn.Module, micro: Micro) -> tuple[Tensor, Parts]:
        """Sum the patch errors; also per contrast and per set of contrasts."""
        pack: MaskedPack = micro.inputs
        loss_M = model(pack, loss_only=True).loss_M
        return loss_M.sum(), _loss_by_group(pack, loss_M.detach())

    def panels(self, model: nn.Module, micro: Micro, *, step: int, folder: Path) -> None:
        """Draw the same study every time, so that pictures of different steps compare."""
        from anycontrast.evaluation.panels import reconstruction_panel

        assert isinstance(model, AMAE)
        try:
            study = self._store.read(_panel_study(self._store))
        except ShardError as error:
            logger.warning("no picture at step %d: %s", step, error)
            return
        batch = pack_studies([study], self._patch_vox, epochs=[0])
        where = micro.inputs.target_index_M.device
        pack = mask_batch(batch, self._masking, self._seed).to(where)
        reconstruction_MP = model.reconstruct(pack)
        if rank() == 0:
            reconstruction_panel(folder / f"step-{step:08d}.png", pack, reconstruction_MP)

    def validate(self, model: nn.Module, *, step: int) -> Validation | None:
        """Pretraining has no validation of its own; finetuning measures what it is worth."""
        return None


def run_pretrain(config: "Config") -> dict[str, Any]:
    """Pretrain in this process; see `pretrain_worker`."""
    return pretrain_worker(config)


def pretrain_worker(
    config: "Config",
    *,
    stop_requested: Callable[[], bool] | None = None,
    save_requested: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Pretrain on this rank: the process group of Ray or torchrun, or a group of one.

    Args:
        config: the run's configuration, the same on every rank.
        stop_requested: see `loop.run_loop`.
        save_requested: see `loop.run_loop`.

    Returns:
        See `loop.run_loop`.

    Raises:
        TrainingError: the packs cannot be shared by the ranks, or training cannot go on.
    """
    from anycontrast.training.config import config_to_record

    with process_group(timeout_s=config.cluster.timeout_s):
        store = open_shards(config)
        task = PretrainTask(config.model, config.masking, seed=config.seed, store=store)
        has_own = any((config.paths.pretrain / "checkpoints").glob("step-????????"))
        if config.pretrain.init_from is not None and not has_own:
            _init_from(task.model, Path(config.pretrain.init_from))
        order_backend(config.pretrain.attention)
        if config.pretrain.compiles_on(device()):
            compile_blocks(task.model)

        def open_stream(start_step: int) -> StudyStream:
            return StudyStream(
                store,
                config.pretrain.stream,
                config.model.patch_vox,
                seed=config.seed,
                rank=rank(),
                world_size=world_size(),
                start_step=start_step,
            )

        if config.pretrain.stream.packs_per_step % world_size():
            raise TrainingError(
                f"pretrain.stream.packs_per_step must be a multiple of the {world_size()} "
                f"processes, got {config.pretrain.stream.packs_per_step}"
            )
        return run_loop(
            task,
            open_stream,
            config.pretrain,
            folder=config.paths.pretrain,
            run_config=config_to_record(config),
            stop_requested=stop_requested,
            save_requested=save_requested,
        )


def _init_from(model: nn.Module, path: Path) -> None:
    from anycontrast.training.checkpoint import CheckpointError, load_weights

    weights, state = load_weights(path)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"pretrain.init_from={path}: its weights (a {state.get('kind')}) are not of the "
            f"configured model; use model settings {state.get('model_config')}"
        ) from error


def _panel_study(store: StudyStore) -> int:
    """Index of the study to draw: of split val if there is one, with the most contrasts.

    Looked for among the first studies only, because there may be a million.
    """
    records = store.records
    return max(
        range(min(len(records), _MAX_PANEL_CANDIDATES)),
        key=lambda i: (records[i].split == "val", len(records[i].volumes), -i),
    )


def _loss_by_group(pack: MaskedPack, loss_M: Tensor) -> Parts:
    """Sum and count of the patch errors per contrast and per contrast set."""
    batch = pack.batch
    sets = ["+".join(sorted(names, key=contrast_id)) for names in batch.contrasts]
    by_volume = [
        (f"loss/contrast/{name}", f"loss/set/{which}")
        for names, which in zip(batch.contrasts, sets, strict=True)
        for name in names
    ]
    groups = sorted({group for pair in by_volume for group in pair})
    volume_M = batch.volume_T.index_select(0, pack.target_index_M)
    sum_G = loss_M.new_zeros(len(groups))
    count_G = loss_M.new_zeros(len(groups))
    for kind in (0, 1):
        group_V = torch.tensor([groups.index(pair[kind]) for pair in by_volume])
        group_M = group_V.to(volume_M.device).index_select(0, volume_M)
        sum_G.index_add_(0, group_M, loss_M)
        count_G.index_add_(0, group_M, torch.ones_like(loss_M))
    return {group: (sum_G[i], count_G[i]) for i, group in enumerate(groups)}
