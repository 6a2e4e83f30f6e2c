"""Recipes: every shipped one loads, and every mistake is one line that says where, what and what was expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from configs.describe import describe_recipe
from configs.dialect import parse_yaml, render_yaml
from configs.loader import RecipeError, dump_recipe, load_recipe
from configs.schema import Recipe

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))

SMALL = """\
name: small
tasks:
  suite: libero_object
  task_ids: [0, 8]
  demo_init_states: [0, 1]
  train_init_states: 0..29
  held_out_init_states: [30..34, 40, 45..46]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), path.name)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_demonstration_of_a_shipped_recipe_has_an_initial_state_of_its_own(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.demonstrated:
        assert len(recipe.tasks.demo_init_states) >= recipe.demonstrations.per_task


def test_configs_import_nothing_heavy() -> None:
    program = (
        "import sys, configs.loader, configs.describe\n"
        "print(sorted({'torch', 'ray', 'mujoco', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_ranges_include_both_ends_and_mix_with_numbers(small: Path) -> None:
    tasks = load_recipe(small).tasks
    assert tasks.train_init_states == tuple(range(30))
    assert tasks.held_out_init_states == (30, 31, 32, 33, 34, 40, 45, 46)
    assert load_recipe(small, ["tasks.task_ids=3..5"]).tasks.task_ids == (3, 4, 5)


def test_overrides_are_yaml_and_the_last_wins(small: Path) -> None:
    recipe = load_recipe(
        small,
        [
            "preference.beta=0.5",
            "preference.beta=1e-3",
            "policy.vision.width=32",
            "policy.decoder={width: 48, layers: 2}",
            "tasks.task_ids=[1, 2]",
            "environment.max_steps=null",
            "schedule=overlapped",
        ],
    )
    assert recipe.preference.beta == 0.001
    assert (recipe.policy.vision.width, recipe.policy.vision.layers) == (32, 3)
    assert (recipe.policy.decoder.width, recipe.policy.decoder.layers, recipe.policy.decoder.mlp) == (
        48,
        2,
        256,
    )
    assert recipe.tasks.task_ids == (1, 2)
    assert recipe.environment.max_steps is None
    assert recipe.schedule == "overlapped"


def test_a_dumped_recipe_loads_back_equal(small: Path, tmp_path: Path) -> None:
    recipe = load_recipe(small, ["name=1e5x", "preference.lr=1e-7", "environment.assets='no'"])
    dump_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert "task_ids: [0, 8]\n" in (tmp_path / "resolved.yaml").read_text()


def test_a_recipe_extends_another_and_its_own_keys_win(small: Path, tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("extends: small.yaml\npreference: {beta: 0.1, steps: 7}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: middle.yaml\nname: top\npreference:\n  beta: 0.2\ntasks:\n  task_ids: [5]\n")
    recipe = load_recipe(top, ["preference.pairs_per_step=2"])
    assert recipe.name == "top"
    assert (recipe.preference.beta, recipe.preference.steps, recipe.preference.pairs_per_step) == (0.2, 7, 2)
    assert (recipe.tasks.suite, recipe.tasks.task_ids) == ("libero_object", (5,))


def test_extending_in_a_circle_is_named(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}.yaml\n")
    assert error_of(tmp_path / "a.yaml").endswith("`extends` goes in a circle: b.yaml -> c.yaml -> b.yaml")


def test_a_mistake_in_an_extended_file_is_blamed_on_that_file(small: Path, tmp_path: Path) -> None:
    small.write_text(SMALL + "preference: {beta: -1}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: small.yaml\npreference: {steps: 3}\n")
    assert error_of(top).startswith(
        f"{small}: `preference.beta` = -1: expected number > 0 or null (DPO inverse temp"
    )


def test_a_missing_file_names_the_nearest_recipe(tmp_path: Path) -> None:
    assert error_of(tmp_path / "quikstart.yaml") == (
        "recipe quikstart.yaml does not exist; did you mean configs/quickstart.yaml?"
    )
    assert "configs/ holds quickstart.yaml" in error_of(tmp_path / "zzzz").replace(
        ", ".join(path.name for path in SHIPPED), "quickstart.yaml"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preferences.beta=1", "unknown key `preferences`; did you mean `preference`?"),
        ("preference.betta=1", "unknown key `preference.betta`; did you mean `preference.beta`?"),
        ("policy.vision.widht=32", "unknown key `policy.vision.widht`; did you mean `policy.vision.width`?"),
        ("beta=1", "unknown key `beta`; did you mean `preference.beta`?"),
        (
            "guard.zzz=1",
            "unknown key `guard.zzz`; known keys: chosen_drop, canary_episodes, canary_significance",
        ),
        ("name.first=x", '`name` = {"first": "x"}: expected text; it is a value, not a part'),
        (
            "policy.vision=7",
            "`policy.vision` = 7: expected a part with keys width, layers, heads, ",
        ),
        ("preference.beta", "expected part.key=value, for example preference.beta=0.05"),
        (".beta=1", "expected part.key=value, for example preference.beta=0.05"),
        ("tasks.task_ids=[1", "the value is not YAML: expected ',' or ']', but got '<stream end>', line 1"),
        (
            "preference.beta=-1",
            "`preference.beta` = -1: expected number > 0 or null (DPO inverse temperature, on summed",
        ),
        ("preference.beta=hot", '`preference.beta` = "hot": expected number > 0 or null (DPO'),
        ("preference.beta=true", "`preference.beta` = true: expected number > 0 or null (DPO"),
        ("preference.beta=.inf", "`preference.beta` = Infinity: expected number > 0 or null, and finite"),
        (
            "preference.steps=2.5",
            "`preference.steps` = 2.5: expected whole number >= 1 (optimizer steps per round)",
        ),
        ("preference.steps=yes", '`preference.steps` = "yes": expected whole number >= 1'),
        ("adapter.method=rola", '`adapter.method` = "rola": expected one of lora, dora ('),
        ("environment.max_steps=0", "`environment.max_steps` = 0: expected whole number >= 1 or null"),
        ("tasks.task_ids=[]", "`tasks.task_ids` = []: expected list of whole numbers (task indices"),
        ("tasks.task_ids=[1, x]", '`tasks.task_ids` = "x": expected list of whole numbers'),
        ("tasks.task_ids=3", "`tasks.task_ids` = 3: expected list of whole numbers"),
        (
            "tasks.task_ids=9..3",
            '`tasks.task_ids` = "9..3": a range runs upwards, such as 0..29 (30 numbers)',
        ),
        ("tasks.task_ids=0..99999999", "a range runs upwards"),
        ("tasks.task_ids=[[1]]", "`tasks.task_ids` = [[1]]: expected list of whole numbers"),
        ("tasks.held_out_init_states=5..35", "held_out_init_states must not be trained on, but [5, 6, 7"),
        ("tasks.held_out_init_states=[50]", "`tasks`: held_out_init_states must lie in 0..49, got [50]"),
        ("name=../../etc", '`name` = "../../etc": expected text (run name; outputs go to <root>/<name>/)'),
        ("name=5", "`name` = 5: expected text (run name"),
        ("serving.engine=vlm", '`serving.engine` = "vlm": expected one of torch, vllm ('),
    ],
)
def test_a_wrong_override_is_one_line_with_place_value_and_expectation(
    small: Path, override: str, message: str
) -> None:
    text = error_of(small, override)
    assert text.startswith(f"override {override}: "), text
    assert message in text


@pytest.mark.parametrize("paradigm", ["flow", "diffusion"])
def test_vllm_serves_token_policies_alone(small: Path, paradigm: str) -> None:
    overrides = (f"policy.paradigm={paradigm}", "preference.reference=start", "serving.engine=vllm")
    said = error_of(small, *overrides)
    assert f"policy.paradigm={paradigm} does not; set serving.engine=torch" in said
    assert said.startswith("override serving.engine=vllm: serving.engine=vllm decodes token after token")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1\n", "not YAML: expected ',' or ']', but got '<stream end>', line 2"),
        ("name: a\nseed: 1\nname: b\n", "not YAML: key `name` is given twice, line 3"),
        ("just words\n", 'expected keys and values, such as `name: my-run`, got "just words"'),
        ("", "expected keys and values, such as `name: my-run`, got null"),
        ("extends: [a, b]\n", '`extends` = ["a", "b"]: expected one file name'),
        ("name: !!python/object:os.system x\n", "not YAML: could not determine a constructor for the tag"),
        ("name: x\n", "`tasks` is missing"),
        (
            "name: x\ntasks: {task_ids: [1]}\n",
            "`tasks.suite` is missing (one of libero_spatial, libero_object",
        ),
        ("3: x\n", "unknown key `3`; known keys: name, root"),
        ("? [a]\n: x\n", "not YAML: a key must be a word, line 1"),
    ],
)
def test_a_wrong_file_is_one_line_naming_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert error_of(path).startswith("wrong.yaml: ")
    assert message in error_of(path)


