"""Capability vectors: what an auxiliary objective taught beyond plain fine-tuning, as a difference of weights.

CapVector, arXiv 2605.10903. From two fine-tunings of one base on the same few tasks, one plain and one with an
auxiliary objective, gamma = theta_aux - theta_sft (Eq. 3); theta_meta = theta_pre + alpha gamma (Eq. 4) is where
later fine-tunings begin. A vector is a folder of safetensors files beside `capability.json`, which says what it was
made of, and is refused on any other base. Tensors pass through one by one.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.weights.shards import ShardFolder, Stored, write_shard
from trajectories.bfloat16 import is_finite, narrow, widen
from trajectories.hashing import root_hash, tensor_hash

MANIFEST = "capability.json"
FORMAT = 2
BLOCK = 1 << 22
"""Numbers that are widened to float32 at once."""


class CapabilityError(ValueError):
    """Weights or a vector that do not go together; one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a vector lies to what plain fine-tuning changed, in one weight or in all."""

    gamma_norm: float
    """||gamma||, Frobenius."""
    sft_norm: float
    """||theta_sft - theta_pre||."""
    inner: float
    """<gamma, theta_sft - theta_pre>."""

    @property
    def ratio(self) -> float:
        """||gamma|| / ||delta_sft||; infinite where fine-tuning changed nothing."""
        return self.gamma_norm / self.sft_norm if self.sft_norm else math.inf

    @property
    def cosine(self) -> float:
        """cos(gamma, delta_sft); 0 where either is zero."""
        scale = self.gamma_norm * self.sft_norm
        return self.inner / scale if scale else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a vector was made of."""

    base_hash: str
    """Content hash of theta_pre (`trajectories.hashing`)."""
    sft_hash: str
    aux_hash: str
    gamma_hash: str
    """Of the vector itself."""
    recipes: Mapping[str, str]
    """SHA-256 of the recipe of `base`, `sft` and `aux`, each where the weights lie in a run folder."""
    layers: Mapping[str, Geometry]
    """By weight."""

    def total(self) -> Geometry:
        """All weights as one vector."""
        layers = self.layers.values()
        return Geometry(
            gamma_norm=math.sqrt(sum(layer.gamma_norm**2 for layer in layers)),
            sft_norm=math.sqrt(sum(layer.sft_norm**2 for layer in layers)),
            inner=sum(layer.inner for layer in layers),
        )


def extract(
    base: str | Path,
    *,
    sft: str | Path,
    aux: str | Path,
    out: str | Path,
) -> Manifest:
    """Write gamma = theta_aux - theta_sft (Eq. 3) to the folder `out`, in the dtype and the files of `base`.

    Only weights that all three hold in equal shape have a gamma; what an auxiliary objective added (a projector)
    stays behind. Differences are taken in float32. Raises CapabilityError where they share none, for a shape that
    differs, a weight that is not finite, or an `out` that exists.
    """
    folders = {"base": open_weights(base), "sft": open_weights(sft), "aux": open_weights(aux)}
    names = [
        n for n in folders["base"].tensors if n in folders["sft"].tensors and n in folders["aux"].tensors
    ]
    if not names:
        raise CapabilityError(f"{base}, {sft} and {aux} share no weight by name; expected runs of one base")
    for name in names:
        shapes = {who: folder.tensors[name].shape for who, folder in folders.items()}
        if len(set(shapes.values())) > 1:
            raise CapabilityError(f"{name} has shapes {shapes}; expected runs of one base")
    hashes: dict[str, dict[str, str]] = {"base": {}, "sft": {}, "aux": {}}
    layers: dict[str, Geometry] = {}
    gammas: dict[str, str] = {}

    def gamma_of(name: str) -> np.ndarray:
        found = {who: folder.read(name) for who, folder in folders.items()}
        for who, array in found.items():
            require_finite(array, name, where=str(folders[who].path))
            hashes[who][name] = tensor_hash(array)
        kept, layers[name] = _difference(**found)
        require_finite(kept, name, where=f"{aux} - {sft}")
        gammas[name] = tensor_hash(kept)
        return kept

    with staged(Path(out)) as staging:
        write_like(folders["base"], names, staging, gamma_of)
        for who, folder in folders.items():
            for name in folder.tensors:
                if name not in hashes[who]:
                    hashes[who][name] = tensor_hash(folder.read(name))
        manifest = Manifest(
            base_hash=root_hash(hashes["base"]),
            sft_hash=root_hash(hashes["sft"]),
            aux_hash=root_hash(hashes["aux"]),
            gamma_hash=root_hash(gammas),
            recipes={who: found for who, folder in folders.items() if (found := _recipe_hash(folder.path))},
            layers=layers,
        )
        (staging / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1))
    return manifest


