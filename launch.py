"""Pairloom's command line: `python launch.py VERB ...`, where VERB is train, evaluate, collect, compare, dashboard,
assets, parity or capability.

Without a verb it trains the quickstart recipe. Start it on a cluster with
`ray job submit --working-dir . -- python launch.py train configs/quickstart.yaml`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from actors.checks import recipe_to_resume
from actors.demonstrations import DemonstrationError
from actors.learning import LearnerLostError
from actors.members import FleetLostError
from actors.parameter_server import ParameterServerError
from actors.pipeline import train as run_training
from actors.placement import PlacementError, cause_of
from actors.verbs import collect_demonstrations, evaluate_run
from configs.describe import describe_recipe
from configs.loader import RecipeError, load_recipe
from dashboard.server import Dashboard, DashboardError
from envs.assets import check_pack, resolve_assets
from envs.experts import NoExpertError
from envs.fingerprint import FingerprintError
from envs.protocol import ComparisonError, compare_episodes
from learners import merging
from learners.capability import CapabilityError
from learners.capability import extract as extract_vector
from learners.checkpoint import CheckpointError
from policies.parity.check import check_fixture
from policies.parity.fixture import FixtureError, load_fixture
from policies.published import PublishedError
from trajectories.journal import JournalError

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)
capability = typer.Typer(no_args_is_help=True, help="Capability vectors: differences of weights (CapVector).")
app.add_typer(capability, name="capability")

QUICKSTART = Path("configs/quickstart.yaml")
CAPABILITY = Path("configs/capability.yaml")

RecipeArgument = Annotated[Path, typer.Argument(help="recipe, a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings to change, as part.key=value")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a person can mend into one line on stderr and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except (
        CapabilityError,
        RecipeError,
        PlacementError,
        ParameterServerError,
        CheckpointError,
        ComparisonError,
        DashboardError,
        DemonstrationError,
        FingerprintError,
        FleetLostError,
        FloatingPointError,
        JournalError,
        LearnerLostError,
        NoExpertError,
        PublishedError,
        OSError,
    ) as error:
        typer.echo(f"pairloom: {cause_of(error)}", err=True)
        raise typer.Exit(2) from error


def fields_help() -> str:
    """Every recipe field with its default and meaning, one paragraph each."""
    lines = (f"{path} ({kind}, default {default}): {text}" for path, kind, default, text in describe_recipe())
    return "Recipe fields:\n\n" + "\n\n".join(lines)


@app.callback(invoke_without_command=True, help=__doc__, epilog=fields_help())
def main(context: typer.Context) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    if context.invoked_subcommand is None:
        train()


@app.command(epilog=fields_help())
def train(
    recipe: Annotated[Path | None, typer.Argument(help=f"recipe, a YAML file; default: {QUICKSTART}")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(help="run folder to go on in, with its own recipe, after its driver died")
    ] = None,
) -> None:
    """Run a recipe: supervised start, online rounds, evaluation, report."""
    changes = list(overrides or [])
    with one_line_errors():
        if resume is None:
            result = run_training(load_recipe(recipe or QUICKSTART, changes))
        else:
            if recipe is not None and "=" in str(recipe):
                recipe, changes = None, [str(recipe), *changes]
            result = run_training(recipe_to_resume(resume, recipe, changes), resume=resume)
    typer.echo(json.dumps(result))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    version: Annotated[int | None, typer.Option(help="default: the last promoted")] = None,
    manifest: Annotated[str, typer.Option(help="held-out, or published (10 tasks x 50 states)")] = "held-out",
    tasks: Annotated[
        str | None, typer.Option(help="held-out states of these tasks instead, such as 1,8")
    ] = None,
) -> None:
    """Drive a finished run's policy over a manifest of cells; prints rates with Wilson intervals."""
    with one_line_errors():
        result = evaluate_run(run, version=version, manifest=manifest, tasks=tasks)
    typer.echo(json.dumps(result))


