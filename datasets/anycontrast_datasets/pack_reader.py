"""The studies of one pack: read, augmented, packed, and what to do when one cannot be read.

In: the servings of a pack. Out: a `ReadPack`. A study whose bytes are damaged ends the run, or is
left out of its pack. A pack that would be empty is filled with one substitute, because every rank
needs something to train on: a study of the same step or, if all of those are damaged too, of the
split, chosen by (seed, epoch, study) alone. What is left out, and what stands in, depends on
nothing but the stored bytes, so every rank, thread count and resume finds the same.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import numpy as np

from anycontrast_datasets.augment import (
    StudyView,
    augment_study,
    choose_crop,
    choose_flips,
    cut_study,
    mirror_study,
)
from anycontrast_datasets.batch import PackedBatch
from anycontrast_datasets.order import study_rng
from anycontrast_datasets.pack import pack_studies
from anycontrast_datasets.pack_direct import DirectPack, StudyRequest
from anycontrast_datasets.quarantine import Damage, Quarantine, damage_from
from anycontrast_datasets.step_plan import SUBSTITUTE_REPEAT, Place, Serving, Servings
from anycontrast_datasets.store.byte_source import UNREACHABLE
from anycontrast_datasets.store.reader import Announcer, StudyStore
from anycontrast_datasets.store.volume_index import LABEL_MEMBER
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import ShardError

_MAX_SUBSTITUTES = 100


@dataclass(frozen=True)
class ReadPack:
    """A pack and what could not be put into it."""

    batch: PackedBatch
    served: tuple[Serving, ...]
    """The servings that count, in the pack's order; none where a substitute stands in."""
    left_out: tuple[Serving, ...]
    damages: tuple[Damage, ...]
    """What is wrong with the studies left out."""


