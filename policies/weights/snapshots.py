"""A network's learned tensors out as NumPy, and a snapshot's in. bfloat16 travels as its bits, uncast."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from trajectories.bfloat16 import BFLOAT16, is_finite
from trajectories.records import WeightSnapshot


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy in the host's memory, in the tensor's dtype (bfloat16: `trajectories.bfloat16`)."""
    tensor = tensor.detach().to("cpu", copy=True)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_array`. It shares memory with the array, unless that is read-only or not in C order."""
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = array.copy(order="C")
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def state_tensors(module: nn.Module) -> dict[str, np.ndarray]:
    """Copies of a network's learned tensors by canonical name: the names and dtypes of a `WeightSnapshot`.

    Raises ValueError while an adapter is attached: the base alone is not what such a network computes.
    """
    state = module.state_dict()
    for name in state:
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(f"{name} belongs to an adapter; merge it before taking the weights")
    return {name: to_array(tensor) for name, tensor in state.items()}


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
        own[name].copy_(to_tensor(array))


def _check_tensor(name: str, array: np.ndarray, expected: torch.Tensor) -> None:
    dtype = str(expected.dtype).removeprefix("torch.")
    if array.shape != tuple(expected.shape):
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(expected.shape)}")
    held = "bfloat16" if array.dtype == BFLOAT16 else str(array.dtype)
    if held != dtype:
        raise ValueError(f"{name} is {held}, expected {dtype}")
    finite = is_finite(array)
    if not finite.all():
        raise ValueError(f"{name} has {int((~finite).sum())} non-finite values")
