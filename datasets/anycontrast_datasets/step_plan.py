"""Which studies form a step, and which packs they form: from the order to servings.

In: an order of studies and a place in it. Out: a `StepPlan`, the same on every rank, and the place
after it. Nothing is read here but the studies' records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.augment import choose_contrasts
from anycontrast_datasets.mixing import strata, study_weights
from anycontrast_datasets.order import StudyOrder, study_rng
from anycontrast_datasets.pack import assign_packs, estimate_tokens
from anycontrast_datasets.selection import Selection
from anycontrast_datasets.store.reader import StudyStore
from anycontrast_datasets.stream_config import StreamConfig
from anycontrast_datasets.study import StudyRecord

SUBSTITUTE_REPEAT = 2**40
"""Repeats from here on are extra servings, which fill a pack that would be empty and do not count;
the study may be served in its own right in the same epoch."""


@dataclass(frozen=True)
class Cursor:
    """A place in the endless order, at the edge of a step."""

    step: int
    """Global steps before this place, over the whole run."""
    epoch: int
    offset: int
    """Of this epoch, how much is served: studies, or steps where packs are filled by tokens."""


@dataclass(frozen=True)
class Serving:
    """One study of a step: which one, for which epoch, with which contrasts."""

    epoch: int
    study: int
    """Row of the `Selection`."""
    index: int
    """In the store."""
    record: StudyRecord
    contrasts: tuple[str, ...]
    """Chosen before reading, so that a dropped contrast costs no decoding."""
    repeat: int = 0
    """See `EpochOrder.repeat_N`."""
    num_draws: int = 1

    @property
    def draws(self) -> range:
        """The draw of every copy that goes into the pack, see `PackedBatch.draws`."""
        return range(self.repeat * self.num_draws, (self.repeat + 1) * self.num_draws)

    @property
    def counts(self) -> bool:
        """Whether this is one of the places of the epoch, and not an extra serving."""
        return self.repeat < SUBSTITUTE_REPEAT


@dataclass(frozen=True)
class StepPlan:
    """The packs of one global step, over all ranks."""

    cursor: Cursor
    packs: tuple[tuple[Serving, ...], ...]
    following: Cursor
    finished_epochs: tuple[int, ...]
    """Epochs of which this step serves the last study."""


class StepPlanner(Protocol):
    """Makes plans one after the other."""

    @property
    def steps_per_epoch(self) -> float:
        """Global steps in an epoch; a fraction when an epoch ends inside a step."""

    def start(self, step: int) -> Cursor:
        """Return where a global step begins in a run that was never changed on its way."""

    def plan(self, cursor: Cursor) -> StepPlan:
        """Return the plan of the step that begins at `cursor`."""

    def places_before(self, cursor: Cursor) -> int:
        """Return how many places of its epoch lie before a cursor."""

    def places_from(
        self, epoch: int, first_place: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return study and repeat of the places of an epoch, in serving order, from one on."""


