"""Tokens against a plain loop, positions against geometry, the spread over packs against LPT."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anycontrast.models.patches import patch_codes
from anycontrast_datasets.augment import StudyView
from anycontrast_datasets.contrast import ContrastDescriptor, contrast_id
from anycontrast_datasets.intensity import pack_occupancy
from anycontrast_datasets.pack import assign_packs, estimate_tokens, pack_studies, study_cost
from anycontrast_datasets.study import StudyArrays, StudyError, StudyRecord, VolumeRecord

Shape = tuple[int, int, int]
Codes = dict[str, npt.NDArray[np.int16]]

IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def make_volume(contrast: str, occupancy: str = "") -> VolumeRecord:
    return VolumeRecord(
        contrast=contrast,
        scale=2.0,
        offset=10.0,
        p0_5=12.0,
        p99_5=800.0,
        mean=300.0,
        std=50.0 + len(contrast),
        num_foreground=1,
        occupancy=occupancy,
        source_spacing_mm=(1.0, 1.0, 1.0),
        descriptor=ContrastDescriptor(te_s=0.09 + 0.01 * len(contrast)),
    )


def make_study(
    study_id: str,
    codes: Codes,
    *,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    shape: Shape | None = None,
    label: npt.NDArray[np.uint8] | None = None,
) -> StudyArrays:
    x, y, z = shape or next(iter(codes.values())).shape
    can_have_bitmap = not (x % 8 or y % 8 or z % 8 or shape)
    record = StudyRecord(
        study_id=study_id,
        dataset="d",
        subject_id="p",
        session_id="1",
        split="train",
        shape=(x, y, z),
        spacing_mm=spacing_mm,
        affine=IDENTITY,
        volumes=tuple(
            make_volume(name, pack_occupancy(c) if can_have_bitmap else "")
            for name, c in codes.items()
        ),
        has_label=label is not None,
    )
    return StudyArrays(record, codes, label)


def random_codes(shape: Shape, *names: str, empty: float = 0.5, seed: int = 0) -> Codes:
    """Codes of which about `empty` of the 2 x 3 x 4 blocks are background."""
    rng = np.random.default_rng(seed)
    codes = {}
    for name in names:
        blocks = rng.random([-(-n // p) for n, p in zip(shape, (2, 3, 4), strict=True)]) >= empty
        mask = blocks.repeat(2, 0).repeat(3, 1).repeat(4, 2)[: shape[0], : shape[1], : shape[2]]
        codes[name] = (rng.integers(1, 4096, shape) * mask).astype(np.int16)
    return codes


def patches_by_loop(codes: npt.NDArray[np.int16], patch: Shape) -> dict[Shape, list[int]]:
    """Every patch of a volume, padded with 0, by the plainest loop there is."""
    grid = [-(-n // p) for n, p in zip(codes.shape, patch, strict=True)]
    found = {}
    for a, b, c in itertools.product(*(range(g) for g in grid)):
        values = []
        for i, j, k in itertools.product(*(range(p) for p in patch)):
            at = (a * patch[0] + i, b * patch[1] + j, c * patch[2] + k)
            inside = all(v < n for v, n in zip(at, codes.shape, strict=True))
            values.append(int(codes[at]) if inside else 0)
        found[(a, b, c)] = values
    return found


@pytest.mark.parametrize("patch", [(2, 3, 4), (4, 4, 4), (3, 5, 1), (16, 16, 16)])
@pytest.mark.parametrize("drop_empty", [True, False])
def test_tokens_are_those_of_a_plain_loop_over_patches(patch: Shape, drop_empty: bool) -> None:
    studies = [
        make_study("a", random_codes((7, 9, 10), "T1w", "FLAIR", seed=1)),
        make_study("b", random_codes((20, 6, 17), "DWI", seed=2)),
    ]
    batch = pack_studies(studies, patch, epochs=[0, 4], drop_empty=drop_empty)
    codes_TP = patch_codes(batch)
    token = 0
    volume = 0
    for s, study in enumerate(studies):
        for name in study.record.contrasts:
            for index, values in patches_by_loop(study.codes[name], patch).items():
                keeps_all = len(patches_by_loop(study.codes[name], patch)) <= 2
                if drop_empty and not any(values) and not keeps_all:
                    continue
                assert codes_TP[token].tolist() == values
                assert tuple(batch.grid_T3[token].tolist()) == index
                assert int(batch.volume_T[token]) == volume
                token += 1
            assert int(batch.study_V[volume]) == s
            assert int(batch.contrast_V[volume]) == contrast_id(name)
            volume += 1
    assert (batch.num_tokens, batch.num_volumes) == (token, volume)


def test_tables_and_offsets_describe_the_tokens() -> None:
    a = make_study("a", random_codes((6, 6, 8), "T1w", "FLAIR"), spacing_mm=(1.0, 2.0, 3.0))
    b = make_study("b", random_codes((4, 9, 8), "DWI", seed=3))
    batch = pack_studies([a, b], (2, 3, 4), epochs=[2, 3])
    assert batch.study_ids == ("a", "b")
    assert batch.epochs == (2, 3)
    assert batch.contrasts == (("T1w", "FLAIR"), ("DWI",))
    assert batch.patch_grids == ((3, 2, 2), (2, 3, 2))
    assert batch.spacing_mm == ((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    assert batch.cu_seqlens.dtype == torch.int32
    assert tuple(batch.cu_seqlens.tolist()) == batch.offsets
    counts = torch.bincount(batch.volume_T, minlength=3).tolist()
    assert tuple(counts) == batch.volume_lengths
    assert batch.lengths == (counts[0] + counts[1], counts[2])
    records = [*a.record.volumes, *b.record.volumes]
    expected = torch.tensor([r.intensity_map for r in records], dtype=torch.float32)
    assert torch.equal(batch.intensity_V4, expected)
    for row, record in zip(batch.descriptor_VK, records, strict=True):
        assert np.array_equal(row.numpy(), record.descriptor.vector())
    assert batch.labels == ()


def test_positions_are_patch_centres_in_mm_from_the_centre_of_the_stored_box() -> None:
    spacing = (0.5, 1.0, 6.0)
    study = make_study("a", random_codes((7, 9, 5), "T1w"), spacing_mm=spacing)
    batch = pack_studies([study], (2, 3, 4), epochs=[0], drop_empty=False)
    first = [(0 + 1 - 3.5) * 0.5, (0 + 1.5 - 4.5) * 1.0, (0 + 2 - 2.5) * 6.0]
    last = [(6 + 1 - 3.5) * 0.5, (6 + 1.5 - 4.5) * 1.0, (4 + 2 - 2.5) * 6.0]
    assert batch.position_mm_T3.dtype == torch.float32
    assert batch.position_mm_T3[0].tolist() == first
    assert batch.position_mm_T3[-1].tolist() == last


def test_positions_of_a_whole_multiple_are_symmetric_about_zero() -> None:
    study = make_study("a", random_codes((8, 12, 16), "T1w"), spacing_mm=(1.0, 0.7, 3.0))
    batch = pack_studies([study], (2, 3, 4), epochs=[0], drop_empty=False)
    assert torch.allclose(batch.position_mm_T3.mean(0), torch.zeros(3), atol=1e-5)


def test_a_crop_keeps_the_positions_it_has_in_the_whole_study() -> None:
    codes = random_codes((8, 12, 16), "T1w", empty=0.0)
    whole = make_study("a", codes, spacing_mm=(1.0, 0.7, 3.0))
    part = StudyArrays(whole.record, {"T1w": codes["T1w"][4:8, 3:12, 8:16]})
    cut = pack_studies([StudyView(part, (4, 3, 8))], (2, 3, 4), epochs=[0])
    full = pack_studies([whole], (2, 3, 4), epochs=[0])
    whole_TP = patch_codes(full)
    places = {tuple(p.tolist()): c for p, c in zip(full.position_mm_T3, whole_TP, strict=True)}
    assert cut.num_tokens == 2 * 3 * 2
    for position, patch in zip(cut.position_mm_T3, patch_codes(cut), strict=True):
        assert torch.equal(places[tuple(position.tolist())], patch)


def test_packing_does_not_care_how_the_codes_lie_in_memory() -> None:
    codes = random_codes((8, 12, 16), "T1w")["T1w"]
    shape = codes.shape
    strided = np.zeros((9, 14, 20), dtype=np.int16)[1:, 2:, 4:]
    strided[...] = codes
    frozen = codes.copy()
    frozen.flags.writeable = False
    variants = [codes, codes[::-1].copy()[::-1], np.asfortranarray(codes), strided, frozen]
    packed = [
        patch_codes(pack_studies([make_study("a", {"T1w": v})], (2, 3, 4), epochs=[0]))
        for v in variants
    ]
    assert all(
        v.shape == shape and torch.equal(packed[0], p)
        for v, p in zip(variants, packed, strict=True)
    )


def test_packed_tokens_are_copies_of_the_study() -> None:
    codes = random_codes((8, 12, 16), "T1w", empty=0.0)
    label = np.ones((8, 12, 16), dtype=np.uint8)
    study = make_study("a", codes, label=label)
    batch = pack_studies([study], (8, 12, 16), epochs=[0], drop_empty=False, labels=True)
    batch.codes_B.zero_()
    assert batch.labels[0] is not None
    batch.labels[0].zero_()
    assert codes["T1w"].all()
    assert label.all()


def test_nearly_empty_volumes_keep_their_two_fullest_patches() -> None:
    one = np.zeros((4, 4, 6), dtype=np.int16)
    one[3, 3, 5] = 7
    nothing = np.zeros_like(one)
    batch = pack_studies([make_study("a", {"T1w": one, "FLAIR": nothing})], (2, 2, 2), epochs=[0])
    assert batch.volume_lengths == (2, 2)
    assert batch.grid_T3[:2].tolist() == [[0, 0, 0], [1, 1, 2]]
    assert patch_codes(batch).sum() == 7


def test_a_volume_of_a_single_patch_keeps_that_patch() -> None:
    study = make_study("a", random_codes((4, 4, 4), "T1w", empty=0.0))
    assert pack_studies([study], (8, 8, 8), epochs=[0]).volume_lengths == (1,)


def test_labels_lie_on_the_padded_grid_and_are_none_where_absent() -> None:
    label = np.arange(7 * 9 * 5, dtype=np.uint8).reshape(7, 9, 5)
    studies = [
        make_study("a", random_codes((7, 9, 5), "T1w"), label=label),
        make_study("b", random_codes((7, 9, 5), "T1w")),
    ]
    batch = pack_studies(studies, (4, 4, 4), epochs=[0, 0], drop_empty=False, labels=True)
    assert batch.labels[1] is None
    padded = batch.labels[0]
    assert padded is not None
    assert (padded.shape, padded.dtype) == ((8, 12, 8), torch.uint8)
    assert np.array_equal(padded[:7, :9, :5].numpy(), label)
    assert int(padded.sum()) == int(label.astype(int).sum())


def test_only_the_contrasts_that_were_read_are_packed() -> None:
    codes = random_codes((6, 6, 8), "T1w", "FLAIR", "DWI")
    study = make_study("a", codes)
    part = StudyArrays(study.record, {"DWI": codes["DWI"], "T1w": codes["T1w"]})
    assert pack_studies([part], (2, 3, 4), epochs=[0]).contrasts == (("T1w", "DWI"),)


def test_arrays_that_contradict_their_record_are_refused() -> None:
    codes = random_codes((6, 6, 8), "T1w", "FLAIR")
    study = make_study("s1", codes)
    cropped = StudyArrays(study.record, {n: c[:4] for n, c in codes.items()})
    with pytest.raises(StudyError, match=r"s1: arrays are \(4, 6, 8\).*StudyView"):
        pack_studies([cropped], (2, 2, 2), epochs=[0])
    uneven = StudyArrays(study.record, {"T1w": codes["T1w"], "FLAIR": codes["FLAIR"][:4]})
    with pytest.raises(StudyError, match="s1: all arrays share one grid"):
        pack_studies([uneven], (2, 2, 2), epochs=[0])
    with pytest.raises(StudyError, match="s1: packing needs volumes"):
        pack_studies([StudyArrays(study.record, {})], (2, 2, 2), epochs=[0])
    with pytest.raises(StudyError, match=r"s1: packing needs.*found \['DWI'\]"):
        pack_studies([StudyArrays(study.record, {"DWI": codes["T1w"]})], (2, 2, 2), epochs=[0])


def test_impossible_packing_arguments_are_refused() -> None:
    study = make_study("a", random_codes((6, 6, 8), "T1w"))
    with pytest.raises(ValueError, match="at least one study"):
        pack_studies([], (2, 2, 2), epochs=[])
    with pytest.raises(ValueError, match="got 2 for 1 studies"):
        pack_studies([study], (2, 2, 2), epochs=[0, 1])
    with pytest.raises(ValueError, match="patch_vox"):
        pack_studies([study], (2, 0, 2), epochs=[0])


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (16, 8, 24)])
def test_token_estimate_is_exact_for_whole_studies_and_aligned_patches(patch: Shape) -> None:
    blocks = np.random.default_rng(5).random((2, 5, 3, 6)) < 0.2
    codes = {
        name: blocks[n].repeat(8, 0).repeat(8, 1).repeat(8, 2).astype(np.int16)
        for n, name in enumerate(("T1w", "FLAIR"))
    }
    study = make_study("a", codes)
    for names in (("T1w", "FLAIR"), ("FLAIR",)):
        part = StudyArrays(study.record, {n: codes[n] for n in names})
        for drop_empty in (True, False):
            batch = pack_studies([part], patch, epochs=[0], drop_empty=drop_empty)
            estimate = estimate_tokens(study.record, names, patch, drop_empty=drop_empty)
            assert estimate == pytest.approx(batch.num_tokens)


def test_token_estimate_of_a_crop_scales_the_occupied_share() -> None:
    codes = np.zeros((32, 16, 16), dtype=np.int16)
    codes[:16] = 1
    record = make_study("a", {"T1w": codes}).record
    patch = (4, 4, 4)
    assert estimate_tokens(record, ("T1w",), patch) == 8 * 4 * 4 / 2
    assert estimate_tokens(record, ("T1w",), patch, crop_vox=(16, 16, 16)) == 4 * 4 * 4 / 2


def test_token_estimate_counts_the_patches_kept_of_an_empty_volume() -> None:
    codes = {"T1w": np.ones((16, 8, 8), np.int16), "FLAIR": np.zeros((16, 8, 8), np.int16)}
    record = make_study("a", codes).record
    assert estimate_tokens(record, ("T1w", "FLAIR"), (4, 8, 8)) == 4 + 2


@given(
    costs=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    num_packs=st.integers(1, 4),
)
@settings(deadline=None)
def test_packs_hold_every_study_once_and_stay_within_the_lpt_bound(
    costs: list[int], num_packs: int
) -> None:
    if len(costs) < num_packs:
        with pytest.raises(ValueError, match=f"{len(costs)} studies for {num_packs} packs"):
            assign_packs(costs, num_packs)
        return
    packs = assign_packs(costs, num_packs)
    assert len(packs) == num_packs
    assert all(packs)
    assert sorted(i for pack in packs for i in pack) == list(range(len(costs)))
    dearest = max(sum(costs[i] for i in pack) for pack in packs)
    assert dearest <= (4 / 3 - 1 / (3 * num_packs)) * best_possible(costs, num_packs) + 1e-9
    assert packs == assign_packs(list(costs), num_packs)


@pytest.mark.parametrize("costs", [[0, 0], [0, 0, 0, 5], [0, 0, 0, 0, 0]])
def test_studies_without_cost_still_fill_every_pack(costs: list[float]) -> None:
    assert all(assign_packs(costs, 2))
    assert all(assign_packs([*costs, 0.0], 3))


def best_possible(costs: list[int], num_packs: int) -> int:
    """Smallest possible dearest pack, over every set of loads that can be reached."""
    loads = {(0,) * num_packs}
    for cost in costs:
        loads = {
            tuple(sorted((*load[:n], load[n] + cost, *load[n + 1 :])))
            for load in loads
            for n in range(num_packs)
        }
    return min(load[-1] for load in loads)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_costs_that_cannot_be_ordered_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and >= 0"):
        assign_packs([1.0, bad], 1)


def test_one_long_study_costs_more_than_two_halves() -> None:
    assert study_cost(4000) > 2 * study_cost(2000)
    assert study_cost(0) == 0
