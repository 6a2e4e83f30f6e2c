"""Folders and settings that will not do, each refused in one line before anything is read or started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import launch
from configs.loader import RecipeError, load_recipe
from configs.policy import FlowPart, PolicyPart
from policies.published import PublishedError, check_published, published_policy
from tests import openvla_tiny
from tests.published_tiny import CPU, HEADS, STATS, write_pi0_tokenizer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
Spoil = Callable[[Path], Any]


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def text_config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        held = json.loads(file.read_text())
        file.write_text(json.dumps(held | {"text_config": held["text_config"] | changes}))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = next(iter(sorted(folder.glob("*.safetensors"))))
        held = load_file(file)
        change(held)
        save_file(held, file)

    return spoil


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def stats(**changes: Any) -> Spoil:
    return lambda folder: (folder / "assets/libero/norm_stats.json").write_text(
        json.dumps({"norm_stats": {**STATS, **changes}})
    )


JOINT = "paligemma_with_expert."
GATE = f"{JOINT}gemma_expert.model.layers.0.mlp.gate_proj.weight"
UP = f"{JOINT}gemma_expert.model.layers.1.mlp.up_proj.weight"
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSALS = {
    "no folder": ("openvla", shutil.rmtree, "has no config.json; expected a checkpoint folder"),
    "no pi-0 folder": ("pi0", shutil.rmtree, "is no folder; expected one with config.json"),
    "no weights": ("pi0", remove("model.safetensors"), "model.safetensors is missing"),
    "no tokenizer": ("pi05", remove("tokenizer.json"), "has no tokenizer.json; put PaliGemma's there"),
    "no OpenVLA tokenizer": ("openvla", remove("tokenizer.json"), "has no tokenizer.json; expected the"),
    "another line feed": (
        "pi05",
        lambda folder: write_pi0_tokenizer(folder / "tokenizer.json", line_feed=109),
        "is [109], expected [108]; this is not PaliGemma's tokenizer",
    ),
    "larger tokenizer": (
        "pi05",
        lambda folder: write_pi0_tokenizer(folder / "tokenizer.json", size=1025),
        "is a tokenizer of 1025 tokens, the network knows 1024",
    ),
    "broken tokenizer": (
        "pi0",
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot be read as a tokenizer",
    ),
    "bitsandbytes": (
        "openvla",
        config(quantization_config=BITSANDBYTES),
        "these weights are quantised (bitsandbytes)",
    ),
    "GPTQ": (
        "pi05",
        config(quantization_config={"quant_method": "gptq"}),
        "these weights are quantised (gptq)",
    ),
    "AWQ": ("diffusion", config(quantization_config={"quant_method": "awq"}), "are quantised (awq)"),
    "BOS outside": (
        "openvla",
        text_config(bos_token_id=10**6),
        "bos_token_id 1000000 is outside the vocabulary of",
    ),
    "more actions than anyone makes": (
        "pi0",
        config(action_horizon=10**9),
        "action_horizon or chunk_size is 1000000000, expected how many actions",
    ),
    "deviation below 0": (
        "pi0",
        stats(actions=STATS["actions"] | {"std": [-1.0] * len(STATS["actions"]["mean"])}),
        "norm_stats.actions.std is [-1.0",
    ),
    "quantiles the wrong way round": (
        "pi05",
        stats(actions=STATS["actions"] | {"q01": STATS["actions"]["q99"], "q99": STATS["actions"]["q01"]}),
        "norm_stats.actions has a q01 above its q99",
    ),
    "integers": (
        "pi0",
        tensors(lambda held: held.update({f"{GATE}.qweight": torch.zeros(2, 2, dtype=torch.int32)})),
        "is stored as I32, expected one of BF16, F16, F32, F64; integers are what bitsandbytes, GPTQ or AWQ",
    ),
    "missing": ("pi0", tensors(lambda held: held.pop(UP)), f"{UP} is missing; expected the tensors of pi-0"),
    "missing that says a size": ("pi05", tensors(lambda held: held.pop(GATE)), f"{GATE} is missing"),
    "extra": (
        "pi05",
        tensors(lambda held: held.update({"value_head.weight": torch.zeros(2)})),
        "value_head.weight is not of this network",
    ),
    "mis-shaped": (
        "pi0",
        tensors(lambda held: held.update({UP: torch.zeros(3, 16)})),
        f"{UP} has shape [3, 16], expected [24, 16]",
    ),
    "OpenVLA extra": (
        "openvla",
        lambda folder: openvla_tiny.write_weights(
            folder, openvla_tiny.random_tensors() | {"head": torch.zeros(1)}, shards=3
        ),
        "has the tensor head, which OpenVLA's layout lacks",
    ),
    "statistics without quantiles": (
        "pi05",
        stats(actions={k: STATS["actions"][k] for k in ("mean", "std")}),
        "lacks norm_stats.actions.q01",
    ),
    "another robot": (
        "pi0",
        stats(state={"mean": [0.0] * 6, "std": [1.0] * 6}),
        "norm_stats.state are of 6 dimensions, LIBERO's robot has 8",
    ),
    "no horizon": (
        "pi0",
        lambda folder: (folder / "config.json").write_text(json.dumps(HEADS)),
        "action_horizon or chunk_size is None, expected how many actions the network makes at once",
    ),
    "no OpenVLA statistics": ("openvla", config(norm_stats=None), "no action statistics"),
    "no room for a mask": (
        "diffusion",
        lambda folder: openvla_tiny.write_checkpoint(
            folder,
            config={**openvla_tiny.CONFIG, **ONE_SPARE},
            tensors=openvla_tiny.random_tensors({**openvla_tiny.CONFIG, **ONE_SPARE}),
        ),
        "the vocabulary of 32001 ids has none left for [MASK]",
    ),
}
ONE_SPARE = {
    "pad_to_multiple_of": 1,
    "text_config": openvla_tiny.CONFIG["text_config"] | {"vocab_size": 32001},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_that_will_not_do_is_one_line(
    name: str, own: Callable[[str], PolicyPart], tmp_path: Path
) -> None:
    """Found before anything starts, and likewise by whoever builds the policy."""
    kind, spoil, said = REFUSALS[name]
    part = own(kind)
    spoil(tmp_path / "folder")
    with pytest.raises(PublishedError) as refusal:
        check_published(part, image_size=64)
    text = str(refusal.value)
    assert said in text
    assert str(tmp_path / "folder") in text
    assert "\n" not in text
    with pytest.raises(PublishedError) as built:
        published_policy(part, device=CPU)
    assert str(built.value) == text


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("openvla", {"chunk": 8}, "policy.chunk is 8; a published OpenVLA decides one action at a time"),
        (
            "openvla",
            {"unnorm_key": "libero_object"},
            "no statistics for unnorm_key 'libero_object', nearest is 'libero_object_no_noops'",
        ),
        ("diffusion", {"unnorm_key": None}, "statistics of 2 data sets; name one as unnorm_key"),
        ("pi05", {"chunk": 6}, "policy.chunk is 6, "),
        ("pi05", {"flow": FlowPart(version="pi0")}, "is pi0.5 and policy.flow.version is pi0; set"),
        ("pi0", {"flow": FlowPart()}, "is pi0 and policy.flow.version is pi0.5; set"),
    ],
)
def test_a_setting_that_contradicts_the_folder_is_one_line(
    kind: str, change: dict[str, Any], said: str, known: dict[str, PolicyPart]
) -> None:
    part = known[kind].model_copy(update=change)
    for check in (lambda p: check_published(p, image_size=64), lambda p: published_policy(p, device=CPU)):
        with pytest.raises(PublishedError) as refusal:
            check(part)
        assert said in str(refusal.value)


@pytest.mark.parametrize("kind", ["openvla", "pi0", "pi05", "diffusion"])
def test_images_smaller_than_the_checkpoints_are_one_line(kind: str, known: dict[str, PolicyPart]) -> None:
    with pytest.raises(PublishedError) as refusal:
        check_published(known[kind], image_size=27)
    assert str(refusal.value) == (
        f"policy.checkpoint: environment.image_size is 27, the images of {known[kind].checkpoint} have 28 rows and "
        "columns, and it has seen no enlarged ones; set environment.image_size to 28 or more (published LIBERO data: "
        "256)"
    )
    assert check_published(known[kind], image_size=28) > 0


@pytest.mark.parametrize("kind", ["openvla", "pi0"])
def test_the_check_does_not_read_the_weights(
    kind: str, own: Callable[[str], PolicyPart], tmp_path: Path
) -> None:
    """Infinite numbers are not seen by it, only by whoever reads them."""
    part = own(kind)
    tensors(lambda held: [t.fill_(torch.inf) for t in held.values()])(tmp_path / "folder")
    assert check_published(part, image_size=64) > 0
    with pytest.raises(PublishedError, match="non-finite values"):
        published_policy(part, device=CPU)
    published_policy(part, device=CPU, filled=False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.unnorm_key=x"], "unnorm_key means something with policy.checkpoint alone"),
        (["policy.dtype=bfloat16"], "dtype means something with policy.checkpoint alone"),
        (
            ["policy.paradigm=flow", "policy.flow.delta_actions=true"],
            "flow.delta_actions means something with policy.checkpoint",
        ),
        (["policy.checkpoint=x"], "bins contradicts policy.checkpoint"),
        (["policy.checkpoint=x", "policy.bins=256", "policy.decoder.width=32"], "decoder contradicts"),
        (
            ["policy.checkpoint=x", "policy.paradigm=flow", "policy.flow.expert_mlp=32"],
            "flow.expert_mlp contra",
        ),
        (["policy.checkpoint=x", "policy.bins=256", "policy.norm_stats=y"], "norm_stats is not for a"),
        (
            ["policy.checkpoint=x", "policy.bins=256", "policy.paradigm=flow", "policy.unnorm_key=y"],
            "unnorm_key is not for a",
        ),
        (["supervised.steps=0"], "supervised.steps=0 starts from random weights"),
        (
            ["policy.checkpoint=x", "policy.bins=256", "policy.dtype=bfloat16"],
            "supervised.steps=600 on policy.dtype=bfloat16",
        ),
        (
            [
                "policy.checkpoint=x",
                "policy.bins=256",
                "policy.dtype=bfloat16",
                "supervised.steps=0",
                "adapter.dropout=0.1",
            ],
            "adapter.dropout=0.1 with adapter.method=dora on policy.dtype=bfloat16",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_recipe(QUICKSTART, overrides)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_demonstrations_are_needed_by_what_learns_from_them() -> None:
    published = ["policy.checkpoint=x", "policy.bins=256", "supervised.steps=0"]
    assert load_recipe(QUICKSTART).demonstrated
    assert load_recipe(QUICKSTART, ["preference.demo_weight=0"]).demonstrated
    assert load_recipe(QUICKSTART, published).demonstrated
    assert not load_recipe(QUICKSTART, [*published, "preference.demo_weight=0"]).demonstrated


def test_the_command_line_says_it_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    settings = ["policy.bins=256", "policy.chunk=1", "supervised.steps=0", f"root={tmp_path / 'runs'}"]
    done = CliRunner().invoke(
        launch.app, ["train", str(QUICKSTART), f"policy.checkpoint={tmp_path / 'none'}", *settings]
    )
    assert done.exit_code == 2
    assert done.stderr.strip().splitlines()[-1].startswith("pairloom: policy.checkpoint: ")
    assert "has no config.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
