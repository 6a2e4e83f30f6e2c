"""Published weights as policies, by recipe: `policy.checkpoint`.

| paradigm       | folder                                                       | decides                          |
|----------------|--------------------------------------------------------------|----------------------------------|
| autoregressive | OpenVLA as on the Hub                                        | one action at a time             |
|   parallel     | OpenVLA-OFT with the token head, one camera                  | a chunk, as long as trained for  |
| flow           | pi-0 or pi-0.5, of openpi, LeRobot or transformers           | the first actions of its horizon |
| diffusion      | OpenVLA whose vocabulary has an id left for [MASK]           | a chunk of any length            |
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from configs.policy import DiffusionPart, PolicyPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.modules import ModuleDecoder
from policies.diffusion import DiffusionPolicy
from policies.flow import FlowPolicy
from policies.openvla.checkpoint import OpenVLAFolder, open_openvla
from policies.openvla.images import openvla_view
from policies.openvla.inputs import OpenVLAInputs
from policies.parallel import ParallelPolicy
from policies.pi0.checkpoint import weight_names as pi0_names
from policies.pi0.folder import Pi0Folder, open_pi0
from policies.pi0.inputs import PublishedInputs
from policies.pi0.network import Pi0Network
from policies.protocol import Policy

LIBERO_SIDE = 256
"""Rows and columns at which the published policies' LIBERO data were rendered."""
LLAMA_STOP_ID = 2
"""`</s>`, which OpenVLA-OFT's sequences end with."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PublishedError(ValueError):
    """Published weights that cannot be used, or a setting that contradicts them; one line."""


def published_policy(part: PolicyPart, *, device: torch.device, filled: bool = True) -> Policy:
    """The policy of `part.checkpoint`; not `filled`, with memory for the weights alone, for a snapshot to fill.

    Raises PublishedError as `check_published` does, and for weights that are not finite.
    """
    folder, dtype = _folder(part), DTYPES[part.dtype]
    try:
        match part.paradigm:
            case "autoregressive" if part.decoding == "parallel":
                return openvla_parallel_policy(
                    folder,
                    chunk=part.chunk,
                    unnorm_key=part.unnorm_key,
                    device=device,
                    dtype=dtype,
                    filled=filled,
                )
            case "autoregressive":
                _one_action(part)
                return openvla_policy(
                    folder, unnorm_key=part.unnorm_key, device=device, dtype=dtype, filled=filled
                )
            case "diffusion":
                return openvla_diffusion_policy(
                    folder,
                    part=part.diffusion,
                    chunk=part.chunk,
                    unnorm_key=part.unnorm_key,
                    device=device,
                    dtype=dtype,
                    filled=filled,
                )
            case "flow":
                found = _pi0(part)
                inputs = PublishedInputs(found, part.flow)
                network = found.network(device=device, dtype=dtype, filled=filled)
                return FlowPolicy(network, inputs=inputs, part=part.flow, chunk=part.chunk)
    except ValueError as error:
        raise PublishedError(f"policy.checkpoint: {error}") from error


def openvla_policy(
    folder: str | Path,
    *,
    unnorm_key: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    filled: bool = True,
) -> AutoregressivePolicy:
    """The policy of a checkpoint folder: one action at a time, from the agentview alone.

    `unnorm_key` names the data set whose statistics scale the actions, and may be left out where there is one alone;
    `filled`: see `OpenVLAFolder.network`. Tokens are drawn from the action tokens alone;
    OpenVLA's own argmax is over the whole vocabulary (`greedy_over_vocabulary`), and the two agree whenever that finds
    an action token. Raises ValueError as `open_openvla` and `OpenVLAFolder.network` do.
    """
    found = open_openvla(folder)
    inputs = _openvla_inputs(found, unnorm_key, chunk=1)
    network = found.network(device=device, dtype=dtype, filled=filled)
    return AutoregressivePolicy(network, inputs=inputs, decoder=ModuleDecoder)


def openvla_parallel_policy(
    folder: str | Path,
    *,
    chunk: int,
    unnorm_key: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    filled: bool = True,
) -> ParallelPolicy:
    """A checkpoint of OpenVLA-OFT with the token head, one camera and no proprioception; `chunk` must be what it was
    trained for (LIBERO: 8), which no file says. Everything else as in `openvla_policy`."""
    found = open_openvla(folder)
    inputs = _openvla_inputs(found, unnorm_key, chunk=chunk)
    network = found.network(device=device, dtype=dtype, filled=filled)
    return ParallelPolicy(network, inputs=inputs, stop_token_id=LLAMA_STOP_ID)


def openvla_diffusion_policy(
    folder: str | Path,
    *,
    part: DiffusionPart,
    chunk: int,
    unnorm_key: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    filled: bool = True,
) -> DiffusionPolicy:
    """A checkpoint as a policy that unmasks chunks of `chunk` actions (Discrete Diffusion VLA, arXiv 2508.20072).

    [MASK] is `OpenVLAFolder.mask_id`; unless the checkpoint was trained on it, it means nothing before the supervised
    start. Everything else as in `openvla_policy`.
    """
    found = open_openvla(folder)
    inputs, mask_id = _openvla_inputs(found, unnorm_key, chunk=chunk), found.mask_id()
    network = found.network(device=device, dtype=dtype, filled=filled)
    return DiffusionPolicy(network, inputs=inputs, part=part, mask_id=mask_id)


def check_published(part: PolicyPart, *, image_size: int) -> int:
    """Look `part.checkpoint` through without reading its weights; returns their bytes in `part.dtype`.

    Raises PublishedError in one line for a folder, a file, a tensor, a tokenizer or statistics that are missing or do
    not fit, quantised weights, an unknown unnorm_key, a setting that contradicts the checkpoint, or cameras of
    `image_size` pixels a side, fewer than the checkpoint's own images have.
    """
    try:
        network, side = _empty(part)
        _large_enough(_folder(part), side, image_size)
    except ValueError as error:
        raise PublishedError(f"policy.checkpoint: {error}") from error
    return sum(p.numel() for p in network.parameters()) * DTYPES[part.dtype].itemsize


def published_shapes(part: PolicyPart) -> dict[str, tuple[int, ...]]:
    """Of the network's weights by name. Raises ValueError as `check_published`."""
    network, _ = _empty(part)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _empty(part: PolicyPart) -> tuple[torch.nn.Module, int]:
    """The network without memory, and the rows and columns of its images, once the folder is found to be whole."""
    if part.paradigm == "flow":
        config = _pi0(part).config
        with torch.device("meta"):
            return Pi0Network(config), config.vision.image
    found = open_openvla(_folder(part))
    found.actions(part.unnorm_key)
    if part.paradigm == "diffusion":
        found.mask_id()
    elif part.decoding == "sequential":
        _one_action(part)
    return found.layout.empty(), found.image_size


