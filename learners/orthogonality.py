"""Keeps training apart from a capability vector: the gradient of a penalty on what has changed since it began.

CapVector, arXiv 2605.10903, Eq. 8: L = L_action + lambda L_orth. The objectives are in `objectives.orthogonal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch

from configs.supervised import CapabilityPart
from objectives.orthogonal import LowRank, Matrix, Rescaled, cosine_penalty, elementwise_penalty
from policies.weights import adapters

_LITTLE = 1e-3
"""Share of a weight's norm below which its change has no direction yet, see `objectives.orthogonal.squared_cosine`."""


class OrthogonalPenalty:
    """One penalty between a vector and the changes of the weights that both know.

    Example:
        penalty = full_penalty(policy.module, part, load_vector(part.vector))
        loss.backward()
        metrics |= penalty.add_gradients()
    """

    def __init__(
        self,
        part: CapabilityPart,
        gamma: Mapping[str, torch.Tensor],
        changes: Callable[[], dict[str, Matrix]],
        norms: Mapping[str, float],
    ) -> None:
        """`changes` gives what has changed by weight, differentiable; `norms` of the weights themselves.

        Raises ValueError for a vector that shares no weight with them, or has one of another shape.
        """
        present = changes()
        shared = [name for name in gamma if name in present]
        if not shared:
            raise ValueError("the capability vector names none of the weights that are trained here")
        for name in shared:
            if gamma[name].shape != present[name].shape:
                raise ValueError(
                    f"the capability vector's {name} is {list(gamma[name].shape)}, expected "
                    f"{list(present[name].shape)}: it was extracted from another network"
                )
        self._part = part
        self._gamma = {name: gamma[name] for name in shared}
        self._changes = changes
        self._floors = {name: (_LITTLE * norms[name]) ** 2 for name in shared}

    def value(self) -> torch.Tensor:
        """The penalty before its weight, a scalar, differentiable."""
        delta = self._changes()
        if self._part.penalty == "elementwise":
            return elementwise_penalty(self._gamma, cast(Mapping[str, torch.Tensor], delta))
        return cosine_penalty(self._gamma, delta, floors=self._floors)

    def add_gradients(self) -> dict[str, float]:
        """Add the weighted penalty's gradient to the parameters' `.grad`; returns it unweighted as
        `orthogonal_penalty`."""
        value = self.value()
        (self._part.weight * value).backward()
        return {"orthogonal_penalty": value.item()}


def full_penalty(
    module: torch.nn.Module, part: CapabilityPart, vector: Mapping[str, np.ndarray]
) -> OrthogonalPenalty:
    """Of every weight of a network, against a copy of what it is now. Raises ValueError as `OrthogonalPenalty`."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    began = {name: p.detach().clone() for name, p in trained.items() if name in vector}

    def changes() -> dict[str, Matrix]:
        return {name: trained[name] - start for name, start in began.items()}

    return OrthogonalPenalty(part, _on(trained, vector), changes, _norms(began))


def adapter_penalty(
    module: torch.nn.Module, part: CapabilityPart, vector: Mapping[str, np.ndarray]
) -> OrthogonalPenalty:
    """Of the layers that an adapter is on, from its factors alone. Raises ValueError as `OrthogonalPenalty`, and for
    the element-wise form, which needs the change multiplied out."""
    if part.penalty == "elementwise":
        raise ValueError("capability.penalty=elementwise is of whole weights; an adapter's is cosine")
    layers = {f"{name}.weight": layer for name, layer in adapters.adapted_layers(module)}
    bases = {name: layer.get_base_layer().get_parameter("weight") for name, layer in layers.items()}

    def changes() -> dict[str, Matrix]:
        found: dict[str, Matrix] = {}
        for name, layer in layers.items():
            factors = adapters.factors(layer)
            low = LowRank(left=adapters.scaling(layer) * factors["B"], right=factors["A"])
            found[name] = low
            if "m" in factors:
                found[name] = Rescaled(base=bases[name].float(), low=low, magnitude=factors["m"])
        return found

    return OrthogonalPenalty(part, _on(bases, vector), changes, _norms(bases))


def _on(weights: Mapping[str, torch.Tensor], vector: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The vector's tensors of these weights, where they are, float32."""
    return {
        name: torch.from_numpy(array).to(weights[name].device)
        for name, array in vector.items()
        if name in weights
    }


def _norms(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: torch.linalg.vector_norm(w.detach().float()).item() for name, w in weights.items()}
