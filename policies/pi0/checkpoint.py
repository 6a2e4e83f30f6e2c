"""Published checkpoints of pi-0 and pi-0.5 as weights of `Pi0Network`.

Three layouts of one `model.safetensors`, told apart by their names:

* openpi's PyTorch port, `paligemma_with_expert.paligemma.model.*`;
* LeRobot's fine-tunes, the same names behind `model.` (lerobot/pi0_base and pi05_base come in openpi's);
* transformers' `PI0ForConditionalGeneration`, `model.vlm.*` and `model.dit.*`; what its `save_pretrained` writes has
  openpi's names, with `language_model.model.`.

In each, SigLIP's tensors may or may not lie under `vision_model.` (transformers 5 dropped that level). The language
model's head is tied to its embedding, and safetensors may keep either name; the expert's head or embedding has no
use. Anything else that is missing, extra or of another shape is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.initialization import no_init_weights

from policies.pi0.network import Pi0Network
from policies.pi0.sizes import Pi0Config
from policies.weights.files import and_more, refuse_integers

WEIGHTS_FILE = "model.safetensors"
EMBEDDING = "vlm.language_model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a checkpoint names what `Pi0Network` calls `vlm.*`, `expert.*`, `suffix.*` and `action_out_proj.*`."""

    vlm: str
    expert: str
    suffix: str = ""
    head: str = ""
    """Before `action_out_proj`."""
    vision_level: str = ""
    """SigLIP's level under `vision_tower.`."""
    tied: str = ""
    """The language model's head, another name of its embedding."""
    unused: tuple[str, ...] = ()
    """Tensors that no output depends on."""

    def key(self, name: str) -> str:
        """The checkpoint's key of one of `Pi0Network`'s tensors."""
        part, _, rest = name.partition(".")
        stem = {"vlm": self.vlm, "expert": self.expert, "suffix": self.suffix}.get(part)
        if stem is None:
            return self.head + name
        if part == "vlm" and rest.startswith("vision_tower."):
            rest = rest.replace("vision_tower.", f"vision_tower.{self.vision_level}", 1)
        return stem + rest


def _openpi_layout(prefix: str) -> Layout:
    joint = f"{prefix}paligemma_with_expert."
    return Layout(
        vlm=f"{joint}paligemma.model.",
        expert=f"{joint}gemma_expert.model.",
        suffix=prefix,
        head=prefix,
        vision_level="vision_model.",
        tied=f"{joint}paligemma.lm_head.weight",
        unused=(f"{joint}gemma_expert.lm_head.weight", f"{joint}gemma_expert.model.embed_tokens.weight"),
    )


LAYOUTS: Mapping[str, Layout] = {
    "openpi": _openpi_layout(""),
    "LeRobot": _openpi_layout("model."),
    "transformers": Layout(
        vlm="model.vlm.",
        expert="model.dit.",
        suffix="embed_action_time.",
        unused=("model.dit.embed_tokens.weight",),
    ),
}


def load_pi0(
    path: str | Path, config: Pi0Config, *, dtype: torch.dtype = torch.float32, filled: bool = True
) -> Pi0Network:
    """A network with the weights of a checkpoint, for inference until told otherwise (`eval`); not `filled`, with
    memory for them alone, for a snapshot to fill. See `read_weights`."""
    with no_init_weights():
        network = Pi0Network(config)
    for parameter in network.parameters():
        # Buffers, the rotary frequencies among them, are no weights and stay float32.
        parameter.data = parameter.data.to(dtype)
    network.eval()
    if filled:
        read_weights(network, path)
    return network


@dataclass(frozen=True, kw_only=True, slots=True)
class Headers:
    """Names, shapes and dtypes of a checkpoint's tensors."""

    file: Path
    layout: Layout
    slices: Mapping[str, Any]
    """Key -> safetensors' slice, which says shape and dtype without reading."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of what `Pi0Network` calls `name`; None where there is no such tensor."""
        for key, part in self.slices.items():
            if _plain(key) == _plain(self.layout.key(name)):
                return tuple(part.get_shape())
        if name == EMBEDDING and self.layout.tied in self.slices:
            return tuple(self.slices[self.layout.tied].get_shape())
        return None

    def network_names(self) -> set[str]:
        """What `Pi0Network` calls the tensors, of those under its language model, vision tower and expert."""
        names = set()
        for part, stem in (("vlm", self.layout.vlm), ("expert", self.layout.expert)):
            plain = _plain(stem)
            names |= {
                f"{part}.{_plain(key)[len(plain) :]}" for key in self.slices if _plain(key).startswith(plain)
            }
        return names


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, Headers]]:
    """A safetensors file, or the `model.safetensors` of a folder: the archive and its headers.

    Raises ValueError in one line for a file that is missing or cannot be read, tensors of integers, or names of no
    known layout.
    """
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is missing; expected a checkpoint's weights there")
    try:
        archive = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    with archive:
        slices = {key: archive.get_slice(key) for key in archive.keys()}  # noqa: SIM118  an archive is no mapping
        layout = _layout(file, slices)
        for key, part in slices.items():
            refuse_integers(key, part.get_dtype(), where=str(file))
        yield archive, Headers(file=file, layout=layout, slices=slices)


