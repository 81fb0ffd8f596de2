from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anycontrast_kernels import reference
from anycontrast_kernels.attention import varlen_attention
from anycontrast_kernels.backends import BACKENDS
from anycontrast_kernels.dispatch import Situation
from anycontrast_kernels.sequences import Sequences, sequences

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 4e-2}
HEAD_DIM = 32

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
    ((2, 3), (0, 0)),
]


def draw(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; views of wider tensors, as a model cuts them out."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(sum(n) + padding, 3, 2, HEAD_DIM, generator=generator).to(dtype)[:, 1]
        for n in (lengths_q, lengths_k, lengths_k)
    )
    return q, k, v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [(n, n) for n in SELF_LENGTHS] + CROSS_LENGTHS)
def test_forward_and_gradients_match_the_definition(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = draw(lengths_q, lengths_k, dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = varlen_attention(q, k, v, sequences(lengths_q), sequences(lengths_k))
    oracle_inputs = [x.detach().float().clone().requires_grad_() for x in inputs]
    a, b, c = oracle_inputs
    oracle = reference.attention(a, b, c, lengths_q=lengths_q, lengths_k=lengths_k)
    assert found.dtype == dtype
    grad = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1))
    found_grads = torch.autograd.grad(found, inputs, grad.to(dtype))
    oracle_grads = torch.autograd.grad(oracle, oracle_inputs, grad, materialize_grads=True)
    for x, y in zip((found, *found_grads), (oracle, *oracle_grads), strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=TOLERANCE[dtype], rtol=0)


def test_the_definition_is_softmax_attention_of_torch() -> None:
    q, k, v = draw((6,), (9,))
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=0.3
    ).transpose(0, 1)
    found = reference.attention(q, k, v, lengths_q=(6,), lengths_k=(9,), scale=0.3)
    torch.testing.assert_close(found, expected)


def test_padding_changes_nothing_and_is_zero() -> None:
    lengths = (5, 0, 9)
    q, k, v = draw(lengths, lengths, padding=6)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    padded = varlen_attention(q, k, v, sequences(lengths, capacity=6, num_tokens=20))
    bare = varlen_attention(q[:14], k[:14], v[:14], sequences(lengths))
    assert torch.equal(padded[:14], bare)
    assert not padded[14:].any()
    for gradient in torch.autograd.grad(padded.square().sum(), inputs):
        assert gradient[:14].any()
        assert not gradient[14:].any()


def test_a_sequence_never_sees_its_neighbours() -> None:
    lengths = (4, 6, 3)
    q, k, v = draw(lengths, lengths)
    before = varlen_attention(q, k, v, sequences(lengths))
    k[4:10], v[4:10] = 100.0, -100.0
    after = varlen_attention(q, k, v, sequences(lengths))
    torch.testing.assert_close(after[:4], before[:4], atol=0, rtol=0)
    torch.testing.assert_close(after[10:], before[10:], atol=0, rtol=0)
    assert not torch.allclose(after[4:10], before[4:10])


def test_queries_without_keys_get_zero() -> None:
    q, k, v = draw((3, 2), (0, 5))
    out = varlen_attention(q, k, v, sequences((3, 2)), sequences((0, 5)))
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert bool((out[3:] != 0).any())


def test_scale_is_used() -> None:
    q, k, v = draw((5,), (5,))
    out = varlen_attention(q, k, v, sequences((5,)), scale=0.7)
    known = reference.attention(q, k, v, lengths_q=(5,), lengths_k=(5,), scale=0.7)
    torch.testing.assert_close(out, known)
    assert not torch.allclose(out, varlen_attention(q, k, v, sequences((5,))))


