"""From a published OpenVLA checkpoint to a network that acts, without running any code the checkpoint brings.

A folder as on the Hugging Face Hub: config.json, tokenizer.json, weights as one model.safetensors or as shards with
model.safetensors.index.json, action statistics in config.json or, of a fine-tuned checkpoint, in
dataset_statistics.json. preprocessor_config.json, where there is one, has the pixel normalisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from policies.openvla.actions import ActionStatistics, OpenVLAActions, action_statistics
from policies.openvla.layout import OpenVLALayout, openvla_layout
from policies.openvla.network import OpenVLA
from policies.openvla.prompts import LlamaPrompts
from policies.weights.files import CONFIG, DTYPES, and_more, read_json, refuse_integers, refuse_quantised

TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"
STATISTICS = "dataset_statistics.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVLAFolder:
    """A checkpoint on the disk, found to be whole: everything but the numbers themselves."""

    folder: Path
    layout: OpenVLALayout
    prompts: LlamaPrompts
    norm_stats: Mapping[str, Any]
    """Data set -> its statistics."""
    files: tuple[str, ...]
    """Those that hold the tensors."""
    dtype: torch.dtype
    """What the weights are stored in."""

    @property
    def image_size(self) -> int:
        """Rows and columns of the images that the network sees."""
        return self.layout.towers[0].img_size

    def statistics(self, unnorm_key: str | None = None) -> ActionStatistics:
        """Of one data set; without a key, of the only one. ValueError for an unknown key, with its nearest."""
        return action_statistics(self.norm_stats, unnorm_key, where=str(self.folder))

    def actions(self, unnorm_key: str | None = None) -> OpenVLAActions:
        """Its action tokens in LIBERO's units. ValueError for an unknown key, or another robot's."""
        return OpenVLAActions(self.layout.actions, self.statistics(unnorm_key))

    def mask_id(self) -> int:
        """The first id behind the action tokens that is not the padding token's own: one of those that fill the
        vocabulary up. Raises ValueError where there is none."""
        layout = self.layout
        for free in range(layout.vocab_size, layout.text["vocab_size"]):
            if free != layout.pad_id:
                return free
        raise ValueError(
            f"{self.folder}: the vocabulary of {layout.text['vocab_size']} ids has none left for [MASK] behind the "
            f"{layout.vocab_size} of text and actions; expected a pad_to_multiple_of of 2 or more"
        )

    def network(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, filled: bool = True
    ) -> OpenVLA:
        """The network in eval mode, without a dtype in the one its weights are stored in; not `filled`, with memory
        for the weights alone, for a snapshot to fill.

        Tensors are copied in one by one, one file open at a time: memory holds the network and the tensor at hand.
        Raises ValueError on reaching one that is not finite.
        """
        network = self.layout.allocate(device=torch.device(device), dtype=dtype or self.dtype)
        if filled:
            fill(network, _tensors(self.folder, self.files))
        return network


def open_openvla(folder: str | Path) -> OpenVLAFolder:
    """Look a checkpoint folder through without reading its weights.

    Raises ValueError in one line for a file that is missing or broken, quantised weights, a layout that is not
    OpenVLA's, a tensor that is missing, extra or mis-shaped (the first, and how many more), another tokenizer, or no
    statistics.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    refuse_quantised(config, where=str(folder / CONFIG))
    layout = openvla_layout(config, where=str(folder / CONFIG))
    if (folder / PREPROCESSOR).is_file():
        layout = _with_pixels(layout, folder / PREPROCESSOR)
    norm_stats = _norm_stats(folder, config)
    prompts = LlamaPrompts(
        folder / TOKENIZER,
        vocab_size=layout.vocab_size,
        action_first_id=layout.actions.first_id,
        bos_id=layout.bos_id,
        pad_id=layout.pad_id,
    )
    files = _tensor_files(folder)
    shapes, dtypes = _headers(folder, files)
    check_tensors(layout, shapes, where=str(folder))
    return OpenVLAFolder(
        folder=folder,
        layout=layout,
        prompts=prompts,
        norm_stats=norm_stats,
        files=tuple(files),
        dtype=dtypes["language_model.lm_head.weight"],
    )


