"""What became of the data of a run: every epoch audited, every damaged study named.

Comes in: the steps of a stream, on every rank. Goes out, beside the metrics, written by rank 0:

    <folder>/audit.jsonl        one object per finished epoch, over all ranks
    <folder>/quarantine.jsonl   one object per study and member that could not be read

and the data part of a checkpoint's state.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from anycontrast.training.metrics import drop_lines_after
from anycontrast.training.process_group import gather_objects, rank
from anycontrast_datasets.audit import Tally, combine_states
from anycontrast_datasets.quarantine import Damage
from anycontrast_datasets.stream import StepPacks, StudyStream

logger = logging.getLogger(__name__)


class DataLog:
    """The books of a stream over all ranks; every rank calls it alike.

    Args:
        stream: This rank's stream, restored if the run was resumed.
        folder: The run folder.
        start_step: Steps already done; later lines, left by a run that died after its newest
            checkpoint, are dropped.
    """

    def __init__(self, stream: StudyStream, folder: Path, *, start_step: int) -> None:
        self._stream = stream
        self._audit = folder / "audit.jsonl"
        self._quarantine = folder / "quarantine.jsonl"
        self._logged = {(d.index, d.member) for d in stream.damages}
        if rank() == 0:
            drop_lines_after(self._audit, start_step)
            drop_lines_after(self._quarantine, start_step)

    def note(self, packs: StepPacks, *, num_damages: int) -> None:
        """Exchange what ranks could not read; audit the epochs that this step has finished.

        Args:
            packs: The step of this rank.
            num_damages: Sum of `len(packs.damages)` over ranks.

        Raises:
            ShardError: too many studies cannot be read; on every rank.
            AuditError: studies were lost or served twice; on every rank.
        """
        if num_damages:
            damages = [d for of_rank in gather_objects(packs.damages) for d in of_rank]
            self._log_damages(damages)
            self._stream.add_damages(damages)
        if packs.finished_epochs:
            self._close_epochs(packs)

    def _log_damages(self, damages: list[Damage]) -> None:
        for damage in damages:
            key = (damage.index, damage.member)
            if key in self._logged:
                continue
            self._logged.add(key)
            if rank() == 0:
                logger.warning(
                    "step %d: study %s left out: %s",
                    damage.step + 1,
                    damage.study_id,
                    damage.reason,
                )
                values = asdict(damage)
                del values["index"]
                _append(self._quarantine, {**values, "step": damage.step + 1})

    def _close_epochs(self, packs: StepPacks) -> None:
        own = [self._stream.tally(epoch) for epoch in packs.finished_epochs]
        of_ranks = gather_objects(own)
        for number, epoch in enumerate(packs.finished_epochs):
            total: Tally = reduce(add, (tallies[number] for tallies in of_ranks))
            audit = self._stream.close_epoch(epoch, total)
            if rank() == 0:
                logger.info("audit: %s", audit.line())
                _append(self._audit, {**audit.to_json(), "step": packs.step + 1})

    def state(self, step: int) -> dict[str, Any]:
        """Return the data state of the run after `step` steps."""
        return combine_states(gather_objects(self._stream.state_dict(step)))


def _append(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(values) + "\n")
