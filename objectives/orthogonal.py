"""Keep what fine-tuning changes out of the way of a capability vector.

CapVector, arXiv 2605.10903: gamma = theta_aux - theta_sft (Eq. 3), theta_meta = theta_pre + alpha gamma (Eq. 4), and
then fine-tuning Delta from theta_meta with <gamma, Delta> = 0 wanted matrix by matrix (Eq. 6). The paper's penalty
(Eq. 7) is not that inner product: it is the sum of |gamma_ij Delta_ij|, which bounds the inner product from above and
presses Delta to zero wherever gamma is large. The squared cosine has no such pull and no scale; both are here.

With LoRA Delta = s B A, and a gamma of two adapters is a product U V of rank 2 r. Inner products and norms of such
are traces of small Gram matrices, so nothing of the size of the weights is made (`LowRank`). Nor is it for DoRA, whose
change is that of every row's length too (`Rescaled`).

Letters: m rows and n columns of a weight, r and q ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_TINY = 1e-12
"""Keeps a cosine with a vanishing matrix at zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A matrix, or a stack of matrices of one shape, as the product of two factors, `left @ right`, never multiplied
    out."""

    left: torch.Tensor
    """float [..., m, r], with whatever scale the product has."""
    right: torch.Tensor
    """float [..., r, n]."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescaled:
    """DoRA's change of a weight W: c (W + B A) - W with c_i = m_i / ||W_i + (B A)_i|| for row i (arXiv 2402.09353,
    Eq. 5), never multiplied out. The norm counts as a constant in the backward pass (section 4.3).

    What its inner product with a gamma needs of W is given by row, for W does not change.
    """

    low: LowRank
    """B A, with its scale."""
    magnitude: torch.Tensor
    """m, float [..., m]."""
    projected: torch.Tensor
    """W A^T, float [..., m, r]."""
    squares: torch.Tensor
    """||W_i||^2, float [..., m]."""
    along: torch.Tensor
    """<gamma_i, W_i>, float [..., m], of the gamma that this is compared with."""

    @property
    def shape(self) -> torch.Size:
        return self.low.shape

    def inner(self, gamma: torch.Tensor) -> torch.Tensor:
        """<gamma, this>."""
        scales, _, _ = self._rows()
        product = (self.low.left * _thin(gamma, self.low.right)).sum(dim=-1)
        return ((scales - 1) * self.along + scales * product).sum(dim=-1)

    def squared_norm(self) -> torch.Tensor:
        """||this||^2."""
        scales, mixed, added = self._rows()
        parts = (scales - 1) ** 2 * self.squares + 2 * (scales - 1) * scales * mixed + scales**2 * added
        return parts.sum(dim=-1).clamp_min(0.0)  # three terms that cancel while little has changed

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By row: c_i, <W_i, (B A)_i> and ||(B A)_i||^2."""
        left, right = self.low.left, self.low.right
        mixed = (left * self.projected).sum(dim=-1)
        added = (left * (left @ (right @ right.mT))).sum(dim=-1)
        return self.magnitude / (self.squares + 2 * mixed + added).detach().sqrt(), mixed, added


Matrix = torch.Tensor | LowRank | Rescaled
"""A weight's change: dense, of any shape, or an adapter's."""


def inner(a: Matrix, b: Matrix) -> torch.Tensor:
    """Frobenius inner product <a, b>, a scalar; with `LowRank` on either side, or `Rescaled` on one, from the factors
    alone, in the dense matrix's dtype, and of a stack [G, ...] by matrix, [G].

    Raises ValueError where the shapes differ, and TypeError for `Rescaled` and an adapter's change.
    """
    if a.shape != b.shape:
        raise ValueError(f"an inner product of {list(a.shape)} and {list(b.shape)}, expected equal shapes")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.vdot(a.flatten(), b.flatten())
    if isinstance(a, Rescaled) or isinstance(b, Rescaled):
        one, other = (a, b) if isinstance(a, Rescaled) else (b, a)
        if not isinstance(one, Rescaled) or not isinstance(other, torch.Tensor):
            raise TypeError("DoRA's change has an inner product with a dense matrix only")
        return one.inner(other)
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        # <U V, B A> = tr((B^T U)(V A^T)), two r x q grams.
        return ((b.left.mT @ a.left) * (b.right @ a.right.mT)).sum(dim=(-2, -1))
    low, dense = (a, b) if isinstance(a, LowRank) else (b, a)
    assert isinstance(low, LowRank)
    assert isinstance(dense, torch.Tensor)
    return (low.left * _thin(dense, low.right)).sum(dim=(-2, -1))


def _thin(dense: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """dense @ right^T, [..., m, r], a product of the dense matrix's dtype."""
    return (dense @ right.mT.to(dense.dtype)).to(right.dtype)