def check_tensors(layout: OpenVLALayout, shapes: Mapping[str, Shape], *, where: str) -> None:
    """Raises ValueError naming the first tensor that is missing, extra or mis-shaped, and how many more are."""
    expected = {name: tuple(tensor.shape) for name, tensor in layout.empty().state_dict().items()}
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    other = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    if missing:
        raise ValueError(f"{where} lacks the tensor {missing[0]}{and_more(missing)}")
    if extra:
        raise ValueError(f"{where} has the tensor {extra[0]}, which OpenVLA's layout lacks{and_more(extra)}")
    if other:
        name = other[0]
        raise ValueError(
            f"{where}: {name} has shape {list(shapes[name])}, expected {list(expected[name])}{and_more(other)}"
        )


@torch.no_grad()
def fill(network: OpenVLA, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the network, in its dtype and on its device, as they come. ValueError for one that is not
    finite."""
    own = network.state_dict()
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has {int((~tensor.isfinite()).sum())} non-finite values")
        own[name].copy_(tensor)


def _norm_stats(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A fine-tuned checkpoint's own statistics come before those that its config.json inherited."""
    file = folder / STATISTICS
    stats = read_json(file) if file.is_file() else config.get("norm_stats")
    if not isinstance(stats, Mapping) or not stats:
        raise ValueError(
            f"{folder} has no action statistics: neither {STATISTICS} nor norm_stats in {CONFIG}; its actions could "
            "not be scaled to the robot's units"
        )
    return stats


def _with_pixels(layout: OpenVLALayout, file: Path) -> OpenVLALayout:
    """The normalisation that the checkpoint was published with: bfloat16's roundings of ImageNet's, for one."""
    processor = read_json(file)
    rows: dict[str, Any] = {name: processor.get(name) for name in ("means", "stds")}
    for name, values in rows.items():
        lists = values if isinstance(values, list) else []
        if len(lists) != len(layout.towers) or not all(_is_colour(row) for row in lists):
            raise ValueError(
                f"{file}: {name} is {values}, expected three numbers for each of {len(layout.towers)} towers"
            )
    if not all(deviation > 0 for row in rows["stds"] for deviation in row):
        raise ValueError(f"{file}: stds is {rows['stds']}, expected numbers above 0")
    towers = [
        replace(tower, mean=tuple(rows["means"][i]), std=tuple(rows["stds"][i]))
        for i, tower in enumerate(layout.towers)
    ]
    return replace(layout, towers=tuple(towers))


def _is_colour(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(isinstance(x, float | int) for x in row)


def _tensor_files(folder: Path) -> dict[str, list[str] | None]:
    """File -> the tensors that the index says it has; one file alone has no index."""
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{folder / INDEX} has no weight_map, expected tensor -> file")
        for file in places.values():
            if Path(str(file)).name != file or not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}, of which {INDEX} speaks; download it again")
        return {file: [name for name in places if places[name] == file] for file in places.values()}
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    raise ValueError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}; weights in other forms (pickles) are not read, for they can "
        "run code"
    )


def _headers(
    folder: Path, files: Mapping[str, list[str] | None]
) -> tuple[dict[str, Shape], dict[str, torch.dtype]]:
    """Shape and dtype of every tensor; the data stays on the disk. Each file must hold what the index says."""
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file, listed in files.items():
        with _opened(folder / file) as tensors:
            held = list(tensors.keys())
            if listed is not None and set(held) != set(listed):
                odd = sorted(set(held) ^ set(listed))
                raise ValueError(f"{folder / file} and {INDEX} disagree about {odd[0]}{and_more(odd)}")
            for name in held:
                part = tensors.get_slice(name)
                refuse_integers(name, part.get_dtype(), where=str(folder / file))
                shapes[name] = tuple(part.get_shape())
                dtypes[name] = DTYPES[part.get_dtype()]
    return shapes, dtypes


def _tensors(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with _opened(folder / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping: it has keys alone)
                yield name, tensors.get_tensor(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}; download it again") from error
