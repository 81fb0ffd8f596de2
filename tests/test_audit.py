"""The audit: exact books add up over ranks and interruptions, and every kind of loss shows."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from anycontrast_datasets.audit import (
    AuditError,
    EpochAudit,
    Tally,
    close_epoch,
    combine_states,
    place_hashes,
    sequence_hash,
    serving_hash,
    tallies_from_json,
    tallies_to_json,
)
from anycontrast_datasets.selection import id_hash

IDS = np.array([id_hash(f"s{n}") for n in range(6)], dtype=np.uint64)
PLACES = np.array([3, 0, 5, 1, 2, 4])


def tally_of(studies: Sequence[int], epoch: int = 2, quarantined: Sequence[int] = ()) -> Tally:
    total = Tally()
    for study in studies:
        value = serving_hash(int(IDS[study]), epoch, 0)
        total += Tally(served=1, served_hash=value)
    for study in quarantined:
        value = serving_hash(int(IDS[study]), epoch, 0)
        total += Tally(quarantined=1, quarantined_hash=value)
    return total


def close(tally: Tally, epoch: int = 2) -> EpochAudit:
    study_P = PLACES[tally.first_place :]
    repeat_P = np.zeros(len(study_P), np.int64)
    return close_epoch(epoch, tally, id_hash_N=IDS, study_P=study_P, repeat_P=repeat_P)


def test_an_epoch_served_by_two_ranks_in_any_order_closes() -> None:
    audit = close(tally_of([5, 0, 1]) + tally_of([4, 2], quarantined=[3]))
    assert (audit.manifest, audit.served, audit.quarantined) == (6, 5, 1)
    assert audit.line().startswith("epoch 2: 6 studies = 5 served + 1 quarantined; hash ")
    assert json.loads(json.dumps(audit.to_json()))["served_hash"] == audit.served_hash
    assert close(tally_of(range(6))).served_hash == close(tally_of(range(5, -1, -1))).served_hash


@pytest.mark.parametrize(
    ("studies", "epoch"),
    [
        ((0, 1, 2, 3, 4), 2),
        ((0, 1, 2, 3, 4, 5, 5), 2),
        ((0, 1, 2, 3, 4, 4), 2),
        ((0, 1, 2, 3, 4, 5), 1),
    ],
)
def test_a_lost_a_doubled_an_exchanged_and_a_misdated_study_are_found(
    studies: Sequence[int], epoch: int
) -> None:
    with pytest.raises(AuditError, match=r"served once or quarantined.*this is a defect"):
        close(tally_of(studies, epoch))


def test_an_epoch_entered_in_its_middle_is_counted_from_there() -> None:
    audit = close(replace(tally_of(PLACES[2:].tolist()), first_place=2))
    assert (audit.places, audit.drawn, audit.first_place) == (4, 4, 2)
    assert "4 places for 4 of 6 studies" in audit.line()
    assert "counted from place 2" in audit.line()


def test_a_repeat_is_not_the_first_serving() -> None:
    repeat_P = np.array([0, 1])
    study_P = np.array([4, 4])
    tally = tally_of([4, 4])
    with pytest.raises(AuditError):
        close_epoch(2, tally, id_hash_N=IDS, study_P=study_P, repeat_P=repeat_P)
    hashes = place_hashes(IDS[study_P], 2, repeat_P)
    tally = Tally(served=2, served_hash=int(hashes.sum(dtype=np.uint64)))
    assert close_epoch(2, tally, id_hash_N=IDS, study_P=study_P, repeat_P=repeat_P).drawn == 1


def test_hashes_are_the_ones_that_older_states_hold() -> None:
    assert serving_hash(id_hash("s0"), 3, 1) == 12403290394687275862
    assert sequence_hash(5, 7, 1, 2) == 7075986634039835388


def test_a_sequence_hash_knows_its_place() -> None:
    places = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
    values = {sequence_hash(9, *place) for place in places} | {sequence_hash(8, 1, 0, 0)}
    assert len(values) == 5


def test_tallies_survive_json() -> None:
    tallies = {3: tally_of([1, 2], 3), 4: replace(tally_of([], 4, [5]), first_place=7)}
    assert tallies_from_json(json.loads(json.dumps(tallies_to_json(tallies)))) == tallies


def test_states_of_ranks_add_up_and_other_streams_states_pass() -> None:
    ranks = [
        {"next_step": 9, "tallies": tallies_to_json({2: one}), "served_hash": f"{value:016x}"}
        for one, value in ((tally_of([0, 1]), 2**63), (tally_of([2, 3]), 2**63 + 5))
    ]
    combined = combine_states(ranks)
    assert tallies_from_json(combined["tallies"]) == {2: tally_of([0, 1, 2, 3])}
    assert int(combined["served_hash"], 16) == 5
    assert combined["next_step"] == 9
    assert combine_states([{"name": "rows"}, {"name": "rows"}]) == {"name": "rows"}
