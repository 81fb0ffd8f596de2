"""A store to the packs of one rank, step after step: ordered, prefetched, resumable.

In: a study store, a seed, a rank. Out: for every global step the packs this rank trains on. Which
studies form a step, and which packs they form, depends on (seed, step, records, config) alone, so
runs on 1, 2 or 4 ranks, with any number of threads, stopped and resumed anywhere, see the same
packs. Studies are read, augmented and packed in threads `prefetch_steps` ahead; nothing is
shuffled through a buffer, and the state is one integer beside what it is valid for.

Gives up: a step waits for its slowest study, and a study that cannot be read stops the run.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from anycontrast_datasets.augment import StudyView, augment_study, choose_contrasts
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.order import step_studies, study_rng
from anycontrast_datasets.pack import assign_packs, estimate_tokens, pack_studies, study_cost
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.study import SPLITS, ManifestError, StudyRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What of a store is served, and how."""

    studies_per_step: int = 4
    """Studies in one optimiser step, over all ranks."""
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
        ):
            if getattr(self, name) < least:
                raise ValueError(f"stream.{name} must be >= {least}, got {getattr(self, name)}")
        if self.packs_per_step > self.studies_per_step:
            raise ValueError(
                f"stream.packs_per_step must be <= studies_per_step ({self.studies_per_step}), "
                f"got {self.packs_per_step}; raise studies_per_step"
            )
        if self.split not in SPLITS:
            raise ValueError(f"stream.split must be one of {SPLITS}, got {self.split!r}")
        for name in self.contrasts:
            contrast_id(name)
        self._check_augmentation()

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


@dataclass(frozen=True)
class StepPacks:
    """What one rank trains on in one global step."""

    step: int
    packs: tuple[PackedBatch, ...]
    data_wait_s: float
    """Seconds the consumer waited for these packs."""
    epoch: int
    """Epoch of the step's first study, the same on every rank."""


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    packs: tuple[Future[PackedBatch], ...]


@dataclass(frozen=True)
class _Serving:
    """One study of a step: which one, for which epoch, with which contrasts."""

    epoch: int
    index: int
    record: StudyRecord
    contrasts: tuple[str, ...]
    """Chosen before reading, so that a dropped contrast costs no decoding."""


