"""A golden fixture on disk, and what is compared with it.

A fixture is a folder with `config.json` (`family` and every size a loader needs), `inputs.safetensors`,
`expected.safetensors` and, where a network is involved, `weights.safetensors` under the official key names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

TOLERANCE = 1e-4
"""Largest absolute difference that passes, in fp32."""


class FixtureError(ValueError):
    """A fixture that cannot be read, in one line: what, the value, what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixture:
    """One folder. Tensors are clones: unaligned memory maps alone move fp32 results by 6e-6."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """Official key names; empty for pure functions."""
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]

    def setting(self, name: str) -> Any:
        """A required entry of config.json. Raises FixtureError naming it."""
        if name not in self.config:
            raise FixtureError(f"{self.folder / 'config.json'} lacks {name!r}; it has {sorted(self.config)}")
        return self.config[name]

    def count(self, name: str, default: int) -> int:
        """An entry of config.json that counts something. Raises FixtureError naming it for what is no count."""
        count = self.config.get(name, default)
        if not isinstance(count, int) or count < 1:
            raise FixtureError(
                f"{self.folder / 'config.json'}: {name} is {count!r}, expected a whole number of 1 or more"
            )
        return count

    def input(self, name: str) -> torch.Tensor:
        """A required input. Raises FixtureError naming it."""
        if name not in self.inputs:
            raise FixtureError(f"{self.folder / 'inputs.safetensors'} lacks the tensor {name!r}")
        return self.inputs[name]

    def ids(self, name: str, vocabulary: int, *, also: int | None = None) -> torch.Tensor:
        """A required input of token ids. Raises FixtureError for one that is neither in 0 .. vocabulary - 1 nor
        `also`."""
        ids = self.input(name)
        odd = ids[((ids < 0) | (ids >= vocabulary)) & (ids != (-1 if also is None else also))]
        if odd.numel():
            raise FixtureError(
                f"{self.folder / 'inputs.safetensors'}: {name} holds the token {int(odd[0])}, "
                f"expected 0 .. {vocabulary - 1}"
            )
        return ids

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        """Tensors of a further file, e.g. `adapters.safetensors`. Raises FixtureError naming it."""
        return _tensors(self.folder / file, required=True)


@dataclass(frozen=True, slots=True)
class Output:
    """What this implementation computes for one expected tensor."""

    value: torch.Tensor
    where: torch.Tensor | None = None
    """bool, broadcastable to `value`: the places that mean something; none: all of them."""
    relative: float = 0.0
    """Also passes within this share of an expected value of 1 and more (large losses)."""
    slack: float = 0.0
    """Also passes within this of any value: what float32's last bits come to where something large magnifies them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One compared tensor."""

    name: str
    difference: float
    """Largest absolute difference; NaN when shapes differ or a value is not finite."""
    passed: bool
    compared: bool = True
    """False: nothing was computed for it, and something had to be."""
    note: str = ""


Outputs = Mapping[str, Output]
"""Expected tensor's name -> what was computed for it."""


def _nothing_more(fixture: Fixture) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family module gives: `compute` and the outputs without which a pass proves too little."""

    compute: Callable[[Fixture], Outputs]
    """Fixture -> Outputs. Raises ValueError in one line for weights, settings or inputs that do not fit."""
    required: tuple[str, ...] = field(default=())
    """fnmatch patterns, each of which at least one compared tensor must match; ` or ` between two of them: either."""
    required_by: Callable[[Fixture], tuple[str, ...]] = _nothing_more
    """Further patterns, which depend on the fixture."""


def load_fixture(folder: str | Path) -> Fixture:
    """Read a fixture. Raises FixtureError naming the file that is missing or cannot be read."""
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FixtureError(f"{folder} is not a fixture: it has no config.json")
    try:
        config = json.loads(config_file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FixtureError(f"{config_file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FixtureError(f"{config_file} holds a {type(config).__name__}, expected an object")
    return Fixture(
        folder=folder,
        config=config,
        weights=_tensors(folder / "weights.safetensors", required=False),
        inputs=_tensors(folder / "inputs.safetensors", required=True),
        expected=_tensors(folder / "expected.safetensors", required=True),
    )


def _tensors(file: Path, *, required: bool) -> dict[str, torch.Tensor]:
    if not file.is_file():
        if required:
            raise FixtureError(f"{file} is missing")
        return {}
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise FixtureError(f"{file} cannot be read: {error}") from error
