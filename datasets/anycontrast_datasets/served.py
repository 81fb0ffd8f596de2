"""What one rank has served so far: counted pack by pack, carried along in the state.

In: packs on their way out, judged by what they say of themselves and not by their plan. Out:
tallies per epoch for the audit, a hash of the sequence, and how datasets and contrasts were mixed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from anycontrast_datasets.audit import (
    Tally,
    sequence_hash,
    serving_hash,
    tallies_from_json,
    tallies_to_json,
)
from anycontrast_datasets.contrast import contrast_id
from anycontrast_datasets.pack_reader import ReadPack
from anycontrast_datasets.selection import id_hash
from anycontrast_datasets.step_plan import SUBSTITUTE_REPEAT


class ServedCount:
    """Counts what a rank hands out.

    Args:
        num_draws: Copies of a study in its pack; a study counts once.
    """

    def __init__(self, num_draws: int) -> None:
        self._num_draws = num_draws
        self._tallies: dict[int, Tally] = {}
        self.sequence = 0
        """Sum modulo 2^64 of `sequence_hash`, so that sums of ranks can be added up."""

    def begin(self, epoch: int, first_place: int) -> None:
        """Start counting at a place of an epoch."""
        self._tallies = {epoch: Tally(first_place)} if first_place else {}

    def add(self, step: int, number: int, pack: ReadPack) -> None:
        """Count pack `number` of a global step."""
        for serving in pack.left_out:
            value = serving_hash(id_hash(serving.record.study_id), serving.epoch, serving.repeat)
            self._add(serving.epoch, Tally(quarantined=1, quarantined_hash=value))
        batch = pack.batch
        named = zip(batch.study_ids, batch.epochs, batch.draws, strict=True)
        for slot, (study_id, epoch, draw) in enumerate(named):
            repeat, copy = divmod(draw, self._num_draws)
            if copy == 0 and repeat < SUBSTITUTE_REPEAT:
                value = serving_hash(id_hash(study_id), epoch, repeat)
                self._add(epoch, Tally(served=1, served_hash=value))
                self.sequence += sequence_hash(value, step, number, slot)
        self.sequence %= 2**64

    def _add(self, epoch: int, tally: Tally) -> None:
        self._tallies[epoch] = self.tally(epoch) + tally

    def tally(self, epoch: int) -> Tally:
        """Return what was counted of an epoch."""
        return self._tallies.get(epoch, Tally())

    def forget(self, epoch: int) -> None:
        """Drop the tally of an epoch that was audited."""
        self._tallies.pop(epoch, None)

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "tallies": tallies_to_json(self._tallies),
            "served_hash": f"{self.sequence:016x}",
        }

    def restore(self, state: Mapping[str, Any], *, is_first_rank: bool) -> None:
        """Go on from a state of the whole run.

        One rank carries on what all of them counted, so the sum over ranks stays what it was.
        """
        tallies = tallies_from_json(state["tallies"])
        if not is_first_rank:
            tallies = {epoch: Tally(tally.first_place) for epoch, tally in tallies.items()}
        self._tallies = tallies
        self.sequence = int(state["served_hash"], 16) if is_first_rank else 0


def count_mix(packs: Iterable[ReadPack]) -> Counter[str]:
    """Count studies served by `dataset/<name>`, `contrast/<name>` and `set/<names>`."""
    counts: Counter[str] = Counter()
    for serving in (serving for pack in packs for serving in pack.served):
        counts[f"dataset/{serving.record.dataset}"] += 1
        counts[f"set/{'+'.join(sorted(serving.contrasts, key=contrast_id))}"] += 1
        counts.update(f"contrast/{name}" for name in serving.contrasts)
    return counts
