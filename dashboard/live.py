"""A run folder as the page shows it, kept up to date from what is appended to its journals.

      episodes.jsonl --+                +--> panels (one a section of the page) --section()--> JSON
      metrics.jsonl  --+-- Tail.read ---+
      events.jsonl   --+                    revision of each section rises when a line changes it

The same code follows a run that goes on and replays one that is over. A panel holds counts, bounded lists and bounded
series, never the lines: memory does not grow with the length of a run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

from configs.loader import RecipeError, load_recipe
from dashboard.frames import Sheets
from dashboard.panels.contrasts import SHOWN, Contrasts
from dashboard.panels.fleet import Actors, Cluster, Incidents, Speed
from dashboard.panels.heldout import HeldOut, compared
from dashboard.panels.learning import Learning, Pairs
from dashboard.panels.overview import Overview, assets_of
from dashboard.panels.success import HeatMap, Success
from dashboard.tail import StartOver, Tail

logger = logging.getLogger(__name__)

JOURNALS = ("metrics", "events", "episodes")
QUIET_S = 30.0
"""A run without a new line for as long may have ended."""
EPISODES_REMEMBERED = 10_000
"""Latest episodes by which a line written again after a restart is known: the last ones before it come again."""


class Panel(Protocol):
    """What one section of the page is made from."""

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed. AttributeError, KeyError, TypeError or ValueError for a line
        that is not what it must be."""
        ...


class LiveRun:
    """One run folder. Not for several threads at once; `Board` is."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError where there is no `recipe.yaml`, RecipeError where it is not a recipe."""
        if not (folder / "recipe.yaml").is_file():
            raise FileNotFoundError(
                f"{folder} is not a run folder: it has no recipe.yaml; name one such as runs/quickstart"
            )
        self.folder = folder
        self.sheets = Sheets(folder)
        self._start()

    def _start(self) -> None:
        recipe = load_recipe(self.folder / "recipe.yaml")
        self.overview, self.success, self.held_out = Overview(recipe), Success(), HeldOut()
        self.contrasts, self.heat, self.learning = Contrasts(), HeatMap(), Learning(recipe)
        self.pairs, self.speed, self.actors = Pairs(), Speed(), Actors()
        self.cluster, self.incidents = Cluster(), Incidents()
        self._panels: dict[str, Panel] = {
            "run": self.overview,
            "success": self.success,
            "heat": self.heat,
            "contrast": self.contrasts,
            "pairs": self.pairs,
            "learning": self.learning,
            "speed": self.speed,
            "actors": self.actors,
            "cluster": self.cluster,
            "incidents": self.incidents,
            "compare": self.held_out,
        }
        self._tails = {name: Tail(self.folder / f"{name}.jsonl") for name in JOURNALS}
        self._seen: dict[int, None] = {}
        """Hashes of (phase, trajectory id), oldest first."""
        self._unreadable = 0

    @property
    def sections(self) -> tuple[str, ...]:
        """Names of the sections of the page."""
        return tuple(self._panels)

    def poll(self) -> set[str]:
        """Fold in what was appended since the last call; the names of the sections that changed.

        Raises OSError when a journal cannot be read.
        """
        changed: set[str] = set()
        try:
            for journal, tail in self._tails.items():
                for line in tail.read():
                    changed |= self._fold(journal, line)
        except StartOver:
            if not (self.folder / "recipe.yaml").is_file():
                return set()  # moved aside, and the next run is not there yet: what was seen stays
            self._start()
            return self.poll() | self._panels.keys()
        before = self.overview.extra
        self.overview.extra = self._beside_the_journals()
        return changed | ({"run"} if self.overview.extra != before else set())

    def _fold(self, journal: str, line: Mapping[str, Any]) -> set[str]:
        changed: set[str] = set()
        understood = True
        if journal == "episodes" and self._again(line):
            return changed
        for name, panel in self._panels.items():
            try:
                if panel.take(journal, line):
                    changed.add(name)
            except (AttributeError, KeyError, TypeError, ValueError):
                understood = False
        self._unreadable += not understood
        return changed

    def _again(self, line: Mapping[str, Any]) -> bool:
        if "trajectory_id" not in line:
            return False
        key = hash((str(line.get("phase")), str(line["trajectory_id"])))
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > EPISODES_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return False

    def _beside_the_journals(self) -> dict[str, Any]:
        fingerprint, result = (_object(self.folder / f"{name}.json") for name in ("fingerprint", "result"))
        return {
            "folder": self.folder.name,
            "status": self._status(result),
            "unreadable": self._unreadable + sum(tail.damaged for tail in self._tails.values()),
            "result": result,
            "ends": self.success.ends(),
            **assets_of(fingerprint, result),
        }

    def _status(self, result: Mapping[str, Any]) -> str:
        """`finished`, `running`, or `ended early`: without a result, silent, and no process holds its lock."""
        if result:
            return "finished"
        newest = max((_modified(tail.path) for tail in self._tails.values()), default=0.0)
        if time.time() - newest < QUIET_S or _locked(self.folder / "run.lock"):
            return "running"
        return "ended early"

    def section(self, name: str) -> dict[str, Any]:
        """A section of the page as JSON values, but for `compare`, which is the board's."""
        if name != "contrast":
            panel: Any = self._panels[name]
            return dict(panel.section())
        stored = (
            found
            for found in self.contrasts.latest()
            if self.sheets.stored(found["success"]) and self.sheets.stored(found["failure"])
        )
        return {"latest": list(islice(stored, SHOWN))}


