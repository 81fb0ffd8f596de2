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
class Place:
    """One study of a step: which one, for which epoch, and for which time in it."""

    epoch: int
    study: int
    """Row of the `Selection`."""
    repeat: int
    """See `EpochOrder.repeat_N`."""


@dataclass(frozen=True)
class Serving:
    """A place with what is read for it."""

    place: Place
    index: int
    """In the store."""
    record: StudyRecord
    contrasts: tuple[str, ...]
    """Chosen before reading, so that a dropped contrast costs no decoding."""
    num_draws: int = 1
    """Copies that go into the pack."""

    @property
    def epoch(self) -> int:
        """Epoch it is served for."""
        return self.place.epoch

    @property
    def repeat(self) -> int:
        """See `EpochOrder.repeat_N`."""
        return self.place.repeat

    @property
    def draws(self) -> range:
        """The draw of every copy that goes into the pack, see `PackedBatch.draws`."""
        first = self.repeat * self.num_draws
        return range(first, first + self.num_draws)

    @property
    def counts(self) -> bool:
        """Whether this is one of the places of the epoch, and not an extra serving."""
        return self.repeat < SUBSTITUTE_REPEAT


@dataclass(frozen=True)
class StepPlan:
    """The packs of one global step, over all ranks."""

    cursor: Cursor
    packs: tuple[tuple[Place, ...], ...]
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
    """Turns places into servings, and knows their tokens.

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

    def make(self, place: Place) -> Serving:
        """Look up the record of a place, and choose the contrasts that are served."""
        config = self._config
        index = int(self._selection.index_N[place.study])
        record = self._store.records[index]
        contrasts = tuple(
            c for c in record.contrasts if not config.contrasts or c in config.contrasts
        )
        if config.drop_contrasts:
            draw = place.repeat * config.draws_per_study
            rng = study_rng(self._seed, place.epoch, record.study_id, "contrasts", draw=draw)
            contrasts = choose_contrasts(contrasts, rng)
        return Serving(place, index, record, contrasts, config.draws_per_study)

    def tokens(self, place: Place) -> float:
        """Estimate the tokens of one copy of a study.

        Estimated once per study and kept, unless the contrasts change from serving to serving.
        """
        if self._config.drop_contrasts:
            return self._estimate(self.make(place))
        if np.isnan(self._tokens_N[place.study]):
            self._tokens_N[place.study] = self._estimate(self.make(place))
        return float(self._tokens_N[place.study])

    def epoch_tokens(self, epoch: int) -> npt.NDArray[np.float64]:
        """Return `tokens` of every place of an epoch: [N]."""
        study_N = self.order.epoch(epoch).study_N
        if self._config.drop_contrasts:
            places = (place_at(self.order, epoch, offset) for offset in range(len(study_N)))
            return np.array([self.tokens(place) for place in places])
        for study in study_N[np.isnan(self._tokens_N[study_N])].tolist():
            self.tokens(Place(epoch, study, 0))
        return self._tokens_N[study_N]

    def _estimate(self, serving: Serving) -> float:
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
        places = []
        for number in range(cursor.offset, cursor.offset + self._studies_per_step):
            epochs_on, offset = divmod(number, num_places)
            places.append(place_at(self._order, cursor.epoch + epochs_on, offset))
        epochs_on, offset = divmod(cursor.offset + self._studies_per_step, num_places)
        return StepPlan(
            cursor=cursor,
            packs=self._share(places),
            following=Cursor(cursor.step + 1, cursor.epoch + epochs_on, offset),
            finished_epochs=tuple(range(cursor.epoch, cursor.epoch + epochs_on)),
        )

    def _share(self, places: Sequence[Place]) -> tuple[tuple[Place, ...], ...]:
        if self._num_packs == 1:
            return (tuple(places),)
        costs = self._cost([self._servings.tokens(place) for place in places])
        packs = assign_packs(costs.tolist(), self._num_packs)
        return tuple(tuple(places[i] for i in pack) for pack in packs)

    def places_before(self, cursor: Cursor) -> int:
        """See `StepPlanner.places_before`."""
        return cursor.offset

    def places_from(
        self, epoch: int, first_place: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `StepPlanner.places_from`."""
        order = self._order.epoch(epoch)
        return order.study_N[first_place:], order.repeat_N[first_place:]


def place_at(order: StudyOrder, epoch: int, offset: int) -> Place:
    """Return a place of an epoch by how many come before it."""
    found = order.epoch(epoch)
    return Place(epoch, int(found.study_N[offset]), int(found.repeat_N[offset]))


def _make_order(selection: Selection, config: StreamConfig, seed: int) -> StudyOrder:
    if config.mixing.is_even:
        return StudyOrder(len(selection), seed)
    weights = study_weights(
        config.mixing, selection.dataset_names, selection.dataset_N, selection.contrast_set_N
    )
    groups = strata(selection.dataset_N, selection.contrast_set_N)
    return StudyOrder(len(selection), seed, weights=weights, strata=groups)