def squared_norm(matrix: Matrix) -> torch.Tensor:
    """||matrix||^2, Frobenius, a scalar."""
    return matrix.squared_norm() if isinstance(matrix, Rescaled) else inner(matrix, matrix)


def squared_cosine(
    gamma: Matrix, delta: Matrix, *, floor: float = 0.0, squares: torch.Tensor | None = None
) -> torch.Tensor:
    """cos^2 of the angle between two changes of one weight, in [0, 1]; 0 where either is zero.

    Its gradient at delta = 0 is zero, and just beside it, without bound: the direction of next to nothing turns with
    the smallest step. (floor ||gamma||)^2 is added to ||delta||^2, so that a change well below that counts little.
    `squares` is ||gamma||^2, where it is known.
    """
    product = inner(gamma, delta)
    squares = squared_norm(gamma) if squares is None else squares
    return product.square() / (squares * (squared_norm(delta) + floor**2 * squares) + _TINY**2)


def cosine(gamma: Matrix, delta: Matrix, *, squares: torch.Tensor) -> torch.Tensor:
    """cos of the angle between two changes of one weight, in [-1, 1], as it is; 0 where either is zero. Of a stack, by
    matrix. `squares` is ||gamma||^2."""
    return inner(gamma, delta) / (squares * squared_norm(delta)).sqrt().clamp_min(_TINY)