class Board:
    """A run and those it is compared with, for several threads: sections as JSON text, each with its revision."""

    def __init__(self, folder: Path, compare: Sequence[Path] = ()) -> None:
        """Raises as `LiveRun` does, for any of the folders."""
        self.run = LiveRun(folder)
        self._others = [LiveRun(other) for other in compare]
        self._lock = RLock()
        self._texts: dict[str, str] = {}
        self.revision = 0
        """Rises with every poll that changed something."""
        self._revisions: dict[str, int] = dict.fromkeys(self.run.sections, 0)

    def poll(self) -> int:
        """Fold in what is new; the revision afterwards."""
        with self._lock:
            try:
                changed = self.run.poll()
                others = set[str]().union(*(other.poll() for other in self._others))
            except (OSError, RecipeError) as error:
                # A file system that hiccups, or a recipe half written: the page keeps what it has and looks again.
                logger.warning("the dashboard could not read the run: %s", error)
                return self.revision
            if {"compare", "run"} & others:
                changed.add("compare")
            if changed:
                self.revision += 1
                for name in changed:
                    self._revisions[name] = self.revision
                    self._texts.pop(name, None)
            return self.revision

    def since(self, revision: int) -> tuple[int, str]:
        """The revision now, and a JSON object of the sections that changed after `revision` (-1: every one)."""
        with self._lock:
            parts = [
                f"{json.dumps(name)}:{self._text(name)}"
                for name, changed in self._revisions.items()
                if changed > revision
            ]
            return self.revision, "{" + ",".join(parts) + "}"

    def _text(self, name: str) -> str:
        if name not in self._texts:
            section = self._compared() if name == "compare" else self.run.section(name)
            self._texts[name] = json.dumps(section, separators=(",", ":"))
        return self._texts[name]

    def _compared(self) -> dict[str, Any]:
        version, here = self.run.held_out.last()
        rows = []
        for run in (self.run, *self._others):
            other_version, there = run.held_out.last()
            shared = {} if run is self.run else compared(here, there)
            rows.append(
                {"name": run.folder.name, "version": other_version, "ends": run.success.ends(), **shared}
            )
        return {"version": version, "runs": rows if self._others else []}


def _object(path: Path) -> dict[str, Any]:
    """A small JSON object beside the journals; empty while it is missing or half written."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _locked(path: Path) -> bool:
    """Whether a process holds the run's lock. Asked of quiet runs alone: for an instant the question holds it too."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