def test_the_operator_keeps_the_promises_of_torch() -> None:
    q, k, v = (x.requires_grad_() for x in draw((7, 0, 5), (7, 0, 5)))
    made = sequences((7, 0, 5))
    torch.library.opcheck(
        torch.ops.anycontrast.varlen_attention.default, (q, k, v, *made, *made, 0.2, None)
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph_that_serves_any_lengths(backend: str) -> None:
    graphs = 0

    def attend(qkv: Tensor, runs: Sequences) -> Tensor:
        q, k, v = (2.0 * qkv).unbind(1)
        return varlen_attention(q, k, v, runs) + 1.0

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    torch.compiler.reset()
    compiled = torch.compile(attend, backend=counting, fullgraph=True)
    qkv = torch.randn(40, 3, 2, HEAD_DIM, requires_grad=True)
    for lengths in ((40,), (3, 0, 30), (1, 1, 1, 1), (20, 20)):
        runs = sequences(lengths, capacity=4, num_tokens=40)
        found, expected = compiled(qkv, runs), attend(qkv, runs)
        torch.testing.assert_close(found, expected)
        pair = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (found, expected)]
        torch.testing.assert_close(*pair)
    assert graphs == 1


def bad_sequences(**change: object) -> Sequences:
    return sequences((3, 2))._replace(**change)  # type: ignore[arg-type]


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def wide(size: int) -> Tensor:
    return torch.zeros(5, 2, size)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q_THD": wide(32).int()}, TypeError, "q_THD must be float16, bfloat16"),
        ({"k_THD": wide(32).double()}, TypeError, "k_THD must have the dtype of q_THD"),
        ({"v_THD": torch.zeros(5, 32)}, ValueError, r"v_THD must be \[tokens"),
        ({"k_THD": torch.zeros(5, 3, 32)}, ValueError, "k_THD must be"),
        ({"v_THD": torch.zeros(4, 2, 32)}, ValueError, "same tokens"),
        ({"v_THD": wide(32).to("meta")}, ValueError, "v_THD must lie on the device of q_THD"),
        (
            {"k_THD": torch.zeros(5, 32, 2).transpose(1, 2)},
            ValueError,
            r"last dim of k_THD must be contiguous .*\.contiguous\(\)",
        ),
        (
            {"q_THD": wide(24), "k_THD": wide(24), "v_THD": wide(24)},
            ValueError,
            "head dim of q_THD must be a multiple of 8 from 32 to 256, got 24",
        ),
        ({"q_THD": wide(60), "k_THD": wide(60), "v_THD": wide(60)}, ValueError, "got 60"),
        ({"q_THD": wide(264), "k_THD": wide(264), "v_THD": wide(264)}, ValueError, "got 264"),
        ({"sequences_q": offsets(0, 5)}, TypeError, "sequences_q must be Sequences"),
        (
            {"sequences_q": bad_sequences(cu_seqlens=offsets(0, 3, 5).long())},
            TypeError,
            r"sequences_q.cu_seqlens must be int32",
        ),
        (
            {"sequences_k": bad_sequences(tiles_64=torch.zeros(3, 2))},
            TypeError,
            r"sequences_k.tiles_64 must be int32",
        ),
        (
            {"sequences_k": sequences((3, 2)).to("meta")},
            ValueError,
            r"sequences_k.cu_seqlens must lie on .*move it with sequences_k.to",
        ),
        (
            {"sequences_q": bad_sequences(cu_seqlens=offsets(0, 9, 3, 9, 5, 9)[::2])},
            ValueError,
            "sequences_q.cu_seqlens must be contiguous",
        ),
        (
            {"sequences_q": bad_sequences(cu_seqlens=offsets(0, 3, 5).unsqueeze(0))},
            ValueError,
            r"sequences_q.cu_seqlens must be \[sequences \+ 1\]",
        ),
        ({"sequences_k": sequences((5,))}, ValueError, "same capacity, got 2 and 1"),
        ({"sequences_q": bad_sequences(cu_seqlens=offsets(1, 3, 5))}, ValueError, "start at 0"),
        (
            {"sequences_q": bad_sequences(cu_seqlens=offsets(0, 4, 3))},
            ValueError,
            "sequences_q: offsets must not decrease .*sequence 1 runs from 4 to 3",
        ),
        (
            {"sequences_k": bad_sequences(cu_seqlens=offsets(0, 3, 6))},
            ValueError,
            "sequences_k: sequences must end within the 5 tokens",
        ),
        (
            {"sequences_k": bad_sequences(max_len=2)},
            ValueError,
            "sequences_k: no sequence may be longer than max_len 2",
        ),
        (
            {"q_THD": torch.zeros(5, 2, 3, 32)[:, :, 1]},
            ValueError,
            r"heads of q_THD must be contiguous \(stride 32\), got strides \(192, 96, 1\)",
        ),
        (
            {"v_THD": torch.zeros(2, 5, 32).transpose(0, 1)},
            ValueError,
            r"heads of v_THD must be contiguous .*\.contiguous\(\)",
        ),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0, got -1"),
        ({"scale": 0.0}, ValueError, "scale must be finite and > 0, got 0"),
        ({"scale": float("inf")}, ValueError, "scale must be finite and > 0, got inf"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"backend": "fastest"}, ValueError, "backend must be one of .*'fastest'"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, object], error: type[Exception], match: str
) -> None:
    arguments: dict[str, object] = {
        "q_THD": wide(32),
        "k_THD": wide(32),
        "v_THD": wide(32),
        "sequences_q": sequences((3, 2)),
        "sequences_k": sequences((3, 2)),
    }
    with pytest.raises(error, match=match):
        varlen_attention(**(arguments | change))  # type: ignore[arg-type]