def test_a_file_that_is_not_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert error_of(tmp_path / "binary.yaml").startswith("recipe binary.yaml cannot be read:")
    assert "cannot be read" in error_of(tmp_path)


def test_yaml_scalars_follow_version_1_2() -> None:
    text = "[1e-3, 1.5, -2, 012, no, on, 1:30, 2026-11-20, 0..4, null, ~, true, .5, '7', 1_000]"
    expected = [
        0.001,
        1.5,
        -2,
        12,
        "no",
        "on",
        "1:30",
        "2026-11-20",
        "0..4",
        None,
        None,
        True,
        0.5,
        "7",
        "1_000",
    ]
    assert parse_yaml(text) == expected
    assert parse_yaml(render_yaml([*expected, "1e5", "null", "true", "012", ""])) == [
        *expected,
        "1e5",
        "null",
        "true",
        "012",
        "",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.flow.steps=5"], "policy.flow.steps means nothing to paradigm autoregressive"),
        (
            ["policy.diffusion.remask=true"],
            "policy.diffusion.remask means nothing to paradigm autoregressive",
        ),
        (
            ["policy.paradigm=flow", "policy.vision.merge=1"],
            "policy.vision.merge means nothing to paradigm flow",
        ),
        (["policy.bins=21", "policy.paradigm=flow"], "policy.bins means nothing to paradigm flow"),
        (
            ["policy.paradigm=flow", "policy.diffusion.iterations=3"],
            "policy.diffusion.iterations means nothing",
        ),
        (
            ["policy.paradigm=flow", "policy.flow={version: pi0, state_in_prompt: false}"],
            "policy.flow.state_in_prompt means nothing to version pi0",
        ),
        (["policy.paradigm=diffusion", "policy.flow.score_draws=2"], "policy.flow.score_draws means nothing"),
        (
            ["policy.checkpoint=x", "policy.flow.delta_actions=true"],
            "policy.flow.delta_actions means nothing",
        ),
    ],
)
def test_a_setting_that_its_paradigm_does_not_read_is_refused(
    small: Path, overrides: list[str], said: str
) -> None:
    text = error_of(small, "preference.reference=start", *overrides)
    assert said in text
    assert text.endswith("; leave it out")


