"""Streams of mixed weights, filled packs and several draws: exact, resumable, audited."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import torch

from anycontrast.models.masking import MaskingConfig, mask_batch
from anycontrast.models.patches import patch_codes
from anycontrast_datasets.audit import combine_states
from anycontrast_datasets.mixing import MixingConfig
from anycontrast_datasets.stream import StepPacks, StreamConfig, StudyStream

PATCH = (4, 4, 4)
MakeStore = Callable[..., Any]

MIXED = StreamConfig(
    studies_per_step=6,
    packs_per_step=4,
    drop_contrasts=True,
    mixing=MixingConfig(by_dataset={"b": 4.0}, by_contrast={"DWI": 2.5}),
)
TOKENS = StreamConfig(packs_per_step=4, pack_tokens=160, pool_studies=16, draws_per_study=2)
BOTH = replace(TOKENS, mixing=MIXED.mixing, drop_contrasts=True)


@pytest.fixture
def store(memory_store: MakeStore) -> Any:
    contrasts = (("T1w",), ("T1w", "FLAIR"), ("DWI", "ADC", "FLAIR"))
    return memory_store(41, contrasts=contrasts, datasets=("a", "a", "a", "b"))


def named(steps: Sequence[StepPacks]) -> list[tuple[Any, ...]]:
    """What was served, by step, pack and slot."""
    return [
        (step.step, number, study_id, epoch, draw, contrasts, grid)
        for step in steps
        for number, pack in enumerate(step.packs)
        for study_id, epoch, draw, contrasts, grid in zip(
            pack.study_ids, pack.epochs, pack.draws, pack.contrasts, pack.patch_grids, strict=True
        )
    ]


def serve(store: Any, config: StreamConfig, num_steps: int, **place: int) -> list[StepPacks]:
    with StudyStream(store, config, PATCH, seed=5, **place) as stream:
        return [next(stream) for _ in range(num_steps)]


class Run:
    """A run on some ranks that audits every epoch, stops, and goes on from its state."""

    def __init__(self, store: Any, config: StreamConfig) -> None:
        self.store, self.config = store, config
        self.state: dict[str, Any] = {}
        self.lines: list[str] = []

    def go(self, until_step: int, world_size: int = 1, **tuning: Any) -> None:
        """Serve up to a step on so many ranks, then keep nothing but the JSON state."""
        config = replace(self.config, **tuning)
        start = int(self.state.get("next_step", 0))
        streams = [
            StudyStream(
                self.store, config, PATCH, seed=5, rank=rank, world_size=world_size,
                start_step=start,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        for stream in streams if self.state else ():
            stream.restore(self.state)
        for _ in range(start, until_step):
            steps = [next(stream) for stream in streams]
            for epoch in steps[0].finished_epochs:
                total = reduce(add, (stream.tally(epoch) for stream in streams))
                self.lines += {stream.close_epoch(epoch, total).line() for stream in streams}
        states = [stream.state_dict(until_step) for stream in streams]
        self.state = json.loads(json.dumps(combine_states(states)))
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("config", [MIXED, TOKENS, BOTH])
def test_interruptions_ranks_and_threads_leave_no_trace(store: Any, config: StreamConfig) -> None:
    whole = Run(store, config)
    whole.go(26)
    parted = Run(store, config)
    for stop, world_size, threads in ((3, 2, 1), (4, 4, 3), (11, 1, 4), (12, 2, 2), (26, 4, 1)):
        parted.go(stop, world_size, num_threads=threads, prefetch_steps=threads - 1)
    assert parted.state == whole.state
    assert parted.lines == whole.lines
    assert len(whole.lines) >= 3
    assert all(" 0 quarantined" in line for line in whole.lines)
    assert not any("counted from" in line for line in whole.lines)


@pytest.mark.parametrize("config", [MIXED, BOTH])
def test_ranks_share_exactly_the_packs_of_a_single_rank(store: Any, config: StreamConfig) -> None:
    alone = named(serve(store, config, 6))
    shares = [named(serve(store, config, 6, rank=rank, world_size=2)) for rank in range(2)]
    moved = [
        (step, number + 2 * rank, *rest)
        for rank, share in enumerate(shares)
        for step, number, *rest in share
    ]
    assert sorted(map(repr, moved)) == sorted(map(repr, alone))


def test_weights_are_realised_within_one_place_and_logged(store: Any) -> None:
    config = replace(MIXED, studies_per_step=41, packs_per_step=1, drop_contrasts=False)
    (step,) = serve(store, config, 1)
    records = {record.study_id: record for record in store.records}
    weight = {
        name: (4.0 if r.dataset == "b" else 1.0) * (2.5 if "DWI" in r.contrasts else 1.0)
        for name, r in records.items()
    }
    share = {name: 41 * w / sum(weight.values()) for name, w in weight.items()}
    counts = Counter(step.packs[0].study_ids)
    assert all(np.floor(share[n]) <= counts[n] <= np.ceil(share[n]) for n in records)
    wanted = sum(share[name] for name, record in records.items() if record.dataset == "b")
    assert abs(step.mix["dataset/b"] - wanted) < 1
    assert step.mix["dataset/a"] + step.mix["dataset/b"] == 41
    assert step.mix["contrast/ADC"] == step.mix["set/FLAIR+DWI+ADC"]
    with StudyStream(store, config, PATCH, seed=5) as stream:
        next(stream)
        audit = stream.close_epoch(0, stream.tally(0))
    assert audit.mix["dataset/b"] == pytest.approx(step.mix["dataset/b"] / 41)
    assert f"b {audit.mix['dataset/b']:.1%}" in audit.line()


def test_weight_zero_leaves_out_and_shortens_the_epoch(store: Any) -> None:
    config = replace(MIXED, mixing=MixingConfig(by_dataset={"a": 0.0}))
    with StudyStream(store, config, PATCH, seed=5) as stream:
        assert (stream.num_studies, stream.steps_per_epoch) == (41, 10 / 6)
        step = next(stream)
    assert set(step.mix) & {"dataset/a"} == set()


def test_a_study_dealt_twice_an_epoch_gets_two_crops_and_two_masks(memory_store: MakeStore) -> None:
    store = memory_store(2, contrasts=(("T1w",),), datasets=("a", "b"))
    mixing = MixingConfig(by_dataset={"a": 3.0})
    config = StreamConfig(studies_per_step=2, crop_vox=(4, 8, 8), mixing=mixing)
    masks = set()
    for step in serve(store, config, 12):
        (pack,) = step.packs
        if pack.study_ids == ("s000", "s000"):
            assert sorted(pack.draws) == [0, 1]
            hidden = mask_batch(pack, MaskingConfig(), 5).hidden_T
            masks.add(torch.equal(hidden[: pack.lengths[0]], hidden[pack.lengths[0] :]))
    assert False in masks


def test_draws_read_a_study_once_and_mask_it_several_times(store: Any) -> None:
    once = serve(store, StreamConfig(studies_per_step=3, prefetch_steps=0, flip_axes=[0]), 5)
    num_reads = len(store.reads)
    config = StreamConfig(studies_per_step=3, prefetch_steps=0, flip_axes=[0], draws_per_study=3)
    thrice = serve(store, config, 5)
    assert len(store.reads) == 2 * num_reads == 30
    flips = set()
    for one, three in zip(once, thrice, strict=True):
        few, many = one.packs[0], three.packs[0]
        assert many.study_ids == tuple(name for name in few.study_ids for _ in range(3))
        assert many.draws == (0, 1, 2) * 3
        plain, drawn = (mask_batch(pack, MaskingConfig(), 5) for pack in (few, many))
        few_TP, many_TP = patch_codes(few), patch_codes(many)
        for study in range(3):
            a, b = few.offsets[study : study + 2]
            copies = [slice(*many.offsets[3 * study + n : 3 * study + n + 2]) for n in range(3)]
            # Draw 0 is what was served before there were several.
            assert torch.equal(few_TP[a:b], many_TP[copies[0]])
            assert torch.equal(plain.hidden_T[a:b], drawn.hidden_T[copies[0]])
            masks = [tuple(drawn.hidden_T[copy].tolist()) for copy in copies]
            assert len(set(masks)) > 1
            flips.add(torch.equal(many_TP[copies[0]], many_TP[copies[1]]))
    assert flips == {True, False}


def test_packs_are_filled_up_to_their_tokens(store: Any) -> None:
    config = replace(TOKENS, draws_per_study=1, pack_tokens=80, flip_axes=[])
    with StudyStream(store, config, PATCH, seed=5) as stream:
        steps = [next(stream) for _ in range(int(stream.steps_per_epoch))]
        assert steps[-1].finished_epochs == (0,)
    tokens = [pack.num_tokens for step in steps for pack in step.packs]
    assert max(tokens) <= 80
    assert all(len(step.packs) == 4 for step in steps)
    assert sum(tokens[:-4]) / (80 * len(tokens[:-4])) > 0.9
    served = sorted(name for step in steps for pack in step.packs for name in pack.study_ids)
    assert served == [record.study_id for record in store.records]


def test_left_over_studies_get_a_step_of_their_own(memory_store: MakeStore) -> None:
    # Every study fills a pack, and five packs make no whole number of steps.
    store = memory_store(5, contrasts=(("T1w",),))
    config = StreamConfig(packs_per_step=4, pack_tokens=15, crop_vox=(8, 8, 8))
    with StudyStream(store, config, PATCH, seed=5) as stream:
        assert stream.steps_per_epoch == 2
        steps = [next(stream) for _ in range(4)]
        audits = [stream.close_epoch(epoch, stream.tally(epoch)) for epoch in (0, 1)]
    assert [audit.served for audit in audits] == [5, 5]
    assert [len(step.packs) for step in steps] == [4] * 4
    extra = [draw for *_, draw, _, _ in named(steps) if isinstance(draw, int) and draw > 0]
    assert len(extra) == 6


def test_a_study_larger_than_a_pack_is_named(store: Any) -> None:
    stream = StudyStream(store, replace(TOKENS, pack_tokens=8), PATCH, seed=5)
    with pytest.raises(ValueError, match=r"study s\d\d\d has .*raise pack_tokens"):
        next(stream)


def test_weights_may_change_at_an_epoch_edge_only(store: Any) -> None:
    run = Run(store, TOKENS)
    with StudyStream(store, TOKENS, PATCH, seed=5) as stream:
        edge = int(stream.steps_per_epoch)
    run.go(edge)
    other = replace(TOKENS, mixing=MixingConfig(by_dataset={"a": 0.0}))
    stream = StudyStream(store, other, PATCH, seed=5, start_step=edge)
    stream.restore(run.state)
    with stream:
        assert next(stream).epoch == 1
    run.go(edge + 1)
    with pytest.raises(ValueError, match=r"mixing was .* is .*inside epoch 1"):
        StudyStream(store, other, PATCH, seed=5, start_step=edge + 1).restore(run.state)


def test_a_state_from_before_these_options_goes_on(store: Any) -> None:
    config = StreamConfig(studies_per_step=6, packs_per_step=2)
    new = {"cursor", "tallies", "served_hash", "quarantine", "stream.mixing"}
    new |= {"stream.pack_tokens", "stream.pool_studies", "stream.draws_per_study"}
    with StudyStream(store, config, PATCH, seed=5) as stream:
        state = {name: v for name, v in stream.state_dict(4).items() if name not in new}
    with StudyStream(store, config, PATCH, seed=5, start_step=4) as stream:
        stream.restore(state)
        steps = [next(stream) for _ in range(3)]
        assert named(steps) == named(serve(store, config, 7)[4:])
        assert "counted from place 24" in stream.close_epoch(0, stream.tally(0)).line()
    with pytest.raises(ValueError, match="draws_per_study was 1, is 2"):
        StudyStream(store, replace(config, draws_per_study=2), PATCH, seed=5).restore(state)


def test_a_state_stays_small(store: Any) -> None:
    with StudyStream(store, BOTH, PATCH, seed=5) as stream:
        for _ in range(9):
            next(stream)
        assert len(json.dumps(stream.state_dict(9))) < 4000


@pytest.fixture(autouse=True)
def _no_stray_threads() -> Iterator[None]:
    import threading

    before = threading.active_count()
    yield
    assert threading.active_count() == before
