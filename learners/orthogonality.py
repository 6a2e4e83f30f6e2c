"""Keeps training apart from a capability vector: the gradient of a penalty on what has changed since it began.

CapVector, arXiv 2605.10903, Eq. 8: L = L_action + lambda L_orth. The objectives are in `objectives.orthogonal`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from configs.supervised import CapabilityPart
from learners.capability import CapabilityError
from objectives.orthogonal import (
    LowRank,
    Rescaled,
    add_elementwise_gradient,
    add_squared_cosine_gradient,
    cosine,
    cosine_penalty,
    elementwise_penalty,
    low_rank_gradients,
    rescaled_gradients,
)
from policies.weights import adapters
from policies.weights.snapshots import to_tensor

FLOOR = 0.1
"""Share of the vector's norm below which a change has no direction yet, see `objectives.orthogonal.squared_cosine`."""


class OrthogonalPenalty(Protocol):
    """One penalty between a vector and the changes of the weights that both know.

    Example:
        penalty = FullPenalty(policy.module, part, Vector(part.vector))
        loss.backward()
        metrics |= penalty.add_gradients()
    """

    def value(self) -> torch.Tensor:
        """The penalty before its weight, a scalar, differentiable."""
        ...

    def lie(self) -> dict[str, float]:
        """How what has changed lies to the vector, whatever the penalty makes of it: `vector_cosine`, the mean of the
        weights' cosines, and `vector_cosine_most`, the largest in magnitude; see `objectives.orthogonal.cosine`."""
        ...

    def add_gradients(self) -> dict[str, float]:
        """Add the weighted penalty's gradient to the parameters' `.grad`; returns it unweighted as
        `orthogonal_penalty`."""
        ...


class FullPenalty:
    """Of every weight of a network (by cosine: of its matrices), against a copy of what it is now."""

    def __init__(
        self, module: torch.nn.Module, part: CapabilityPart, vector: Mapping[str, np.ndarray]
    ) -> None:
        """Raises CapabilityError for a vector that shares no weight with the network, or has one of another shape."""
        # A gain or bias is no matrix (Eq. 6), and the direction of the few numbers of one would turn with every step.
        least = 1 if part.penalty == "elementwise" else 2
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad and p.dim() >= least}
        self._part = part
        self._gamma = _shared(vector, trained)
        self._weights = {name: trained[name] for name in self._gamma}
        self._squares = _squares(self._gamma)
        self._began = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def value(self) -> torch.Tensor:
        changes = {name: weight - self._began[name] for name, weight in self._weights.items()}
        if self._part.penalty == "elementwise":
            return elementwise_penalty(self._gamma, changes)
        return cosine_penalty(self._gamma, changes, floor=FLOOR, squares=self._squares)

    @torch.no_grad()
    def lie(self) -> dict[str, float]:
        return _lie(
            cosine(self._gamma[name], weight - self._began[name], squares=self._squares[name])
            for name, weight in self._weights.items()
        )

    @torch.no_grad()
    def add_gradients(self) -> dict[str, float]:
        weight_of_all = self._part.weight
        total = torch.zeros(())
        for name, weight in self._weights.items():
            gamma, delta, gradient = self._gamma[name], weight - self._began[name], gradient_of(weight)
            if self._part.penalty == "elementwise":
                value = add_elementwise_gradient(gradient, gamma, delta, weight=weight_of_all)
            else:
                share = 1 / len(self._weights)
                value = share * add_squared_cosine_gradient(
                    gradient,
                    gamma,
                    delta,
                    squares=self._squares[name],
                    floor=FLOOR,
                    weight=share * weight_of_all,
                )
            total = total.to(value.device) + value
        return {"orthogonal_penalty": total.item()}


class AdapterPenalty:
    """Of the layers that an adapter is on, from its factors alone. Layers of one shape are computed as a stack: on a
    GPU a kernel for each of some hundred layers would take longer than what it computes."""

    def __init__(
        self, module: torch.nn.Module, part: CapabilityPart, vector: Mapping[str, np.ndarray]
    ) -> None:
        """Raises CapabilityError as `FullPenalty`, and ValueError for the element-wise form, which needs the change
        multiplied out."""
        if part.penalty == "elementwise":
            raise ValueError("capability.penalty=elementwise is of whole weights; an adapter's is cosine")
        layers = {f"{name}.weight": layer for name, layer in adapters.adapted_layers(module)}
        by_shape: dict[str, list[str]] = {}
        for name in _common(vector, layers):
            by_shape.setdefault(str(list(_weight(layers[name]).shape)), []).append(name)
        self._part = part
        self._stacks = {}
        for shape, names in by_shape.items():
            gammas = (_gamma(vector, name, _weight(layers[name])) for name in names)
            self._stacks[shape] = _Stack([layers[name] for name in names], gammas)
        self._gamma = {shape: stack.gamma for shape, stack in self._stacks.items()}
        self._squares = {
            shape: torch.linalg.vector_norm(stack.gamma, dim=(-2, -1), dtype=torch.float32).square()
            for shape, stack in self._stacks.items()
        }

    def value(self) -> torch.Tensor:
        changes = {shape: stack.change() for shape, stack in self._stacks.items()}
        return cosine_penalty(self._gamma, changes, floor=FLOOR, squares=self._squares)

    @torch.no_grad()
    def lie(self) -> dict[str, float]:
        return _lie(
            cosine(stack.gamma, stack.change(), squares=self._squares[shape])
            for shape, stack in self._stacks.items()
        )

    @torch.no_grad()
    def add_gradients(self) -> dict[str, float]:
        layers = sum(len(stack) for stack in self._stacks.values())
        weight = self._part.weight / layers
        values = [
            stack.add_gradients(squares=self._squares[shape], weight=weight)
            for shape, stack in self._stacks.items()
        ]
        return {"orthogonal_penalty": torch.stack(values).sum().item() / layers}


