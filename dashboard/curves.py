"""The report's curves of learning: margin, rewards and log-ratios over the optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dashboard.plots import BLUE, VERMILLION, draw, write_across
from dashboard.run_folder import Run

_BESIDE_TITLE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.02, 0.98),
    "ncols": 2,
    "fontsize": 9,
    "handlelength": 1.6,
    "columnspacing": 1.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Updates:
    """The updates of one round: metric lines, and where each lies on the axis of all rounds' optimizer steps."""

    round: int
    lines: list[Mapping[str, Any]]
    x: list[int]

    def column(self, name: str) -> list[float]:
        return [float("nan") if line.get(name) is None else line[name] for line in self.lines]


def _updates(run: Run) -> list[_Updates]:
    rounds: list[_Updates] = []
    for index, group in groupby(run.stage("update"), key=lambda line: int(line["round"])):
        lines = list(group)
        first = rounds[-1].x[-1] if rounds else 0
        rounds.append(_Updates(round=index, lines=lines, x=[first + int(line["step"]) for line in lines]))
    return rounds


def plot_margins(run: Run, path: Path) -> Path:
    """Preference margin, implicit rewards and log-ratios over the optimizer steps of all rounds."""
    rounds = _updates(run)

    def fill(figure: Figure) -> None:
        margin, rewards, ratios = figure.subplots(1, 3)
        for updates in rounds:
            for axes, name, colour, dash, label in (
                (margin, "margin", BLUE, "-", None),
                (rewards, "chosen_reward", BLUE, "-", "chosen"),
                (rewards, "rejected_reward", VERMILLION, "--", "rejected"),
                (ratios, "chosen_logratio", BLUE, "-", "chosen"),
                (ratios, "rejected_logratio", VERMILLION, "--", "rejected"),
            ):
                # A legend entry for the first round speaks for all.
                named = label if updates is rounds[0] else None
                values = updates.column(name)
                axes.plot(updates.x, values, dash, marker="o", markersize=2.5, color=colour, label=named)
        margin.set(title="Margin, chosen - rejected", ylabel="beta x nats")
        margin.margins(y=0.15)  # room for the names of refused rounds
        rewards.set(title="Rewards", ylabel="beta x nats")
        ratios.set(title="Log-ratios", ylabel="nats per token")
        _limit(ratios, -run.recipe.guard.chosen_drop, "tripwire for chosen", BLUE)
        _limit(ratios, -run.recipe.preference.rejected_floor, "floor for rejected", VERMILLION)
        for axes in (margin, rewards, ratios):
            axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
            axes.set_xlabel("optimizer step, all rounds in order")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _mark_rounds(axes, rounds, run, named=axes is margin)
            if axes is not margin and rounds:
                axes.legend(**_BESIDE_TITLE)
            if not rounds:
                write_across(axes, "no updates")
            elif axes is not ratios and all(line.get("margin") is None for u in rounds for line in u.lines):
                write_across(axes, "no pairs")

    return draw(path, 11.5, 3.3, fill)


def _limit(axes: Axes, value: float, text: str, colour: str) -> None:
    """A dotted line at a limit, with its name on it."""
    axes.axhline(value, color=colour, ls=":")
    axes.annotate(
        text,
        (1, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=colour,
    )


def _mark_rounds(axes: Axes, rounds: Sequence[_Updates], run: Run, *, named: bool) -> None:
    """A dashed line where a round's updates begin, and a shade over those that never reached the fleet; `named`: with
    the reason in words."""
    refused = {
        event["round"]: event["event"] for event in run.occurrences("rolled_back", "tripped", "refused")
    }
    start = 0
    for updates in rounds:
        end = updates.x[-1]
        if start:
            axes.axvline(start, color="#BBBBBB", linewidth=1, ls="--")
        if updates.round in refused:
            axes.axvspan(start, end, color=VERMILLION, alpha=0.10, linewidth=0)
        if updates.round in refused and named:
            axes.text(
                (start + end) / 2,
                0.97,
                refused[updates.round].replace("_", " "),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
                color=VERMILLION,
            )
        start = end
