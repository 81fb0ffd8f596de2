"""Steps whose packs are filled up to a number of tokens: the epoch plan, served step by step.

In: servings and a token budget. Out: the same `StepPlan`s on every rank. An epoch is planned as a
whole when its first step is, and ends with a step, so each study is served exactly once an epoch
and every rank takes the same number of steps.
"""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.epoch_plan import EpochPlan, plan_epoch
from anycontrast_datasets.step_plan import (
    SUBSTITUTE_REPEAT,
    Cursor,
    Place,
    Servings,
    StepPlan,
    place_at,
)
from anycontrast_datasets.stream_config import StreamConfig

_KEPT_PLANS = 2


class TokenPlanner:
    """Steps as `epoch_plan.plan_epoch` makes them.

    Args:
        servings: Makes servings, and estimates their tokens.
        config: `pack_tokens` is set.
        seed: Seed of the run.
    """

    def __init__(self, servings: Servings, config: StreamConfig, seed: int) -> None:
        assert config.pack_tokens is not None
        self._servings = servings
        self._order = servings.order
        self._config = config
        self._pack_tokens = config.pack_tokens
        self._seed = seed
        self._plans: OrderedDict[int, EpochPlan] = OrderedDict()

    @property
    def steps_per_epoch(self) -> float:
        """Of the first epoch; where contrasts are dropped at random others differ a little."""
        return float(self._num_steps(0))

    def start(self, step: int) -> Cursor:
        """See `StepPlanner.start`; plans all epochs before, so a state's cursor is quicker."""
        epoch, offset = 0, step
        while offset >= self._num_steps(epoch):
            offset -= self._num_steps(epoch)
            epoch += 1
        return Cursor(step, epoch, offset)

    def plan(self, cursor: Cursor) -> StepPlan:
        """See `StepPlanner.plan`."""
        offsets = self._offsets(cursor.epoch, cursor.offset)
        packs = [tuple(self._place(cursor.epoch, int(n)) for n in pack) for pack in offsets]
        # A step of left-over studies has fewer packs than ranks want: the first places of the
        # epoch are served once more, with draws of their own, and not counted.
        for offset in range(self._config.packs_per_step - len(packs)):
            again = self._place(cursor.epoch, offset)
            packs.append((replace(again, repeat=SUBSTITUTE_REPEAT + again.repeat),))
        is_last = cursor.offset + 1 == self._num_steps(cursor.epoch)
        ahead = (cursor.epoch + 1, 0) if is_last else (cursor.epoch, cursor.offset + 1)
        return StepPlan(
            cursor=cursor,
            packs=tuple(packs),
            following=Cursor(cursor.step + 1, *ahead),
            finished_epochs=(cursor.epoch,) if is_last else (),
        )

    def places_before(self, cursor: Cursor) -> int:
        """See `StepPlanner.places_before`."""
        steps = range(cursor.offset)
        return sum(len(pack) for step in steps for pack in self._offsets(cursor.epoch, step))

    def places_from(
        self, epoch: int, first_place: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See `StepPlanner.places_from`."""
        plan, order = self._plan(epoch), self._order.epoch(epoch)
        places = np.concatenate((plan.positions, plan.left_over))[first_place:]
        return order.study_N[places], order.repeat_N[places]

    def _offsets(self, epoch: int, step: int) -> list[npt.NDArray[np.int64]]:
        plan = self._plan(epoch)
        if step < plan.num_steps:
            return plan.step(step)
        return [offset[None] for offset in plan.left_over]

    def _place(self, epoch: int, offset: int) -> Place:
        return place_at(self._order, epoch, offset)

    def _num_steps(self, epoch: int) -> int:
        plan = self._plan(epoch)
        return plan.num_steps + (len(plan.left_over) > 0)

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            self._plans[epoch] = plan_epoch(
                self._servings.epoch_tokens(epoch),
                pack_tokens=self._pack_tokens,
                packs_per_step=self._config.packs_per_step,
                pool_studies=self._config.pool_studies,
                copies=self._config.draws_per_study,
                cost=self._config.cost,
                seed=self._seed,
                epoch=epoch,
                name=lambda n: self._servings.make(self._place(epoch, n)).record.study_id,
            )
            while len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return self._plans[epoch]