class PackReader:
    """Reads packs of one stream.

    Args:
        store: Where the studies are read from; called from several threads.
        config: How they are augmented, and what happens to damaged ones.
        patch_vox: Voxels of a patch along i, j, k.
        seed: Seed of the run.
        servings: Makes servings of substitutes.
        num_studies: Rows of the selection, to choose substitutes from.
        quarantine: What is known to be damaged; only read here.
    """

    def __init__(
        self,
        store: StudyStore,
        config: StreamConfig,
        patch_vox: tuple[int, int, int],
        *,
        seed: int,
        servings: Servings,
        num_studies: int,
        quarantine: Quarantine,
    ) -> None:
        self._store = store
        self._config = config
        self._patch_vox = patch_vox
        self._seed = seed
        self._servings = servings
        self._num_studies = num_studies
        self._quarantine = quarantine

    def submit(
        self, pool: Executor, step: int, places: Sequence[Place], others: Sequence[Place]
    ) -> Future[ReadPack]:
        """Start reading a pack.

        Args:
            pool: Its threads start work in the order of submission.
            step: Global step.
            places: What the pack is made of.
            others: The places of the step's other packs, of which a substitute may be taken.

        Returns:
            The pack to come; its errors are the store's.
        """
        pack = [self._servings.make(place) for place in places]
        direct = self._direct(pack)
        reads = [pool.submit(self._read_into, direct, n, pack[n]) for n in range(len(pack))]
        # When a task runs, those it waits for are being run by other threads or are done: the pool
        # starts work in the order of submission, so it never waits for a place in the pool.
        return pool.submit(self._pack, step, pack, direct, reads, others)

    def announce(self, places: Sequence[Place]) -> None:
        """Let the disk fetch the studies of a pack while others are being decoded."""
        if isinstance(self._store, Announcer):
            for serving in map(self._servings.make, places):
                self._store.announce(serving.index, serving.contrasts)

    def _direct(self, pack: Sequence[Serving]) -> DirectPack | None:
        """Plan to read straight into the pack; parts of studies and labels are packed after."""
        config = self._config
        if config.crop_vox is not None or config.labels:
            return None
        requests = [
            StudyRequest(
                index=serving.index,
                record=serving.record,
                contrasts=serving.contrasts,
                epoch=serving.epoch,
                draws=tuple(serving.draws),
                flips=tuple(
                    choose_flips(config.flip_axes, self._rng(serving, draw))
                    for draw in serving.draws
                ),
            )
            for serving in pack
        ]
        return DirectPack(self._store, requests, self._patch_vox, drop_empty=config.drop_empty)

    def _read_into(
        self, direct: DirectPack | None, number: int, serving: Serving
    ) -> list[StudyView]:
        """Read a study into its place in the pack, or return it to be packed."""
        if direct is None:
            return self._read(serving)
        self._refuse_known(serving, serving.contrasts)
        direct.read(number)
        return []

    def _read(self, serving: Serving) -> list[StudyView]:
        """Read a study once and augment it once per draw."""
        config = self._config
        label = config.labels and serving.record.has_label
        self._refuse_known(
            serving, (*serving.contrasts, LABEL_MEMBER) if label else serving.contrasts
        )
        is_anywhere = config.foreground_crop_fraction == 0 and len(serving.draws) == 1
        if config.crop_vox is not None and is_anywhere:
            return [self._read_crop(serving, config.crop_vox, label)]
        arrays = self._store.read(serving.index, contrasts=serving.contrasts, label=label)
        return [
            augment_study(
                arrays,
                self._rng(serving, draw),
                flip_axes=config.flip_axes,
                crop_vox=config.crop_vox,
                foreground_crop_fraction=config.foreground_crop_fraction,
            )
            for draw in serving.draws
        ]

    def _read_crop(
        self, serving: Serving, crop_vox: tuple[int, int, int], label: bool
    ) -> StudyView:
        """Read what of a study the crop needs; the same crop as of the whole study."""
        rng = self._rng(serving, serving.draws[0])
        shape = serving.record.shape
        flips = choose_flips(self._config.flip_axes, rng)
        origin = choose_crop(shape, crop_vox, rng)
        x, y, z = (
            shape[n] - origin[n] - crop_vox[n] if n in flips else origin[n] for n in range(3)
        )
        arrays = self._store.read_crop(
            serving.index, (x, y, z), crop_vox, contrasts=serving.contrasts, label=label
        )
        inside = StudyView(arrays, (max(x, 0), max(y, 0), max(z, 0)))
        return cut_study(mirror_study(inside, flips), origin, crop_vox)

    def _refuse_known(self, serving: Serving, members: Sequence[str]) -> None:
        known = self._quarantine.find(serving.index, members)
        if known is not None:
            raise ShardError(known.reason)

    def _rng(self, serving: Serving, draw: int) -> np.random.Generator:
        return study_rng(self._seed, serving.epoch, serving.record.study_id, "augment", draw=draw)

    def _pack(
        self,
        step: int,
        pack: Sequence[Serving],
        direct: DirectPack | None,
        reads: Sequence[Future[list[StudyView]]],
        others: Sequence[Place],
    ) -> ReadPack:
        views, left_out, damages, numbers = [], [], [], []
        for number, (serving, read) in enumerate(zip(pack, reads, strict=True)):
            try:
                views.append(read.result())
                numbers.append(number)
            except ShardError as error:
                # An unreachable store says nothing about the study.
                if self._config.on_corrupt == "stop" or error.code == UNREACHABLE:
                    raise
                left_out.append(serving)
                damages.append(_damage(error, serving, step))
        served = [pack[number] for number in numbers]
        if not served:
            batch = self._substitute(step, pack, others)
        elif direct is None:
            batch = self._join(views, served)
        else:
            batch = direct.finish(numbers)
        counted = tuple(serving for serving in served if serving.counts)
        missed = tuple(serving for serving in left_out if serving.counts)
        return ReadPack(batch, counted, missed, tuple(damages))

    def _join(self, views: Sequence[list[StudyView]], served: Sequence[Serving]) -> PackedBatch:
        batch = pack_studies(
            [view for copies in views for view in copies],
            self._patch_vox,
            epochs=[serving.epoch for serving in served for _ in serving.draws],
            drop_empty=self._config.drop_empty,
            labels=self._config.labels,
        )
        return replace(batch, draws=tuple(draw for serving in served for draw in serving.draws))

    def _substitute(
        self, step: int, pack: Sequence[Serving], others: Sequence[Place]
    ) -> PackedBatch:
        for serving in self._substitutes(pack[0].place, others):
            try:
                return self._join([self._read(serving)], [serving])
            except ShardError as error:
                if error.code == UNREACHABLE:
                    raise
        raise ShardError(
            f"stream: no study of step {step} can be read, nor any of {_MAX_SUBSTITUTES} others; "
            f"first {pack[0].record.study_id}; are the shards still there?"
        )

    def _substitutes(self, missing: Place, others: Sequence[Place]) -> Iterator[Serving]:
        """Yield who may stand in for a study, best first, each with draws of its own."""
        key = str(missing.study)
        rng = study_rng(self._seed, missing.epoch, key, "substitute", draw=missing.repeat)
        for number in rng.permutation(len(others)):
            other = others[number]
            repeat = SUBSTITUTE_REPEAT + other.repeat
            yield self._servings.make(replace(other, repeat=repeat))
        for _ in range(_MAX_SUBSTITUTES):
            study = int(rng.integers(self._num_studies))
            yield self._servings.make(Place(missing.epoch, study, SUBSTITUTE_REPEAT))


def _damage(error: ShardError, serving: Serving, step: int) -> Damage:
    return damage_from(
        error,
        index=serving.index,
        study_id=serving.record.study_id,
        step=step,
        epoch=serving.epoch,
    )
