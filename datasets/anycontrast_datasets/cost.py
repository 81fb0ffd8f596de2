"""What a study costs to train on: linear and quadratic in its tokens, by formula or by fit.

In: tokens of studies. Out: cost in any one unit; packs and ranks are balanced by it. Within a pack
every study attends to itself only, so that the cost of a pack is the sum over its studies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Cost of a study of L tokens = linear * L + quadratic * L^2."""

    linear: float = 1.0
    """Cost of a token, in any unit."""
    quadratic: float = 1.0 / (6 * 768)
    """Cost of a pair of tokens, in the same unit; only the ratio of the two decides on balance.
    The default counts a transformer block of width D = 768: 24 D^2 operations a token on its
    projections and 4 D L on attention, hence a quadratic share of 1 / (6 D)."""

    def __post_init__(self) -> None:
        values = (self.linear, self.quadratic)
        if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
            raise ValueError(
                "cost: linear and quadratic must be finite, >= 0 and not both 0, "
                f"got {self.linear} and {self.quadratic}"
            )

    def __call__(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the cost of studies of these many tokens, shape as given."""
        counts = np.asarray(tokens, dtype=np.float64)
        return self.linear * counts + self.quadratic * counts * counts


DEFAULT_COST = CostModel()
"""Until something was measured."""


@dataclass(frozen=True, kw_only=True)
class BlockStack:
    """Transformer blocks of one width, and which share of a study's tokens they see."""

    width: int
    depth: int
    token_share: float = 1.0
    context_share: float | None = None
    """Which share of the tokens they attend to; None for the tokens they see."""
    mlp_ratio: float = 4.0


def flops_cost(stacks: Sequence[BlockStack], *, per_token: float = 0.0) -> CostModel:
    """Return the cost in floating-point operations of a forward pass, counted by formula.

    A block of width D and MLP ratio m spends (8 + 4 m) D^2 operations a token on its projections
    and 4 D L a token on attention over L tokens.

    Args:
        stacks: All transformer blocks of the model.
        per_token: Operations a token outside the blocks (patch embedding, prediction head).
    """
    linear, quadratic = per_token, 0.0
    for stack in stacks:
        per_layer = (8 + 4 * stack.mlp_ratio) * stack.width**2
        linear += stack.depth * per_layer * stack.token_share
        context = stack.token_share if stack.context_share is None else stack.context_share
        quadratic += stack.depth * 4 * stack.width * stack.token_share * context
    return CostModel(linear=linear, quadratic=quadratic)


def fit_cost(tokens: Sequence[Sequence[int]], seconds: Sequence[float]) -> CostModel:
    """Fit a cost model to measured packs: least squares, no coefficient below 0.

    Errors count relative to the time measured, so that small packs count as much as large ones. A
    constant time per pack is fitted too and left out of the result, since every pack has it.

    Args:
        tokens: Of every measured pack, the tokens of each of its studies.
        seconds: Time of each pack, > 0.

    Returns:
        Cost in seconds.

    Raises:
        ValueError: fewer than three packs, a time that is not positive, or packs all alike.
    """
    from scipy.optimize import nnls

    if len(tokens) != len(seconds) or len(tokens) < 3:
        raise ValueError(
            f"fitting the cost: needs a time for each of at least 3 packs, got {len(tokens)} packs "
            f"and {len(seconds)} times"
        )
    measured = np.asarray(seconds, dtype=np.float64)
    if not (np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError(f"fitting the cost: every time must be > 0 s, got {list(seconds)}")
    lengths = [np.asarray(pack, dtype=np.float64) for pack in tokens]
    terms = np.array([[1.0, pack.sum(), (pack * pack).sum()] for pack in lengths])
    scale = terms.max(axis=0)
    fitted, _ = nnls(terms / scale / measured[:, None], np.ones(len(measured)))
    _, linear, quadratic = (float(value) for value in fitted / scale)
    if linear == quadratic == 0:
        raise ValueError(
            "fitting the cost: the times do not grow with the tokens; measure packs of different "
            "sizes on an idle machine"
        )
    return CostModel(linear=linear, quadratic=quadratic)
