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


def main(folder: Annotated[Path, typer.Option(help="folder of the episodes")] = Path("docs/results")) -> None:
    lines = [
        "| paradigm | file | seeds x cells | start | success-only SFT | DPO + DoRA | DPO + LoRA | "
        "DPO + DoRA over the start | over SFT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, paradigm in NAMES.items():
        line = row(paradigm, name, read_journal(folder / f"{name}.jsonl"))
        if line is not None:
            lines.append(line)
    text = "\n".join(lines) + "\n"
    (folder / "paradigms.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
