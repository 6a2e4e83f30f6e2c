"""Keep what fine-tuning changes out of the way of a capability vector.

CapVector, arXiv 2605.10903: gamma = theta_aux - theta_sft (Eq. 3), theta_meta = theta_pre + alpha gamma (Eq. 4), and
then fine-tuning Delta from theta_meta with <gamma, Delta> = 0 wanted matrix by matrix (Eq. 6). The paper's penalty
(Eq. 7) is not that inner product: it is the sum of |gamma_ij Delta_ij|, which bounds the inner product from above and
presses Delta to zero wherever gamma is large. The squared cosine has no such pull and no scale; both are here.

With LoRA Delta = s B A, and a gamma of two adapters is a product U V of rank 2 r. Inner products and norms of such
are traces of small Gram matrices, so nothing of the size of the weights is made (`LowRank`).

No learner applies these yet.

Letters: m rows and n columns of a weight, r and q ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_TINY = 1e-12
"""Keeps a cosine with a vanishing matrix at zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A matrix as the product of two factors, `left @ right`, never multiplied out."""

    left: torch.Tensor
    """float [m, r], with whatever scale the product has."""
    right: torch.Tensor
    """float [r, n]."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))


Matrix = torch.Tensor | LowRank
"""A weight's change: dense, of any shape, or low rank."""


def inner(a: Matrix, b: Matrix) -> torch.Tensor:
    """Frobenius inner product <a, b>, a scalar; with `LowRank` on either side from the factors alone.

    Raises ValueError where the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"an inner product of {list(a.shape)} and {list(b.shape)}, expected equal shapes")
    if isinstance(a, LowRank):
        if isinstance(b, LowRank):
            # <U V, B A> = tr((B^T U)(V A^T)), two r x q grams.
            return ((b.left.T @ a.left) * (b.right @ a.right.T)).sum()
        return (a.left * (b @ a.right.T)).sum()
    return inner(b, a) if isinstance(b, LowRank) else (a * b).sum()


def squared_cosine(gamma: Matrix, delta: Matrix) -> torch.Tensor:
    """cos^2 of the angle between two changes of one weight, in [0, 1]; 0 where either is zero.

    Its gradient at delta = 0 is zero, so it holds nothing before fine-tuning has moved.
    """
    product, squares = inner(gamma, delta), inner(gamma, gamma) * inner(delta, delta)
    return product.square() / (squares + _TINY**2)


def cosine_penalty(gamma: Mapping[str, Matrix], delta: Mapping[str, Matrix]) -> torch.Tensor:
    """Mean over the weights that both name of `squared_cosine`, a scalar in [0, 1]. Raises ValueError where there is
    none."""
    shared = _shared(gamma, delta)
    return torch.stack([squared_cosine(gamma[name], delta[name]) for name in shared]).mean()


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


def _shared(gamma: Mapping[str, Matrix], delta: Mapping[str, Matrix]) -> list[str]:
    names = [name for name in gamma if name in delta]
    if not names:
        raise ValueError("the capability vector and the update share no weight: nothing to hold apart")
    return names
