"""OpenVLA as published: its network against golden numbers, its checkpoints, tokens, actions and images."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from configs.policy import DecoderPart, VisionPart
from configs.schema import AdapterPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import decode
from policies.decoding.modules import ModuleDecoder
from policies.decoding.packed import PackedDecoder
from policies.encoding.action_tokens import ActionTokenizer
from policies.openvla.actions import (
    ActionStatistics,
    OpenVLAActions,
    action_statistics,
    from_libero_gripper,
    to_libero_gripper,
)
from policies.openvla.checkpoint import OpenVLACheckpoint, load_openvla
from policies.openvla.images import crop_centre, jpeg_round_trip, libero_view, resize_lanczos
from policies.openvla.layout import DINOV2, SIGLIP, openvla_layout
from policies.openvla.network import OpenVLA, llama
from policies.openvla.towers import TimmBackbone, TimmTower
from policies.openvla.vision import SiglipTower, VisionBackbone
from policies.openvla.whole_vocabulary import greedy_over_vocabulary, score_over_vocabulary
from policies.parity.check import check_fixture
from policies.parity.fixture import FixtureError, load_fixture
from policies.protocol import DecisionBatch
from policies.published import openvla_policy
from policies.weights import adapters
from tests import openvla_tiny as tiny
from trajectories.records import Observation

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PAIRLOOM_SHARED", ROOT.parent / "shared"))
GOLDEN = sorted(SHARED.glob("parity/openvla*"))
needs_golden = pytest.mark.skipif(not GOLDEN, reason=f"no golden fixture at {SHARED}/parity/openvla*")
KEY = "libero_object_no_noops"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> OpenVLACheckpoint:
    return load_openvla(folder)


@pytest.fixture(scope="module")
def policy(folder: Path) -> AutoregressivePolicy:
    return openvla_policy(folder, unnorm_key=KEY)


def observations(count: int) -> list[Observation]:
    rng = np.random.default_rng(0)
    instructions = (
        "open the middle drawer of the cabinet",
        "pick up the milk",
        "pick up the black bowl",
    )
    return [
        Observation(
            agentview=rng.integers(0, 256, (48, 48, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (48, 48, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=instructions[i % 3],
        )
        for i in range(count)
    ]


# The network against the official one's numbers


@needs_golden
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_the_network_computes_what_the_official_one_does(golden: Path) -> None:
    fixture = load_fixture(golden)
    found = {one.name: one for one in check_fixture(fixture)}
    assert set(found) == set(fixture.expected)
    assert [one for one in found.values() if not one.passed or one.difference > 3e-5] == []


@needs_golden
@pytest.mark.parametrize(
    ("name", "number", "first"),
    [
        ("vision_backbone.featurizer.blocks.0.ls1.scale_factor", 0.0, "fused_patches"),
        ("vision_backbone.featurizer.reg_token", 0.0, "fused_patches"),
        ("projector.fc3.bias", 0.0, "projected_patches"),
        ("language_model.lm_head.weight", 0.0, "tf_loss"),
    ],
)
def test_another_network_is_found_out(name: str, number: float, first: str) -> None:
    fixture = load_fixture(GOLDEN[0])
    weights = {**fixture.weights, name: torch.full_like(fixture.weights[name], number)}
    failed = {one.name for one in check_fixture(replace(fixture, weights=weights)) if not one.passed}
    assert first in failed
    assert "encoded_ids" not in failed


@needs_golden
def test_a_golden_fixture_that_does_not_fit_is_refused() -> None:
    fixture = load_fixture(GOLDEN[0])
    weights = {
        name: tensor for name, tensor in fixture.weights.items() if not name.startswith("projector.fc3")
    }
    with pytest.raises(FixtureError, match=r"lacks the tensor projector\.fc3\.weight \(and 1 more\)"):
        list(check_fixture(replace(fixture, weights=weights)))
    named = replace(
        fixture, expected={"greedy_actions_bridge": fixture.expected["greedy_actions_demo_masked"]}
    )
    with pytest.raises(FixtureError, match=r"no statistics for unnorm_key 'bridge', nearest is"):
        list(check_fixture(named))


# Towers


def test_published_sizes_make_the_published_network() -> None:
    """7,541,237,184 parameters, and text_config naming no more than it does on the Hub."""
    config = {**tiny.CONFIG, "image_sizes": [224, 224], "text_config": {"vocab_size": 32064}}
    del config["timm_create_model_calls"]
    network = openvla_layout(config, where="test").empty()
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_541_237_184
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["vision_backbone.featurizer.pos_embed"] == (1, 256, 1024)
    assert shapes["vision_backbone.featurizer.blocks.23.ls2.scale_factor"] == (1024,)
    assert shapes["vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight"] == (4304, 1152)
    assert shapes["vision_backbone.fused_featurizer.attn_pool.latent"] == (1, 1, 1152)
    assert shapes["projector.fc1.weight"] == (8704, 2176)
    assert shapes["language_model.model.layers.31.mlp.up_proj.weight"] == (11008, 4096)
    assert not any("proprio" in name for name in shapes)


def test_each_tower_normalises_pixels_its_own_way(checkpoint: OpenVLACheckpoint) -> None:
    backbone = checkpoint.network.vision_backbone
    assert isinstance(backbone, TimmBackbone)
    dinov2, siglip = backbone.towers
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 1, 1, 3)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert dinov2.normalize(image).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert siglip.normalize(image).flatten().tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-6)


@torch.no_grad()
def test_channels_and_features_lie_tower_by_tower(checkpoint: OpenVLACheckpoint) -> None:
    backbone = checkpoint.network.vision_backbone
    assert isinstance(backbone, TimmBackbone)
    pixels = torch.randn(2, 6, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
    fused = backbone.patches(pixels)
    assert fused.shape == (2, 4, 16 + 24)
    changed = pixels.clone()
    changed[:, 4] += 1
    moved = (backbone.patches(changed) - fused).abs().amax(dim=(0, 1))
    assert moved[:16].max() == 0
    assert moved[16:].min() > 0
    images = torch.randint(0, 256, (2, tiny.SIDE, tiny.SIDE, 3), dtype=torch.uint8)
    normal = torch.cat([tower.normalize(images) for tower in backbone.towers], dim=1)
    torch.testing.assert_close(backbone(images), backbone.patches(normal))
    with pytest.raises(ValueError, match=r"pixels have shape \[2, 3, 28, 28\], expected \[images, 6"):
        backbone.patches(pixels[:, :3])
    with pytest.raises(ValueError, match=r"28 x 28 images got pixels of shape \[2, 3, 14, 28\]"):
        backbone.patches(pixels[:, :, :14])


@torch.no_grad()
def test_what_lies_behind_the_second_to_last_block_has_no_influence() -> None:
    for sizes in (DINOV2, SIGLIP):
        tower = TimmTower(replace(sizes, embed_dim=16, depth=3, num_heads=2, img_size=28))
        generator = torch.Generator().manual_seed(0)
        for parameter in tower.parameters():
            parameter.normal_(generator=generator, std=0.3)
        pixels = torch.randn(1, 3, 28, 28, generator=generator)
        before = tower(pixels)
        for name, parameter in tower.named_parameters():
            parameter += 1
            idle = name.startswith(("blocks.2.", "norm.", "attn_pool."))
            assert torch.equal(tower(pixels), before) == idle, name
            parameter -= 1
            before = tower(pixels)


def test_towers_that_do_not_fit_are_named() -> None:
    small = replace(DINOV2, embed_dim=16, depth=2, num_heads=2, img_size=28)
    with pytest.raises(ValueError, match="embed_dim 16 is no multiple of num_heads 3"):
        replace(small, num_heads=3)
    with pytest.raises(ValueError, match="img_size 30 is no multiple of patch_size 14"):
        replace(small, img_size=30)
    with pytest.raises(ValueError, match="got depth 1"):
        replace(small, depth=1)
    with pytest.raises(ValueError, match="share one img_size, got 28 and 42"):
        TimmBackbone([small, replace(small, img_size=42)])
    with pytest.raises(ValueError, match="1 or 2 towers, got 3"):
        TimmBackbone([small] * 3)


# One or two cameras, with and without proprioception


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("proprioception", [False, True])
@torch.no_grad()
def test_a_network_reads_what_it_was_built_to_read(cameras: Any, proprioception: bool) -> None:
    torch.manual_seed(0)
    network = OpenVLA(
        vision_backbone=VisionBackbone([SiglipTower(VisionPart(width=16, layers=1, heads=1), 32)], 2),
        language_model=llama(DecoderPart(width=16, layers=1, heads=2), vocab_size=60, bos_id=1, pad_id=0),
        action_first_id=40,
        action_stop_id=60,
        cameras=cameras,
        proprioception=proprioception,
    )
    batch = DecisionBatch(
        agentview_BHWC=torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
        wrist_BHWC=torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
        proprio_BP=torch.randn(2, 8),
        prompt_BT=torch.tensor([[1, 5, 6, 7], [1, 5, 0, 0]]),
        prompt_mask_BT=torch.tensor([[True] * 4, [True, True, False, False]]),
        chunk_BL=torch.tensor([[41, 42, 43], [44, 45, 46]]),
    )
    image_tokens = network.encode_images(batch.agentview_BHWC, batch.wrist_BHWC)
    assert image_tokens.shape == (2, 4 * cameras, 16)
    logits = network(batch)
    for row, text in enumerate(([1, 5, 6, 7, 41, 42], [1, 5, 44, 45])):
        one = network.read(torch.tensor([text]), image_tokens[row : row + 1], batch.proprio_BP[row : row + 1])
        assert one.logits_BSV.shape == (1, len(text) + 4 * cameras + proprioception, 60)
        torch.testing.assert_close(logits[row], one.logits_BSV[0, -3:, 40:], atol=1e-5, rtol=1e-5)
    for name, seen in (
        ("wrist_BHWC", cameras == 2),
        ("proprio_BP", proprioception),
        ("agentview_BHWC", True),
    ):
        other = network(replace(batch, **{name: getattr(batch, name).flip(0)}))
        assert torch.equal(other, logits) != seen, name
    if proprioception:
        with pytest.raises(ValueError, match="reads proprioception; none was given"):
            network.embed(batch.prompt_BT, image_tokens)


# Checkpoints


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_read_whole(tmp_path: Path, shards: int) -> None:
    tensors = tiny.random_tensors(seed=5)
    loaded = load_openvla(tiny.write_checkpoint(tmp_path, tensors=tensors, shards=shards))
    state = loaded.network.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name
    assert (loaded.tokens.first_id, loaded.tokens.stop_id, loaded.image_size) == (31744, 32000, 28)
    assert not loaded.network.training
    frequencies = loaded.network.language_model.model.rotary_emb.inv_freq
    assert frequencies.tolist() == pytest.approx([10000 ** (-i / 4) for i in range(4)])


def test_weights_keep_their_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tiny.random_tensors().items()}
    tiny.write_checkpoint(tmp_path, tensors=tensors)
    kept, widened = load_openvla(tmp_path), load_openvla(tmp_path, dtype=torch.float32)
    for loaded, dtype in ((kept, torch.bfloat16), (widened, torch.float32)):
        assert {parameter.dtype for parameter in loaded.network.parameters()} == {dtype}
        assert loaded.network.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    name = "projector.fc2.weight"
    assert torch.equal(widened.network.state_dict()[name], tensors[name].float())
    sample = openvla_policy(tmp_path, unnorm_key=KEY).act(observations(1), seeds=[0], temperature=0)[0]
    assert np.isfinite(sample.logps).all()


def test_a_fine_tuned_checkpoints_own_statistics_and_pixels_come_first(tmp_path: Path) -> None:
    tiny.write_checkpoint(tmp_path)
    own = {"libero_spatial": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(own))
    pixels = {"means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3], "stds": [[0.25] * 3, [0.5] * 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    loaded = load_openvla(tmp_path)
    assert list(loaded.norm_stats) == ["libero_spatial"]
    assert loaded.statistics().mask.tolist() == [True] * 7
    backbone = loaded.network.vision_backbone
    assert isinstance(backbone, TimmBackbone)
    assert backbone.towers[0].sizes.mean == (0.484375, 0.455078125, 0.40625)
    assert backbone.towers[0].sizes.std == (0.25, 0.25, 0.25)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**pixels, "stds": [[0.25] * 3]}))
    with pytest.raises(
        ValueError, match=r"stds is \[\[0\.25, 0\.25, 0\.25\]\], expected three numbers for each of 2"
    ):
        load_openvla(tmp_path)


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
        load_openvla(tmp_path)
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
    folder: Path, tmp_path: Path, break_it: Break, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_it(broken)
    with pytest.raises(ValueError, match=message) as error:
        load_openvla(broken)
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
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = {**tiny.CONFIG, **change}
    if "timm_model_ids" in change:
        del config["timm_create_model_calls"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_openvla(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_an_unknown_argument_of_a_tower_is_named() -> None:
    calls = [[name, {"dept": 3}] for name in (tiny.DINOV2, tiny.SIGLIP)]
    with pytest.raises(ValueError, match=r"x: timm_create_model_calls of 'vit_large\S+' has 'dept'; known"):
        openvla_layout({**tiny.CONFIG, "timm_create_model_calls": calls}, where="x")


# Statistics and actions


def test_statistics_are_found_by_key(checkpoint: OpenVLACheckpoint) -> None:
    assert checkpoint.statistics(KEY).q99[0] == 0.6
    assert checkpoint.statistics("bridge_orig").mask.all()
    with pytest.raises(
        ValueError, match=r"for unnorm_key 'libero_object', nearest is 'libero_object_no_noops'; known"
    ):
        checkpoint.statistics("libero_object")
    with pytest.raises(
        ValueError, match=r"statistics of 2 data sets; name one as unnorm_key: libero_object_no_noops"
    ):
        checkpoint.statistics()


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
    ],
)
def test_incomplete_statistics_are_refused(stats: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        action_statistics({"a": stats}, None, where="here")
    assert one_line(error).startswith("here")


def test_unnormalising_spans_the_quantiles_where_the_mask_is_true() -> None:
    stats = action_statistics(tiny.STATISTICS, KEY, where="test")
    values = np.array([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0, 0.25])
    np.testing.assert_allclose(stats.unnormalize(values), [-0.5, 0.025, 0.9, -0.1, -0.025, 0.3, 0.25])
    np.testing.assert_allclose(stats.normalize(stats.unnormalize(values)), values, atol=1e-12)
    flat = ActionStatistics(q01=np.array([0.2]), q99=np.array([0.2]), mask=np.array([True]))
    assert flat.normalize(np.array([5.0])).tolist() == [0]
    assert flat.unnormalize(np.array([0.0])).tolist() == [0.2]


@given(shares=st.lists(st.floats(0, 1), min_size=6, max_size=6), closed=st.booleans())
def test_actions_survive_a_checkpoints_tokens_within_half_a_bin(shares: list[float], closed: bool) -> None:
    stats = action_statistics(tiny.STATISTICS, KEY, where="test")
    actions = OpenVLAActions(ActionTokenizer(vocab_size=32000, bins=256), stats)
    width = (stats.q99 - stats.q01)[:6]
    given_actions = np.array([[*(stats.q01[:6] + np.array(shares) * width), 1.0 if closed else -1.0]])
    ids = actions.encode(given_actions)
    assert ((ids >= 31744) & (ids < 32000)).all()
    back = actions.decode(ids)
    assert back.dtype == np.float32
    assert back[0, 6] == given_actions[0, 6]
    # Half a bin is 1 / 255 of normalised units, which span two; a shared lowest centre is as far.
    assert (np.abs(back - given_actions)[0, :6] <= width / 2 / 255 + 1e-6).all()
    # The two lowest ids share the highest centre, which is the second's own.
    np.testing.assert_array_equal(actions.encode(back)[:6], np.maximum(ids, 31745)[:6])


def test_ids_that_are_no_actions_clip_where_openvla_clips_them() -> None:
    tokens = ActionTokenizer(vocab_size=32000, bins=256)
    ids = np.array([31999, 32000, 32063, 31744, 31745, 31743, 5])
    expected = np.array([-254, -254, -254, 254, 254, 254, 254]) / 255
    np.testing.assert_allclose(tokens.values(ids), expected, atol=1e-12)
    with pytest.raises(ValueError, match="token id 32000 is no action token"):
        tokens.decode(ids)


def test_openvlas_rule_holds_for_odd_numbers_of_bins_when_asked() -> None:
    tokens = ActionTokenizer(vocab_size=100, bins=5, exact_ends=False)
    # Edges -1, -0.5, 0, 0.5, 1; centres between them.
    np.testing.assert_allclose(tokens.centres, [-0.75, -0.25, 0.25, 0.75])
    assert tokens.ids(np.array([-1.0, -0.6, 0.1, 0.9, 1.0])).tolist() == [99, 99, 97, 96, 95]


def test_the_gripper_is_always_open_or_closed() -> None:
    actions = np.tile(np.arange(7.0), (5, 1))
    actions[:, 6] = [0.0, 0.49, 0.5, 1.0, -0.2]
    libero = to_libero_gripper(actions)
    assert libero[:, 6].tolist() == [1, 1, -1, -1, 1]
    assert libero[:, :6].tolist() == actions[:, :6].tolist()
    assert actions[2, 6] == 0.5
    assert from_libero_gripper(libero)[:, 6].tolist() == [0, 0, 1, 1, 0]


def test_statistics_of_another_robot_are_refused() -> None:
    stats = ActionStatistics(q01=np.zeros(14), q99=np.ones(14), mask=np.ones(14, bool))
    with pytest.raises(ValueError, match="statistics are of 14 action dimensions, LIBERO's robot has 7"):
        OpenVLAActions(ActionTokenizer(vocab_size=32000, bins=256), stats)


# Prompts


def test_prompts_begin_with_bos_and_end_with_the_lone_space(checkpoint: OpenVLACheckpoint) -> None:
    ids, mask = checkpoint.prompts.stack(["Pick up the milk", "open the middle drawer of the cabinet"])
    lengths = mask.sum(axis=1)
    # BOS, in : what action should the robot take to <4 or 7 words> ? out : and the space.
    assert lengths.tolist() == [18, 21]
    assert ids[:, 0].tolist() == [1, 1]
    assert [int(row[n - 1]) for row, n in zip(ids, lengths, strict=True)] == [29871, 29871]
    assert (ids[0, 18:] == 32000).all()
    assert (ids[mask] != 0).all()


# Decoding


@torch.no_grad()
def test_decoding_by_modules_is_one_forward_per_token(checkpoint: OpenVLACheckpoint) -> None:
    """Over the whole vocabulary, ragged prompts included: each id is the argmax of a forward over all before it."""
    network = checkpoint.network
    prompt, mask = (
        torch.from_numpy(a) for a in checkpoint.prompts.stack([o.instruction for o in observations(3)])
    )
    images = torch.randint(
        0, 256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    image_tokens = network.encode_images(images, images)
    ids, logits = greedy_over_vocabulary(network, image_tokens, prompt, mask, length=7)
    assert len(set(mask.sum(dim=1).tolist())) == 3
    assert ids.shape == (3, 7)
    for row in range(3):
        text = prompt[row : row + 1, : int(mask[row].sum())]
        for step in range(7):
            expected = network.read(text, image_tokens[row : row + 1]).logits_BSV[0, -1]
            torch.testing.assert_close(logits[row, step], expected, atol=1e-4, rtol=1e-4)
            assert ids[row, step] == expected.argmax()
            text = torch.cat([text, ids[row : row + 1, step : step + 1]], dim=1)
    assert (ids < 31744).any()


@torch.no_grad()
def test_both_decoders_agree_on_the_action_tokens(checkpoint: OpenVLACheckpoint) -> None:
    network = checkpoint.network
    prompt, mask = (
        torch.from_numpy(a) for a in checkpoint.prompts.stack([o.instruction for o in observations(3)])
    )
    images = torch.randint(
        0, 256, (3, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    prefix = network.embed(prompt, network.encode_images(images, images))
    lengths = (mask.sum(dim=1) + 4).tolist()
    noise = torch.randn(7, 3, 256, generator=torch.Generator().manual_seed(2))
    results = [
        decode(kind(network.language_model, first_id=31744, stop_id=32000), prefix, lengths, noise)
        for kind in (PackedDecoder, ModuleDecoder)
    ]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)


# The policy of a checkpoint


def test_a_checkpoint_acts_on_libero(policy: AutoregressivePolicy) -> None:
    seen = observations(4)
    samples = policy.act(seen, seeds=range(4), temperature=1.0)
    stats = action_statistics(tiny.STATISTICS, KEY, where="test")
    for sample in samples:
        assert sample.actions.shape == (1, 7)
        assert sample.actions.dtype == np.float32
        assert ((sample.actions[0, :6] >= stats.q01[:6]) & (sample.actions[0, :6] <= stats.q99[:6])).all()
        assert sample.actions[0, 6] in (-1, 1)
    with torch.no_grad():
        batch = policy.batch(seen, [sample.model_chunk for sample in samples])
        scores = policy.score(batch).numpy()
        np.testing.assert_allclose(scores, [sample.logps for sample in samples], atol=1e-4)
        whole = score_over_vocabulary(policy.network, batch).numpy()
        assert (whole < scores).all()
        tokens = policy.encode_context(batch)
        np.testing.assert_allclose(
            score_over_vocabulary(policy.network, batch, tokens).numpy(), whole, atol=1e-5
        )
    alone = policy.act([seen[2]], seeds=[2], temperature=1.0)[0]
    np.testing.assert_array_equal(alone.model_chunk, samples[2].model_chunk)


def test_a_checkpoint_sees_the_agentview_alone(policy: AutoregressivePolicy) -> None:
    seen = observations(1)[0]
    before = policy.act([seen], seeds=[0], temperature=0)[0].logps
    blind = replace(seen, wrist=255 - seen.wrist, proprio=seen.proprio + 1)
    np.testing.assert_array_equal(policy.act([blind], seeds=[0], temperature=0)[0].logps, before)
    other = replace(seen, agentview=255 - seen.agentview)
    assert np.abs(policy.act([other], seeds=[0], temperature=0)[0].logps - before).max() > 1e-3
    with pytest.raises(ValueError, match=r"an image is float64 \[48, 48, 3\], expected uint8"):
        policy.act([replace(seen, agentview=seen.agentview / 255)], seeds=[0], temperature=0)


def test_the_likeliest_action_is_the_same_over_the_whole_vocabulary_when_it_is_an_action(
    folder: Path,
) -> None:
    policy = openvla_policy(folder, unnorm_key=KEY)
    with torch.no_grad():
        # No id but an action's can win.
        policy.network.language_model.lm_head.weight[:31744] *= 1e-3
        policy.network.language_model.lm_head.weight[32000:] *= 1e-3
    seen = observations(3)
    samples = policy.act(seen, seeds=[0, 0, 0], temperature=0)
    batch = policy.batch(seen, [sample.model_chunk for sample in samples])
    ids, _ = greedy_over_vocabulary(
        policy.network, policy.encode_context(batch), batch.prompt_BT, batch.prompt_mask_BT, length=7
    )
    np.testing.assert_array_equal(ids.numpy(), [sample.model_chunk for sample in samples])


def test_an_adapter_goes_on_a_checkpoint_and_is_seen_when_it_acts(folder: Path) -> None:
    policy = openvla_policy(folder, unnorm_key=KEY)
    seen = observations(1)
    before = policy.act(seen, seeds=[0], temperature=0)[0].logps
    adapters.attach(
        policy.module, AdapterPart(method="dora", rank=2, alpha=4), seed=0, decoder=policy.adapted
    )
    np.testing.assert_allclose(policy.act(seen, seeds=[0], temperature=0)[0].logps, before, atol=1e-4)
    with torch.no_grad():
        for name, parameter in adapters.parameters(policy.module).items():
            if name.endswith(".B"):
                parameter.fill_(0.3)
    assert np.abs(policy.act(seen, seeds=[0], temperature=0)[0].logps - before).max() > 1e-2


# Images


def test_an_upright_image_is_mirrored_which_turns_the_simulators_by_180_degrees() -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:16, :16] = 255
    simulators = upright[::-1]
    seen = libero_view(upright, size=64, crop=False)
    assert seen.shape == (64, 64, 3)
    assert np.abs(seen.astype(int) - simulators[::-1, ::-1]).mean() < 1
    assert seen[4, 60].min() > 250
    assert seen[4, 4].max() < 5


def test_jpeg_keeps_grey_and_halves_colour() -> None:
    grey = np.full((16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(jpeg_round_trip(grey), grey)
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    back = jpeg_round_trip(stripes).astype(int)
    # Columns of red and blue alike bright become nearly one purple: their colour is averaged by pairs.
    assert np.abs(back[4, 4, 0] - back[4, 5, 0]) < 128


def test_lanczos_weights_are_the_kernels() -> None:
    """A column of one bright row, shrunk 8 -> 4: each new row is the kernel at the distance, widened twice."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[3] = 200
    small = resize_lanczos(image, 4)
    centres = 2 * np.arange(4) + 1.0
    distance = (np.arange(8)[None] + 0.5 - centres[:, None]) / 2
    kernel = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    expected = 200 * kernel[:, 3] / kernel.sum(axis=1)
    np.testing.assert_array_equal(small[:, 0, 0], np.clip(np.rint(expected), 0, 255))
    assert small[1, 0, 0] > 80
    same = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_lanczos(same, 9), same)


