"""Writes the whole pack."""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from pathlib import Path

from envs.standins.appliances import appliances
from envs.standins.furniture import furniture
from envs.standins.groceries import groceries
from envs.standins.models import Model, model_document
from envs.standins.scenes import scene_document, scenes
from envs.standins.tableware import tableware
from envs.standins.textures import TEXTURES, write_textures


def models() -> tuple[Model, ...]:
    """Every object and fixture of the pack."""
    return (*groceries(), *tableware(), *furniture(), *appliances())


def build_pack(folder: Path) -> None:
    """Write the pack into `folder` (created if absent): the same bytes every time, in under a second.

    Raises:
        OSError: the folder cannot be written.
    """
    for model in models():
        _write(folder / model.path, model_document(model))
    for scene in scenes():
        _write(folder / scene.path, scene_document(scene))
    write_textures(folder / "textures")


def required_files() -> tuple[str, ...]:
    """Paths, relative to an asset folder, of every model, scene and texture that the tasks load."""
    textures = (f"textures/{name}" for name in TEXTURES)
    return (*(m.path for m in models()), *(s.path for s in scenes()), *textures)


def generator_digest() -> str:
    """16 hex digits over this package's source: a changed generator makes a new pack."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write(path: Path, root: ET.Element) -> None:
    ET.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