def cosine_penalty(
    gamma: Mapping[str, Matrix],
    delta: Mapping[str, Matrix],
    *,
    floor: float = 0.0,
    squares: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean over the weights that both name of `squared_cosine`, a scalar in [0, 1]. Raises ValueError where there is
    none."""
    known = squares or {}
    cosines = [
        squared_cosine(gamma[name], delta[name], floor=floor, squares=known.get(name))
        for name in _shared(gamma, delta)
    ]
    return torch.cat([one.flatten() for one in cosines]).mean()


def elementwise_penalty(gamma: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """CapVector Eq. 7: the sum over weights and elements of |gamma_ij Delta_ij|, a scalar.

    For adapters the paper takes it on the factor A alone: gamma is then A_aux - A_sft, and delta A - A_init. Raises
    ValueError where the two share no name, or a weight has two shapes.
    """
    total = torch.zeros(())
    for name in _shared(gamma, delta):
        if gamma[name].shape != delta[name].shape:
            raise ValueError(
                f"{name} is {list(gamma[name].shape)} in the vector and {list(delta[name].shape)} in the update"
            )
        total = total.to(delta[name].device) + (gamma[name] * delta[name]).abs().sum()
    return total


def add_elementwise_gradient(
    gradient: torch.Tensor, gamma: torch.Tensor, delta: torch.Tensor, *, weight: float
) -> torch.Tensor:
    """Eq. 7 of one dense weight, float32; adds `weight` times its gradient in delta (0 where delta is 0) to `gradient`.
    Without a graph: for every weight of a network that would cost more than the arithmetic."""
    products = gamma * delta
    value = products.abs().sum(dtype=torch.float32)
    gradient.addcmul_(gamma, products.sign_(), value=weight)
    return value


def add_squared_cosine_gradient(
    gradient: torch.Tensor,
    gamma: torch.Tensor,
    delta: torch.Tensor,
    *,
    squares: torch.Tensor,
    floor: float,
    weight: float,
) -> torch.Tensor:
    """`squared_cosine` of dense weights, float32, adding its gradient likewise; `squares` is ||gamma||^2."""
    one, other = gamma.flatten(), delta.flatten()
    slope = _slope(torch.vdot(one, other).float(), torch.vdot(other, other).float(), squares, floor)
    gradient.addcmul_(gamma, slope.by_product.to(gamma.dtype), value=weight)
    gradient.addcmul_(delta, slope.by_square.to(delta.dtype), value=2 * weight)
    return slope.value


def low_rank_gradients(
    gamma: torch.Tensor, low: LowRank, *, squares: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`squared_cosine` of dense gammas [G, m, n] and a stack of products, [G], and its gradients in the factors.
    Without a graph: two passes over gamma, and nothing else of its size."""
    left, right = low.left, low.right
    seen = _thin(gamma, right)
    left_gram, right_gram = left.mT @ left, right @ right.mT
    product = (left * seen).sum(dim=(-2, -1))
    slope = _slope(product, (left_gram * right_gram).sum(dim=(-2, -1)), squares, floor)
    by_product, by_square = slope.by_product[:, None, None], 2 * slope.by_square[:, None, None]
    return (
        slope.value,
        by_product * seen + by_square * (left @ right_gram),
        by_product * _thin_rows(left, gamma) + by_square * (left_gram @ right),
    )


def rescaled_gradients(
    gamma: torch.Tensor,
    change: Rescaled,
    *,
    squares: torch.Tensor,
    floor: float,
    times_base: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `low_rank_gradients` of DoRA's change: the value, and gradients in the two factors and the magnitude.
    `times_base` multiplies [G, r, m] by the weights W, [G, r, n]."""
    left, right, along = change.low.left, change.low.right, change.along
    seen, right_gram = _thin(gamma, right), right @ right.mT
    scales, mixed, added = change._rows()
    beside = scales - 1
    inner_rows = (left * seen).sum(dim=-1)
    product = (beside * along + scales * inner_rows).sum(dim=-1)
    slope = _slope(product, change.squared_norm(), squares, floor)
    by_product, by_square = slope.by_product[:, None], 2 * slope.by_square[:, None]
    # d product / d c_i and, halved, d ||change||^2 / d c_i; c_i is m_i over a constant.
    by_scale = by_product * (along + inner_rows) + by_square * (
        beside * change.squares + (2 * scales - 1) * mixed + scales * added
    )
    of_gamma, of_base, of_low = by_product * scales, by_square * beside * scales, by_square * scales**2
    left_gradient = (
        of_gamma[..., None] * seen
        + of_base[..., None] * change.projected
        + of_low[..., None] * (left @ right_gram)
    )
    right_gradient = (
        _thin_rows(of_gamma[..., None] * left, gamma)
        + times_base((of_base[..., None] * left).mT)
        + (left.mT @ (of_low[..., None] * left)) @ right
    )
    return slope.value, left_gradient, right_gradient, by_scale * scales / change.magnitude


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slope:
    """A squared cosine, and its derivatives in what it is made of."""

    value: torch.Tensor
    by_product: torch.Tensor
    """In <gamma, delta>."""
    by_square: torch.Tensor
    """In ||delta||^2."""


def _slope(product: torch.Tensor, norm: torch.Tensor, squares: torch.Tensor, floor: float) -> _Slope:
    scale = squares * (norm + floor**2 * squares) + _TINY**2
    value = product.square() / scale
    return _Slope(value=value, by_product=2 * product / scale, by_square=-value * squares / scale)


def _thin_rows(left: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """left^T @ dense, [..., r, n], a product of the dense matrix's dtype."""
    return (left.mT.to(dense.dtype) @ dense).to(left.dtype)


def _shared(gamma: Mapping[str, Matrix], delta: Mapping[str, Matrix]) -> list[str]:
    names = [name for name in gamma if name in delta]
    if not names:
        raise ValueError("the capability vector and the update share no weight: nothing to hold apart")
    return names
