"""Where LIBERO's asset folder (models, meshes, textures) comes from, and whether it is complete."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from envs.standins import build_pack, generator_digest, required_files

logger = logging.getLogger(__name__)

AssetKind = Literal["explicit", "cache", "hub", "stand-in"]

HUB_REPOSITORY = "lerobot/libero-assets"
HUB_PROBE_SECONDS = 4.0
HUB_REFUSAL_SECONDS = 600.0
ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


@dataclass(frozen=True, kw_only=True)
class ResolvedAssets:
    """An asset folder that is ready to use.

    Attributes:
        path: absolute folder holding `scenes/`, `articulated_objects/` and the other families.
        kind: where it was found; results on "stand-in" are never comparable with published tables.
        digest: 16 hex digits naming the content (see `pack_digest`).
    """

    path: Path
    kind: AssetKind
    digest: str


def cache_folder() -> Path:
    """Pairloom's cache: PAIRLOOM_CACHE, else XDG_CACHE_HOME/pairloom, else ~/.cache/pairloom."""
    own = os.environ.get("PAIRLOOM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser().absolute() / "pairloom"


def resolve_assets(explicit: str | None) -> ResolvedAssets:
    """Find LIBERO's assets: the explicit folder, a local copy, the Hugging Face Hub, else procedural stand-ins.

    Local copies are looked for in `libero-assets` of Pairloom's cache, in the Hub's own cache, and where
    hf-libero downloads to. An unreachable Hub costs at most `HUB_PROBE_SECONDS`, and is remembered in the cache
    for `HUB_REFUSAL_SECONDS`. HF_HUB_OFFLINE is honoured. The kind in use is logged.

    Raises:
        FileNotFoundError: `explicit` does not exist or is not an asset folder.
        OSError: the cache, where the stand-ins are built, cannot be written, or the pack there is damaged.
    """
    if explicit is not None:
        return _resolved(_explicit_folder(explicit), "explicit")
    for folder in _local_copies():
        problems = check_pack(folder)
        if not problems:
            return _resolved(folder, "cache")
        logger.warning("LIBERO assets in %s are incomplete (%s); looking on", folder, problems[0])
    downloaded = _download()
    if downloaded is not None:
        return _resolved(downloaded, "hub")
    return _resolved(_stand_in_pack(), "stand-in")


def check_pack(path: Path) -> list[str]:
    """Everything a folder lacks for LIBERO's tasks, one line each; empty when it is complete.

    Every model and scene that the tasks load must be there, readable, and every mesh and texture it names too.
    """
    problems = []
    for name in required_files():
        file = path / name
        if not file.is_file():
            problems.append(f"missing {name}")
        elif file.suffix == ".xml":
            problems.extend(f"{name}: {problem}" for problem in _missing_parts(file))
    return problems


def pack_digest(folder: Path) -> str:
    """16 hex digits over every model file's text and every other file's relative path and size.

    Meshes and textures are named by size only: a full pack is large, and this runs in every process.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if ".cache" in name.parts:  # the Hub client's own notes, which differ from one download to the next
            continue
        digest.update(f"{name.as_posix()}:{path.stat().st_size}\n".encode())
        if path.suffix == ".xml":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _explicit_folder(explicit: str) -> Path:
    folder = Path(explicit).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"environment.assets={explicit!r} is not a folder; expected LIBERO's asset folder, "
            "or leave it out to use the cache, the Hub or the stand-ins"
        )
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"environment.assets={explicit!r} is not a LIBERO asset folder: it has no {', '.join(missing)}; "
            "expected the folder that holds scenes/, textures/ and the object families"
        )
    return folder


def _local_copies() -> Iterator[Path]:
    """Folders that may hold the published assets, in order of preference."""
    candidates = [cache_folder() / "libero-assets"]
    try:
        candidates.append(Path(snapshot_download(HUB_REPOSITORY, repo_type="dataset", local_files_only=True)))
    except LocalEntryNotFoundError:
        logger.debug("no snapshot of %s in the Hub's cache", HUB_REPOSITORY)
    candidates.append(Path("~/.cache/libero/assets").expanduser())
    return (folder for folder in candidates if folder.is_dir())


def _download() -> Path | None:
    """The Hub's copy, or None where the Hub cannot be had, which is then remembered for a while."""
    if constants.HF_HUB_OFFLINE:
        logger.info("HF_HUB_OFFLINE is set: not asking the Hub for LIBERO's assets")
        return None
    remembered = _remembered_refusal()
    if remembered is not None:
        logger.info("the Hub was unreachable a short while ago (%s): not asking again", remembered)
        return None
    refusal = _probe_hub()
    if refusal is None:
        try:
            folder = Path(snapshot_download(HUB_REPOSITORY, repo_type="dataset"))
        except (OSError, HfHubHTTPError, RuntimeError, AttributeError) as error:
            # When one of its download threads gives up, huggingface_hub closes the client under the others,
            # and which of their errors comes out is chance.
            refusal = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            problems = check_pack(folder)
            if not problems:
                return folder
            refusal = f"its copy is incomplete: {problems[0]}"
    logger.warning("the Hub cannot give LIBERO's assets (%s)", refusal)
    _remember_refusal(refusal)
    return None


def _probe_hub() -> str | None:
    """None when the Hub answers for the repository, else why not.

    In a thread with a deadline of its own: looking up a name can block far longer than a socket's timeout.
    """
    url = f"{constants.ENDPOINT}/api/datasets/{HUB_REPOSITORY}"
    outcome: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_PROBE_SECONDS):
                outcome.append(None)
        except OSError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PROBE_SECONDS)
    return outcome[0] if outcome else f"no answer in {HUB_PROBE_SECONDS:g} s"


