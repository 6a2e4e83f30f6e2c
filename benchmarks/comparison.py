"""Tables of held-out outcomes: arms beside each other, cell by cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from envs.fingerprint import read_fingerprint
from envs.significance import mcnemar, paired_difference, wilson
from trajectories.journal import read_journal

START = "start"
"""The arm that has learned nothing beyond the supervised start."""
Outcomes = dict[tuple[int, int, int], bool]
"""(task, initial state, sampling seed) -> success."""


def outcomes(rows: Sequence[Mapping[str, Any]], arm: str, seed: int) -> Outcomes:
    return {
        (r["task"], r["init_state"], r["sampling_seed"]): r["success"]
        for r in rows
        if r["arm"] == arm and r["training_seed"] == seed
    }


def table(rows: Sequence[Mapping[str, Any]], *baselines: str) -> str:
    """Markdown: each arm's success by seed and pooled, and its paired comparison with the start and with those of
    `baselines` (none named: `sft`) that there are."""
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    baselines = baselines or ("sft",)
    others = [arm for arm in baselines if arm in arms] or [baselines[0]]
    seeds = sorted({r["training_seed"] for r in rows})
    lines = [
        "| arm | "
        + " | ".join(f"seed {s}" for s in seeds)
        + " | pooled (95 % Wilson) | over the start | p | "
        + "".join(f"over {arm} | p | " for arm in others).rstrip(),
        "|---|" + "---|" * (len(seeds) + 3 + 2 * len(others)),
    ]
    for arm in arms:
        mine = {s: outcomes(rows, arm, s) for s in seeds if outcomes(rows, arm, s)}
        cells = [f"{_percent(mine[s])} ({len(mine[s])})" if s in mine else "-" for s in seeds]
        compared = [cell for other in (START, *others) for cell in against(rows, mine, arm, other)]
        lines.append("| " + " | ".join([arm, *cells, pooled(mine), *compared]) + " |")
    return "\n".join(lines) + "\n"


def pooled(by_seed: Mapping[int, Outcomes]) -> str:
    """Success over all seeds with its 95 % Wilson interval."""
    wins, total = sum(sum(o.values()) for o in by_seed.values()), sum(len(o) for o in by_seed.values())
    low, high = wilson(wins, total)
    return f"{100 * wins / total:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def _percent(cells: Outcomes) -> str:
    return f"{100 * sum(cells.values()) / len(cells):.1f} %"


def against(
    rows: Sequence[Mapping[str, Any]], mine: Mapping[int, Outcomes], arm: str, other: str
) -> tuple[str, str]:
    """Difference in points with its 95 % paired interval, and the pooled exact McNemar p."""
    theirs = {s: outcomes(rows, other, s) for s in mine}
    if arm in (START, other) or not all(theirs.values()):
        return "", ""
    pooled_mine = {(s, *c): v for s, o in mine.items() for c, v in o.items()}
    pooled_theirs = {(s, *c): v for s, o in theirs.items() for c, v in o.items()}
    shared = pooled_mine.keys() & pooled_theirs.keys()
    before, after = {c: pooled_theirs[c] for c in shared}, {c: pooled_mine[c] for c in shared}
    test = mcnemar(before, after)
    both = sum(before[c] and after[c] for c in shared)
    gain, low, high = paired_difference(
        both=both,
        only_after=test.better,
        only_before=test.worse,
        neither=len(shared) - both - test.better - test.worse,
    )
    return (
        f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}; {test.better} better, {test.worse} worse)",
        f"{test.p_value:.2g}",
    )


def recipes_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which recipe each arm's outcomes are of, in one line."""
    hashes: dict[str, list[str]] = {}
    for row in rows:
        said = row.get("recipe", "not recorded")
        if said not in hashes.setdefault(row["arm"], []):
            hashes[row["arm"]].append(said)
    return ", ".join(f"{arm} {' and '.join(said)}" for arm, said in hashes.items())


def write_table(file: Path, run: Path, changes: Sequence[str] = ()) -> None:
    """Write and say the table of everything in a file of outcomes, the recipes they are of, the changes that were given
    for all of them, and the stack that `run` recorded."""
    rows = read_journal(file)
    text = table(rows)
    stack = json.dumps(read_fingerprint(run) or "not recorded here")
    given = " ".join(f"`{change}`" for change in changes) or "none"
    file.with_suffix(".md").write_text(
        f"{text}\nRecipes: {recipes_of(rows)}. Changes to all: {given}.\n\nStack: `{stack}`\n"
    )
    typer.echo(text)