def test_what_was_set_for_another_paradigm_is_left_behind(small: Path, tmp_path: Path) -> None:
    small.write_text(SMALL + "policy: {bins: 21, chunk: 4, vision: {merge: 1, patch: 16}}\n")
    top = tmp_path / "top.yaml"
    top.write_text(
        "extends: small.yaml\npreference: {reference: start}\n"
        "policy: {paradigm: flow, flow: {version: pi0.5, state_in_prompt: false, steps: 3}}\n"
    )
    policy = load_recipe(top).policy
    assert (policy.bins, policy.vision.merge) == (256, 2)
    assert (policy.chunk, policy.vision.patch, policy.flow.state_in_prompt) == (4, 16, False)
    older = load_recipe(top, ["policy.flow.version=pi0"])
    assert (older.policy.flow.state_in_prompt, older.policy.flow.steps) == (True, 3)
    dump_recipe(older, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == older
    assert load_recipe(top, ["policy.paradigm=diffusion"]).policy.flow.steps == 10


def test_help_lists_every_key_with_a_meaning() -> None:
    rows = {row.path: row for row in describe_recipe()}
    assert rows["preference.beta"].type == "number > 0 or null"
    assert rows["preference.beta"].default == "0.1"
    assert rows["tasks.suite"].default == "required"
    assert rows["environment.max_steps"].type == "whole number >= 1 or null"
    assert rows["adapter.method"][1:3] == ("one of lora, dora", "dora")
    assert rows["adapter.dropout"].type == "number >= 0 and < 1"
    assert all(row.description for row in rows.values())

    def leaves(part: type[BaseModel], prefix: str) -> set[str]:
        found: set[str] = set()
        for name, info in part.model_fields.items():
            kind = info.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= leaves(kind, f"{prefix}{name}.")
            else:
                found.add(f"{prefix}{name}")
        return found

    assert rows.keys() == leaves(Recipe, "")
