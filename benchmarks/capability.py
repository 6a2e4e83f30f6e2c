"""Is a capability vector worth what is said of it? One policy fine-tuned plainly, with an auxiliary objective, merged.

    python -m benchmarks.capability [--seeds 0,1,2] [--steps 50,200] [--auxiliary spatial] [--alphas 1.1]
    python -m benchmarks.capability --name capability-weights --arms apart --weights 1e-9,1e-2,1

CapVector (arXiv 2605.10903) claims the success of auxiliary fine-tuning at the cost of plain fine-tuning. For each seed
a policy is trained on the quickstart's tasks (`pre`) and fine-tuned on one more task (EXTRACTED_ON) three times:
plainly, with the auxiliary objective, and plainly with another seed. The first two give the vector, the first and third
the control: a vector of nothing but chance. Then it is fine-tuned on a third task (USED_ON) in the ways of `ARMS`, each
for every number of steps, and driven over the held-out states of that task and of the tasks of `pre`, which fine-tuning
may have unlearned. Last, `pre` takes one round of the online loop on one of its two tasks,
without demonstrations, with and without the penalty (`ONLINE`), and is driven over the other one too.

Every run is `launch.py train` and called NAME-...-sSEED; what has finished under runs/ is not run again. Episodes go to
docs/results/NAME.jsonl, how the vectors lie to docs/results/NAME-vectors.jsonl, what fine-tuning said of itself at its
end (with a penalty: the cosine of all that it changed with the vector) to docs/results/NAME-ends.jsonl, and the tables
to docs/results/NAME.md.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison import START, table
from benchmarks.learning import check_held, last_version, recipe_hash, rows_of, run_arm
from configs.loader import RecipeError, load_recipe
from learners.capability import extract, read_manifest
from learners.merging import ALPHA, merged_once
from trajectories.journal import Journal, read_journal

PRE, FINE = Path("configs/quickstart.yaml"), Path("configs/capability.yaml")
EXTRACTED_ON, USED_ON, BEFORE = "[3]", "[5]", "[0,8]"
ROLLED_OUT, LEFT_ALONE = 0, 8
"""Of the tasks of `pre`: the one of the online round, and the other."""
ARMS = (
    "sft",
    "auxiliary",
    "merged",
    "apart",
    "apart-cosine",
    "control",
    "adapter",
    "adapter-merged",
    "adapter-apart",
)
"""`sft`: plain fine-tuning; `auxiliary`: with the auxiliary objective; `merged`: plain, from pre + alpha gamma;
`apart` and `apart-cosine`: the same, kept apart from gamma by either penalty; `control`: as `merged`, with the control
vector; `adapter`, `adapter-merged` and `adapter-apart`: as `sft`, `merged` and `apart-cosine`, of an adapter."""
ADAPTER_LR = 2e-3
"""Four times that of whole weights; no other was compared."""
ONLINE = ("online", "online-apart")
"""A round of rollouts, DPO and likelihood of successes; the same, kept apart from gamma by the cosine penalty."""
OF_VECTOR = ("merged", "apart", "apart-cosine", "control", "adapter-merged", "adapter-apart")
"""Arms that a vector, and so alpha, is a part of."""
PLAIN = (START, "sft", "adapter", "online")
"""Arms without an auxiliary objective."""
CELLS = {
    "task": "the task fine-tuned on",
    "before": "the tasks before",
    "online": "the task of the online round",
    "left-alone": "the other task, after the online round",
}


@dataclass(frozen=True, slots=True)
class Study:
    """The runs of one training seed."""

    name: str
    seed: int
    auxiliary: str
    alpha: float
    changes: Sequence[str]
    weight: float | None = None
    """Of the penalty; none: the recipe's own."""
    root: Path = Path("runs")
    ends: list[dict[str, Any]] = field(default_factory=list)
    """What each fine-tuning said of its last step."""

    def folder(self, what: str) -> Path:
        return self.root / f"{self.name}-{what}-s{self.seed}"

    def start(self, what: str) -> Path:
        return self.folder(what) / "checkpoints" / "start"

    def run(self, recipe: Path, what: str, overrides: Sequence[str]) -> Path:
        """Run it unless it has finished; returns its folder."""
        given = {"name": self.folder(what).name, "seed": self.seed, "demonstrations.seed": self.seed}
        own = [key.partition("=")[0] for key in overrides]
        kept = [f"{key}={value}" for key, value in given.items() if key not in own]
        settings = [*kept, "rollouts.rounds=0", *self.changes, *overrides]
        check_held(load_recipe(recipe, settings), self.folder(what), [])
        run_arm(recipe, settings, self.folder(what))
        return self.folder(what)

    def vectors(self) -> dict[str, Path]:
        """`gamma` and `control`, and all that they are made of."""
        self.run(PRE, "pre", [])
        fine = [f"supervised.init={self.start('pre')}", f"tasks.task_ids={EXTRACTED_ON}"]
        self.run(FINE, "ext-sft", fine)
        self.run(FINE, f"ext-{self.auxiliary}", [*fine, f"supervised.auxiliary={self.auxiliary}"])
        self.run(FINE, "ext-control", [*fine, f"seed={1000 + self.seed}"])
        made = {}
        for vector, aux in (("gamma", f"ext-{self.auxiliary}"), ("control", "ext-control")):
            made[vector] = self.root / f"{self.name}-{self.auxiliary}-{vector}-s{self.seed}"
            if not made[vector].exists():
                extract(self.start("pre"), sft=self.start("ext-sft"), aux=self.start(aux), out=made[vector])
        return made

    def label(self, arm: str) -> str:
        """An arm and what else sets its runs apart."""
        weighed = "" if self.weight is None or "apart" not in arm else f"-w{self.weight:g}"
        of_vector = f"{arm}-{self.auxiliary}-{self.alpha:g}{weighed}"
        return {"sft": arm, "adapter": arm, "auxiliary": f"{arm}-{self.auxiliary}"}.get(arm, of_vector)

    def settings(self, arm: str, vectors: Mapping[str, Path]) -> list[str]:
        """What an arm changes in the fine-tuning on the third task."""
        pre = self.start("pre")
        if arm.startswith("adapter"):
            adapter = ["supervised.trains=adapter", f"supervised.lr={ADAPTER_LR}"]
            of_weights = {"adapter": "sft", "adapter-merged": "merged", "adapter-apart": "apart-cosine"}
            return [*self.settings(of_weights[arm], vectors), *adapter]
        if arm in ("sft", "auxiliary"):
            auxiliary = [f"supervised.auxiliary={self.auxiliary}"] if arm == "auxiliary" else []
            return [f"supervised.init={pre}", *auxiliary]
        vector = vectors["control" if arm == "control" else "gamma"]
        init = merged_once(pre, vector, alpha=self.alpha, root=self.root)
        penalty = {"apart": "elementwise", "apart-cosine": "cosine"}.get(arm)
        apart = [f"capability.vector={vector}", f"capability.penalty={penalty}"] if penalty else []
        weighed = [f"capability.penalty_weight={self.weight}"] if penalty and self.weight is not None else []
        return [f"supervised.init={init}", *apart, *weighed]

    def episodes(self, arms: Sequence[str], steps: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        """Run everything; the outcomes of one run after another."""
        vectors = self.vectors()
        yield self._rows(self.folder("pre"), START, 0, "before")
        for arm in (a for a in arms if a in ARMS):
            for count in steps:
                what = f"{self.label(arm)}-{count}"
                settings = [*self.settings(arm, vectors), f"supervised.steps={count}"]
                run = self.run(FINE, what, [f"tasks.task_ids={USED_ON}", *settings])
                yield self._rows(run, arm, count, "task")
                self.ends.append(self._end(run, arm, count))
                after = [f"start={self.folder(what)}", f"tasks.task_ids={BEFORE}"]
                yield self._rows(self.run(PRE, f"{what}-before", after), arm, count, "before")

        for arm in (a for a in arms if a in ONLINE):
            yield from self._online(arm, vectors)

    def _online(self, arm: str, vectors: Mapping[str, Path]) -> Iterator[list[dict[str, Any]]]:
        """Start and end of a round on one task, on it and on the task left alone."""
        settings = [f"start={self.folder('pre')}", f"tasks.task_ids=[{ROLLED_OUT}]"]
        settings += ["rollouts.rounds=1", "preference.demo_weight=0"]
        what = arm
        if arm == "online-apart":
            what = f"{arm}-{self.auxiliary}"
            settings += [f"capability.vector={vectors['gamma']}", "capability.penalty=cosine"]
        run = self.run(PRE, what, settings)
        version, driven = last_version(run), "evaluation-held-out"
        if not self._rows(run, arm, 1, "left-alone", version, driven):
            again = ["evaluate", str(run), "--version", str(version), "--tasks", str(LEFT_ALONE)]
            subprocess.run([sys.executable, "launch.py", *again], check=True)
        for task, cells, phase in (
            (ROLLED_OUT, "online", "evaluation"),
            (LEFT_ALONE, "left-alone", driven),
        ):
            before = self._rows(self.folder("pre"), START, 0, cells)
            yield [row for row in before if row["task"] == task]
            yield self._rows(run, arm, 1, cells, version, phase)

    def _rows(
        self, run: Path, arm: str, steps: int, cells: str, version: int = 0, phase: str = "evaluation"
    ) -> list[dict[str, Any]]:
        found = rows_of(run, load_recipe(run / "recipe.yaml"), arm, self.seed, version, phase)
        return [row | {"cells": cells} | self._of(arm, steps) for row in found]

    def _end(self, run: Path, arm: str, steps: int) -> dict[str, Any]:
        """What fine-tuning said of its last step."""
        last = [line for line in read_journal(run / "metrics.jsonl") if line["stage"] == "supervised"][-1]
        said = {key: value for key, value in last.items() if key not in ("time", "stage", "step", "lr")}
        recipe = recipe_hash(load_recipe(run / "recipe.yaml"))
        return {"arm": arm, "recipe": recipe, "training_seed": self.seed, **self._of(arm, steps), **said}

    def _of(self, arm: str, steps: int) -> dict[str, Any]:
        """What sets a run of an arm and a seed apart."""
        vector = arm in OF_VECTOR
        return {
            "steps": steps,
            "auxiliary": None if arm in PLAIN else self.auxiliary,
            "alpha": self.alpha if vector else None,
            "weight": self.weight if arm in ("apart", "apart-cosine", "adapter-apart") else None,
        }


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What sets one run's outcomes apart from another's."""
    own = ["arm", "training_seed", "steps", "cells"]
    own += ["auxiliary"] if row["arm"] not in PLAIN else []
    own += ["alpha"] if row["arm"] in OF_VECTOR else []
    return (*(row.get(name) for name in own), row.get("weight"))


def add_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append the outcomes of one run unless they are held; RecipeError where those held are of other settings."""
    if not rows:
        return
    held = [r for r in read_journal(file) if key_of(r) == key_of(rows[0])]
    other = next((r["recipe"] for r in held if r["recipe"] != rows[0]["recipe"]), None)
    if other is not None:
        named = ", ".join(str(value) for value in key_of(rows[0]) if value is not None)
        raise RecipeError(
            f"{file} has outcomes of {named} by recipe {other}, and {rows[0]['recipe']} is asked for; "
            "give another --name, or remove those rows"
        )
    if not held:
        Journal(file, fsync=True).extend(rows)


def geometry(study: Study, vectors: Mapping[str, Path]) -> list[dict[str, Any]]:
    """How each vector lies to what plain fine-tuning changed: in all and by weight."""
    rows = []
    for name, path in vectors.items():
        manifest = read_manifest(path)
        for weight, found in (("all", manifest.total()), *manifest.layers.items()):
            rows.append(
                {
                    "training_seed": study.seed,
                    "auxiliary": study.auxiliary,
                    "vector": name,
                    "weight": weight,
                    "gamma_over_sft": found.ratio,
                    "cosine": found.cosine,
                }
            )
    return rows


def shown(row: Mapping[str, Any]) -> str:
    """An arm's name in a table, with what it was run with where that is not the usual."""
    name = row["arm"]
    if name in OF_VECTOR and row["alpha"] != ALPHA:
        name += f", alpha {row['alpha']:g}"
    return name if row.get("weight") is None else f"{name}, weight {row['weight']:g}"


def tables(rows: Sequence[Mapping[str, Any]], vectors: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: success on the task by steps, on the tasks before, of the online round, and the vectors. Rows of `sft`
    and the start stand beside every auxiliary objective's."""
    rows = [{**r, "auxiliary": None} if r["arm"] in PLAIN else r for r in rows]
    parts = []
    order = list(CELLS)
    kinds = {(r["cells"], r["auxiliary"], r["steps"]) for r in rows if r["steps"] and r["auxiliary"]}
    for cells, auxiliary, steps in sorted(kinds, key=lambda k: (order.index(k[0]), k[1:])):
        mine = [
            {**r, "arm": shown(r)}
            for r in rows
            if r["cells"] == cells and r["auxiliary"] in (auxiliary, None) and r["steps"] in (steps, 0)
        ]
        online = cells in ("online", "left-alone")
        how = auxiliary if online else f"{steps} steps, {auxiliary}"
        compared = table(mine, "online") if online else table(mine, "sft", "merged", "adapter-merged")
        parts.append(f"**On {CELLS[cells]}**, {how}\n\n{compared}")
    lines = [
        "| seed | auxiliary | vector | norm over plain fine-tuning's | cosine with it |",
        "|---|---|---|---|---|",
    ]
    for r in vectors:
        if r["weight"] == "all":
            lies = f"{r['gamma_over_sft']:.3f} | {r['cosine']:+.3f}"
            lines.append(f"| {r['training_seed']} | {r['auxiliary']} | {r['vector']} | {lies} |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def main(
    changes: Annotated[list[str] | None, typer.Argument(help="settings to change in every run")] = None,
    seeds: Annotated[str, typer.Option(help="training seeds")] = "0,1,2",
    arms: Annotated[str, typer.Option(help="arms to run")] = ",".join((*ARMS, *ONLINE)),
    steps: Annotated[str, typer.Option(help="fine-tuning steps, from few to many")] = "50,200",
    auxiliary: Annotated[str, typer.Option(help="spatial or future")] = "spatial",
    alphas: Annotated[str, typer.Option(help="how much of the vector")] = f"{ALPHA}",
    weights: Annotated[
        str | None, typer.Option(help="of the penalty, in arms that are kept apart; none: the recipe's")
    ] = None,
    name: Annotated[str, typer.Option(help="of the files written and of the runs")] = "capability",
    output: Annotated[Path, typer.Option(help="folder of tables and episodes")] = Path("docs/results"),
) -> None:
    unknown = [arm for arm in arms.split(",") if arm not in (*ARMS, *ONLINE)]
    if unknown:
        raise typer.BadParameter(f"unknown arm {unknown[0]!r}; known: {', '.join((*ARMS, *ONLINE))}")
    output.mkdir(parents=True, exist_ok=True)
    file, vector_file, end_file = (output / f"{name}{kind}.jsonl" for kind in ("", "-vectors", "-ends"))
    for seed in map(int, seeds.split(",")):
        for alpha, weight in product(map(float, alphas.split(",")), _numbers(weights)):
            study = Study(name, seed, auxiliary, alpha, changes or [], weight)
            for rows in study.episodes(arms.split(","), [int(s) for s in steps.split(",")]):
                add_rows(file, rows)
            for end in study.ends:
                add_rows(end_file, [end])
            known = {(r["training_seed"], r["auxiliary"]) for r in read_journal(vector_file)}
            if (seed, auxiliary) not in known:
                Journal(vector_file, fsync=True).extend(geometry(study, study.vectors()))
    text = tables(read_journal(file), read_journal(vector_file))
    file.with_suffix(".md").write_text(text)
    typer.echo(text)


def _numbers(text: str | None) -> list[float | None]:
    return [None] if text is None else [float(number) for number in text.split(",")]


if __name__ == "__main__":
    typer.run(main)
