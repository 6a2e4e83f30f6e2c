"""The house keeps its shape: who may import whom, how large a file may grow, and what nothing may be called."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "configs": set(),
    "trajectories": {"configs"},
    "envs": {"trajectories", "configs"},
    "objectives": set(),
    "policies": {"objectives", "trajectories", "configs"},
    "preferences": {"trajectories", "configs"},
    "learners": {"objectives", "policies", "preferences", "trajectories", "configs"},
    "dashboard": {"trajectories", "configs"},
    "actors": {
        "configs",
        "trajectories",
        "envs",
        "objectives",
        "policies",
        "preferences",
        "learners",
        "dashboard",
    },
}
"""Room -> the other rooms it may import."""
FREE = {"benchmarks", "tests"}
"""Folders that may import anything and are not measured."""
RAY_ROOMS = {"actors"}
NO_TORCH = {"configs", "trajectories", "preferences"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc", "core"}


def violations(root: Path) -> list[str]:
    """Every breach below `root`, as `path:line: what`; line 0 is the file itself."""
    found = []
    for path in sources(root):
        relative = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{relative}:{line}: {what}" for line, what in name_breaches(relative)]
        room = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        if room in FREE:
            continue
        found += [f"{relative}:{line}: {what}" for line, what in import_breaches(room, tree)]
        found += [f"{relative}:{line}: {what}" for line, what in hidden_imports(path, tree)]
        found += [f"{relative}:{line}: {what}" for line, what in size_breaches(path, tree)]
    return found + rings(root)


def sources(root: Path) -> list[Path]:
    """Python files at the root and in its visible folders, `runs/` (what runs leave behind) excepted."""
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "runs"]
    return sorted([*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def name_breaches(relative: Path) -> Iterator[tuple[int, str]]:
    if len(relative.parts) > 1 and relative.parts[0] not in MAY_IMPORT.keys() | FREE:
        yield 0, f"{relative.parts[0]}/ is not a room of the house"
    for name in (*relative.parts[:-1], relative.stem):
        if name in BANNED_NAMES:
            yield 0, f"{name} says nothing about what is in it"
        if name in sys.stdlib_module_names and name != "__init__":
            yield 0, f"{name} shadows the standard library's module"


def import_breaches(room: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports anywhere in the file, in functions and under TYPE_CHECKING too."""
    allowed = MAY_IMPORT.get(room, set(MAY_IMPORT)) | {room}
    for line, module in imported(tree):
        top = module.split(".")[0]
        if top in MAY_IMPORT.keys() | FREE and top not in allowed:
            yield line, f"{room} may not import {module}"
        if top == "ray" and room not in RAY_ROOMS | {"launch"}:
            yield line, f"{room} may not import ray"
        if top == "torch" and room in NO_TORCH:
            yield line, f"{room} may not import torch"


def rings(root: Path) -> list[str]:
    """In each room, its folders (each as one) and the files beside them import in one direction."""
    found = []
    for room in MAY_IMPORT:
        files = {path: part(path.relative_to(root)) for path in (root / room).rglob("*.py")}
        graph: dict[str, set[str]] = {name: set() for name in files.values()}
        for path, name in files.items():
            for module in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
                graph[name] |= {part(Path(*module.split(".")))} & graph.keys() - {name}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            # Each name here is imported by the one after it.
            found.append(f"{room}:0: imports run in a ring: {' <- '.join(error.args[1])}")
    return found


