"""Weights that a fine-tuning begins with: a base, plus some of a capability vector of its own (CapVector, Eq. 4)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from learners import checkpoint
from learners.capability import (
    CapabilityError,
    blocks,
    open_weights,
    read_manifest,
    recipe_of,
    require_finite,
    require_intact,
    staged,
    write_like,
)
from policies.weights.shards import ShardFolder
from trajectories.bfloat16 import narrow, widen
from trajectories.hashing import root_hash, tensor_hash

MERGED = "merged.json"
"""Beside merged weights: the hashes of their base and of the vector, and how much of it was added."""


def merge(base: str | Path, vector: str | Path, *, alpha: float, out: str | Path) -> str:
    """Write theta_meta = theta_pre + alpha gamma (Eq. 4) to the folder `out`, with `base`'s dtypes, files and
    whatever else lies in its folder; returns its content hash.

    Sums are taken in float32 and cast once. With alpha 0 the weights are those of `base` to the bit. Raises
    CapabilityError for a vector of another base, a result that is not finite, or an `out` that exists.
    """
    theirs, gammas = open_weights(base), open_weights(vector)
    _require_base(theirs, gammas.path)
    require_intact(gammas)
    hashes: dict[str, str] = {}

    def merged(name: str) -> np.ndarray:
        array = theirs.read(name)
        if alpha and name in gammas.tensors:
            array = _added(array, gammas.read(name), alpha)
            require_finite(array, name, where=f"{base} + {alpha:g} {vector}")
        hashes[name] = tensor_hash(array)
        return array

    with staged(Path(out)) as staging:
        own = (theirs.path / checkpoint.METADATA).is_file()
        replaced = (*theirs.files, *((checkpoint.MANIFEST,) if own else ()))
        shutil.copytree(
            theirs.path,
            staging,
            dirs_exist_ok=True,
            ignore=lambda folder, _: replaced if Path(folder) == theirs.path else (),
        )
        write_like(theirs, list(theirs.tensors), staging, merged)
        manifest = read_manifest(vector)
        said = {"base_hash": manifest.base_hash, "gamma_hash": manifest.gamma_hash, "alpha": alpha}
        (staging / MERGED).write_text(json.dumps(said, indent=1))
        if own:  # a run's own checkpoint: so is what comes of it
            checkpoint.seal(staging, sequence=1)
    return root_hash(hashes)


def merged_once(base: str | Path, vector: str | Path, *, alpha: float, root: str | Path) -> Path:
    """The folder below `root` that holds theta_pre + alpha gamma, made unless it is there; see `merge`, whose refusals
    hold either way. It lies as a run's start does, beside the recipe of `base`'s run where that is one's."""
    manifest = read_manifest(vector)
    _require_base(open_weights(base), Path(vector))
    run = Path(root) / f"meta-{manifest.base_hash[:8]}-{manifest.gamma_hash[:8]}-{alpha!r}"
    out = run / "checkpoints" / "start"
    if (recipe := recipe_of(base)) is not None:  # first: weights without it would pass for nobody's
        run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe, run / recipe.name)
    if out.exists():
        require_intact(open_weights(vector))
    else:
        merge(base, vector, alpha=alpha, out=out)
    return out


def descends(weights: str | Path, vector: str | Path) -> bool:
    """Whether a vector is of these weights: they are its base, or were merged from that and from the vector itself."""
    manifest = read_manifest(vector)
    merged = Path(weights) / MERGED
    if merged.is_file():
        said = json.loads(merged.read_text())
        return (said["base_hash"], said["gamma_hash"]) == (manifest.base_hash, manifest.gamma_hash)
    return _content(open_weights(weights)) == manifest.base_hash


def _added(base: np.ndarray, gamma: np.ndarray, alpha: float) -> np.ndarray:
    """base + alpha gamma, in float32 block by block, cast once."""
    total = np.empty_like(base)
    flat, gammas, out = base.reshape(-1), gamma.reshape(-1), total.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in blocks(base.size):
            out[part] = narrow(widen(flat[part]) + np.float32(alpha) * widen(gammas[part]), base.dtype)
    return total


def _content(base: ShardFolder) -> str:
    return root_hash({name: tensor_hash(base.read(name)) for name in base.tensors})


def _require_base(base: ShardFolder, vector: Path) -> None:
    expected = read_manifest(vector).base_hash
    found = _content(base)
    if found != expected:
        raise CapabilityError(
            f"{vector} was extracted from the base {expected[:12]}, {base.path} is {found[:12]}; merge it into the one "
            "it came from"
        )
