"""dashboard/grafana.json draws what is measured, under the names that Ray exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dashboard.metric_names import METRICS, RUN

BOARD = Path(__file__).parents[1] / "dashboard" / "grafana.json"
EXPORTED = {metric.exported: metric for metric in METRICS.values()}
SELECTOR = re.compile(r"\b(ray_\w+)(?:\{([^}]*)\})?")


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


def drawn(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel but the rows' headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(board: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(panel, PromQL, legend)."""
    for panel in drawn(board):
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def test_every_query_reads_a_series_of_the_chosen_run_by_its_own_labels(board: dict[str, Any]) -> None:
    for title, expr, legend in queries(board):
        selectors = SELECTOR.findall(expr)
        assert len(selectors) == 1, title
        name, matchers = selectors[0]
        assert name in EXPORTED, title
        assert f'{RUN}=~"$run"' in matchers, title
        labels = {RUN, *EXPORTED[name].labels}
        named = re.findall(r"(\w+)=~", matchers) + re.findall(r"\{\{(\w+)\}\}", legend)
        grouped = re.search(r"by \(([\w, ]+)\)", expr)
        if grouped:
            named += grouped[1].split(", ")
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= set(grouped[1].split(", ")), title
        assert set(named) <= labels, title


def test_every_series_has_a_panel(board: dict[str, Any]) -> None:
    assert {name for _, expr, _ in queries(board) for name, _ in SELECTOR.findall(expr)} == set(EXPORTED)


def test_rates_are_of_counters_alone(board: dict[str, Any]) -> None:
    for title, expr, _ in queries(board):
        ((name, _),) = SELECTOR.findall(expr)
        assert "rate(" not in expr or EXPORTED[name].kind == "counter", title


def test_the_source_and_the_run_are_variables(board: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "run", "task", "phase"}
    for name in ("run", "task", "phase"):
        ((series, _),) = SELECTOR.findall(variables[name]["query"]["query"])
        assert name in {RUN, *EXPORTED[series].labels}
    for panel in drawn(board):
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = set(re.findall(r"\$(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == {"run", "task", "phase"}


def test_no_panel_is_orphaned(board: dict[str, Any]) -> None:
    """Each has a name, something to draw and a place of its own on the grid, below the heading of a row."""
    panels = board["panels"]
    assert panels[0]["type"] == "row"
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in drawn(board):
        assert panel["title"]
        assert panel["description"]
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for row in (panel for panel in panels if panel["type"] == "row"):
        below = [p for p in drawn(board) if p["gridPos"]["y"] == row["gridPos"]["y"] + 1]
        assert below, row["title"]
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = any(one[a] + one[s] <= other[a] or other[a] + other[s] <= one[a] for a, s in ("xw", "yh"))
        assert apart, (one, other)


def test_the_model_is_the_current_classic_one(board: dict[str, Any]) -> None:
    assert board["schemaVersion"] == 42
    assert board["title"] == "Pairloom"