def part(relative: Path) -> str:
    """The folder of a room that a path lies in, or the file directly in the room: `policies/openvla`."""
    return "/".join(relative.with_suffix("").parts[:2])


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what absolute imports bring in: `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def hidden_imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A block of imports inside a function needs its reason in a comment, in the block or on the line above it."""
    lines = ["", *(line.strip() for line in path.read_text(encoding="utf-8").splitlines())]
    for function in functions(tree):
        for node in ast.walk(function):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            first, last = node.lineno, node.end_lineno or node.lineno
            while lines[first - 1].startswith(("import ", "from ")):
                first -= 1
            while last + 1 < len(lines) and lines[last + 1].startswith(("import ", "from ")):
                last += 1
            if not any("#" in line for line in lines[first - 1 : last + 1]):
                yield node.lineno, f"{function.name} imports without saying why it must do so here"


def size_breaches(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    count = len(path.read_text(encoding="utf-8").splitlines())
    if count > MAX_FILE_LINES:
        yield 0, f"{count} lines, at most {MAX_FILE_LINES}"
    for function in functions(tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_house_keeps_its_laws() -> None:
    assert violations(ROOT) == []


def test_every_room_is_there() -> None:
    assert [room for room in MAY_IMPORT if not (ROOT / room / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("path", "text", "breaches"),
    [
        ("envs/a.py", "from policies.make import make\n", ["envs/a.py:1: envs may not import policies.make"]),
        ("configs/a.py", "import trajectories\n", ["configs/a.py:1: configs may not import trajectories"]),
        (
            "objectives/a.py",
            "import configs.schema\n",
            ["objectives/a.py:1: objectives may not import configs.schema"],
        ),
        ("learners/a.py", "import ray\n", ["learners/a.py:1: learners may not import ray"]),
        ("preferences/a.py", "import torch.nn\n", ["preferences/a.py:1: preferences may not import torch"]),
        ("policies/a.py", "import tests.x\n", ["policies/a.py:1: policies may not import tests.x"]),
        (
            "dashboard/a.py",
            "def f():\n    if 1:\n        from envs import libero\n",
            [
                "dashboard/a.py:3: dashboard may not import envs",
                "dashboard/a.py:3: f imports without saying why it must do so here",
            ],
        ),
        ("envs/utils.py", "", ["envs/utils.py:0: utils says nothing about what is in it"]),
        ("actors/queue.py", "", ["actors/queue.py:0: queue shadows the standard library's module"]),
        (
            "benchmarks/statistics.py",
            "",
            ["benchmarks/statistics.py:0: statistics shadows the standard library's module"],
        ),
        (
            "types/a.py",
            "",
            [
                "types/a.py:0: types/ is not a room of the house",
                "types/a.py:0: types shadows the standard library's module",
            ],
        ),
        ("envs/a.py", "#\n" * 301, ["envs/a.py:0: 301 lines, at most 300"]),
        (
            "envs/a.py",
            "class A:\n    async def f(self):\n" + "        await x\n" * 60,
            ["envs/a.py:2: f has 61 lines, at most 60"],
        ),
    ],
)
def test_a_breach_is_found_and_named(tmp_path: Path, path: str, text: str, breaches: list[str]) -> None:
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(text)
    assert violations(tmp_path) == breaches


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    allowed = {
        "actors/rollout.py": "import ray\nimport torch\nimport envs.libero\nfrom learners import dpo\n",
        "launch.py": "import ray\nfrom actors import pipeline\n",
        "learners/dpo.py": "import torch\nfrom . import batch\nfrom preferences.pairing import x\n",
        "envs/libero.py": "def f():\n    import mujoco  # reads its renderer when imported\n    import robosuite\n",
        "benchmarks/broadcast.py": "import ray\nimport actors\n" + "x = 1\n" * 400,
        "tests/test_x.py": "import ray\n",
        ".venv/utils.py": "import ray\n",
        "runs/quickstart/common.py": "",
    }
    for path, text in allowed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert violations(tmp_path) == []


def test_a_ring_among_the_folders_of_a_room_is_found(tmp_path: Path) -> None:
    files = {
        "policies/openvla/network.py": "import torch\n",
        "policies/openvla/policy.py": "from policies.flow import x\n",
        "policies/flow.py": "from policies.openvla import network\n",
        "policies/make.py": "import policies.flow\nfrom policies.openvla.policy import y\n",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (breach,) = violations(tmp_path)
    assert breach.startswith("policies:0: imports run in a ring: ")
    assert set(breach.split(": ")[-1].split(" <- ")) == {"policies/openvla", "policies/flow"}
    (tmp_path / "policies/openvla/policy.py").write_text("from policies.openvla.network import x\n")
    assert violations(tmp_path) == []
