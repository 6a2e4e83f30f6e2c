"""The plots of success and of pairs, in a palette that colour-blind readers can tell apart (Okabe and Ito 2008)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dashboard.rates import Rate, rate_of
from dashboard.run_folder import Run

BLUE, VERMILLION = "#0072B2", "#D55E00"
SKY, ORANGE, GREY = "#56B4E9", "#E69F00", "#7A7A7A"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
}
"""matplotlib settings of every figure here."""


def draw(path: Path, width: float, height: float, fill: Callable[[Figure], None]) -> Path:
    """Lets `fill` draw on a figure of this size (inches) in the report's style and saves it as PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        fill(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def plot_success(run: Run, path: Path) -> Path:
    """Left: held-out success of each task under each evaluated version. Right: all tasks, by version."""
    width = 4.5 + min(max(len(run.tasks()) + 1, 4), 12) * 0.75

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[width - 4.2, 3.6], sharey=True)
        _success_by_task(left, run)
        _success_by_version(right, run)

    return draw(path, width, 3.9, fill)


def _success_by_task(axes: Axes, run: Run) -> None:
    versions, tasks = run.evaluated_versions(), run.tasks()
    episodes = run.paired_evaluation()
    step = 0.62 / max(len(versions), 1)
    for order, version in enumerate(versions):
        rates: list[tuple[float, Rate]] = []
        groups = [[e for e in episodes if e.task == task and e.policy_version == version] for task in tasks]
        groups.append([e for e in episodes if e.policy_version == version])
        for place, group in enumerate(groups):
            rate = rate_of(group)
            gap = 0.4 if place == len(tasks) else 0.0
            if rate is not None:
                rates.append((place + gap + (order - (len(versions) - 1) / 2) * step, rate))
        first, last = order == 0, order == len(versions) - 1
        colour = GREY if first and not last else BLUE if last else SKY
        label = f"version {version}" + (" (start)" if version == 0 else "")
        _error_bars(axes, rates, colour=colour, marker="os^Dv"[order % 5], label=label)
    axes.axvline(len(tasks) - 0.3, color="#BBBBBB", linewidth=1)
    names = [f"{task_id}" for _, task_id in tasks]
    axes.set_xticks([*range(len(tasks)), len(tasks) + 0.4], [*names, "all"])
    axes.set_xlim(-0.6, len(tasks) + 1)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel=f"task of {run.recipe.tasks.suite}", title="Held-out success by task")
    _percent(axes)
    if versions:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=min(len(versions), 4))
    else:
        write_across(axes, "no held-out episodes yet")


def _success_by_version(axes: Axes, run: Run) -> None:
    for episodes, colour, marker, label, shift in (
        (run.paired_evaluation(), BLUE, "o", "held-out states", -0.06),
        (run.phase("rollout"), ORANGE, "s", "training states (rollouts)", 0.06),
    ):
        rates = [
            (version + shift, rate)
            for version in sorted({e.policy_version for e in episodes})
            if (rate := rate_of(e for e in episodes if e.policy_version == version)) is not None
        ]
        if rates:
            _error_bars(axes, rates, colour=colour, marker=marker, label=label, line=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    versions = {e.policy_version for e in run.episodes if e.policy_version >= 0} or {0}
    axes.set_xlim(min(versions) - 0.6, max(versions) + 0.6)
    axes.set(xlabel="policy version", title="All tasks, by version")
    if axes.lines:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2, columnspacing=1.0)


def _error_bars(
    axes: Axes,
    rates: Sequence[tuple[float, Rate]],
    *,
    colour: str,
    marker: str,
    label: str,
    line: bool = False,
) -> None:
    x = [place for place, _ in rates]
    y = [rate.value for _, rate in rates]
    below = [rate.value - rate.interval[0] for _, rate in rates]
    above = [rate.interval[1] - rate.value for _, rate in rates]
    axes.errorbar(
        x,
        y,
        yerr=[[max(v, 0.0) for v in below], [max(v, 0.0) for v in above]],
        fmt=marker,
        linestyle="-" if line else "none",
        linewidth=1.2,
        color=colour,
        markersize=6,
        elinewidth=1.6,
        capsize=3,
        label=label,
    )


def plot_pairs(run: Run, path: Path) -> Path:
    """Left: pairs that each round learned from. Right: the groups of episodes that they were mined from."""
    rounds = sorted(index for index, line in run.rounds().items() if "pairs" in line)
    lines = [run.rounds()[index] for index in rounds]

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        bars = left.bar(rounds, [line["pairs"] for line in lines], width=0.6, color=BLUE)
        left.bar_label(bars, padding=2)
        left.set(title="Pairs to learn from", xlabel="round", ylabel="pairs")
        alike = ("states_all_success", "states_all_failure", "states_unpairable_other")
        mixed = [line["states"] - sum(line[name] for name in alike) for line in lines]
        floor = [0.0] * len(lines)
        for label, colour, hatch, counts in (
            ("both outcomes: can pair", BLUE, "", mixed),
            ("only successes", SKY, "//", [line["states_all_success"] for line in lines]),
            ("only failures", ORANGE, "\\\\", [line["states_all_failure"] for line in lines]),
            ("only faults", GREY, "..", [line["states_unpairable_other"] for line in lines]),
        ):
            if not any(counts):
                continue
            bars = right.bar(
                rounds, counts, 0.6, floor, color=colour, hatch=hatch, edgecolor="white", label=label
            )
            right.bar_label(bars, [str(n) if n else "" for n in counts], label_type="center", **_INSIDE)
            floor = [a + b for a, b in zip(floor, counts, strict=True)]
        right.set(title="Groups of rollouts, by outcome", xlabel="round", ylabel="initial states x versions")
        if lines:
            right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(y=0.12)
            axes.set_ylim(0, max(axes.get_ylim()[1], 1))
            axes.set_xlim(-0.8, max([*rounds, 0]) + 0.8)
            if not lines:
                write_across(axes, "no rounds yet")

    return draw(path, 9.6, 3.4, fill)


_INSIDE: dict[str, Any] = {
    "fontsize": 9,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
}


def _percent(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def write_across(axes: Axes, text: str) -> None:
    """Says why a plot is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
