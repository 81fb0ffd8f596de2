import pytest
import torch

from anycontrast_kernels.sequences import (
    Sequences,
    check_extent,
    clear_padding,
    rounded_length,
    sequences,
    sequences_from_offsets,
)

LENGTHS = (130, 0, 1, 64, 65)


def test_offsets_are_the_running_sum_and_repeat_up_to_the_capacity() -> None:
    found = sequences(LENGTHS, capacity=7, num_tokens=300)
    assert found.cu_seqlens.tolist() == [0, 130, 130, 131, 195, 260, 260, 260]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.max_len == 512


@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_cover_every_row_once(rows: int) -> None:
    found = sequences(LENGTHS, capacity=7, num_tokens=300)
    tiles = found.tiles_64 if rows == 64 else found.tiles_128
    assert tiles.dtype == torch.int32
    assert tiles.is_contiguous()
    real = [(s, first) for s, first in tiles.tolist() if s >= 0]
    assert tiles.tolist() == [[s, f] for s, f in real] + [[-1, -1]] * (len(tiles) - len(real))
    covered = [(s, row) for s, first in real for row in range(first, min(first + rows, LENGTHS[s]))]
    assert sorted(covered) == [(s, row) for s, n in enumerate(LENGTHS) for row in range(n)]
    assert all(first % rows == 0 for _, first in real)


def test_long_sequences_come_first() -> None:
    found = sequences((1, 200, 70)).tiles_64.tolist()
    assert [s for s, _ in found if s >= 0] == [1, 1, 1, 1, 2, 2, 0]


def test_shapes_depend_on_budget_and_capacity_only() -> None:
    many = [sequences(n, capacity=8, num_tokens=512) for n in ((512,), (1,) * 8, (65,) * 7, ())]
    assert {(x.cu_seqlens.shape, x.tiles_64.shape, x.tiles_128.shape) for x in many} == {
        ((9,), (16, 2), (12, 2))
    }


def test_no_sequences_are_fine() -> None:
    found = sequences(())
    assert found.cu_seqlens.tolist() == [0]
    assert found.tiles_64.shape == (0, 2)


@pytest.mark.parametrize("offsets", [[0, 3, 3, 8], torch.tensor([0, 3, 3, 8])])
def test_offsets_give_the_same_as_lengths(offsets: list[int] | torch.Tensor) -> None:
    found = sequences_from_offsets(offsets, num_tokens=10)
    expected = sequences((3, 0, 5), num_tokens=10)
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    assert found.max_len == expected.max_len


def test_they_move_together() -> None:
    found = sequences(LENGTHS, capacity=9).to("cpu")
    assert isinstance(found, Sequences)
    assert found.cu_seqlens.device == found.tiles_64.device == found.tiles_128.device


def test_padding_is_cleared_and_nothing_else() -> None:
    x = torch.full((9, 2, 4), torch.nan)
    x[:5] = 1.0
    found = clear_padding(x, sequences((2, 3), capacity=4, num_tokens=9))
    assert found is x
    assert torch.equal(x[:5], torch.ones(5, 2, 4))
    assert not x[5:].any()


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 512), (512, 512), (513, 1024), (4096, 4096), (4097, 8192), (9000, 16384)],
)
def test_longest_length_takes_few_values(length: int, expected: int) -> None:
    assert rounded_length(length) == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lengths": (3, -1)}, "must not decrease .*sequence 1 runs from 3 to 2"),
        ({"lengths": (3, 4), "capacity": 1}, "capacity must be at least the 2 sequences"),
        ({"lengths": (3, 4), "num_tokens": 6}, "within the 6 tokens"),
        ({"lengths": (3, 4), "max_len": 3}, "longer than max_len 3"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sequences(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offsets", "error", "match"),
    [
        ([1, 3], ValueError, "must start at 0"),
        ([], ValueError, "must start at 0"),
        ([0, 5, 3], ValueError, "must not decrease"),
        (torch.tensor([0.0, 3.0]), TypeError, "must be int32 or int64"),
        (torch.tensor([[0, 3]]), ValueError, r"must be \[C \+ 1\]"),
    ],
)
def test_bad_offsets_are_refused(
    offsets: list[int] | torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sequences_from_offsets(offsets)


@pytest.mark.parametrize(
    ("cu_seqlens", "match"),
    [
        ([1, 3], "here: offsets must start at 0"),
        ([0, 4, 2], "here: offsets must not decrease"),
        ([0, 9], "here: sequences must end within the 8 tokens"),
        ([0, 6, 8], "here: no sequence may be longer than max_len 5"),
    ],
)
def test_sequences_put_together_by_hand_are_checked(cu_seqlens: list[int], match: str) -> None:
    made = sequences((5,), num_tokens=8)._replace(
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32), max_len=5
    )
    if "8 tokens" in match:
        made = made._replace(max_len=512)
    with pytest.raises(ValueError, match=match):
        check_extent("here", made, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_making_sequences_and_checking_them_twice_never_waits_for_the_device() -> None:
    made = sequences(LENGTHS, "cuda")
    by_hand = made._replace(cu_seqlens=made.cu_seqlens.clone())
    check_extent("here", by_hand, 260)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences(LENGTHS, "cuda")
        check_extent("here", made, 260)
        check_extent("here", by_hand, 260)
    finally:
        torch.cuda.set_sync_debug_mode("default")
