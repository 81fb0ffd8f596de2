"""A store to the packs of one rank, step after step: ordered, mixed, prefetched, resumable.

In: a study store, a seed, a rank. Out: for every global step the packs this rank trains on. Which
studies form a step, and which packs they form, depends on (seed, place in the order, records,
config) alone, so runs on 1, 2 or 4 ranks, with any number of threads, stopped and resumed anywhere,
see the same packs. Studies are read, augmented and packed in threads `prefetch_steps` ahead;
nothing is shuffled through a buffer, and the state is a place in the order beside what it is valid
for and what was counted so far.

Gives up: a step waits for its slowest study.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

from anycontrast_datasets.audit import EpochAudit, Tally, close_epoch
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.mixing import mix_shares
from anycontrast_datasets.pack_reader import PackReader, ReadPack
from anycontrast_datasets.quarantine import Damage, Quarantine
from anycontrast_datasets.selection import select_studies
from anycontrast_datasets.served import ServedCount, count_mix
from anycontrast_datasets.step_plan import (
    CountPlanner,
    Cursor,
    Servings,
    StepPlan,
    StepPlanner,
)
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.token_planner import TokenPlanner

__all__ = ["StepPacks", "StreamConfig", "StudyStream"]

logger = logging.getLogger(__name__)

# What does not change which packs are served, or only as far as damaged bytes do.
_TUNING = ("num_threads", "prefetch_steps", "on_corrupt", "max_corrupt_fraction")
# States written before these existed are of streams that behaved like the defaults.
_LATER = ("mixing", "pack_tokens", "pool_studies", "cost", "draws_per_study")


@dataclass(frozen=True)
class StepPacks:
    """What one rank trains on in one global step."""

    step: int
    packs: tuple[PackedBatch, ...]
    data_wait_s: float
    """Seconds the consumer waited for these packs."""
    epoch: int
    """Epoch of the step's first study, the same on every rank."""
    finished_epochs: tuple[int, ...] = ()
    """Epochs of which this step served the last study; ready to be audited."""
    damages: tuple[Damage, ...] = ()
    """Studies this rank could not read and had not met before."""
    mix: Mapping[str, int] = field(default_factory=dict)
    """Studies served to this rank by `dataset/<name>`, `contrast/<name>` and `set/<names>`."""


@dataclass(frozen=True)
class _Pending:
    plan: StepPlan
    packs: tuple[Future[ReadPack], ...]