class StudyStream:
    """Endless iterator over the `StepPacks` of one rank; use as a context manager or `close()`.

    Args:
        store: Where the studies are read from.
        config: What is served, and how.
        patch_vox: Voxels of a patch along i, j, k.
        seed: Seed of the run; order and augmentation follow from it.
        rank: This rank, 0 .. world_size - 1.
        world_size: Ranks that share each step.
        start_step: First global step to serve, e.g. `next_step` of a saved state.

    Raises:
        ManifestError: If no study of the store is in the split with a wanted contrast.
        ValueError: If rank, world size or packs per step do not fit, or start_step is negative.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StreamConfig,
        patch_vox: tuple[int, int, int],
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        _check_place(config, rank, world_size, start_step)
        self._store = store
        self._config = config
        self._patch_vox = patch_vox
        self._seed = seed
        packs_per_rank = config.packs_per_step // world_size
        self._own_packs = range(rank * packs_per_rank, (rank + 1) * packs_per_rank)
        self._indices = _select_studies(store, config)
        self._costs: dict[tuple[int, tuple[str, ...]], float] = {}
        self._next_planned = start_step
        self._pending: deque[_Pending] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._is_closed = False

    @property
    def num_studies(self) -> int:
        """Studies in an epoch."""
        return len(self._indices)

    @property
    def steps_per_epoch(self) -> float:
        """Global steps in an epoch; a fraction when an epoch ends inside a step."""
        return self.num_studies / self._config.studies_per_step

    def __iter__(self) -> Iterator[StepPacks]:
        """Return the stream itself; a second loop goes on where the first one stopped."""
        return self

    def __next__(self) -> StepPacks:
        """Return the next step's packs of this rank, waiting for them if need be.

        Raises:
            ShardError: As the store raised it; the step is not passed over, a retry meets it again.
            ValueError: If the stream is closed.
        """
        if self._is_closed:
            raise ValueError("stream: cannot serve from a closed stream; make a new one")
        started = time.perf_counter()
        while len(self._pending) <= self._config.prefetch_steps:
            self._pending.append(self._submit(self._next_planned))
            self._next_planned += 1
        head = self._pending[0]
        packs = tuple(future.result() for future in head.packs)
        self._pending.popleft()
        return StepPacks(head.step, packs, time.perf_counter() - started, head.epoch)

    def close(self) -> None:
        """Stop reading ahead and join the threads; safe to call again."""
        self._is_closed = True
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "StudyStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self, next_step: int) -> dict[str, object]:
        """Return the JSON state of a run whose next step is `next_step`."""
        return {**self._identity(), "next_step": next_step}

    def check_state(self, state: dict[str, object]) -> None:
        """Check that a saved state continues this stream.

        Raises:
            ValueError: If the store, the seed or the config differ; the message says which.
        """
        mine = self._identity()
        differing = [key for key, value in mine.items() if state.get(key) != value]
        if not differing:
            return
        found = "; ".join(
            f"{key} was {state.get(key, 'not saved')!r}, is {mine[key]!r}" for key in differing
        )
        raise ValueError(
            f"resume: the saved data cursor is of another stream: {found}; "
            "resume with the same shards, seed and data settings, or start a new run"
        )

    def _identity(self) -> dict[str, Any]:
        """Everything the sequence of packs depends on, as JSON values."""
        config = asdict(self._config)
        for tuning in ("num_threads", "prefetch_steps"):
            del config[tuning]
        if self._config.crop_vox is not None:
            config["crop_vox"] = list(self._config.crop_vox)
        return {
            "fingerprint": self._store.fingerprint,
            "seed": self._seed,
            "patch_vox": list(self._patch_vox),
            **{f"stream.{name}": value for name, value in config.items()},
        }

    def _submit(self, step: int) -> _Pending:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._config.num_threads, "anycontrast-stream")
        servings = self._servings(step)
        packs = self._plan_packs(servings)
        futures = [
            self._submit_pack([servings[i] for i in packs[pack]]) for pack in self._own_packs
        ]
        return _Pending(step, servings[0].epoch, tuple(futures))

    def _submit_pack(self, servings: list[_Serving]) -> Future[PackedBatch]:
        assert self._pool is not None
        views = [self._pool.submit(self._read, serving) for serving in servings]
        # The pool starts work in the order of submission: when the packing task runs, its studies
        # are being read by other threads or are done, so it never waits for a place in the pool.
        return self._pool.submit(self._pack, views, [serving.epoch for serving in servings])

    def _servings(self, step: int) -> list[_Serving]:
        config = self._config
        servings = []
        for epoch, place in step_studies(
            step, config.studies_per_step, self.num_studies, self._seed
        ):
            record = self._store.records[self._indices[place]]
            contrasts = _wanted_contrasts(record, config)
            if config.drop_contrasts:
                rng = study_rng(self._seed, epoch, record.study_id, "contrasts")
                contrasts = choose_contrasts(contrasts, rng)
            servings.append(_Serving(epoch, self._indices[place], record, contrasts))
        return servings

    def _plan_packs(self, servings: list[_Serving]) -> list[list[int]]:
        if self._config.packs_per_step == 1:
            return [list(range(len(servings)))]
        return assign_packs([self._cost(s) for s in servings], self._config.packs_per_step)

    def _cost(self, serving: _Serving) -> float:
        key = (serving.index, serving.contrasts)
        if key not in self._costs:
            tokens = estimate_tokens(
                serving.record,
                serving.contrasts,
                self._patch_vox,
                crop_vox=self._config.crop_vox,
                drop_empty=self._config.drop_empty,
            )
            self._costs[key] = study_cost(tokens)
        return self._costs[key]

    def _read(self, serving: _Serving) -> StudyView:
        config = self._config
        arrays = self._store.read(
            serving.index,
            contrasts=serving.contrasts,
            label=config.labels and serving.record.has_label,
        )
        return augment_study(
            arrays,
            study_rng(self._seed, serving.epoch, serving.record.study_id, "augment"),
            flip_axes=config.flip_axes,
            crop_vox=config.crop_vox,
            foreground_crop_fraction=config.foreground_crop_fraction,
        )

    def _pack(self, views: list[Future[StudyView]], epochs: list[int]) -> PackedBatch:
        return pack_studies(
            [view.result() for view in views],
            self._patch_vox,
            epochs=epochs,
            drop_empty=self._config.drop_empty,
            labels=self._config.labels,
        )


def _check_place(config: StreamConfig, rank: int, world_size: int, start_step: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"stream: rank must be in 0 .. world_size - 1, got {rank} of {world_size}")
    if config.packs_per_step % world_size:
        raise ValueError(
            f"stream.packs_per_step must be a multiple of the world size ({world_size}), "
            f"got {config.packs_per_step}"
        )
    if start_step < 0:
        raise ValueError(f"stream: start_step must be >= 0, got {start_step}")


def _wanted_contrasts(record: StudyRecord, config: StreamConfig) -> tuple[str, ...]:
    return tuple(c for c in record.contrasts if not config.contrasts or c in config.contrasts)


def _select_studies(store: StudyStore, config: StreamConfig) -> tuple[int, ...]:
    in_split = [i for i, record in enumerate(store.records) if record.split == config.split]
    served = tuple(i for i in in_split if _wanted_contrasts(store.records[i], config))
    if not served:
        counts = {s: sum(record.split == s for record in store.records) for s in SPLITS}
        raise ManifestError(
            f"stream: no study to serve from split {config.split!r} with contrasts "
            f"{config.contrasts or 'any'}; studies per split: {counts}; "
            "change the split, its fractions at scanning, or the contrasts"
        )
    logger.info(
        "split %s: %d studies served, %d left out for having none of the wanted contrasts %s",
        config.split,
        len(served),
        len(in_split) - len(served),
        config.contrasts or "(all)",
    )
    return served
