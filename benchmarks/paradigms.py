"""The paradigms side by side, from the episodes that `benchmarks.learning` has recorded; drives nothing.

    python -m benchmarks.paradigms

Reads docs/results/NAME.jsonl for every NAME below that is there, and writes docs/results/paradigms.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison import START, against, outcomes, pooled
from trajectories.journal import read_journal

NAMES = {
    "learning": "autoregressive (OpenVLA)",
    "tiny_pi0": "flow matching (pi-0)",
    "tiny_pi05": "flow matching (pi-0.5)",
    "tiny_ddvla": "discrete diffusion",
}
"""Files of outcomes, and what each is of."""
TOGETHER = ("tiny_pi0", "tiny_pi05", "tiny_ddvla")
"""One recipe's tasks and cells by other paradigms, too few each to tell DPO from success-only likelihood."""
COLUMNS = (START, "sft", "dpo-dora", "dpo-lora")


def row(paradigm: str, name: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """One paradigm's line: every arm's success pooled over the seeds that all arms of it have, and DPO with DoRA
    compared, cell by cell, with the start and with success-only likelihood. None where no seed has both."""
    arms = [arm for arm in COLUMNS if any(r["arm"] == arm for r in rows)]
    seeds = [s for s in sorted({r["training_seed"] for r in rows}) if all(outcomes(rows, a, s) for a in arms)]
    if START not in arms or len(arms) < 2 or not seeds:
        return None
    by_arm = {arm: {s: outcomes(rows, arm, s) for s in seeds} for arm in arms}
    rates = [pooled(by_arm[arm]) if arm in by_arm else "-" for arm in COLUMNS]
    cells = sum(len(found) for found in by_arm[START].values())
    gains = []
    for other in (START, "sft"):
        found = "dpo-dora" in by_arm and other in by_arm
        gain, p = against(rows, by_arm["dpo-dora"], "dpo-dora", other) if found else ("", "")
        gains.append(f"{gain}, p = {p}" if gain else "-")
    return (
        f"| {' | '.join([paradigm, f'`{name}`', f'{len(seeds)} x {cells // len(seeds)}', *rates, *gains])} |"
    )


def together(folder: Path) -> str | None:
    """One line of all episodes of `TOGETHER`, every training seed of each a seed of its own. None where one is
    absent."""
    found = {name: read_journal(folder / f"{name}.jsonl") for name in TOGETHER}
    if not all(found.values()):
        return None
    rows = [
        {**r, "training_seed": f"{name} {r['training_seed']}"} for name, own in found.items() for r in own
    ]
    return row("flow and diffusion together", "tiny_*", rows)


def comparison(folder: Path) -> str:
    """The whole table."""
    lines = [
        "| paradigm | file | seeds x cells | start | success-only SFT | DPO + DoRA | DPO + LoRA | "
        "DPO + DoRA over the start | over SFT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    of_each = [
        row(paradigm, name, read_journal(folder / f"{name}.jsonl")) for name, paradigm in NAMES.items()
    ]
    return "\n".join([*lines, *(line for line in (*of_each, together(folder)) if line is not None)]) + "\n"


def main(folder: Annotated[Path, typer.Option(help="folder of the episodes")] = Path("docs/results")) -> None:
    text = comparison(folder)
    (folder / "paradigms.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