def _difference(*, base: np.ndarray, sft: np.ndarray, aux: np.ndarray) -> tuple[np.ndarray, Geometry]:
    """aux - sft in the dtype of base, and how it lies to sft - base; in float32, block by block."""
    gamma, sums = np.empty_like(base), np.zeros(3)
    flat = [array.reshape(-1) for array in (base, sft, aux)]
    for part in blocks(gamma.size):
        theirs, plain, helped = (widen(array[part]) for array in flat)
        taught, moved = helped - plain, plain - theirs
        gamma.reshape(-1)[part] = narrow(taught, gamma.dtype)
        sums += [float(np.vdot(a, b)) for a, b in ((taught, taught), (moved, moved), (taught, moved))]
    norms = np.sqrt(sums[:2])
    return gamma, Geometry(gamma_norm=float(norms[0]), sft_norm=float(norms[1]), inner=float(sums[2]))


def load_vector(vector: str | Path) -> dict[str, np.ndarray]:
    """A vector's tensors by weight, float32. Raises CapabilityError for a folder that is none, or an altered one."""
    gammas = open_weights(vector)
    require_intact(gammas)
    return {name: widen(gammas.read(name)) for name in gammas.tensors}


def verify_vector(vector: str | Path) -> None:
    """Read a vector through, tensor by tensor. Raises CapabilityError as `load_vector`."""
    require_intact(open_weights(vector))


def require_intact(gammas: ShardFolder) -> None:
    """Raise CapabilityError unless a vector hashes to what it says."""
    manifest = read_manifest(gammas.path)
    held = root_hash({name: tensor_hash(gammas.read(name)) for name in gammas.tensors})
    if held != manifest.gamma_hash:
        raise CapabilityError(
            f"{gammas.path} is incomplete or altered: it hashes to {held[:12]}, {MANIFEST} says "
            f"{manifest.gamma_hash[:12]}; extract it again"
        )


def read_manifest(vector: str | Path) -> Manifest:
    """What a vector says of itself. Raises CapabilityError for a folder that is none."""
    file = Path(vector) / MANIFEST
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        if content.pop("format") != FORMAT:
            raise CapabilityError(f"{file} has another format, expected {FORMAT}; extract the vector again")
        layers = {name: Geometry(**values) for name, values in content.pop("layers").items()}
        return Manifest(**content, layers=layers)
    except FileNotFoundError as error:
        raise CapabilityError(f"{vector} is no capability vector: it has no {MANIFEST}") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CapabilityError(f"{file} is not a capability vector's: {error}; extract it again") from error


def recipe_of(weights: str | Path) -> Path | None:
    """The recipe of the run whose `checkpoints/start` these weights are; None where they are none's."""
    recipe = Path(weights).resolve().parent.parent / "recipe.yaml"
    return recipe if recipe.is_file() else None


def _recipe_hash(weights: Path) -> str:
    recipe = recipe_of(weights)
    return hashlib.sha256(recipe.read_bytes()).hexdigest() if recipe is not None else ""


def open_weights(path: str | Path) -> ShardFolder:
    """A folder of weights. Raises CapabilityError for one that is none."""
    try:
        return ShardFolder(path)
    except ValueError as error:
        raise CapabilityError(str(error)) from error


def write_like(
    like: ShardFolder, names: list[str], folder: Path, array_of: Callable[[str], np.ndarray]
) -> None:
    """Write these of `like`'s tensors, file by file as they lie there, as `array_of` gives them."""
    for file in like.files:
        here: dict[str, Stored] = {n: like.tensors[n] for n in names if like.tensors[n].file == file}
        if here:
            write_shard(folder / file, here, ((name, array_of(name)) for name in here), like.metadata[file])


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it in one rename, or nothing."""
    if out.exists():
        raise CapabilityError(f"{out} exists; name another folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".staging-{out.name}-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def blocks(size: int) -> Iterator[slice]:
    """Slices that cover `size` numbers, BLOCK at a time."""
    return (slice(start, start + BLOCK) for start in range(0, size, BLOCK))


def require_finite(array: np.ndarray, name: str, *, where: str) -> None:
    """Raise CapabilityError counting what is not finite."""
    bad = array.size - int(is_finite(array).sum())
    if bad:
        raise CapabilityError(f"{where}: {name} has {bad} non-finite of {array.size} values")
