"""OpenVLA as published: its network against golden numbers, how it decodes, and the policy of a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.policy import DecoderPart, VisionPart
from configs.preference import AdapterPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import decode
from policies.decoding.modules import ModuleDecoder
from policies.decoding.packed import PackedDecoder
from policies.openvla.actions import action_statistics
from policies.openvla.checkpoint import OpenVLAFolder
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

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PAIRLOOM_SHARED", ROOT.parent / "shared"))
GOLDEN = sorted(SHARED.glob("parity/openvla*"))
needs_golden = pytest.mark.skipif(not GOLDEN, reason=f"no golden fixture at {SHARED}/parity/openvla*")


@pytest.fixture(scope="module")
def policy(openvla_folder: Path) -> AutoregressivePolicy:
    return openvla_policy(openvla_folder, unnorm_key=tiny.KEY)


# The network against the official one's numbers


@needs_golden
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_the_network_computes_what_the_official_one_does(golden: Path) -> None:
    fixture = load_fixture(golden)
    found = {one.name: one for one in check_fixture(fixture)}
    assert set(found) == set(fixture.expected)
    assert [one for one in found.values() if not one.passed] == []


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


def test_each_tower_normalises_pixels_its_own_way(openvla_network: OpenVLA) -> None:
    backbone = openvla_network.vision_backbone
    assert isinstance(backbone, TimmBackbone)
    dinov2, siglip = backbone.towers
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(1, 1, 1, 3)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert dinov2.normalize(image).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert siglip.normalize(image).flatten().tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-6)


@torch.no_grad()
def test_channels_and_features_lie_tower_by_tower(openvla_network: OpenVLA) -> None:
    backbone = openvla_network.vision_backbone
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


# Decoding


@torch.no_grad()
def test_decoding_by_modules_is_one_forward_per_token(
    openvla_checkpoint: OpenVLAFolder, openvla_network: OpenVLA
) -> None:
    """Over the whole vocabulary, ragged prompts included: each id is the argmax of a forward over all before it."""
    network = openvla_network
    prompt, mask = (
        torch.from_numpy(a)
        for a in openvla_checkpoint.prompts.stack([o.instruction for o in tiny.observations(3)])
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
def test_both_decoders_agree_on_the_action_tokens(
    openvla_checkpoint: OpenVLAFolder, openvla_network: OpenVLA
) -> None:
    network = openvla_network
    prompt, mask = (
        torch.from_numpy(a)
        for a in openvla_checkpoint.prompts.stack([o.instruction for o in tiny.observations(3)])
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
    seen = tiny.observations(4)
    samples = policy.act(seen, seeds=range(4), temperature=1.0)
    stats = action_statistics(tiny.STATISTICS, tiny.KEY, where="test")
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
    seen = tiny.observations(1)[0]
    before = policy.act([seen], seeds=[0], temperature=0)[0].logps
    blind = replace(seen, wrist=255 - seen.wrist, proprio=seen.proprio + 1)
    np.testing.assert_array_equal(policy.act([blind], seeds=[0], temperature=0)[0].logps, before)
    other = replace(seen, agentview=255 - seen.agentview)
    assert np.abs(policy.act([other], seeds=[0], temperature=0)[0].logps - before).max() > 1e-3
    with pytest.raises(ValueError, match=r"an image is float64 \[48, 48, 3\], expected uint8"):
        policy.act([replace(seen, agentview=seen.agentview / 255)], seeds=[0], temperature=0)


def test_the_likeliest_action_is_the_same_over_the_whole_vocabulary_when_it_is_an_action(
    openvla_folder: Path,
) -> None:
    policy = openvla_policy(openvla_folder, unnorm_key=tiny.KEY)
    with torch.no_grad():
        # No id but an action's can win.
        policy.network.language_model.lm_head.weight[:31744] *= 1e-3
        policy.network.language_model.lm_head.weight[32000:] *= 1e-3
    seen = tiny.observations(3)
    samples = policy.act(seen, seeds=[0, 0, 0], temperature=0)
    batch = policy.batch(seen, [sample.model_chunk for sample in samples])
    ids, _ = greedy_over_vocabulary(
        policy.network, policy.encode_context(batch), batch.prompt_BT, batch.prompt_mask_BT, length=7
    )
    np.testing.assert_array_equal(ids.numpy(), [sample.model_chunk for sample in samples])


def test_an_adapter_goes_on_a_checkpoint_and_is_seen_when_it_acts(openvla_folder: Path) -> None:
    policy = openvla_policy(openvla_folder, unnorm_key=tiny.KEY)
    seen = tiny.observations(1)
    before = policy.act(seen, seeds=[0], temperature=0)[0].logps
    adapters.attach(
        policy.module, AdapterPart(method="dora", rank=2, alpha=4), seed=0, decoders=policy.adapted
    )
    np.testing.assert_allclose(policy.act(seen, seeds=[0], temperature=0)[0].logps, before, atol=1e-4)
    with torch.no_grad():
        for name, parameter in adapters.parameters(policy.module).items():
            if name.endswith(".B"):
                parameter.fill_(0.3)
    assert np.abs(policy.act(seen, seeds=[0], temperature=0)[0].logps - before).max() > 1e-2