def weight_names(part: PolicyPart) -> dict[str, str]:
    """What the network calls the weights of `part.checkpoint` that go by other names there, by those: flow alone has
    layouts of other names. Raises PublishedError as `check_published`."""
    if part.checkpoint is None or part.paradigm != "flow":
        return {}
    try:
        return pi0_names(part.checkpoint, _pi0(part).config)
    except ValueError as error:
        raise PublishedError(f"policy.checkpoint: {error}") from error


def located(part: PolicyPart) -> PolicyPart:
    """The same part with absolute paths: what an actor needs, whose working directory may be another."""
    paths = {"checkpoint": part.checkpoint, "norm_stats": part.norm_stats}
    return part.model_copy(
        update={name: str(Path(path).resolve()) for name, path in paths.items() if path is not None}
    )


def _folder(part: PolicyPart) -> Path:
    if part.checkpoint is None:
        raise ValueError("this part names no checkpoint")
    return Path(part.checkpoint)


def _openvla_inputs(found: OpenVLAFolder, unnorm_key: str | None, *, chunk: int) -> OpenVLAInputs:
    side = found.image_size
    return OpenVLAInputs(
        prompts=found.prompts,
        actions=found.actions(unnorm_key),
        chunk=chunk,
        image_size=side,
        view=partial(openvla_view, size=side),
    )


def _one_action(part: PolicyPart) -> None:
    if part.chunk != 1:
        raise ValueError(
            f"policy.chunk is {part.chunk}; a published OpenVLA decides one action at a time: set policy.chunk=1, "
            "or policy.decoding=parallel for OpenVLA-OFT's"
        )


def _large_enough(folder: Path, side: int, image_size: int) -> None:
    if image_size < side:
        raise ValueError(
            f"environment.image_size is {image_size}, the images of {folder} have {side} rows and columns, "
            f"and it has seen no enlarged ones; set environment.image_size to {side} or more (published LIBERO data: "
            f"{LIBERO_SIDE})"
        )


def _pi0(part: PolicyPart) -> Pi0Folder:
    found = open_pi0(_folder(part), norm_stats=part.norm_stats)
    version = "pi0.5" if found.config.adaptive else "pi0"
    if part.flow.version != version:
        raise ValueError(
            f"{found.folder} is {version} and policy.flow.version is {part.flow.version}; set "
            f"policy.flow.version={version}"
        )
    if part.chunk > found.config.horizon:
        raise ValueError(
            f"policy.chunk is {part.chunk}, {found.folder} makes {found.config.horizon} actions at once; lower it"
        )
    return found
