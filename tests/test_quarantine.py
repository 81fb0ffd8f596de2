"""Damaged studies: named by shard, study and member, counted once, capped, carried in the state."""

import json

import numpy as np
import pytest

from anycontrast_datasets.quarantine import MAX_LISTED, Damage, Quarantine, damage_from
from anycontrast_datasets.study import ShardError


def damage(index: int, member: str = "T1w") -> Damage:
    error = ShardError(
        f"shard train-00{index % 10}.tar, study phantom-{index:012d}-s{index}, member {member}: "
        "xxh3 must be 1, found 2; the shard was damaged after it was written; run `anycontrast "
        "shard` again"
    )
    study_id = f"phantom-{index:012d}-s{index}"
    return damage_from(error, index=index, study_id=study_id, step=3, epoch=0)


def test_a_damage_names_shard_study_and_member() -> None:
    found = damage(7, "FLAIR")
    assert (found.shard, found.member, found.index) == ("train-007.tar", "FLAIR", 7)
    assert "xxh3 must be 1" in found.reason


def test_an_error_without_a_place_is_kept_whole() -> None:
    found = damage_from(ShardError("gone" * 200), index=1, study_id="s", step=0, epoch=0)
    assert (found.shard, found.member) == ("", "")
    assert len(found.reason) == 300


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("shard train-001.tar, study s1: cannot be opened (gone)", ("train-001.tar", "")),
        ("study s1, array FLAIR/0: chunk 3 must have xxh3 1, found 2", ("", "FLAIR")),
    ],
)
def test_what_an_error_does_not_say_stays_empty(text: str, place: tuple[str, str]) -> None:
    found = damage_from(ShardError(text), index=1, study_id="s1", step=0, epoch=0)
    assert (found.shard, found.member) == place


def test_a_study_counts_once_however_many_of_its_members_are_damaged() -> None:
    quarantine = Quarantine(100, 0.01)
    assert len(quarantine.add([damage(1, "T1w"), damage(1, "FLAIR"), damage(1, "T1w")])) == 2
    assert quarantine.add([damage(1, "T1w")]) == ()
    assert len(quarantine) == 1
    quarantine.check()
    assert quarantine.find(1, ("DWI", "FLAIR")) is not None
    assert quarantine.find(1, ("DWI",)) is None
    assert quarantine.find(2, ("T1w",)) is None


def test_the_cap_stops_and_says_how_many_and_where() -> None:
    quarantine = Quarantine(199, 0.01)
    quarantine.add([damage(1)])
    quarantine.check()
    quarantine.add([damage(2)])
    message = r"2 of 199 studies.*max_corrupt_fraction=0.01.*shard train-002.tar, study phantom"
    with pytest.raises(ShardError, match=message):
        quarantine.check()


@pytest.mark.parametrize("num", [0, 1, MAX_LISTED + 5, 10_000])
def test_a_state_is_small_complete_and_restores(num: int) -> None:
    before = Quarantine(1_000_000, 0.01)
    numbers = np.random.default_rng(num).choice(900_000, size=num, replace=False)
    before.add(damage(int(number)) for number in numbers)
    text = json.dumps(before.state())
    assert len(text) < 48_000
    after = Quarantine(1_000_000, 0.01)
    after.restore(json.loads(text))
    assert len(after) == num
    assert after.damages == before.damages[:MAX_LISTED]
    after.check()
    after.add([damage(999_999)])
    if num == 10_000:
        with pytest.raises(ShardError, match="10001 of 1000000"):
            after.check()