class _Stack:
    """Adapted layers of one shape, and the vector's tensors of them."""

    def __init__(self, layers: Sequence[adapters.AdaptedLinear], gammas: Iterable[torch.Tensor]) -> None:
        """`gammas`, one a layer, are read one at a time: together they may be as large as the decoder."""
        self._bases = [_weight(layer) for layer in layers]
        self._factors = [adapters.factors(layer) for layer in layers]
        self._scaling = adapters.scaling(layers[0])
        self._dora = "m" in self._factors[0]
        self.gamma = self._bases[0].new_empty(len(layers), *self._bases[0].shape)
        for place, gamma in zip(self.gamma, gammas, strict=True):
            place.copy_(gamma)
        if self._dora:
            self._squares = torch.stack([_row_products(base, base) for base in self._bases])
            pairs = zip(self.gamma, self._bases, strict=True)
            self._along = torch.stack([_row_products(gamma, base) for gamma, base in pairs])

    def __len__(self) -> int:
        return len(self._bases)

    def change(self) -> LowRank | Rescaled:
        """Of all layers, a stack [G, m, n]."""
        low = LowRank(left=self._scaling * self._stacked("B"), right=self._stacked("A"))
        if not self._dora:
            return low
        projected = [
            (base @ own["A"].mT.to(base.dtype)).to(low.left.dtype)
            for base, own in zip(self._bases, self._factors, strict=True)
        ]
        return Rescaled(
            low=low,
            magnitude=self._stacked("m"),
            projected=torch.stack(projected),
            squares=self._squares,
            along=self._along,
        )

    def add_gradients(self, *, squares: torch.Tensor, weight: float) -> torch.Tensor:
        """Add `weight` times the gradient of the layers' squared cosines to their factors' `.grad`; their sum."""
        change = self.change()
        if isinstance(change, LowRank):
            value, left, right = low_rank_gradients(self.gamma, change, squares=squares, floor=FLOOR)
            found = {"B": self._scaling * left, "A": right}
        else:
            value, left, right, magnitude = rescaled_gradients(
                self.gamma, change, squares=squares, floor=FLOOR, times_base=self._times_base
            )
            found = {"B": self._scaling * left, "A": right, "m": magnitude}
        for name, gradients in found.items():
            own = [gradient_of(factors[name]) for factors in self._factors]
            torch._foreach_add_(own, list(gradients.unbind()), alpha=weight)  # one kernel, not one a layer
        return value.sum()

    def _stacked(self, name: str) -> torch.Tensor:
        return torch.stack([own[name] for own in self._factors])

    def _times_base(self, rows: torch.Tensor) -> torch.Tensor:
        products = [own.to(base.dtype) @ base for own, base in zip(rows, self._bases, strict=True)]
        return torch.stack(products).to(rows.dtype)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Its `.grad`, of zeros where it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _lie(cosines: Iterable[torch.Tensor]) -> dict[str, float]:
    found = torch.cat([one.flatten().float().cpu() for one in cosines])
    most = found[found.abs().argmax()].item()
    return {"vector_cosine": found.mean().item(), "vector_cosine_most": most}


def _weight(layer: adapters.AdaptedLinear) -> torch.Tensor:
    """Of the layer as it was before the adapter."""
    return layer.get_base_layer().get_parameter("weight").detach()


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a_i, b_i> by row, float32."""
    return torch.einsum("mn,mn->m", a.float(), b.float())


def _shared(vector: Mapping[str, np.ndarray], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The vector's tensors of these weights, as `_gamma` gives them."""
    return {name: _gamma(vector, name, weights[name]) for name in _common(vector, weights)}


def _common(vector: Iterable[str], weights: Collection[str]) -> list[str]:
    names = [name for name in vector if name in weights]
    if not names:
        raise CapabilityError(
            "the capability vector names none of the weights that are trained here; name another as capability.vector, "
            "or leave it out"
        )
    return names


def _gamma(vector: Mapping[str, np.ndarray], name: str, weight: torch.Tensor) -> torch.Tensor:
    """The vector's tensor of a weight, where that is and in its dtype, which is the one it was stored in."""
    gamma = to_tensor(vector[name])
    if gamma.shape != weight.shape:
        raise CapabilityError(
            f"the capability vector's {name} is {list(gamma.shape)}, expected {list(weight.shape)}: it was extracted "
            "from another network; name one of this policy as capability.vector, or leave it out"
        )
    return gamma.to(weight)


def _squares(gamma: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """||gamma||^2 by weight, float32."""
    return {name: torch.linalg.vector_norm(g, dtype=torch.float32).square() for name, g in gamma.items()}
