"""Gradients of attention that only autograd can differentiate: the forward pass is done again."""

from collections.abc import Callable

import torch
from torch import Tensor

from anycontrast_kernels.dispatch import in_own_thread


def gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `attend` at (q, k, v), where autograd may be off, as inside an operator.

    Args:
        attend: (q, k, v) -> output, made of differentiable operations.
        grad: gradient of the output.
        q: [Tq, H, D].
        k: [Tk, H, D].
        v: [Tk, H, D].

    Returns:
        Gradients of q, k and v, contiguous.
    """

    def run() -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad(attend(a, b, c), (a, b, c), grad, materialize_grads=True)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    return in_own_thread(run)
