"""The studies that a run could not read: named, counted against a cap, carried along.

In: the `ShardError` of a study that was to be served. Out: one `Damage` per study and member, the
same list on every rank once they have exchanged theirs, and an error when there are too many. What
is served never depends on this list: a study is left out because its bytes are damaged, and
remembering them only saves reading them again.
"""

import base64
import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anycontrast_datasets.study import ShardError

logger = logging.getLogger(__name__)

MAX_LISTED = 64
"""Damages written out in a state; the numbers of all damaged studies are there in any case."""
_MAX_REASON = 300

# How stores name a place: "shard s, study t, member m: what is wrong", or a part of that; the zarr
# store has arrays, "study t, array m/0".
_PLACE = re.compile(
    r"(shard (?P<shard>[^,:]+), )?study [^,:]+(, (member|array) (?P<member>[^,:/]+))?"
)


@dataclass(frozen=True)
class Damage:
    """One study that could not be read."""

    index: int
    """In the store."""
    study_id: str
    shard: str
    """Empty where the error does not say."""
    member: str
    """Contrast, `label` or another stored part; empty where the error does not say."""
    reason: str
    step: int
    """First global step that was to serve it."""
    epoch: int


def damage_from(error: ShardError, *, index: int, study_id: str, step: int, epoch: int) -> Damage:
    """Make the record of a study that a store refused to read."""
    text = str(error)
    place = _PLACE.search(text)
    return Damage(
        index=index,
        study_id=study_id,
        shard=(place["shard"] or "") if place else "",
        member=(place["member"] or "") if place else "",
        reason=text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 3] + "...",
        step=step,
        epoch=epoch,
    )


class Quarantine:
    """What is known to be damaged. Read from many threads, changed by the consumer's alone.

    Args:
        num_studies: Studies the stream serves.
        max_fraction: Share of them that may be damaged before the run stops, 0 .. 1.
    """

    def __init__(self, num_studies: int, max_fraction: float) -> None:
        self._num_studies = num_studies
        self._max_fraction = max_fraction
        self._known: dict[tuple[int, str], Damage] = {}
        self._studies: set[int] = set()

    def __len__(self) -> int:
        return len(self._studies)

    @property
    def damages(self) -> tuple[Damage, ...]:
        """One per study and member, in the order they became known."""
        return tuple(self._known.values())

    def add(self, damages: Iterable[Damage]) -> tuple[Damage, ...]:
        """Take over damages; return those of a study or member that was not known."""
        new = []
        for damage in damages:
            key = (damage.index, damage.member)
            if key not in self._known:
                self._known[key] = damage
                self._studies.add(damage.index)
                new.append(damage)
        return tuple(new)

    def find(self, index: int, members: Sequence[str]) -> Damage | None:
        """Return what is known to be damaged among the named members of a study."""
        for member in members:
            if (index, member) in self._known:
                return self._known[index, member]
        return None

    def check(self) -> None:
        """Stop a run that has too many.

        Raises:
            ShardError: If the share of damaged studies is above the cap.
        """
        if len(self) <= self._max_fraction * self._num_studies:
            return
        places = "; ".join(
            f"shard {d.shard or '?'}, study {d.study_id}, member {d.member or '?'}"
            for d in self.damages[-5:]
        )
        raise ShardError(
            f"stream: {len(self)} of {self._num_studies} studies cannot be read, more than "
            f"stream.max_corrupt_fraction={self._max_fraction} allows; last: {places}; "
            "run `anycontrast shard` again, or raise the fraction to train without them"
        )

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON values of bounded size."""
        listed = [asdict(damage) for damage in self.damages[:MAX_LISTED]]
        return {"num": len(self), "studies": _encode(self._studies), "damages": listed}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self._studies |= _decode(state["studies"])
        self.add(Damage(**values) for values in state["damages"])


def _encode(numbers: set[int]) -> str:
    """Pack numbers as compressed gaps: about two characters each where one in a hundred is set."""
    gaps = np.diff(np.array(sorted(numbers), dtype="<i4"), prepend=np.int32(0))
    return base64.b85encode(zlib.compress(gaps.astype("<i4").tobytes(), 9)).decode()


def _decode(text: str) -> set[int]:
    gaps = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i4")
    return {int(number) for number in np.cumsum(gaps)}