GPU_LENGTHS = [
    ((7, 1, 0, 33), (7, 1, 0, 33)),
    ((700, 64, 1), (700, 64, 1)),
    ((130, 0, 65, 9), (64, 200, 3, 0)),
]


def gpu_case(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], head_dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[Sequences]]:
    """Query, key and value with padding, the output's gradient, and the sequences."""
    generator = torch.Generator().manual_seed(3)
    runs = [sequences(n, "cuda", capacity=6, num_tokens=sum(n) + 11) for n in lengths]
    sizes = [sum(lengths[0]) + 11] + 2 * [sum(lengths[1]) + 11]
    inputs = [
        torch.randn(size, 3, 4, head_dim, generator=generator).to("cuda", dtype)[:, 1]
        for size in sizes
    ]
    grad = torch.randn(sizes[0], 4, head_dim, generator=generator).to("cuda", dtype)
    return [x.requires_grad_() for x in inputs], grad, runs


def usable(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """Skip unless the back end can run here."""
    (backend,) = (b for b in BACKENDS if b.name == name)
    reason = backend.refusal(Situation(torch.device("cuda"), dtype, head_dim))
    if reason is not None:
        pytest.skip(f"{name} {reason}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
@pytest.mark.parametrize("lengths", GPU_LENGTHS)
def test_every_back_end_agrees_with_the_definition_on_cuda(
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    backend: str,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    usable(backend, dtype, head_dim)
    torch.compiler.reset()
    inputs, grad, runs = gpu_case(lengths, head_dim, dtype)
    q, k, v = inputs
    found = varlen_attention(q, k, v, *runs, scale=0.2, backend=backend)
    found_all = [found, *torch.autograd.grad(found, inputs, grad)]
    used = [sum(lengths[0]), sum(lengths[1]), sum(lengths[1])]
    oracle_inputs = [
        x[:n].detach().cpu().float().clone().requires_grad_()
        for x, n in zip(inputs, used, strict=True)
    ]
    a, b, c = oracle_inputs  # on the host, where float32 products are never in TF32
    oracle = reference.attention(a, b, c, lengths_q=lengths[0], lengths_k=lengths[1], scale=0.2)
    grad = grad[: used[0]].cpu().float()
    oracle_all = [oracle, *torch.autograd.grad(oracle, oracle_inputs, grad)]
    atol = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    for x, y in zip(found_all, oracle_all, strict=True):
        torch.testing.assert_close(x[: len(y)].cpu().float(), y, atol=atol, rtol=2e-2)
        assert not x[len(y) :].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_our_kernels_give_the_same_bits_every_time() -> None:
    usable("triton", torch.bfloat16, 64)
    lengths = (700, 64, 1, 1500)
    inputs, grad, runs = gpu_case((lengths, lengths), 64, torch.bfloat16)
    q, k, v = inputs

    def once() -> list[Tensor]:
        out = varlen_attention(q, k, v, *runs, backend="triton")
        return [out, *torch.autograd.grad(out, inputs, grad)]

    first = once()
    for _ in range(20):
        for x, y in zip(once(), first, strict=True):
            assert torch.equal(x, y)