class StudyStream:
    """Endless iterator over the `StepPacks` of one rank; use as a context manager or `close()`.

    Args:
        store: Where the studies are read from.
        config: What is served, and how.
        patch_vox: Voxels of a patch along i, j, k.
        seed: Seed of the run; order and augmentation follow from it.
        rank: This rank, 0 .. world_size - 1.
        world_size: Ranks that share each step.
        start_step: First global step to serve, e.g. `next_step` of a saved state; `restore` then
            takes over the rest of the state.

    Raises:
        ManifestError: If no study of the store is in the split with a wanted contrast, or a
            mixing weight names a dataset that is not there.
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
        self._rank = rank
        packs_per_rank = config.packs_per_step // world_size
        self._own_packs = range(rank * packs_per_rank, (rank + 1) * packs_per_rank)
        self._selection = select_studies(store, config.split, config.contrasts)
        servings = Servings(store, self._selection, config, patch_vox, seed)
        self._planner: StepPlanner = (
            CountPlanner(servings, config)
            if config.pack_tokens is None
            else TokenPlanner(servings, config, seed)
        )
        self._quarantine = Quarantine(self.num_studies, config.max_corrupt_fraction)
        self._reader = PackReader(
            store,
            config,
            patch_vox,
            seed=seed,
            servings=servings,
            num_studies=self.num_studies,
            quarantine=self._quarantine,
        )
        self._served = ServedCount(config.draws_per_study)
        self._pending: deque[_Pending] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._announcer: ThreadPoolExecutor | None = None
        self._is_closed = False
        self._start_step = start_step
        self._next_planned: Cursor | None = None
        self._edges: dict[int, Cursor] = {}

    def _go_to(self, cursor: Cursor) -> None:
        """Begin at a place of the order; counting begins there too."""
        self._next_planned = cursor
        self._edges = {cursor.step: cursor}
        self._served.begin(cursor.epoch, self._planner.places_before(cursor))

    @property
    def num_studies(self) -> int:
        """Studies of the split with a wanted contrast."""
        return len(self._selection)

    @property
    def num_quarantined(self) -> int:
        """Studies known to be unreadable."""
        return len(self._quarantine)

    @property
    def damages(self) -> tuple[Damage, ...]:
        """What could not be read, one per study and member, as far as this rank knows."""
        return self._quarantine.damages

    @property
    def steps_per_epoch(self) -> float:
        """Global steps in an epoch; a fraction when an epoch ends inside a step."""
        return self._planner.steps_per_epoch

    @property
    def served_hash(self) -> int:
        """Sum modulo 2^64 of hashes of what was served where: (study, epoch, step, pack, slot).

        The sums of all ranks, added up, name the sequence of a run, whatever its interruptions.
        """
        return self._served.sequence

    def __iter__(self) -> Iterator[StepPacks]:
        """Return the stream itself; a second loop goes on where the first one stopped."""
        return self

    def __next__(self) -> StepPacks:
        """Return the next step's packs of this rank, waiting for them if need be.

        Raises:
            ShardError: As the store raised it, where damaged studies stop the run, or because there
                are too many of them; the step is not passed over, a retry meets it again.
            ValueError: If the stream is closed.
        """
        if self._is_closed:
            raise ValueError("stream: cannot serve from a closed stream; make a new one")
        self._quarantine.check()
        started = time.perf_counter()
        while len(self._pending) <= self._config.prefetch_steps:
            self._pending.append(self._submit())
        head = self._pending[0]
        packs = tuple(future.result() for future in head.packs)
        self._pending.popleft()
        return self._hand_out(head.plan, packs, time.perf_counter() - started)

    def _submit(self) -> _Pending:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._config.num_threads, "anycontrast-stream")
            # A thread of its own: it tells the disk of all steps ahead while the others decode.
            self._announcer = ThreadPoolExecutor(1, "anycontrast-announce")
        if self._next_planned is None:
            self._go_to(self._planner.start(self._start_step))
        assert self._next_planned is not None
        plan = self._planner.plan(self._next_planned)
        futures = []
        assert self._announcer is not None
        for number in self._own_packs:
            self._announcer.submit(self._reader.announce, plan.packs[number])
            others = [p for i, pack in enumerate(plan.packs) if i != number for p in pack]
            futures.append(
                self._reader.submit(self._pool, plan.cursor.step, plan.packs[number], others)
            )
        self._next_planned = plan.following
        self._edges[plan.following.step] = plan.following
        return _Pending(plan, tuple(futures))

    def _hand_out(self, plan: StepPlan, packs: Sequence[ReadPack], data_wait_s: float) -> StepPacks:
        step = plan.cursor.step
        for number, pack in zip(self._own_packs, packs, strict=True):
            self._served.add(step, number, pack)
        for past in [edge for edge in self._edges if edge <= step]:
            del self._edges[past]
        return StepPacks(
            step=step,
            packs=tuple(pack.batch for pack in packs),
            data_wait_s=data_wait_s,
            epoch=plan.cursor.epoch,
            finished_epochs=plan.finished_epochs,
            damages=self._quarantine.add(d for pack in packs for d in pack.damages),
            mix=count_mix(packs),
        )

    def tally(self, epoch: int) -> Tally:
        """Return what this rank has counted of an epoch."""
        return self._served.tally(epoch)

    def close_epoch(self, epoch: int, tally: Tally) -> EpochAudit:
        """Audit a finished epoch and forget its tally.

        Args:
            epoch: One of `StepPacks.finished_epochs`.
            tally: Sum of `tally(epoch)` over all ranks.

        Raises:
            AuditError: If studies were lost or served twice.
        """
        study_P, repeat_P = self._planner.places_from(epoch, tally.first_place)
        chosen = self._selection
        audit = close_epoch(
            epoch, tally, id_hash_N=chosen.id_hash_N, study_P=study_P, repeat_P=repeat_P
        )
        mix = mix_shares(
            chosen.dataset_names, chosen.dataset_N[study_P], chosen.contrast_set_N[study_P]
        )
        self._served.forget(epoch)
        return replace(audit, mix=mix)

    def add_damages(self, damages: Sequence[Damage]) -> tuple[Damage, ...]:
        """Take over what other ranks could not read; return what was not known.

        Raises:
            ShardError: If too many studies are damaged now.
        """
        new = self._quarantine.add(damages)
        self._quarantine.check()
        return new

    def close(self) -> None:
        """Stop reading ahead and join the threads; safe to call again."""
        self._is_closed = True
        self._pending.clear()
        for pool in (self._announcer, self._pool):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._announcer = self._pool = None

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
        """Return the JSON state of a run whose next step is `next_step`, as this rank knows it.

        At most 64 kB. `audit.combine_states` makes the states of all ranks that of the run.
        """
        cursor = self._edges.get(next_step) or self._planner.start(next_step)
        return {
            **self._identity(),
            "next_step": next_step,
            "cursor": [cursor.epoch, cursor.offset],
            **self._served.state(),
            "quarantine": self._quarantine.state(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state continues this stream.

        Raises:
            ValueError: If the store, the seed or the config differ; the message says which.
        """
        mine = self._identity()
        saved = {f"stream.{name}": value for name, value in _defaults().items()} | dict(state)
        differing = [key for key, value in mine.items() if saved.get(key) != value]
        if not differing:
            return
        cursor = state.get("cursor", [0, 1])
        remedy = "resume with the same shards, seed and data settings, or start a new run"
        if differing == ["stream.mixing"]:
            if cursor[1] == 0:
                logger.info("mixing weights change at the start of epoch %d", cursor[0])
                return
            remedy = (
                f"weights may change at an epoch edge only, and this is inside epoch {cursor[0]}; "
                "resume with the same weights, or from a checkpoint at an edge"
            )
        found = "; ".join(
            f"{key} was {saved.get(key, 'not saved')!r}, is {mine[key]!r}" for key in differing
        )
        raise ValueError(f"resume: the saved data cursor is of another stream: {found}; {remedy}")

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; before the first step is taken.

        Raises:
            ValueError: See `check_state`.
        """
        self.check_state(state)
        assert not self._pending, "a stream is restored before it is used"
        if "cursor" not in state:
            return
        self._go_to(Cursor(int(state["next_step"]), *state["cursor"]))
        self._served.restore(state, is_first_rank=self._rank == 0)
        self._quarantine.restore(state["quarantine"])

    def _identity(self) -> dict[str, Any]:
        """Everything the sequence of packs depends on, as JSON values."""
        config = asdict(self._config)
        for tuning in _TUNING:
            del config[tuning]
        if self._config.crop_vox is not None:
            config["crop_vox"] = list(self._config.crop_vox)
        return {
            "fingerprint": self._store.fingerprint,
            "seed": self._seed,
            "patch_vox": list(self._patch_vox),
            **{f"stream.{name}": value for name, value in config.items()},
        }


def _defaults() -> dict[str, Any]:
    defaults = asdict(StreamConfig())
    return {name: defaults[name] for name in _LATER}


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