def test_resizing_rounds_once() -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    centres = (np.arange(224) + 0.5) * 256 / 224
    distance = (np.arange(256)[None] + 0.5 - centres[:, None]) * 224 / 256
    kernel = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    kernel /= kernel.sum(axis=1, keepdims=True)
    exact = np.moveaxis(kernel @ np.moveaxis(image.astype(np.float64), -1, 0) @ kernel.T, 0, -1)
    assert np.abs(resize_lanczos(image, 224) - np.clip(exact, 0, 255)).max() < 0.501


def test_the_centre_crop_keeps_nine_tenths_of_the_area() -> None:
    # Brightness is the column, so a pixel says where it came from.
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8)[None, :, None], (224, 224, 3))
    cropped = crop_centre(np.ascontiguousarray(ramp), 0.9)
    first = (1 - np.sqrt(0.9)) / 2 * 223
    assert cropped.shape == (224, 224, 3)
    # Back to whole numbers by cutting off: 5.72 is 5, and 217.28 is 217.
    assert cropped[0, 0, 0] == int(first) == 5
    assert cropped[100, -1, 0] == int(223 - first) == 217
    np.testing.assert_allclose(cropped[50, :, 1], np.linspace(first, 223 - first, 224), atol=1)
    whole = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_centre(whole, 1.0), whole)


def test_a_view_is_cropped_unless_told_otherwise() -> None:
    upright = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain = libero_view(upright, size=56, crop=False)
    np.testing.assert_array_equal(libero_view(upright, size=56), crop_centre(plain, 0.9))
    with pytest.raises(
        ValueError, match=re.escape("an image is uint8 [64, 64], expected uint8 [rows, columns, 3]")
    ):
        libero_view(upright[..., 0], size=56)