class Servings:
    """Turns studies of a selection into servings, and knows their cost.

    Args:
        store: Where records are taken from.
        selection: The studies.
        config: What is served of them.
        patch_vox: Voxels of a patch along i, j, k.
        seed: Seed of the run.
    """

    def __init__(
        self,
        store: StudyStore,
        selection: Selection,
        config: StreamConfig,
        patch_vox: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.order = _make_order(selection, config, seed)
        self._store = store
        self._selection = selection
        self._config = config
        self._patch_vox = patch_vox
        self._seed = seed
        self._tokens_N = np.full(len(selection), np.nan)

    def make(self, epoch: int, study: int, repeat: int) -> Serving:
        """Return one serving of a study."""
        config = self._config
        index = int(self._selection.index_N[study])
        record = self._store.records[index]
        contrasts = tuple(
            c for c in record.contrasts if not config.contrasts or c in config.contrasts
        )
        if config.drop_contrasts:
            draw = repeat * config.draws_per_study
            rng = study_rng(self._seed, epoch, record.study_id, "contrasts", draw=draw)
            contrasts = choose_contrasts(contrasts, rng)
        return Serving(epoch, study, index, record, contrasts, repeat, config.draws_per_study)

    def epoch_tokens(
        self, epoch: int, study_N: npt.NDArray[np.int64], repeat_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Estimate the tokens of one copy of many servings: [N].

        A study's tokens are estimated once and kept, unless its contrasts change by the serving.
        """
        if self._config.drop_contrasts:
            pairs = zip(study_N.tolist(), repeat_N.tolist(), strict=True)
            return np.array([self.tokens(self.make(epoch, *pair)) for pair in pairs])
        for study in study_N[np.isnan(self._tokens_N[study_N])]:
            self._tokens_N[study] = self.tokens(self.make(epoch, int(study), 0))
        return self._tokens_N[study_N]

    def tokens(self, serving: Serving) -> float:
        """Estimate the tokens of one copy of a study."""
        return estimate_tokens(
            serving.record,
            serving.contrasts,
            self._patch_vox,
            crop_vox=self._config.crop_vox,
            drop_empty=self._config.drop_empty,
        )


class CountPlanner:
    """Steps of a fixed number of studies; an epoch may end inside a step, nothing is dropped."""

    def __init__(self, servings: Servings, config: StreamConfig) -> None:
        self._servings = servings
        self._order = servings.order
        self._studies_per_step = config.studies_per_step
        self._num_packs = config.packs_per_step
        self._cost = config.cost

    @property
    def steps_per_epoch(self) -> float:
        """See `StepPlanner.steps_per_epoch`."""
        return self._order.num_places / self._studies_per_step

    def start(self, step: int) -> Cursor:
        """See `StepPlanner.start`."""
        return Cursor(step, *divmod(step * self._studies_per_step, self._order.num_places))

    def plan(self, cursor: Cursor) -> StepPlan:
        """See `StepPlanner.plan`."""
        num_places = self._order.num_places
        servings = []
        for place in range(cursor.offset, cursor.offset + self._studies_per_step):
            epochs_on, offset = divmod(place, num_places)
            epoch = cursor.epoch + epochs_on
            order = self._order.epoch(epoch)
            study, repeat = int(order.study_N[offset]), int(order.repeat_N[offset])
            servings.append(self._servings.make(epoch, study, repeat))
        epochs_on, offset = divmod(cursor.offset + self._studies_per_step, num_places)
        return StepPlan(
            cursor=cursor,
            packs=self._share(servings),
            following=Cursor(cursor.step + 1, cursor.epoch + epochs_on, offset),
            finished_epochs=tuple(range(cursor.epoch, cursor.epoch + epochs_on)),
        )

    def _share(self, servings: Sequence[Serving]) -> tuple[tuple[Serving, ...], ...]:
        if self._num_packs == 1:
            return (tuple(servings),)
        costs = self._cost([self._servings.tokens(serving) for serving in servings])
        packs = assign_packs(costs.tolist(), self._num_packs)
        return tuple(tuple(servings[i] for i in pack) for pack in packs)

    def places_before(self, cursor: Cursor) -> int:
        """See `StepPlanner.places_before`."""
        return cursor.offset

    def places_from(
        self, epoch: int, first_place: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `StepPlanner.places_from`."""
        order = self._order.epoch(epoch)
        return order.study_N[first_place:], order.repeat_N[first_place:]


def _make_order(selection: Selection, config: StreamConfig, seed: int) -> StudyOrder:
    if config.mixing.is_even:
        return StudyOrder(len(selection), seed)
    weights = study_weights(
        config.mixing, selection.dataset_names, selection.dataset_N, selection.contrast_set_N
    )
    groups = strata(selection.dataset_N, selection.contrast_set_N)
    return StudyOrder(len(selection), seed, weights=weights, strata=groups)
