"""What the learning benchmark makes of outcomes, and which runs it takes for its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import learning
from benchmarks.comparison import START, table
from benchmarks.learning import ARMS, check_held, measure, overrides_of, recipe_hash, settings
from benchmarks.paradigms import comparison, row
from benchmarks.updates import VARIANTS, recipe_for
from configs.loader import RecipeError, dump_recipe, load_recipe
from trajectories.journal import Journal, read_journal

ROOT = Path(__file__).parents[1]
RECIPES = [
    ROOT / "configs" / f"{name}.yaml" for name in ("libero_object", "tiny_pi0", "tiny_pi05", "tiny_ddvla")
]
RECIPE = RECIPES[0]


def rows(arm: str, seed: int, successes: list[int], **more: Any) -> list[dict[str, Any]]:
    """Outcomes of one task's cells."""
    return [
        {"arm": arm, "training_seed": seed, "task": 0, "init_state": 30 + i, "sampling_seed": 0, **more}
        | {"success": bool(success)}
        for i, success in enumerate(successes)
    ]


def test_the_table_pools_seeds_and_compares_cell_by_cell() -> None:
    found = table(
        [
            *rows(START, 0, [1, 0, 0, 0]),
            *rows(START, 1, [1, 1, 0, 0]),
            *rows("sft", 0, [1, 1, 1, 0]),
            *rows("demos", 0, [0, 1, 0, 0]),
        ]
    )
    head, _, start, sft, demos = ([c.strip() for c in line.split("|")[1:-1]] for line in found.splitlines())
    assert head[:4] == ["arm", "seed 0", "seed 1", "pooled (95 % Wilson)"]
    assert start[:3] == ["start", "25.0 % (4)", "50.0 % (4)"]
    assert start[3].startswith("37.5 % (")
    assert start[4:] == ["", "", "", ""]
    # Wilson's interval of 3 in 4: (0.75 + 0.4802 +- 1.96 sqrt(0.0469 + 0.0600)) / 1.9604.
    assert sft[:4] == ["sft", "75.0 % (4)", "-", "75.0 % (30.1-95.4)"]
    # Two cells better, none worse: p = 2 / 2^2. Seed 1, which sft has not, is left out.
    assert re.fullmatch(r"\+50\.0 \(.*; 2 better, 0 worse\)", sft[4])
    assert sft[5:] == ["0.5", "", ""]
    # Of the start one cell lost and one gained; of sft none gained and two lost.
    assert re.fullmatch(r"\+0\.0 \(.*; 1 better, 1 worse\)", demos[4])
    assert re.fullmatch(r"-50\.0 \(.*; 0 better, 2 worse\)", demos[6])
    assert (demos[5], demos[7]) == ("1", "0.5")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arm", [START, *ARMS])
def test_every_arm_is_a_recipe_of_its_own_and_its_seeds_are_one(recipe: Path, arm: str) -> None:
    one, other = (load_recipe(recipe, overrides_of("x", arm, seed, Path("runs"), [])) for seed in (0, 1))
    assert (one.name, one.seed, one.demonstrations.seed) == (f"x-{arm}-s0", 0, 0)
    assert one.start == (None if arm == START else "runs/x-start-s0")
    assert recipe_hash(one) == recipe_hash(other)
    assert re.fullmatch("[0-9a-f]{8}", recipe_hash(one))
    changed = load_recipe(recipe, overrides_of("x", arm, 0, Path("elsewhere"), ["supervised.lr=0.3"]))
    assert recipe_hash(changed) != recipe_hash(one)


def test_a_start_s_own_run_learns_nothing_and_so_reads_no_setting_of_an_update() -> None:
    one, other = (
        load_recipe(RECIPE, overrides_of("x", START, 0, Path("r"), [change]))
        for change in ("preference.beta=0.3", "adapter.rank=4")
    )
    assert one.rollouts.rounds == 1
    assert recipe_hash(one) == recipe_hash(other)


