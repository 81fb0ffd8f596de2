from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels import reference
from anycontrast_kernels.attention import rounded_length, varlen_attention

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2}

SELF_LENGTHS = [
    (7, 1, 0, 33),
    (5, 5, 5),
    (1,),
    (0, 0, 4, 0),
]
CROSS_LENGTHS = [
    ((3, 1, 0, 20), (9, 1, 4, 5)),
    ((4, 6), (3, 0)),
    ((0, 2), (7, 1)),
]


def cu(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def draw(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(sum(n), 2, 16, generator=generator).to(dtype)
        for n in (lengths_q, lengths_k, lengths_k)
    )
    return q, k, v


def call(q: Tensor, k: Tensor, v: Tensor, lq: tuple[int, ...], lk: tuple[int, ...]) -> Tensor:
    return varlen_attention(q, k, v, cu(lq), cu(lk), lengths_q=lq, lengths_k=lk)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [(n, n) for n in SELF_LENGTHS] + CROSS_LENGTHS)
def test_forward_and_gradients_match_the_definition(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], dtype: torch.dtype
) -> None:
    found_inputs = [x.requires_grad_() for x in draw(lengths_q, lengths_k, dtype)]
    oracle_inputs = [x.detach().float().requires_grad_() for x in found_inputs]
    q, k, v = found_inputs
    found = call(q, k, v, lengths_q, lengths_k)
    q, k, v = oracle_inputs
    oracle = reference.attention(q, k, v, lengths_q=lengths_q, lengths_k=lengths_k)
    assert found.dtype == dtype
    grad = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1))
    found_grads = torch.autograd.grad(found, found_inputs, grad.to(dtype), materialize_grads=True)
    oracle_grads = torch.autograd.grad(oracle, oracle_inputs, grad, materialize_grads=True)
    for a, b in zip((found, *found_grads), (oracle, *oracle_grads), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=TOLERANCE[dtype], rtol=0)


def test_the_definition_is_softmax_attention_of_torch() -> None:
    q, k, v = draw((6,), (9,))
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=0.3
    ).transpose(0, 1)
    found = reference.attention(q, k, v, lengths_q=(6,), lengths_k=(9,), scale=0.3)
    torch.testing.assert_close(found, expected)


def test_a_sequence_never_sees_its_neighbours() -> None:
    lengths = (4, 6, 3)
    q, k, v = draw(lengths, lengths)
    before = call(q, k, v, lengths, lengths)
    k[4:10], v[4:10] = 100.0, -100.0
    after = call(q, k, v, lengths, lengths)
    torch.testing.assert_close(after[:4], before[:4], atol=0, rtol=0)
    torch.testing.assert_close(after[10:], before[10:], atol=0, rtol=0)
    assert not torch.allclose(after[4:10], before[4:10])


def test_queries_without_keys_get_zero() -> None:
    q, k, v = draw((3, 2), (0, 5))
    out = call(q, k, v, (3, 2), (0, 5))
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert bool((out[3:] != 0).any())


def test_scale_is_used() -> None:
    q, k, v = draw((5,), (5,))
    out = varlen_attention(q, k, v, cu((5,)), cu((5,)), lengths_q=(5,), lengths_k=(5,), scale=0.0)
    torch.testing.assert_close(out, v.mean(0, keepdim=True).expand_as(v))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 512), (512, 512), (513, 1024), (4096, 4096), (4097, 8192), (9000, 16384)],
)
def test_longest_length_takes_few_values(length: int, expected: int) -> None:
    assert rounded_length(length) == expected


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q_THD": torch.zeros(5, 2, 16, dtype=torch.int32)}, TypeError, "q_THD must be floating"),
        ({"k_THD": torch.zeros(5, 2, 16, dtype=torch.float64)}, TypeError, "k_THD must have the"),
        ({"v_THD": torch.zeros(5, 16)}, ValueError, r"v_THD must be \[tokens"),
        ({"k_THD": torch.zeros(5, 3, 16)}, ValueError, "k_THD must be"),
        ({"v_THD": torch.zeros(4, 2, 16)}, ValueError, "same tokens"),
        ({"v_THD": torch.zeros(5, 2, 16, device="meta")}, ValueError, "v_THD must lie on"),
        ({"lengths_q": (3, 3)}, ValueError, "lengths_q must be >= 0 and sum to the 5"),
        ({"lengths_k": (6, -1)}, ValueError, "lengths_k must be"),
        ({"lengths_k": (5,), "cu_seqlens_k": cu((5,))}, ValueError, "same sequences"),
        ({"cu_seqlens_q": cu((3, 2)).long()}, TypeError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": cu((5,))}, ValueError, r"cu_seqlens_q must be \[3\]"),
        ({"cu_seqlens_k": cu((2, 3))}, ValueError, "running sum of lengths_k"),
        ({"cu_seqlens_k": cu((3, 2)).to("meta")}, ValueError, "cu_seqlens_k must lie on"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, object], error: type[Exception], match: str
) -> None:
    q, k, v = draw((3, 2), (3, 2))
    arguments: dict[str, object] = {
        "q_THD": q,
        "k_THD": k,
        "v_THD": v,
        "cu_seqlens_q": cu((3, 2)),
        "cu_seqlens_k": cu((3, 2)),
        "lengths_q": (3, 2),
        "lengths_k": (3, 2),
    }
    with pytest.raises(error, match=match):
        varlen_attention(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "loop"])
@pytest.mark.parametrize("lengths", [(7, 1, 0, 33), (700, 64, 1), (0, 0, 4, 0)])
def test_backends_on_cuda_match_the_definition(backend: str, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(sum(lengths), 4, 64, generator=generator) for _ in range(4)]
    q, k, v, grad = (x.to("cuda", torch.bfloat16) for x in drawn)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    oracle_inputs = [x.detach().float().requires_grad_() for x in inputs]
    starts = cu(lengths).to("cuda")
    found = varlen_attention(
        q, k, v, starts, starts, lengths_q=lengths, lengths_k=lengths, backend=backend
    )
    q, k, v = oracle_inputs
    oracle = reference.attention(q, k, v, lengths_q=lengths, lengths_k=lengths)
    found_grads = torch.autograd.grad(found, inputs, grad)
    oracle_grads = torch.autograd.grad(oracle, oracle_inputs, grad.float())
    for a, b in zip((found, *found_grads), (oracle, *oracle_grads), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=4e-2, rtol=0)
