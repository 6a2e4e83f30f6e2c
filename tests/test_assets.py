"""Where assets come from, in order, with a Hub that answers, refuses, or hangs (all on this machine)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from envs.assets import check_pack, pack_digest, resolve_assets
from envs.standins import build_pack

ROOT = Path(__file__).parents[1]
SHARED_ASSETS = ROOT.parent / "shared" / "libero_assets"
REPOSITORY = "lerobot/libero-assets"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a snapshot download of one dataset needs."""

    def __init__(self, *args: object, pack: Path, asked: list[str]) -> None:
        self.pack, self.asked = pack, asked
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        files = {p.relative_to(self.pack).as_posix(): p for p in self.pack.rglob("*") if p.is_file()}
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/"):
            body = json.dumps(
                [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in files.items()]
            ).encode()
        elif path.startswith(f"/api/datasets/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
        elif "/resolve/" not in path:
            self.send_error(404)
            return
        else:
            body = files[path.rpartition(f"{COMMIT}/")[2]].read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{abs(hash(path)):x}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a Hub at a port that nobody listens on. Returns Pairloom's cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PAIRLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    return tmp_path / "cache"


@pytest.fixture
def hub(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub that has the assets (here: a stand-in pack). Yields the paths it was asked for."""
    build_pack(tmp_path / "published")
    asked: list[str] = []
    handler = partial(HubHandler, pack=tmp_path / "published", asked=asked)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template[template.index("/{repo_id}") :]
    )
    yield asked
    server.shutdown()
    server.server_close()


def test_a_missing_path_is_one_clear_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"environment.assets='/no/such/folder' is not a folder") as e:
        resolve_assets("/no/such/folder")
    assert "\n" not in str(e.value)


def test_a_folder_without_assets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"it has no articulated_objects, stable_hope_objects"):
        resolve_assets(str(tmp_path))


def test_an_explicit_folder_wins(hub: list[str], tmp_path: Path) -> None:
    build_pack(tmp_path / "mine")
    assets = resolve_assets(str(tmp_path / "mine"))
    assert (assets.kind, assets.path) == ("explicit", tmp_path / "mine")
    assert hub == []


def test_a_local_copy_comes_before_the_hub(hub: list[str], alone: Path) -> None:
    build_pack(alone / "libero-assets")
    assets = resolve_assets(None)
    assert (assets.kind, assets.path) == ("cache", alone / "libero-assets")
    assert hub == []


def test_the_hub_is_downloaded_once(hub: list[str]) -> None:
    first = resolve_assets(None)
    assert first.kind == "hub"
    assert check_pack(first.path) == []
    requests = len(hub)
    second = resolve_assets(None)
    assert (second.kind, second.path, second.digest) == ("cache", first.path, first.digest)
    assert len(hub) == requests


def test_an_incomplete_local_copy_is_passed_over(alone: Path) -> None:
    build_pack(alone / "libero-assets")
    shutil.rmtree(alone / "libero-assets" / "turbosquid_objects" / "moka_pot")
    assert resolve_assets(None).kind == "stand-in"


def test_offline_asks_nobody(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_assets(None).kind == "stand-in"
    assert hub == []


def test_a_refusal_is_remembered_and_forgotten(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    assert resolve_assets(None).kind == "stand-in"
    asked = request.getfixturevalue("hub")  # from here on the Hub answers
    assert resolve_assets(None).kind == "stand-in"
    assert asked == []
    note = alone / "hub-unreachable.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"time": time.time() - 601}))
    assert resolve_assets(None).kind == "hub"


def test_a_hub_that_hangs_costs_seconds_once(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert resolve_assets(None).kind == "stand-in"
        assert time.monotonic() - start < 8
        start = time.monotonic()
        assert resolve_assets(None).kind == "stand-in"
        assert time.monotonic() - start < 2


def test_processes_that_build_at_once_share_one_pack(alone: Path) -> None:
    script = (
        "from envs.assets import resolve_assets; a = resolve_assets(None); print(a.kind, a.path, a.digest)"
    )
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environ, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (answer,) = answers
    kind, path, digest = answer.split()
    assert kind == "stand-in"
    assert check_pack(Path(path)) == []
    assert pack_digest(Path(path)) == digest
    assert os.listdir(alone / "stand-ins") == [Path(path).name]


def test_a_changed_generator_builds_anew(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = resolve_assets(None).path
    monkeypatch.setattr("envs.assets.generator_digest", lambda: "f" * 16)
    new = resolve_assets(None).path
    assert new != old
    assert new.name == "f" * 16
    assert old.is_dir()


def test_a_damaged_pack_is_named(alone: Path) -> None:
    place = resolve_assets(None).path
    (place / "stable_hope_objects" / "milk" / "milk.xml").unlink()
    with pytest.raises(OSError, match=r"damaged \(missing stable_hope_objects/milk/milk.xml\): delete"):
        resolve_assets(None)


def test_an_unwritable_cache_names_the_remedy(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAIRLOOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot build the stand-in assets .* set PAIRLOOM_CACHE"):
        resolve_assets(None)


def test_check_pack_names_what_is_missing(tmp_path: Path) -> None:
    build_pack(tmp_path)
    (tmp_path / "articulated_objects" / "microwave.xml").unlink()
    (tmp_path / "textures" / "gray_ceramic_tile.png").unlink()
    (tmp_path / "stable_hope_objects" / "milk" / "milk.xml").write_text("<mujoco>")
    problems = check_pack(tmp_path)
    assert "missing articulated_objects/microwave.xml" in problems
    assert "missing textures/gray_ceramic_tile.png" in problems
    kitchen = "scenes/libero_kitchen_tabletop_base_style.xml"
    assert f"{kitchen}: missing ../textures/gray_ceramic_tile.png" in problems
    assert any(p.startswith("stable_hope_objects/milk/milk.xml: not readable as XML") for p in problems)
    assert len(problems) == 4


def test_the_published_models_pass_the_check() -> None:
    if not SHARED_ASSETS.is_dir():
        pytest.skip("needs the reduced copy of the published assets")
    assert check_pack(SHARED_ASSETS) == []
