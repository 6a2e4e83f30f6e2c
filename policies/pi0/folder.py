"""A folder with a published pi-0 or pi-0.5: its sizes, found without reading its weights, and what surrounds them.

model.safetensors in one of the layouts of `policies.pi0.checkpoint`; config.json as openpi's converter, LeRobot or
transformers writes it; PaliGemma's tokenizer.json; openpi's norm_stats.json, in the folder or under its assets, or
LeRobot's policy_preprocessor.json with the file of statistics that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policies.pi0.checkpoint import EMBEDDING, Headers, check_weights, load_pi0, opened
from policies.pi0.network import Pi0Network
from policies.pi0.norm_stats import NormStats, read_norm_stats
from policies.pi0.prompts import PaligemmaPrompts
from policies.pi0.sizes import GEMMA_2B, SO400M, Pi0Config, StreamSize, VisionSize
from policies.weights.files import CONFIG, read_json, refuse_quantised
from trajectories.records import ACTION_DIM, PROPRIO_DIM

HORIZON_KEYS = ("action_horizon", "chunk_size")
"""openpi's and LeRobot's (and transformers') name of the actions made at once, which weights do not tell."""
MOST_ACTIONS = 1000
"""Made at once; published policies make 10 to 50."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pi0Folder:
    """A checkpoint on the disk, found to be whole: everything but the numbers themselves."""

    folder: Path
    config: Pi0Config
    prompts: PaligemmaPrompts
    stats: Mapping[str, NormStats]
    """Of `state` and `actions`."""

    def network(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, filled: bool = True
    ) -> Pi0Network:
        """The network in eval mode; not `filled`, with memory for the weights alone, for a snapshot to fill. Raises
        ValueError on reaching a tensor that is not finite, or a head that differs from the embedding it is tied to."""
        return load_pi0(self.folder, self.config, dtype=dtype, filled=filled).to(device)


def open_pi0(folder: str | Path, *, norm_stats: str | Path | None = None) -> Pi0Folder:
    """Look a checkpoint folder through without reading its weights; `norm_stats` is a file or folder elsewhere.

    Raises ValueError in one line for a file that is missing or broken, quantised weights, a tensor that is missing,
    extra or mis-shaped, no statistics or of another robot, or another tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with {CONFIG} and a checkpoint's weights")
    settings = read_json(folder / CONFIG)
    refuse_quantised(settings, where=str(folder / CONFIG))
    with opened(folder) as (_, headers):
        config = _sizes(headers, settings)
    check_weights(folder, config)
    where = folder if norm_stats is None else Path(norm_stats)
    stats = read_norm_stats(where, quantile=config.adaptive)
    for name, dims in (("state", PROPRIO_DIM), ("actions", ACTION_DIM)):
        if len(stats[name].mean) < dims:
            raise ValueError(
                f"{where}: norm_stats.{name} are of {len(stats[name].mean)} dimensions, LIBERO's robot has {dims}"
            )
    return Pi0Folder(
        folder=folder,
        config=config,
        prompts=PaligemmaPrompts(folder, vocab_size=config.vocab),
        stats=stats,
    )


def _sizes(headers: Headers, settings: Mapping[str, Any]) -> Pi0Config:
    """Sizes from the tensors' shapes, and from config.json what shapes do not tell: heads and horizon. Raises
    ValueError naming the file and what is missing or does not fit."""
    adaptive = headers.shape("suffix.time_mlp_in.weight") is not None
    vlm = _part(settings, "vlm_config")
    head_dim = _whole(_part(vlm, "text_config"), "head_dim", GEMMA_2B.head_dim)
    vision_heads = _whole(_part(vlm, "vision_config"), "num_attention_heads", SO400M.heads)
    action_dim = _shape(headers, "action_out_proj.weight")[0]
    horizon = next((settings[key] for key in HORIZON_KEYS if key in settings), None)
    if not isinstance(horizon, int) or isinstance(horizon, bool) or not 1 <= horizon <= MOST_ACTIONS:
        raise ValueError(
            f"{headers.file.parent / CONFIG}: {' or '.join(HORIZON_KEYS)} is {horizon!r}, expected how many actions "
            "the network makes at once (pi-0: 50; pi-0.5 fine-tuned on LIBERO: 10)"
        )
    try:
        return Pi0Config(
            adaptive=adaptive,
            vision=_vision(headers, vision_heads),
            vlm=_stream(headers, "vlm.language_model", head_dim),
            expert=_stream(headers, "expert", head_dim),
            vocab=_shape(headers, EMBEDDING)[0],
            horizon=horizon,
            action_dim=action_dim,
            state_dim=action_dim if adaptive else _shape(headers, "suffix.state_proj.weight")[1],
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(headers.file)) else f"{headers.file}: {text}") from error


def _vision(headers: Headers, heads: int) -> VisionSize:
    stem = "vlm.vision_tower."
    width, _, patch, _ = _shape(headers, f"{stem}embeddings.patch_embedding.weight", rank=4)
    patches = _shape(headers, f"{stem}embeddings.position_embedding.weight")[0]
    return VisionSize(
        width=width,
        depth=_depth(headers, f"{stem}encoder.layers"),
        mlp=_shape(headers, f"{stem}encoder.layers.0.mlp.fc1.weight")[0],
        heads=heads,
        image=round(patches**0.5) * patch,
        patch=patch,
    )


def _stream(headers: Headers, stem: str, head_dim: int) -> StreamSize:
    mlp, width = _shape(headers, f"{stem}.layers.0.mlp.gate_proj.weight")
    queries, keys = (_shape(headers, f"{stem}.layers.0.self_attn.{x}_proj.weight")[0] for x in "qk")
    for rows in (queries, keys):
        if rows % head_dim:
            raise ValueError(
                f"{stem} has attention of {rows} features, expected a multiple of head_dim {head_dim}"
            )
    return StreamSize(
        width=width,
        depth=_depth(headers, f"{stem}.layers"),
        mlp=mlp,
        heads=queries // head_dim,
        kv_heads=keys // head_dim,
        head_dim=head_dim,
    )


def _depth(headers: Headers, stem: str) -> int:
    """One more than the highest layer's number, so that one that is missing in between is found to be missing."""
    names = {name for name in headers.network_names() if name.startswith(f"{stem}.")}
    numbers = [int(name[len(stem) + 1 :].split(".")[0]) for name in names]
    return max(numbers, default=0) + 1


def _shape(headers: Headers, name: str, *, rank: int = 2) -> tuple[int, ...]:
    shape = headers.shape(name)
    if shape is None:
        raise ValueError(f"{headers.file}: {headers.layout.key(name)} is missing")
    if len(shape) != rank:
        raise ValueError(
            f"{headers.file}: {headers.layout.key(name)} has shape {list(shape)}, expected {rank} dimensions"
        )
    return shape


def _part(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = settings.get(name)
    return part if isinstance(part, Mapping) else {}


def _whole(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{CONFIG}: {name} is {value!r}, expected a whole number such as {default}")
    return value