def test_where_a_run_is_looked_at_is_no_part_of_its_recipe() -> None:
    one, other = (
        load_recipe(RECIPE, overrides_of("x", "sft", 0, Path("r"), changes))
        for changes in ([], ["tracking.tensorboard=false", "tracking.wandb=pairs"])
    )
    assert recipe_hash(one) == recipe_hash(other)
    assert not any(path.startswith(("tracking.", "dashboard.")) for path in settings(one))


def test_arms_differ_in_what_they_learn_from() -> None:
    hashes = {arm: recipe_hash(load_recipe(RECIPE, overrides_of("x", arm, 0, Path("r"), []))) for arm in ARMS}
    assert len(set(hashes.values())) == len(ARMS)
    demos = load_recipe(RECIPE, overrides_of("x", "demos", 0, Path("r"), [])).preference
    assert (demos.preference_weight, demos.anchor_weight, demos.success_weight) == (0, 0, 0)
    assert demos.demo_weight == 1


def finish(root: Path, arm: str, changes: list[str]) -> None:
    """What a run of an arm leaves that the benchmark reads: three held-out cells, one of which ended in a fault."""
    recipe = load_recipe(RECIPE, overrides_of("mine", arm, 0, root, changes))
    folder = root / recipe.name
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / "recipe.yaml")
    version = 0 if arm == START else 2
    if version:
        Journal(folder / "events.jsonl").append({"event": "promoted", "version": version})
    Journal(folder / "episodes.jsonl").extend(
        {
            "phase": "evaluation",
            "suite": "libero_object",
            "task_id": 0,
            "init_state": 30 + i,
            "seed": 0,
            "outcome": outcome,
            "success": outcome == "success",
            "policy_version": version,
            "policy_hash": f"weights-{version}",
        }
        for i, outcome in enumerate(["success", "timeout", "fault"])
    )
    (folder / "result.json").write_text("{}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two finished runs, of the start and of one arm, made with one change."""
    for arm in (START, "sft"):
        finish(tmp_path / "runs", arm, ["rollouts.rounds=1"])
    return tmp_path / "runs"


def test_finished_runs_of_the_same_recipe_are_read_and_not_run(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    measure(RECIPE, ["sft"], [0], file, root, ["rollouts.rounds=1"])
    held = read_journal(file)
    assert [(row["arm"], row["init_state"], row["success"]) for row in held] == [
        ("start", 30, True),
        ("start", 31, False),
        ("sft", 30, True),
        ("sft", 31, False),
    ]
    assert {row["policy_hash"] for row in held if row["arm"] == "sft"} == {"weights-2"}
    asked = load_recipe(RECIPE, overrides_of("mine", "sft", 0, root, ["rollouts.rounds=1"]))
    assert {row["recipe"] for row in held if row["arm"] == "sft"} == {recipe_hash(asked)}
    measure(RECIPE, ["sft"], [0], file, root, ["rollouts.rounds=1"])
    assert read_journal(file) == held


def test_a_finished_run_of_other_settings_is_refused(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    changes = ["rollouts.rounds=1", "preference.beta=0.3", "supervised.steps=7"]
    with pytest.raises(RecipeError) as refusal:
        measure(RECIPE, ["sft"], [0], file, root, changes)
    assert str(refusal.value) == (
        f"{root}/mine-start-s0 was run under other settings: supervised.steps is 800 there and 7 here; "
        "give another --name, or remove that run and its rows"
    )
    assert not file.exists()


def test_rows_of_another_recipe_are_refused_and_rows_that_name_none_are_not(
    root: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(RECIPE, overrides_of("mine", "sft", 0, root, []))
    nowhere = tmp_path / "gone"
    check_held(recipe, nowhere, rows("sft", 0, [1, 0]))
    check_held(recipe, nowhere, rows("sft", 0, [1, 0], recipe=recipe_hash(recipe)))
    with pytest.raises(
        RecipeError, match=f"mine-sft-s0 has outcomes of recipe 0123abcd and {recipe_hash(recipe)} is"
    ):
        check_held(recipe, nowhere, rows("sft", 0, [1], recipe="0123abcd"))


def test_the_command_says_what_the_table_is_of(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run: what is asked for is there, or is refused."""
    Journal(tmp_path / "mine.jsonl").extend(
        rows("dpo-dora", 0, [1, 1])
    )  # of a time when rows named no recipe
    monkeypatch.chdir(tmp_path)
    app = learning.typer.Typer()
    app.command()(learning.main)
    command = [
        "--recipe",
        str(RECIPE),
        "--name",
        "mine",
        "--output",
        ".",
        "--seeds",
        "0",
        "--arms",
        "sft,dpo-dora",
    ]
    done = CliRunner().invoke(app, [*command, "rollouts.rounds=1"])
    assert done.exit_code == 0, done.output
    hashes = {row["arm"]: row.get("recipe") for row in read_journal(tmp_path / "mine.jsonl")}
    assert f"sft {hashes['sft']}" in (tmp_path / "mine.md").read_text()
    assert "dpo-dora not recorded" in (tmp_path / "mine.md").read_text()
    assert "Changes to all: `rollouts.rounds=1`." in (tmp_path / "mine.md").read_text()
    refused = CliRunner().invoke(app, [*command, "rollouts.rounds=2"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(
        "pairloom: runs/mine-sft-s0 was run under other settings: rollouts.rounds is 1"
    )
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_an_update_learns_something(root: Path, variant: str) -> None:
    changed = recipe_for(root / "mine-sft-s0", RECIPE, VARIANTS[variant])
    assert changed.preference.success_weight > 0
    assert changed.start is None


def test_variants_of_another_recipe_than_the_run_s_are_refused(root: Path) -> None:
    with pytest.raises(RecipeError, match="mine-sft-s0 was of another tasks than"):
        recipe_for(root / "mine-sft-s0", ROOT / "configs" / "quickstart.yaml")


def test_a_paradigm_s_line_is_of_the_seeds_that_every_arm_has() -> None:
    start, sft = rows(START, 0, [0, 0]) + rows(START, 1, [0, 1]), rows("sft", 0, [1, 1])
    assert row("flow", "tiny", start) is None
    line = row("flow", "tiny", start + sft)
    assert line is not None
    assert [cell.strip() for cell in line.split("|")[1:6]] == [
        "flow",
        "`tiny`",
        "1 x 2",
        "0.0 % (0.0-65.8)",
        "100.0 % (34.2-100.0)",
    ]
    assert line.count("| - ") == 4
    whole = row("flow", "tiny", start + sft + rows("dpo-dora", 0, [1, 0]))
    assert whole is not None
    assert "1 better, 0 worse" in whole


def test_the_recorded_outcomes_make_the_recorded_table() -> None:
    results = ROOT / "docs" / "results"
    assert table(read_journal(results / "learning.jsonl")) in (results / "learning.md").read_text()
    assert comparison(results) == (results / "paradigms.md").read_text()
    assert comparison(results) in (ROOT / "docs" / "results.md").read_text()


def test_paradigms_are_pooled_only_where_all_are_there(tmp_path: Path) -> None:
    for i, name in enumerate(("tiny_pi0", "tiny_pi05", "tiny_ddvla")):
        assert "together" not in comparison(tmp_path)
        Journal(tmp_path / f"{name}.jsonl").extend(
            rows(START, 0, [0, 0]) + rows("sft", 0, [0, 1]) + rows("dpo-dora", 0, [1, int(i > 0)])
        )
    *_, last = comparison(tmp_path).splitlines()
    assert "| `tiny_*` | 3 x 2 |" in last
    assert "3 better, 1 worse" in last