def _refusal_file() -> Path:
    return cache_folder() / "hub-unreachable.json"


def _remembered_refusal() -> str | None:
    """Why the Hub was unreachable, if that was found out within `HUB_REFUSAL_SECONDS`."""
    try:
        note = json.loads(_refusal_file().read_text())
        age, reason = time.time() - float(note["time"]), str(note["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reason if 0 <= age < HUB_REFUSAL_SECONDS else None


def _remember_refusal(reason: str) -> None:
    file = _refusal_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"time": time.time(), "reason": reason}))
        partial.replace(file)
    except OSError as error:
        logger.warning("cannot remember in %s that the Hub is unreachable: %s", file, error)


def _stand_in_pack() -> Path:
    """The pack of this generator version, built on first use.

    Built beside its place and renamed into it, so that a reader never sees half a pack and of several
    processes that build at once one wins and the others use its pack.
    """
    place = cache_folder() / "stand-ins" / generator_digest()
    if place.is_dir():
        problems = check_pack(place)
        if problems:
            raise OSError(
                f"the stand-in assets in {place} are damaged ({problems[0]}): delete that folder, "
                "and they are built again"
            )
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=place.parent))
        building.chmod(0o755)
        build_pack(building)
    except OSError as error:
        raise OSError(
            f"cannot build the stand-in assets in {place.parent} ({error}); set PAIRLOOM_CACHE to a writable folder"
        ) from error
    try:
        building.rename(place)
    except OSError:
        shutil.rmtree(building)
        if not place.is_dir():
            raise
    return place


def _resolved(path: Path, kind: AssetKind) -> ResolvedAssets:
    assets = ResolvedAssets(path=path, kind=kind, digest=pack_digest(path))
    level = logging.WARNING if kind == "stand-in" else logging.INFO
    logger.log(level, "LIBERO assets: %s, %s (digest %s)", kind, path, assets.digest)
    return assets


def _missing_parts(model: Path) -> list[str]:
    """Mesh and texture files that a model names and that are not there."""
    try:
        root = ET.parse(model).getroot()
    except ET.ParseError as error:
        return [f"not readable as XML ({error})"]
    names = (element.get("file", "") for element in root.findall("asset/*[@file]"))
    return [f"missing {name}" for name in names if not (model.parent / name).is_file()]
