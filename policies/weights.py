"""A network's learned tensors out as NumPy, and a snapshot's in."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from trajectories.records import WeightSnapshot


def state_tensors(module: nn.Module) -> dict[str, np.ndarray]:
    """Copies of a network's learned tensors by canonical name: the names and dtypes of a `WeightSnapshot`.

    Raises ValueError while an adapter is attached: the base alone is not what such a network computes.
    """
    state = module.state_dict()
    for name in state:
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(f"{name} belongs to an adapter; merge it before taking the weights")
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


@torch.no_grad()
def load_snapshot(network: nn.Module, snapshot: WeightSnapshot) -> None:
    """Copy merged weights in; nothing is copied unless everything fits.

    Raises ValueError naming the first tensor that is missing, extra, mis-shaped, of another dtype or not finite.
    """
    own = network.state_dict()
    for name in own:
        if name not in snapshot.tensors:
            raise ValueError(f"snapshot {snapshot.version} lacks the tensor {name}")
    for name, array in snapshot.tensors.items():
        if name not in own:
            raise ValueError(f"snapshot {snapshot.version} has the tensor {name}, which this policy lacks")
        _check_tensor(f"snapshot {snapshot.version}: {name}", array, own[name])
    for name, array in snapshot.tensors.items():
        # A copy, for a snapshot may be a read-only view of shared memory.
        own[name].copy_(torch.from_numpy(array.copy()))


def _check_tensor(name: str, array: np.ndarray, expected: torch.Tensor) -> None:
    dtype = str(expected.dtype).removeprefix("torch.")
    if array.shape != tuple(expected.shape):
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(expected.shape)}")
    if array.dtype != dtype:
        raise ValueError(f"{name} is {array.dtype}, expected {dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has {int((~np.isfinite(array)).sum())} non-finite values")
