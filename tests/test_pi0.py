"""pi-0 and pi-0.5 against openpi's numbers, against transformers' pi-0, and against a plain pass over the whole
sequence; and what sharing, padding and masks must not or must change."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PI0ForConditionalGeneration

from configs.preference import AdapterPart
from objectives.flow_matching import noisy_chunk, velocity_errors
from policies.decoding.prefix import Prefix, attention_mask, positions
from policies.flow import FlowPolicy
from policies.parity.check import check_fixture
from policies.parity.fixture import FixtureError, load_fixture
from policies.pi0.checkpoint import LAYOUTS, read_weights
from policies.pi0.expert import AdaptiveRMSNorm
from policies.pi0.network import Pi0Network, Suffix
from policies.pi0.sizes import PI0, PI05, Pi0Config, pi0_config
from policies.weights.adapters import adapted_layers, attach, parameters
from tests.pi0_tiny import TINY, in_layout, tiny_batch, tiny_network

ROOT = Path(__file__).parents[1]
PARITY = Path(os.environ.get("PAIRLOOM_SHARED", ROOT.parent / "shared")) / "parity"
BOTH = pytest.mark.parametrize("adaptive", [False, True], ids=["pi0", "pi05"])


def golden(name: str) -> Path:
    if not (PARITY / name).is_dir():
        pytest.skip(f"no golden fixture at {PARITY / name}")
    return PARITY / name


@pytest.mark.parametrize("name", ["pi0_tiny", "pi05_tiny"])
def test_openpis_numbers_come_out(name: str) -> None:
    fixture = load_fixture(golden(name))
    comparisons = {c.name: c for c in check_fixture(fixture)}
    assert [c for c in comparisons.values() if not c.passed] == []
    assert set(comparisons) == set(fixture.expected)
    close = ("v_t", "v_t_joint", "sample_actions", "sample_actions_4steps", "image_features")
    # 2e-5 on one processor, 3e-6 on another: kernels sum in different orders.
    assert max(comparisons[name].difference for name in close) < 5e-5


@pytest.mark.parametrize("name", ["pi0_tiny", "pi05_tiny"])
def test_another_camera_mask_is_not_openpis_number(name: str) -> None:
    fixture = load_fixture(golden(name))
    fixture.inputs["image_mask.right_wrist_0_rgb"].logical_not_()
    failed = {c.name for c in check_fixture(fixture) if not c.passed}
    assert {"v_t", "loss", "sample_actions", "prefix_pad_masks"} <= failed


def test_a_fixture_of_the_other_model_is_refused() -> None:
    fixture = load_fixture(golden("pi05_tiny"))
    fixture.config["pi05"] = False
    with pytest.raises(FixtureError, match=r"input_layernorm\.weight is missing \(and \d+ more\)"):
        list(check_fixture(fixture))


def test_pi0_is_transformers_pi0_but_for_its_time_embedding(tmp_path: Path) -> None:
    network, batch = tiny_network(adaptive=False), tiny_batch()
    official = PI0ForConditionalGeneration(pi0_config(TINY)).eval()
    ours = in_layout(network, LAYOUTS["transformers"])
    ours["model.dit.embed_tokens.weight"] = official.state_dict()["model.dit.embed_tokens.weight"]
    official.load_state_dict(ours)
    image_token = network.vlm.config.image_token_id
    there = batch.cameras.repeat_interleave(TINY.vision.tokens, dim=1)
    arguments = {
        "state": batch.state,
        "input_ids": torch.cat([torch.where(there, image_token, 0), batch.prompt], dim=1),
        "attention_mask": torch.cat([there, batch.prompt_mask], dim=1).long(),
        "pixel_values": batch.images,
        "pixel_attention_mask": batch.cameras,
    }
    with torch.no_grad():
        v = batch.velocity(network)
        theirs = official(noise=batch.x, timestep=batch.t, **arguments).logits
        assert 1e-6 < (v - theirs).abs().max() < 2e-3
        official.embed_action_time.set_submodule("sinusoid_embeds", network.suffix.sinusoid_embeds)
        theirs = official(noise=batch.x, timestep=batch.t, **arguments).logits
        torch.testing.assert_close(v, theirs, rtol=0, atol=1e-5)
        loss = official(noise=batch.x, actions=batch.x + 1, timestep=batch.t, **arguments).loss
        on_path = replace(batch, x=noisy_chunk(batch.x + 1, batch.x, batch.t))
        errors = velocity_errors(on_path.velocity(network), batch.x + 1, batch.x)
        torch.testing.assert_close(errors, loss, rtol=1e-5, atol=1e-5)


@BOTH
def test_cached_velocity_is_that_of_one_pass_over_the_whole_sequence(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    prefix, suffix = batch.prefix(network), network.embed_suffix(batch.x, batch.t, batch.state)
    tokens = prefix.tokens_BPD.detach().requires_grad_()
    prefix = replace(prefix, tokens_BPD=tokens)
    weights = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(1))
    velocities, gradients = [], []
    for hidden in (
        network.run_suffix(network.encode_prefix(prefix), suffix),
        whole_sequence(network, prefix, suffix),
    ):
        velocity = network.action_out_proj(hidden[:, -5:])
        (gradient,) = torch.autograd.grad((velocity * weights).sum(), tokens, retain_graph=True)
        velocities.append(velocity)
        gradients.append(gradient[prefix.mask_BP])
    torch.testing.assert_close(velocities[0], velocities[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3


def whole_sequence(network: Pi0Network, prefix: Prefix, suffix: Suffix) -> torch.Tensor:
    """The expert's output from one interleaved pass, with masks and rotary embedding written out."""
    batch, first = prefix.mask_BP.shape
    length = first + suffix.tokens_RTE.shape[1]
    # Prefix: 0. pi-0's state: 1, its actions: 2. pi-0.5's actions: 1.
    block = [0] * first + ([1] * 5 if network.config.adaptive else [1] + [2] * 5)
    exists = [[*row, *[True] * (length - first)] for row in prefix.mask_BP.tolist()]
    sees = torch.tensor(
        [
            [[exists[b][k] and block[k] <= block[q] for k in range(length)] for q in range(length)]
            for b in range(batch)
        ]
    )
    position = torch.tensor([[sum(row[: n + 1]) - 1 for n in range(length)] for row in exists])
    tokens = [prefix.tokens_BPD, suffix.tokens_RTE]
    stacks = [network.vlm.language_model, network.expert]

    def norm(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        return module(x, suffix.cond_RE) if hasattr(module, "dense") else (module(x), 1.0)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)

    for layers in zip(*(stack.layers for stack in stacks), strict=True):
        normed = [norm(layer.input_layernorm, x) for layer, x in zip(layers, tokens, strict=True)]
        q, k, v = (
            torch.cat(
                [
                    heads(getattr(layer.self_attn, name)(x))
                    for layer, (x, _) in zip(layers, normed, strict=True)
                ],
                dim=2,
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (x.repeat_interleave(2, dim=1) for x in (rotated(k, position), v))
        scores = rotated(q, position) @ k.transpose(2, 3) / 8**0.5
        mixed = scores.masked_fill(~sees.unsqueeze(1), -1e9).softmax(dim=-1) @ v
        parts = mixed.transpose(1, 2).flatten(2).split([first, length - first], dim=1)
        for i, (layer, part, (_, gate)) in enumerate(zip(layers, parts, normed, strict=True)):
            tokens[i] = tokens[i] + layer.self_attn.o_proj(part) * gate
            x, gate = norm(layer.post_attention_layernorm, tokens[i])
            tokens[i] = tokens[i] + layer.mlp(x) * gate
    return norm(network.expert.norm, tokens[1])[0]


def rotated(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [B, heads, N, 8]: feature j turns with feature j + 4 by position / 10000 ** (j / 4)."""
    angle = position[:, None, :, None] / 10000 ** (torch.arange(4) / 4)
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


@BOTH
def test_a_batch_of_eight_is_eight_batches_of_one(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch(8)
    with torch.no_grad():
        alone = torch.cat([batch.row(i).velocity(network) for i in range(8)])
        torch.testing.assert_close(batch.velocity(network), alone, rtol=0, atol=1e-5)
        noise = batch.x
        samples = [
            network.sample(network.encode_prefix(row.prefix(network)), row.x, 4, row.state)
            for row in map(batch.row, range(8))
        ]
        together = network.sample(network.encode_prefix(batch.prefix(network)), noise, 4, batch.state)
    torch.testing.assert_close(together, torch.cat(samples), rtol=1e-5, atol=1e-5)


@BOTH
def test_more_padding_of_the_prompt_changes_nothing(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    padding = torch.full((3, 4), 9)
    longer = replace(
        batch,
        prompt=torch.cat([batch.prompt, padding], dim=1),
        prompt_mask=torch.cat([batch.prompt_mask, padding < 0], dim=1),
    )
    with torch.no_grad():
        torch.testing.assert_close(longer.velocity(network), batch.velocity(network), rtol=0, atol=1e-5)
        unmasked = replace(longer, prompt_mask=torch.ones_like(longer.prompt_mask))
        assert (unmasked.velocity(network) - batch.velocity(network)).abs().max() > 1e-2


@BOTH
def test_an_absent_camera_counts_for_nothing_and_a_present_one_for_something(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch(4)
    absent = replace(batch, cameras=torch.tensor([[True, False, True]] * 4))
    with torch.no_grad():
        v = absent.velocity(network)
        images = absent.images.clone()
        images[:, 1] = 0.7
        other_pixels = replace(absent, images=images)
        left_out = replace(absent, images=images[:, [0, 2]], cameras=absent.cameras[:, [0, 2]])
        torch.testing.assert_close(other_pixels.velocity(network), v, rtol=0, atol=1e-6)
        torch.testing.assert_close(left_out.velocity(network), v, rtol=0, atol=1e-5)
        present = replace(absent, cameras=torch.ones(4, 3, dtype=torch.bool))
        assert (present.velocity(network) - v).abs().max() > 1e-2


@BOTH
def test_chunks_of_one_observation_share_its_cache(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    draw = torch.Generator().manual_seed(2)
    x, t = torch.randn(3, 4, 5, 6, generator=draw), torch.rand(3, 4, generator=draw)
    with torch.no_grad():
        cache = network.encode_prefix(batch.prefix(network))
        shared = network.velocity(cache.repeat(2).repeat(2), x.flatten(0, 1), t.flatten(), batch.state)
        apart = [network.velocity(cache, x[:, i], t[:, i], batch.state) for i in range(4)]
    torch.testing.assert_close(shared.unflatten(0, (3, 4)), torch.stack(apart, dim=1), rtol=0, atol=1e-5)
    assert cache.repeat(4).keys[0] is cache.keys[0]


@BOTH
def test_the_joint_path_trains_every_part(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    v = network.velocity_joint(
        batch.images,
        batch.cameras,
        batch.prompt,
        batch.prompt_mask,
        x_BHA=batch.x,
        t_B=batch.t,
        state_BS=batch.state,
    )
    with torch.no_grad():
        torch.testing.assert_close(v, batch.velocity(network), rtol=0, atol=1e-6)
    velocity_errors(v, torch.zeros_like(v), batch.x).mean().backward()
    untrained = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Only keys and values of the last prefix layer are read, and softmax ignores a bias shared by all keys.
    assert [name for name in untrained if "vision_tower" not in name] == [
        f"vlm.language_model.layers.1.{name}"
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "post_attention_layernorm.weight",
        )
    ] + ["vlm.language_model.norm.weight"]


@BOTH
def test_euler_steps_add_up(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    with torch.no_grad():
        cache = network.encode_prefix(batch.prefix(network))
        x, times = batch.x, torch.tensor([1.0, 0.75, 0.5, 0.25])
        for t in times:
            x = x - 0.25 * network.velocity(cache, x, t.expand(3), batch.state)
        path = list(network.integrate(cache, batch.x, 4, batch.state))
    torch.testing.assert_close(network.sample(cache, batch.x, 4, batch.state), x, rtol=0, atol=1e-6)
    assert [step.t.item() for step in path] == times.tolist()
    torch.testing.assert_close(path[-1].next_RHA, x, rtol=0, atol=1e-6)


def test_euler_time_is_summed_up_in_float32() -> None:
    network, batch = tiny_network(adaptive=True), tiny_batch(1)
    with torch.no_grad():
        cache = network.encode_prefix(batch.prefix(network))
        times = [step.t.item() for step in network.integrate(cache, batch.x, 10)]
    # 1 - 8 / 10 in float32 is 0.2 exactly rounded; eight subtractions leave it 5e-8 off.
    assert times[8] == pytest.approx(0.2, abs=1e-6)
    assert times[8] != torch.tensor(0.2).item()
    assert len(times) == 10


def test_no_euler_step_is_refused() -> None:
    network, batch = tiny_network(adaptive=True), tiny_batch(1)
    cache = network.encode_prefix(batch.prefix(network))
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        network.sample(cache, batch.x, 0)


def test_pi0_reads_the_state_and_pi05_does_not() -> None:
    batch = tiny_batch()
    moved = replace(batch, state=batch.state + 1)
    with torch.no_grad():
        pi0, pi05 = tiny_network(adaptive=False), tiny_network(adaptive=True)
        assert (moved.velocity(pi0) - batch.velocity(pi0)).abs().max() > 1e-2
        assert torch.equal(moved.velocity(pi05), batch.velocity(pi05))
        cache = pi0.encode_prefix(batch.prefix(pi0))
        with pytest.raises(ValueError, match=r"pi-0 reads the state: give it \[rows, state_dim\]"):
            pi0.velocity(cache, batch.x, batch.t)


def test_chunks_that_do_not_fit_the_cache_are_refused() -> None:
    network, batch = tiny_network(adaptive=True), tiny_batch()
    cache = network.encode_prefix(batch.prefix(network))
    with pytest.raises(ValueError, match="3 chunks for a cache of 3 prefixes x 2: expected 6"):
        network.velocity(cache.repeat(2), batch.x, batch.t)


@BOTH
def test_half_precision_keeps_chunks_in_float32(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    with torch.no_grad():
        exact = batch.velocity(network)
        rounded = batch.velocity(network.to(torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_time_embedding_is_sines_then_cosines_of_geometric_periods() -> None:
    t = torch.tensor([0.001, 0.3])
    embedding = tiny_network(adaptive=True).embed_time(t)
    assert (embedding.dtype, embedding.shape) == (torch.float64, (2, 16))
    # The first period is 0.004, the last 4.
    assert embedding[0, 0].item() == pytest.approx(1.0, abs=1e-9)
    assert embedding[1, 7].item() == pytest.approx(0.4539905, abs=1e-6)
    assert embedding[1, 15].item() == pytest.approx(0.8910065, abs=1e-6)


def test_adaptive_norm_scales_shifts_and_gates() -> None:
    norm = AdaptiveRMSNorm(2)
    x, cond = torch.tensor([[[3.0, -4.0]]]), torch.tensor([[1.0, 0.0]])
    normed, gate = norm(x, cond)
    rms = 12.5**0.5
    torch.testing.assert_close(normed, torch.tensor([[[3 / rms, -4 / rms]]]))
    assert gate.tolist() == [[[0.0, 0.0]]]
    with torch.no_grad():
        norm.dense.weight[:, 0] = torch.tensor([1.0, 2.0, 10.0, 20.0, 5.0, 6.0])
    normed, gate = norm(x, cond)
    torch.testing.assert_close(normed, torch.tensor([[[2 * 3 / rms + 10, 3 * -4 / rms + 20]]]))
    assert gate.tolist() == [[[5.0, 6.0]]]


@BOTH
def test_an_adapter_finds_the_linears_of_both_decoders(adaptive: bool) -> None:
    network, batch = tiny_network(adaptive=adaptive), tiny_batch()
    with torch.no_grad():
        v = batch.velocity(network)
    attach(network, AdapterPart(method="dora", rank=2, alpha=2), seed=0, decoders=FlowPolicy.adapted)
    assert len(list(adapted_layers(network))) == 2 * 2 * 7
    with_adapter = batch.velocity(network)
    torch.testing.assert_close(with_adapter, v, rtol=0, atol=1e-5)
    with_adapter.square().mean().backward()
    trained = [
        name
        for name, p in parameters(network).items()
        if name.endswith("B") and p.grad is not None and p.grad.any()
    ]
    # The last layer of the language decoder reaches actions through its keys and values alone.
    assert len(trained) == 2 * 7 + 7 + 2


def test_blocks_see_themselves_and_what_came_before() -> None:
    valid = torch.tensor([[True, False, True, True, True]])
    starts = torch.tensor([False, False, True, True, False])
    sees = attention_mask(valid, starts)[0].int().tolist()
    assert sees == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 1], [1, 0, 1, 1, 1]]
    assert attention_mask(valid, starts, first=3)[0].int().tolist() == sees[3:]
    assert positions(valid)[0].tolist() == [0, 0, 1, 2, 3]


def test_a_noisy_chunk_lies_between_actions_and_noise() -> None:
    actions, noise = torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 10.0)
    assert noisy_chunk(actions, noise, torch.tensor([0.25])).tolist() == [[[4.0, 4.0]]]
    v = torch.tensor([[[8.0, 5.0]]])
    assert velocity_errors(v, actions, noise).tolist() == [[[0.0, 9.0]]]


@pytest.mark.parametrize(
    ("config", "total"), [(PI0, 3_238_048_528), (PI05, 3_353_433_872)], ids=["pi0", "pi05"]
)
def test_published_sizes_take_no_memory_on_the_meta_device(config: Pi0Config, total: int) -> None:
    with torch.device("meta"):
        network = Pi0Network(config)
        cache = network.encode_prefix(
            network.embed_prefix(
                torch.zeros(1, 2, 3, 224, 224),
                torch.ones(1, 2, dtype=torch.bool),
                torch.zeros(1, 48, dtype=torch.long),
                torch.ones(1, 48, dtype=torch.bool),
            )
        )
        v = network.velocity(cache.repeat(8), torch.zeros(8, 50, 32), torch.zeros(8), torch.zeros(1, 32))
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert sum(p.numel() for p in network.parameters()) == total
    # PaliGemma-3b at 224 pixels, as published.
    assert sum(p.numel() for p in network.vlm.parameters()) == 2_923_335_408
    assert (cache.keys[0].shape, v.shape) == ((1, 1, 2 * 256 + 48, 256), (8, 50, 32))


def test_a_network_on_the_meta_device_takes_no_weights(tmp_path: Path) -> None:
    save_file(in_layout(tiny_network(adaptive=False), LAYOUTS["openpi"]), tmp_path / "model.safetensors")
    with torch.device("meta"):
        network = Pi0Network(TINY)
    with pytest.raises(ValueError, match="lies on the meta device"):
        read_weights(network, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, expert=replace(c.expert, depth=3)), "expert.depth is 3, expected the VLM's 2"),
        (
            lambda c: replace(c, expert=replace(c.expert, head_dim=4)),
            "expert.head_dim is 4, expected the VLM's 8",
        ),
        (lambda c: replace(c, expert=replace(c.expert, width=15)), "expert.width 15 must be even"),
        (
            lambda c: replace(c, vision=replace(c.vision, image=13)),
            "vision.image is 13, expected at least one patch of 14",
        ),
        (
            lambda c: replace(c, vision=replace(c.vision, heads=3)),
            "vision.width 16 is no multiple of heads 3",
        ),
    ],
)
def test_sizes_that_cannot_work_together_are_refused(
    change: Callable[[Pi0Config], Pi0Config], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        change(TINY)
