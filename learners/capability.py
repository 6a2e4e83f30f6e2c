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

from learners import checkpoint
from policies.weights.shards import ShardFolder, Stored, write_shard
from trajectories.bfloat16 import is_finite, narrow, widen
from trajectories.hashing import root_hash, tensor_hash

MANIFEST = "capability.json"
FORMAT = 2


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
    folders = {"base": _folder(base), "sft": _folder(sft), "aux": _folder(aux)}
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
            _require_finite(array, name, where=str(folders[who].path))
            hashes[who][name] = tensor_hash(array)
        wide = {who: widen(array) for who, array in found.items()}
        gamma, moved = wide["aux"] - wide["sft"], wide["sft"] - wide["base"]
        kept = narrow(gamma, found["base"].dtype).reshape(gamma.shape)
        _require_finite(kept, name, where=f"{aux} - {sft}")
        gammas[name] = tensor_hash(kept)
        layers[name] = Geometry(
            gamma_norm=float(np.linalg.norm(gamma)),
            sft_norm=float(np.linalg.norm(moved)),
            inner=float(np.vdot(gamma, moved)),
        )
        return kept

    with _staged(Path(out)) as staging:
        _write(folders["base"], names, staging, gamma_of)
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


def merge(base: str | Path, vector: str | Path, *, alpha: float, out: str | Path) -> str:
    """Write theta_meta = theta_pre + alpha gamma (Eq. 4) to the folder `out`, with `base`'s dtypes, files and
    whatever else lies in its folder; returns its content hash.

    Sums are taken in float32 and cast once. With alpha 0 the weights are those of `base` to the bit. Raises
    CapabilityError for a vector of another base, a result that is not finite, or an `out` that exists.
    """
    theirs, gammas = _folder(base), _folder(vector)
    _require_base(theirs, gammas.path)
    _require_intact(gammas)
    hashes: dict[str, str] = {}

    def merged(name: str) -> np.ndarray:
        array = theirs.read(name)
        if alpha and name in gammas.tensors:
            with np.errstate(over="ignore", invalid="ignore"):
                total = widen(array) + np.float32(alpha) * widen(gammas.read(name))
                array = narrow(total, array.dtype).reshape(array.shape)
            _require_finite(array, name, where=f"{base} + {alpha:g} {vector}")
        hashes[name] = tensor_hash(array)
        return array

    with _staged(Path(out)) as staging:
        own = (theirs.path / checkpoint.METADATA).is_file()
        replaced = (*theirs.files, *((checkpoint.MANIFEST,) if own else ()))
        shutil.copytree(
            theirs.path,
            staging,
            dirs_exist_ok=True,
            ignore=lambda folder, _: replaced if Path(folder) == theirs.path else (),
        )
        _write(theirs, list(theirs.tensors), staging, merged)
        if own:  # a run's own checkpoint: so is what comes of it
            checkpoint.seal(staging, sequence=1)
    return root_hash(hashes)


def load_vector(vector: str | Path) -> dict[str, np.ndarray]:
    """A vector's tensors by weight, float32. Raises CapabilityError for a folder that is none, or an altered one."""
    gammas = _folder(vector)
    _require_intact(gammas)
    return {name: widen(gammas.read(name)) for name in gammas.tensors}


def verify_vector(vector: str | Path) -> None:
    """Read a vector through, tensor by tensor. Raises CapabilityError as `load_vector`."""
    _require_intact(_folder(vector))


def _require_base(base: ShardFolder, vector: Path) -> None:
    expected = read_manifest(vector).base_hash
    found = root_hash({name: tensor_hash(base.read(name)) for name in base.tensors})
    if found != expected:
        raise CapabilityError(
            f"{vector} was extracted from the base {expected[:12]}, {base.path} is {found[:12]}; merge it into the one "
            "it came from"
        )


def _require_intact(gammas: ShardFolder) -> None:
    manifest = read_manifest(gammas.path)
    held = root_hash({name: tensor_hash(gammas.read(name)) for name in gammas.tensors})
    if held != manifest.gamma_hash:
        raise CapabilityError(
            f"{gammas.path} is incomplete or altered: it hashes to {held[:12]}, {MANIFEST} says "
            f"{manifest.gamma_hash[:12]}; extract it again"
        )


def merged_once(base: str | Path, vector: str | Path, *, alpha: float, root: str | Path) -> Path:
    """The folder below `root` that holds theta_pre + alpha gamma, made unless it is there; see `merge`, whose refusals
    hold either way. It lies as a run's start does, beside the recipe of `base`'s run where that is one's."""
    manifest = read_manifest(vector)
    _require_base(_folder(base), Path(vector))
    run = Path(root) / f"meta-{manifest.base_hash[:8]}-{manifest.gamma_hash[:8]}-{alpha!r}"
    out = run / "checkpoints" / "start"
    if not out.exists():
        merge(base, vector, alpha=alpha, out=out)
        recipe = recipe_of(base)
        if recipe is not None:
            shutil.copyfile(recipe, run / recipe.name)
    return out


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


def _folder(path: str | Path) -> ShardFolder:
    try:
        return ShardFolder(path)
    except ValueError as error:
        raise CapabilityError(str(error)) from error


def _write(like: ShardFolder, names: list[str], folder: Path, array_of: Callable[[str], np.ndarray]) -> None:
    """Write these of `like`'s tensors, file by file as they lie there, as `array_of` gives them."""
    for file in like.files:
        here: dict[str, Stored] = {n: like.tensors[n] for n in names if like.tensors[n].file == file}
        if here:
            write_shard(folder / file, here, ((name, array_of(name)) for name in here), like.metadata[file])


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
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


def _require_finite(array: np.ndarray, name: str, *, where: str) -> None:
    bad = array.size - int(is_finite(array).sum())
    if bad:
        raise CapabilityError(f"{where}: {name} has {bad} non-finite of {array.size} values")