@app.command()
def collect(recipe: RecipeArgument = QUICKSTART, overrides: Overrides = None) -> None:
    """Collect the recipe's scripted demonstrations into runs/<name>/demonstrations/."""
    with one_line_errors():
        result = collect_demonstrations(load_recipe(recipe, overrides or []))
    typer.echo(json.dumps(result))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="run folder, or a JSON-lines file of episodes")],
    after: Annotated[Path, typer.Argument(help="run folder, or a JSON-lines file of episodes")],
    before_arm: Annotated[str | None, typer.Option(help="arm to take from a file of several")] = None,
    after_arm: Annotated[str | None, typer.Option(help="arm to take from a file of several")] = None,
    manifest: Annotated[
        str | None,
        typer.Option(help="held-out or published: what `evaluate` drove; default: the runs' own evaluations"),
    ] = None,
) -> None:
    """Compare two runs on the cells both evaluated: rates, Wilson intervals, exact McNemar."""
    with one_line_errors():
        comparison = compare_episodes(
            before, after, before_arm=before_arm, after_arm=after_arm, manifest=manifest
        )
    if comparison.warnings:
        typer.echo(f"pairloom: the stacks differ: {'; '.join(comparison.warnings)}", err=True)
    title = (str(path) if arm is None else arm for path, arm in ((before, before_arm), (after, after_arm)))
    table = Table(title=" -> ".join(title))
    for column in ("task", "episodes", "before", "after", "better", "worse"):
        table.add_column(column, justify="right")
    for row in comparison.rows():
        table.add_row(*row)
    Console(stderr=True).print(table)
    typer.echo(json.dumps(comparison.summary()))


@app.command()
def dashboard(
    run: Annotated[Path, typer.Argument(help="run folder; the run may still go on")],
    port: Annotated[int | None, typer.Option(help="default: the first free one from 8266 up")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="run folder to compare with; may be given several times")
    ] = None,
    host: Annotated[
        str, typer.Option(help="other than loopback only with PAIRLOOM_DASHBOARD_TOKEN set")
    ] = "127.0.0.1",
) -> None:
    """Serve a run's live page until Ctrl-C; its address, with the token, goes to stderr."""
    with one_line_errors():
        page = Dashboard(run, host=host, port=port, compare=compare or ())
        page.start()
        typer.echo(f"pairloom: {run} is shown at {page.url} (Ctrl-C ends)", err=True)
        page.serve_forever()


@app.command()
def assets(
    path: Annotated[
        str | None, typer.Argument(help="folder to use; none: cache, Hub, then stand-ins")
    ] = None,
) -> None:
    """Say which LIBERO assets are in force, build the stand-ins if need be, and check them."""
    with one_line_errors():
        resolved = resolve_assets(path)
    problems = check_pack(resolved.path)
    typer.echo(f"{resolved.kind} assets in {resolved.path} (digest {resolved.digest}): ", nl=False)
    typer.echo(f"{len(problems)} problems" if problems else "complete for all 40 tasks")
    for problem in problems:
        typer.echo(f"  {problem}")
    if resolved.kind == "stand-in":
        typer.echo("results on stand-ins are not comparable with published LIBERO tables")
    raise typer.Exit(1 if problems else 0)


@app.command()
def parity(
    folders: Annotated[list[Path], typer.Argument(help="golden fixtures: folders with a config.json")],
) -> None:
    """Compare this implementation with the official ones' recorded numbers; exits 0 only when all agree."""
    compared = failed = 0
    for folder in folders:
        try:
            fixture = load_fixture(folder)
            results = list(check_fixture(fixture))
        except FixtureError as error:
            typer.echo(f"pairloom: {error}", err=True)
            failed += 1
            continue
        computed = sum(result.compared for result in results)
        family = fixture.setting("family")
        typer.echo(f"{folder} ({family}): {computed} of {len(fixture.expected)} expected tensors")
        for result in results:
            typer.echo(
                f"{result.name}  {result.difference:.2e}  {'pass' if result.passed else 'fail'}"
                + (f"  ({result.note})" if result.note else "")
            )
        if left_out := sorted(set(fixture.expected) - {result.name for result in results if result.compared}):
            typer.echo(f"not compared, for nothing here computes it: {', '.join(left_out)}")
        compared += computed
        failed += sum(not result.passed for result in results)
    typer.echo(f"parity: {compared} tensors compared, {failed} failed")
    raise typer.Exit(1 if failed or not compared else 0)


