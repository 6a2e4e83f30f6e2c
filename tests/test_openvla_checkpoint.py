"""A published OpenVLA folder: read whole or refused in one line; its statistics and its prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from policies.openvla.actions import action_statistics
from policies.openvla.checkpoint import OpenVLAFolder, open_openvla
from policies.openvla.layout import openvla_layout
from policies.openvla.towers import TimmBackbone
from policies.published import openvla_policy
from tests import openvla_tiny as tiny


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_read_whole(tmp_path: Path, shards: int) -> None:
    tensors = tiny.random_tensors(seed=5)
    found = open_openvla(tiny.write_checkpoint(tmp_path, tensors=tensors, shards=shards))
    network = found.network()
    state = network.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name
    actions = found.layout.actions
    assert (actions.first_id, actions.stop_id, found.image_size) == (31744, 32000, 28)
    assert not network.training
    frequencies = network.language_model.model.rotary_emb.inv_freq
    assert frequencies.tolist() == pytest.approx([10000 ** (-i / 4) for i in range(4)])


def test_weights_keep_their_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tiny.random_tensors().items()}
    tiny.write_checkpoint(tmp_path, tensors=tensors)
    found = open_openvla(tmp_path)
    kept, widened = found.network(), found.network(dtype=torch.float32)
    for network, dtype in ((kept, torch.bfloat16), (widened, torch.float32)):
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}
        assert network.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    name = "projector.fc2.weight"
    assert torch.equal(widened.state_dict()[name], tensors[name].float())
    sample = openvla_policy(tmp_path, unnorm_key=tiny.KEY).act(
        tiny.observations(1), seeds=[0], temperature=0
    )[0]
    assert np.isfinite(sample.logps).all()


def test_a_fine_tuned_checkpoints_own_statistics_and_pixels_come_first(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path)
    own = {"libero_spatial": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(own))
    pixels = {"means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3], "stds": [[0.25] * 3, [0.5] * 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    found = open_openvla(tmp_path)
    assert list(found.norm_stats) == ["libero_spatial"]
    assert found.statistics().mask.tolist() == [True] * 7
    backbone = found.network().vision_backbone
    assert isinstance(backbone, TimmBackbone)
    assert backbone.towers[0].sizes.mean == (0.484375, 0.455078125, 0.40625)
    assert backbone.towers[0].sizes.std == (0.25, 0.25, 0.25)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**pixels, "stds": [[0.25] * 3]}))
    with pytest.raises(
        ValueError, match=r"stds is \[\[0\.25, 0\.25, 0\.25\]\], expected three numbers for each of 2"
    ):
        open_openvla(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**pixels, "stds": [[0.25] * 3, [0.0] * 3]})
    )
    with pytest.raises(ValueError, match=r"stds is .*, expected numbers above 0"):
        open_openvla(tmp_path)


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"lacks the tensor vision_backbone\.featurizer\.blocks\.2\.norm1\.weight \(and 1 more\)"),
        ("last block", r"lacks the tensor vision_backbone\.featurizer\.blocks\.2\.\S+ \(and 13 more\)"),
        ("extra", r"has the tensor action_head\.bias, which OpenVLA's layout lacks \(and 1 more\)"),
        ("shape", r"projector\.fc1\.weight has shape \[40, 160\], expected \[160, 40\] \(and 1 more\)"),
        ("dtype", r"projector\.fc1\.bias is stored as I8, expected one of BF16, F16, F32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, fault: str, message: str) -> None:
    tensors = tiny.random_tensors()
    match fault:
        case "missing":
            del tensors["vision_backbone.featurizer.blocks.2.norm1.weight"]
            del tensors["language_model.lm_head.weight"]
        case "last block":
            tensors = {name: t for name, t in tensors.items() if ".featurizer.blocks.2." not in name}
        case "extra":
            tensors |= {"action_head.weight": torch.zeros(2), "action_head.bias": torch.zeros(2)}
        case "shape":
            for name in ("projector.fc1.weight", "projector.fc2.weight"):
                tensors[name] = tensors[name].T.contiguous()
        case _:
            tensors["projector.fc1.bias"] = torch.zeros(160, dtype=torch.int8)
    tiny.write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=message) as error:
        open_openvla(tmp_path)
    assert str(tmp_path) in one_line(error)


INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
Break = Callable[[Path], Any]


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def move_out(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / SECOND)
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(SECOND, f"../{SECOND}"))


def add_unlisted(folder: Path) -> None:
    save_file({**load_file(folder / THIRD), "extra": torch.zeros(1)}, folder / THIRD)


def cut_short(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, r"has no config\.json; expected a checkpoint folder"),
        (remove(INDEX), r"has neither model\.safetensors nor model\.safetensors\.index\.json; .*pickles"),
        (
            remove(SECOND),
            r"has no model-00002-of-00003\.safetensors, of which model\.safetensors\.index\.json speaks",
        ),
        (move_out, r"has no \.\./model-00002-of-00003\.safetensors"),
        (add_unlisted, r"model-00003-of-00003\.safetensors and model\.\S+json disagree about extra$"),
        (cut_short, r"model-00001-of-00003\.safetensors cannot be read: .*; download it again"),
        (write(INDEX, "{}"), r"model\.safetensors\.index\.json has no weight_map"),
        (write("config.json", "{"), r"config\.json is not JSON"),
        (write("config.json", "[]"), r"config\.json holds a list, expected an object"),
        (remove("tokenizer.json"), r"has no tokenizer\.json; expected the checkpoint's own"),
        (write("tokenizer.json", "{}"), r"tokenizer\.json cannot be read as a tokenizer"),
        (
            lambda folder: tiny.write_tokenizer(folder / "tokenizer.json", size=31999),
            r"is a tokenizer of 31999 tokens, the network's is of 32000",
        ),
        (
            lambda folder: tiny.write_tokenizer(folder / "tokenizer.json", space="<29871>"),
            r"token 29871 is '<29871>', expected '▁', which ends OpenVLA's prompts",
        ),
    ],
)
def test_folders_that_are_no_checkpoint_are_refused(
    openvla_folder: Path, tmp_path: Path, break_it: Break, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(openvla_folder, broken)
    break_it(broken)
    with pytest.raises(ValueError, match=message) as error:
        open_openvla(broken)
    assert str(broken) in one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava', expected 'openvla'"),
        ({"text_config": None}, "text_config is None, expected an object"),
        ({"text_config": {"vocab_size": 32064, "model_type": "phi"}}, "text_config.model_type is 'phi'"),
        ({"text_config": {"vocab_size": "many"}}, "text_config.vocab_size is 'many'"),
        ({"text_config": {"vocab_size": 32064, "hidden_size": 30}}, "hidden_size 30, num_attention_heads 32"),
        (
            {"text_config": {"vocab_size": 32064, "rope_scaling": {"factor": 2}}},
            "rope_scaling is .*, expected none",
        ),
        ({"n_action_bins": None}, "n_action_bins is None, expected a whole number"),
        ({"pad_to_multiple_of": -1}, "pad_to_multiple_of is -1, expected 0 or more"),
        ({"n_action_bins": 32000}, r"bins must lie in 3\.\.31999"),
        ({"pad_token_id": 32064}, "pad_token_id 32064 is outside the vocabulary of 32064"),
        ({"image_sizes": [28, 30]}, "img_size 30 is no multiple of patch_size 14"),
        ({"image_sizes": [28]}, "need 2 entries each"),
        (
            {"image_sizes": [28, "28"]},
            "img_size of 'vit_so400m_patch14_siglip_224' is '28', expected a positive",
        ),
        ({"timm_override_act_layers": [None, "quick_gelu"]}, "'quick_gelu'; only towers with GELU"),
        ({"timm_override_act_layers": 5}, "timm_override_act_layers has 5; only towers with GELU"),
        ({"timm_create_model_calls": 3}, "timm_create_model_calls is 3, expected pairs"),
        ({"timm_create_model_calls": [["a", 3], ["a", None]]}, "expected pairs of a name and its arguments"),
        (
            {"text_config": {"vocab_size": 32064, "hidden_act": "swish_glu"}},
            "text_config.hidden_act is 'swish_glu', expected one that transformers knows",
        ),
        (
            {"timm_model_ids": [tiny.DINOV2, "vit_so400m_patch14_siglip_240"]},
            "nearest known is 'vit_so400m_patch14_",
        ),
        ({"timm_create_model_calls": [[tiny.DINOV2, {"dept": 3}]] * 2}, "timm_create_model_calls are of"),
        ({"norm_stats": None}, "no action statistics: neither dataset_statistics.json nor norm_stats"),
        ({"pad_token_id": 31999}, r"the padding token 31999 lies among the action tokens 31744\.\.31999"),
        (
            {"n_action_bins": 3000},
            r"the prompt-ending token 29871 lies among the action tokens 29000\.\.31999",
        ),
    ],
)
def test_settings_that_are_not_openvlas_are_named(
    openvla_folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    for file in openvla_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = {**tiny.CONFIG, **change}
    if "timm_model_ids" in change:
        del config["timm_create_model_calls"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        open_openvla(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_an_unknown_argument_of_a_tower_is_named() -> None:
    calls = [[name, {"dept": 3}] for name in (tiny.DINOV2, tiny.SIGLIP)]
    with pytest.raises(ValueError, match=r"x: timm_create_model_calls of 'vit_large\S+' has 'dept'; known"):
        openvla_layout({**tiny.CONFIG, "timm_create_model_calls": calls}, where="x")


# Statistics


def test_statistics_are_found_by_key(openvla_checkpoint: OpenVLAFolder) -> None:
    assert openvla_checkpoint.statistics(tiny.KEY).q99[0] == 0.6
    assert openvla_checkpoint.statistics("bridge_orig").mask.all()
    with pytest.raises(
        ValueError, match=r"for unnorm_key 'libero_object', nearest is 'libero_object_no_noops'; known"
    ):
        openvla_checkpoint.statistics("libero_object")
    with pytest.raises(
        ValueError, match=r"statistics of 2 data sets; name one as unnorm_key: libero_object_no_noops"
    ):
        openvla_checkpoint.statistics()


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({}, "statistics of 'a' lack action.q01 or action.q99"),
        ({"action": {"q01": [0.0]}}, "lack action.q01 or action.q99"),
        (
            {"action": {"q01": [0.0], "q99": [1.0, 2.0]}},
            r"differ in length: q01 \[1\], q99 \[2\], mask \[1\]",
        ),
        ({"action": {"q01": [0.0], "q99": [1.0], "mask": [True] * 2}}, r"mask \[2\]"),
        ({"action": {"q01": [0.0], "q99": ["x"]}}, "are not lists of numbers"),
        ({"action": {"q01": [float("nan")], "q99": [1.0]}}, "a quantile that is not finite"),
        ({"action": {"q01": [1.0], "q99": [0.0]}}, "a q01 above its q99"),
    ],
)
def test_incomplete_statistics_are_refused(stats: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        action_statistics({"a": stats}, None, where="here")
    assert one_line(error).startswith("here")


# Prompts


def test_prompts_begin_with_bos_and_end_with_the_lone_space(openvla_checkpoint: OpenVLAFolder) -> None:
    ids, mask = openvla_checkpoint.prompts.stack(
        ["Pick up the milk", "open the middle drawer of the cabinet"]
    )
    lengths = mask.sum(axis=1)
    # BOS, in : what action should the robot take to <4 or 7 words> ? out : and the space.
    assert lengths.tolist() == [18, 21]
    assert ids[:, 0].tolist() == [1, 1]
    assert [int(row[n - 1]) for row, n in zip(ids, lengths, strict=True)] == [29871, 29871]
    assert (ids[0, 18:] == 32000).all()
    assert (ids[mask] != 0).all()