def weight_names(path: str | Path, config: Pi0Config) -> dict[str, str]:
    """Key in the file -> name in the network, found without reading a tensor. Raises ValueError as `read_weights`."""
    with torch.device("meta"):
        wanted = _shapes(Pi0Network(config))
    with opened(path) as (_, headers):
        return {key: name for name, key in _sources(headers, wanted).items()}


def check_weights(path: str | Path, config: Pi0Config) -> None:
    """Raises ValueError as `read_weights` does, of what can be seen without reading a tensor."""
    weight_names(path, config)


def read_weights(network: Pi0Network, path: str | Path) -> None:
    """Fill a network from a safetensors file, or from the `model.safetensors` of a folder, casting to its dtypes.

    Raises ValueError in one line: a file that cannot be read, names of no known layout, a head that differs from the
    embedding it is tied to, or the first tensor that is missing, extra, mis-shaped or not of floats and how many more
    there are; nothing is written then. Raises it, too, on reaching a tensor that is not finite.
    """
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} lies on the meta device; weights need a network that has memory")
    with opened(path) as (archive, headers):
        file, tied = headers.file, headers.layout.tied
        sources = _sources(headers, _shapes(network))
        if tied in headers.slices and not torch.equal(
            archive.get_tensor(tied), archive.get_tensor(sources[EMBEDDING])
        ):
            raise ValueError(f"{file}: {tied} differs from {sources[EMBEDDING]}, expected them tied")
        for name, tensor in state.items():
            source = archive.get_tensor(sources[name])
            if not source.isfinite().all():
                raise ValueError(
                    f"{file}: {sources[name]} has {int((~source.isfinite()).sum())} non-finite values"
                )
            tensor.copy_(source)


def _shapes(network: Pi0Network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _layout(file: Path, keys: Iterable[str]) -> Layout:
    keys = list(keys)
    for layout in LAYOUTS.values():
        if any(key.startswith((layout.vlm, layout.expert)) for key in keys):
            return layout
    known = ", ".join(f"{layout.vlm}* ({name})" for name, layout in LAYOUTS.items())
    holds = f"{keys[0]!r} and {len(keys) - 1} more" if keys else "nothing"
    raise ValueError(f"{file} is no checkpoint of pi-0 or pi-0.5: it holds {holds}, expected {known}")


def _sources(headers: Headers, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in the network -> key in the file. Raises ValueError if they do not match."""
    found, layout = headers.slices, headers.layout
    sources: dict[str, str] = {}
    problems = []
    left: dict[str, str] = {}
    for key in found:
        if _plain(key) in left:
            problems.append(f"{key} and {left[_plain(key)]} are one tensor")
        left.setdefault(_plain(key), key)
    for name, shape in wanted.items():
        key = left.pop(_plain(layout.key(name)), "")
        if not key and name == EMBEDDING and layout.tied in found:
            key = layout.tied
        if not key:
            problems.append(f"{layout.key(name)} is missing")
        elif tuple(found[key].get_shape()) != shape:
            problems.append(f"{key} has shape {found[key].get_shape()}, expected {list(shape)}")
        else:
            sources[name] = key
    harmless = {layout.tied, *layout.unused}
    problems += [f"{key} is not of this network" for key in left.values() if key not in harmless]
    if problems:
        raise ValueError(
            f"{headers.file}: {problems[0]}{and_more(problems)}; expected the tensors of {_described(wanted)}"
        )
    return sources


def _plain(key: str) -> str:
    """A key without the levels that only some versions write."""
    return key.replace("vision_tower.vision_model.", "vision_tower.").replace(
        "language_model.model.", "language_model."
    )


def _described(wanted: Iterable[str]) -> str:
    return "pi-0.5" if "suffix.time_mlp_in.weight" in wanted else "pi-0"
