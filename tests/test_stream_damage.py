"""Damaged studies in a stream: stopped at or left out, the same way on any ranks and threads."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import pytest

from anycontrast_datasets.audit import EpochAudit, combine_states
from anycontrast_datasets.quarantine import Damage
from anycontrast_datasets.stream import StepPacks, StreamConfig, StudyStream
from anycontrast_datasets.study import ShardError

PATCH = (4, 4, 4)
MakeStore = Callable[..., Any]
DAMAGED = {"s003": "T1w", "s008": "FLAIR", "s012": "FLAIR", "s017": "T1w"}
SKIP = StreamConfig(
    studies_per_step=4,
    packs_per_step=4,
    drop_contrasts=True,
    on_corrupt="skip",
    max_corrupt_fraction=0.25,
)
CONFIGS = [
    SKIP,
    replace(SKIP, studies_per_step=9, packs_per_step=2, draws_per_study=2),
    replace(SKIP, packs_per_step=2, pack_tokens=100, pool_studies=8),
]


@pytest.fixture
def store(memory_store: MakeStore) -> Any:
    return memory_store(20, contrasts=(("T1w", "FLAIR"), ("T1w",)), damaged=DAMAGED)


def packs_of(steps: Sequence[StepPacks]) -> list[tuple[object, ...]]:
    return [
        (step.step, pack.study_ids, pack.epochs, pack.draws, pack.contrasts)
        for step in steps
        for pack in step.packs
    ]


def serve(store: Any, config: StreamConfig, num_steps: int, **place: int) -> list[StepPacks]:
    with StudyStream(store, config, PATCH, seed=5, **place) as stream:
        return [next(stream) for _ in range(num_steps)]


def test_stopping_is_the_default_and_names_the_place(memory_store: MakeStore) -> None:
    store = memory_store(4, damaged={"s002": "T1w"})
    with StudyStream(store, StreamConfig(studies_per_step=1), PATCH, seed=5) as stream:
        for _ in range(2):
            with pytest.raises(ShardError, match=r"shard memory-0\.tar, study s002, member T1w"):
                for _ in range(4):
                    next(stream)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_damaged_study_is_left_out_named_once_and_audited(
    store: Any, config: StreamConfig
) -> None:
    audits: list[EpochAudit] = []
    damages: list[Damage] = []
    served = set()
    with StudyStream(store, config, PATCH, seed=5) as stream:
        while len(audits) < 6:
            step = next(stream)
            damages += step.damages
            for pack in step.packs:
                pairs = zip(pack.study_ids, pack.contrasts, strict=True)
                served |= {(name, member) for name, members in pairs for member in members}
            audits += [stream.close_epoch(e, stream.tally(e)) for e in step.finished_epochs]
        assert stream.num_quarantined == 4
    assert {(d.study_id, d.member) for d in damages} == set(DAMAGED.items())
    assert len(damages) == 4
    assert all(damage.shard == "memory-0.tar" for damage in damages)
    assert not served & set(DAMAGED.items())
    assert all(audit.served + audit.quarantined == 20 for audit in audits)
    # The other contrast of a study with a damaged one is still of use.
    assert ("s008", "T1w") in served
    # Whether a damaged member is asked for changes from epoch to epoch.
    assert len({audit.quarantined for audit in audits}) > 1


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_left_out_depends_on_neither_ranks_nor_threads_nor_memory(
    store: Any, config: StreamConfig
) -> None:
    alone = packs_of(serve(store, config, 12))
    assert alone == packs_of(serve(store, replace(config, num_threads=4, prefetch_steps=5), 12))
    shares = [packs_of(serve(store, config, 12, rank=rank, world_size=2)) for rank in range(2)]
    num = config.packs_per_step // 2
    joined = [
        pack
        for step in range(12)
        for share in shares
        for pack in share[step * num : (step + 1) * num]
    ]
    assert joined == alone
    # A later start has to find out again what is damaged.
    assert packs_of(serve(store, config, 7, start_step=5)) == alone[5 * config.packs_per_step :]


def test_an_empty_pack_gets_a_substitute_that_does_not_count(store: Any) -> None:
    steps = serve(store, SKIP, 10)
    counted = {(n, e) for s in steps for p in s.packs for n, e, d in named(p) if d == 0}
    extra = [(s.step, n) for s in steps for p in s.packs for n, _, d in named(p) if d > 0]
    assert all(len(step.packs) == 4 for step in steps)
    assert len(extra) == 40 - len(counted) >= 3
    for step, name in extra:
        of_step = {n for pack in steps[step].packs for n, _, d in named(pack) if d == 0}
        assert name in of_step, "a healthy study of the same step stands in"
    assert sum(step.mix["dataset/a"] for step in steps) == len(counted)


def named(pack: Any) -> list[tuple[str, int, int]]:
    return list(zip(pack.study_ids, pack.epochs, pack.draws, strict=True))


def test_a_step_of_damaged_studies_only_is_filled_from_the_split(memory_store: MakeStore) -> None:
    store = memory_store(4, contrasts=(("T1w",),), damaged={"s000": "T1w", "s001": "T1w"})
    config = replace(
        SKIP, studies_per_step=1, packs_per_step=1, drop_contrasts=False, max_corrupt_fraction=0.5
    )
    steps = serve(store, config, 4)
    assert {pack.study_ids for step in steps for pack in step.packs} == {("s002",), ("s003",)}
    assert sum(step.packs[0].draws[0] > 0 for step in steps) == 2


def test_nothing_readable_at_all_is_an_error_that_says_so(memory_store: MakeStore) -> None:
    store = memory_store(3, contrasts=(("T1w",),), damaged={f"s00{n}": "T1w" for n in range(3)})
    config = replace(SKIP, packs_per_step=1, max_corrupt_fraction=1.0)
    with (
        StudyStream(store, config, PATCH, seed=5) as stream,
        pytest.raises(ShardError, match="no study of step 0 can be read, nor any of 100 others"),
    ):
        next(stream)


def test_the_cap_ends_the_stream_after_the_step_that_reached_it(store: Any) -> None:
    config = replace(SKIP, max_corrupt_fraction=0.1)
    with StudyStream(store, config, PATCH, seed=5) as stream:
        damages: list[Damage] = []
        with pytest.raises(ShardError, match=r"[34] of 20 studies.*max_corrupt_fraction=0.1"):
            while len(damages) < 20:
                damages += next(stream).damages
        assert len(damages) >= 3
        with pytest.raises(ShardError, match=r"[34] of 20 studies"):
            next(stream)


def test_ranks_that_exchange_their_damages_reach_the_cap_together(store: Any) -> None:
    config = replace(SKIP, max_corrupt_fraction=0.1)
    streams = [
        StudyStream(store, config, PATCH, seed=5, rank=rank, world_size=2) for rank in range(2)
    ]
    outcomes: list[str] = []
    while not outcomes:
        damages = [d for stream in streams for d in next(stream).damages]
        for stream in streams:
            try:
                stream.add_damages(damages)
            except ShardError as error:
                outcomes.append(str(error))
    assert len(outcomes) == 2
    for stream in streams:
        stream.close()


def test_a_state_carries_the_quarantine_to_other_ranks(store: Any) -> None:
    config = replace(SKIP, drop_contrasts=False)
    with StudyStream(store, config, PATCH, seed=5) as stream:
        for _ in range(7):
            next(stream)
        state = json.loads(json.dumps(stream.state_dict(7)))
    assert state["quarantine"]["num"] == 4
    store.reads.clear()
    ranks = [
        StudyStream(store, config, PATCH, seed=5, rank=rank, world_size=2, start_step=7)
        for rank in range(2)
    ]
    audits: list[Any] = []
    for stream in ranks:
        stream.restore(state)
    while len(audits) < 2:
        steps = [next(stream) for stream in ranks]
        assert all(not step.damages for step in steps)
        for epoch in steps[0].finished_epochs:
            total = reduce(add, (stream.tally(epoch) for stream in ranks))
            audits.append(ranks[0].close_epoch(epoch, total))
            ranks[1].close_epoch(epoch, total)
    assert [(audit.served, audit.quarantined) for audit in audits] == [(16, 4), (16, 4)]
    # What is known to be damaged is not read again.
    assert not set(store.reads) & set(DAMAGED)
    combined = combine_states([stream.state_dict(steps[0].step + 1) for stream in ranks])
    assert combined["quarantine"] == state["quarantine"]
    for stream in ranks:
        stream.close()


def test_a_run_that_stopped_at_damage_may_go_on_by_skipping(store: Any) -> None:
    stopped = replace(SKIP, on_corrupt="stop", max_corrupt_fraction=0.01)
    with StudyStream(store, stopped, PATCH, seed=5) as stream:
        state = json.loads(json.dumps(stream.state_dict(0)))
    with StudyStream(store, SKIP, PATCH, seed=5) as stream:
        stream.restore(state)
        assert next(stream).step == 0