WeightsFolder = Annotated[
    Path, typer.Argument(help="folder with *.safetensors, as published or a run's checkpoints/start")
]
NewFolder = Annotated[Path, typer.Option(help="folder to make")]


@capability.command()
def extract(base: WeightsFolder, sft: WeightsFolder, aux: WeightsFolder, out: NewFolder) -> None:
    """Take what fine-tuning with an auxiliary objective (AUX) changed beyond plain fine-tuning (SFT) of one BASE."""
    with one_line_errors():
        manifest = extract_vector(base, sft=sft, aux=aux, out=out)
    total = manifest.total()
    layers = sorted(manifest.layers.items(), key=lambda item: -item[1].gamma_norm)
    table = Table(title="the ten weights that the vector changes most")
    for column in ("weight", "|gamma|", "|gamma| / |delta sft|", "cos(gamma, delta sft)"):
        table.add_column(column, justify="right")
    for name, layer in layers[:10]:
        table.add_row(name, f"{layer.gamma_norm:.4g}", f"{layer.ratio:.3g}", f"{layer.cosine:+.3f}")
    Console(stderr=True).print(table)
    lies = {"gamma_over_sft": total.ratio if math.isfinite(total.ratio) else None, "cosine": total.cosine}
    typer.echo(
        json.dumps({"vector": str(out), "base_hash": manifest.base_hash, "weights": len(layers)} | lies)
    )


@capability.command()
def merge(
    base: WeightsFolder,
    vector: Annotated[Path, typer.Argument(help="a folder that `extract` made")],
    out: NewFolder,
    alpha: Annotated[float, typer.Option(help="how much of the vector; 0 is the base")] = 1.0,
) -> None:
    """Add ALPHA times a vector to the BASE it was extracted from."""
    with one_line_errors():
        content = merging.merge(base, vector, alpha=alpha, out=out)
    typer.echo(json.dumps({"weights": str(out), "hash": content, "alpha": alpha}))


@capability.command("train", epilog=fields_help())
def train_apart(
    recipe: RecipeArgument = CAPABILITY,
    overrides: Overrides = None,
    init: Annotated[Path | None, typer.Option(help="weights to fine-tune: a run's checkpoints/start")] = None,
    vector: Annotated[Path | None, typer.Option(help="a vector of these weights, to begin with")] = None,
    alpha: Annotated[float | None, typer.Option(help=f"default: {merging.ALPHA}")] = None,
) -> None:
    """Fine-tune weights on the recipe's demonstrations and evaluate them: INIT or, with a VECTOR, INIT plus ALPHA times
    that, kept apart from it as the recipe's `capability` part says. The recipe may add an auxiliary objective."""
    with one_line_errors():
        changes = list(overrides or [])
        if init is None:
            raise RecipeError("capability train needs --init, the weights to fine-tune")
        if vector is None and alpha is not None:
            raise RecipeError(f"--alpha {alpha:g} without --vector: name the vector that it is of")
        if vector is not None:
            how_much = merging.ALPHA if alpha is None else alpha
            init = merging.merged_once(init, vector, alpha=how_much, root=load_recipe(recipe, changes).root)
            changes.append(f"capability.vector={vector}")
        changes.append(f"supervised.init={init}")
        result = run_training(load_recipe(recipe, changes))
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    app()
