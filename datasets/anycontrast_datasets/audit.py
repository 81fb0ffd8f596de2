"""Was everything served exactly once? Counted from the packs, compared with the order.

In: what a stream handed out, study by study. Out: an `EpochAudit` per epoch. Every serving is
hashed to 64 bits, and hashes are added up modulo 2^64: sums of several ranks, and of a run before
and after an interruption, add up to the sum of the whole, so a state carries a few numbers and not
a list of studies. A lost serving, a doubled one, or two that cancel out in number show in the sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from anycontrast_datasets.study import StudyError

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class AuditError(StudyError):
    """Studies were lost or served twice: a defect of this program, never of the data."""

    code = "audit_failed"


@dataclass(frozen=True)
class Tally:
    """What was served, or was to be and could not be read. Tallies of ranks add up."""

    first_place: int = 0
    """Where counting began in the epoch: 0, or the place a stream without a state was opened at."""
    served: int = 0
    served_hash: int = 0
    quarantined: int = 0
    quarantined_hash: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            first_place=max(self.first_place, other.first_place),
            served=self.served + other.served,
            served_hash=(self.served_hash + other.served_hash) & _MASK,
            quarantined=self.quarantined + other.quarantined,
            quarantined_hash=(self.quarantined_hash + other.quarantined_hash) & _MASK,
        )


@dataclass(frozen=True, kw_only=True)
class EpochAudit:
    """The books of one epoch over all ranks."""

    epoch: int
    manifest: int
    """Studies of the split with a wanted contrast."""
    drawn: int
    """Of these, the studies that have a place in the epoch; all of them with equal weights."""
    places: int
    """Servings the epoch consists of, from `first_place` on."""
    first_place: int
    """0, or where the counting began because the stream was opened inside the epoch."""
    served: int
    quarantined: int
    """Servings left out because the study cannot be read."""
    served_hash: str
    """Of the servings as a multiset: equal if and only if the same studies were served."""
    mix: dict[str, float] = field(default_factory=dict)
    """Share of the places by dataset, contrast and contrast set, see `mixing.mix_shares`."""

    def line(self) -> str:
        """Return the audit in one line."""
        of_split = f"{self.manifest} studies"
        if (self.drawn, self.places) != (self.manifest, self.manifest):
            of_split = f"{self.places} places for {self.drawn} of {self.manifest} studies"
        datasets = [name for name in self.mix if name.startswith("dataset/")]
        shares = ", ".join(f"{n.partition('/')[2]} {self.mix[n]:.1%}" for n in datasets[:20])
        since = f", counted from place {self.first_place}" if self.first_place else ""
        return (
            f"epoch {self.epoch}: {of_split} = {self.served} served + {self.quarantined} "
            f"quarantined{since}; hash {self.served_hash}" + (f"; {shares}" if shares else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def serving_hash(id_hash: int, epoch: int, repeat: int) -> int:
    """Return 64 bits that stand for one serving of a study."""
    return int(place_hashes(np.array([id_hash], np.uint64), epoch, np.array([repeat]))[0])


def place_hashes(
    id_hash_N: npt.NDArray[np.uint64], epoch: int, repeat_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Return `serving_hash` of many servings of one epoch."""
    salt = np.uint64((epoch + 1) * _GOLDEN & _MASK)
    return _mix(_mix(id_hash_N ^ salt) + repeat_N.astype(np.uint64) * np.uint64(_GOLDEN))


def sequence_hash(serving: int, step: int, pack: int, slot: int) -> int:
    """Return 64 bits that stand for a serving at its place in the run; the sum names the order."""
    place = np.array([(step << 32) ^ (pack << 16) ^ slot], dtype=np.uint64)
    return int(_mix(_mix(place) ^ np.uint64(serving))[0])


def close_epoch(
    epoch: int,
    tally: Tally,
    *,
    id_hash_N: npt.NDArray[np.uint64],
    study_P: npt.NDArray[np.int64],
    repeat_P: npt.NDArray[np.int64],
) -> EpochAudit:
    """Compare what all ranks served of an epoch with what its order says.

    Args:
        epoch: The epoch.
        tally: Sum of all ranks' tallies.
        id_hash_N: Hash of every study's id.
        study_P: The studies of the places from `tally.first_place` on, in any order.
        repeat_P: See `EpochOrder.repeat_N`.

    Raises:
        AuditError: If they differ.
    """
    expected = int(place_hashes(id_hash_N[study_P], epoch, repeat_P).sum(dtype=np.uint64))
    found = (tally.served_hash + tally.quarantined_hash) & _MASK
    audit = EpochAudit(
        epoch=epoch,
        manifest=len(id_hash_N),
        drawn=len(np.unique(study_P)),
        places=len(study_P),
        first_place=tally.first_place,
        served=tally.served,
        quarantined=tally.quarantined,
        served_hash=f"{tally.served_hash:016x}",
    )
    if tally.served + tally.quarantined != len(study_P) or found != expected:
        raise AuditError(
            f"audit: every place of an epoch is served once or quarantined, found {audit.line()}, "
            f"where the order has hash {expected:016x} and served and quarantined together have "
            f"{found:016x}; this is a defect, please report it with the data state of the "
            "checkpoint"
        )
    return audit


def tallies_to_json(tallies: Mapping[int, Tally]) -> dict[str, Any]:
    """Return tallies as JSON values; JSON has no 64-bit integers, so hashes are text."""
    return {
        str(epoch): [
            t.first_place, t.served, f"{t.served_hash:016x}", t.quarantined,
            f"{t.quarantined_hash:016x}",
        ]
        for epoch, t in tallies.items()
    }  # fmt: skip


def tallies_from_json(state: Mapping[str, Any]) -> dict[int, Tally]:
    """Return what `tallies_to_json` was given."""
    return {
        int(epoch): Tally(first, served, int(a, 16), quarantined, int(b, 16))
        for epoch, (first, served, a, quarantined, b) in state.items()
    }


def combine_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make the states of all ranks, asked for at the same step, that of the run.

    Ranks agree on everything but what they counted themselves; that is added up. Nothing else is
    touched, so a stream that counts nothing has the state of its first rank.
    """
    combined = dict(states[0])
    if "tallies" not in combined:
        return combined
    totals: dict[int, Tally] = {}
    for state in states:
        for epoch, tally in tallies_from_json(state["tallies"]).items():
            totals[epoch] = totals.get(epoch, Tally(tally.first_place)) + tally
    combined["tallies"] = tallies_to_json(totals)
    hashes = sum(int(state["served_hash"], 16) for state in states)
    combined["served_hash"] = f"{hashes & _MASK:016x}"
    return combined


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit integers (finaliser of splitmix64: Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
