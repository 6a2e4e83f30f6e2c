"""The token policy: images, exact scores, lean decoding, sampling and loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.policy import DecoderPart, PolicyPart, VisionPart
from configs.preference import AdapterPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import decode, gumbel_noise
from policies.decoding.packed import PackedDecoder
from policies.make import make_policy
from policies.openvla.vision import SiglipTower, VisionBackbone
from policies.weights import adapters
from policies.weights.snapshots import state_tensors
from trajectories.hashing import weights_hash
from trajectories.records import Observation, WeightSnapshot

INSTRUCTIONS = (
    "pick up the alphabet soup and place it in the basket",
    "open the middle drawer of the cabinet",
    "put the white mug on the left plate and put the yellow and white mug on the right plate",
)
SMALL = PolicyPart(
    vision=VisionPart(width=32, layers=2, heads=2, mlp=64, patch=8, merge=2),
    decoder=DecoderPart(width=32, layers=2, heads=2, mlp=64),
    bins=21,
    chunk=2,
)
CPU = torch.device("cpu")


def make(part: PolicyPart = SMALL, *, seed: int = 0) -> AutoregressivePolicy:
    policy = make_policy(part, image_size=32, seed=seed, device=CPU)
    assert isinstance(policy, AutoregressivePolicy)
    return policy


def observations(count: int, *, seed: int = 0) -> list[Observation]:
    """Random images and states; instructions of 3 lengths in turn."""
    rng = np.random.default_rng(seed)
    return [
        Observation(
            agentview=rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]


def score(
    policy: AutoregressivePolicy, seen: Sequence[Observation], chunks: Sequence[np.ndarray]
) -> np.ndarray:
    with torch.no_grad():
        return policy.score(policy.batch(seen, chunks)).numpy()


# Images


def test_merged_patches_are_neighbours() -> None:
    backbone = VisionBackbone([SiglipTower(VisionPart(width=16, layers=1, heads=1, patch=8, merge=2), 32)], 2)
    # Each patch's features are its own index, so a token lists the patches it was made of.
    index = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 16)
    backbone.towers[0].forward = lambda images: index  # type: ignore[method-assign]
    tokens = backbone(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert tokens.shape == (1, 4, 64)
    assert tokens[0, :, ::16].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (VisionPart(patch=7), "image_size 32 is no multiple of vision.patch 7"),
        (VisionPart(merge=3), "vision.merge 3 does not divide the 4 x 4 patch grid"),
        (VisionPart(width=30, heads=4), "vision.width 30 is no multiple of vision.heads 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(part: VisionPart, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(SMALL.model_copy(update={"vision": part}), image_size=32, seed=0, device=CPU)


# Scores


def test_score_equals_one_plain_forward_per_token() -> None:
    """Grow each sequence by hand and read the next token's distribution off LlamaForCausalLM's own logits."""
    policy = make()
    seen = observations(3)
    chunks = [sample.model_chunk for sample in policy.act(seen, seeds=[1, 2, 3], temperature=1.0)]
    got = score(policy, seen, chunks)
    network = policy.network
    for i, (observation, chunk) in enumerate(zip(seen, chunks, strict=True)):
        one = policy.batch([observation], [chunk])
        image_tokens = policy.encode_context(one)
        for step, token in enumerate(chunk):
            text = torch.cat([one.prompt_BT, one.chunk_BL[:, :step]], dim=1)
            embeddings = network.embed(text, image_tokens, one.proprio_BP)
            logits = network.language_model(inputs_embeds=embeddings).logits[0, -1]
            actions = logits[network.action_first_id : network.action_stop_id]
            expected = F.log_softmax(actions, dim=-1)[int(token) - network.action_first_id]
            assert got[i, step] == pytest.approx(expected.item(), abs=1e-4)


def test_score_depends_on_every_input() -> None:
    policy = make()
    seen = observations(1)[0]
    chunk = policy.act([seen], seeds=[0], temperature=1.0)[0].model_chunk
    before = score(policy, [seen], [chunk])
    others = [
        replace(seen, agentview=255 - seen.agentview),
        replace(seen, wrist=255 - seen.wrist),
        replace(seen, agentview=seen.wrist, wrist=seen.agentview),
        replace(seen, proprio=seen.proprio + 1),
        replace(seen, instruction="pick up the cream cheese and place it in the basket"),
    ]
    for other in others:
        assert np.abs(score(policy, [other], [chunk]) - before).max() > 1e-3


def test_batching_and_padding_change_nothing() -> None:
    policy = make()
    seen = observations(8)
    together = policy.act(seen, seeds=range(8), temperature=1.0)
    alone = [policy.act([one], seeds=[i], temperature=1.0)[0] for i, one in enumerate(seen)]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.model_chunk, b.model_chunk)
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)
    chunks = [sample.model_chunk for sample in together]
    singly = np.concatenate([score(policy, [o], [c]) for o, c in zip(seen, chunks, strict=True)])
    np.testing.assert_allclose(score(policy, seen, chunks), singly, atol=1e-4)


def test_score_from_cached_image_tokens_is_the_score() -> None:
    policy = make()
    seen = observations(4)
    batch = policy.batch(seen, [s.model_chunk for s in policy.act(seen, seeds=range(4), temperature=1.0)])
    with torch.no_grad():
        image_tokens = policy.encode_context(batch)
        assert image_tokens.shape == (4, 8, 32)
        wrist = policy.network.projector(policy.network.vision_backbone(batch.wrist_BHWC))
        torch.testing.assert_close(image_tokens[:, 4:], wrist)
        assert batch.agentview_BHWC.dtype == torch.uint8
        blank = torch.zeros_like(batch.agentview_BHWC)
        unseen = replace(batch, agentview_BHWC=blank, wrist_BHWC=blank)
        torch.testing.assert_close(policy.score(unseen, image_tokens), policy.score(batch))


def test_scores_are_a_distribution_over_the_bins_and_have_gradients() -> None:
    policy = make()
    seen = observations(1) * 21
    first = policy.network.action_first_id
    chunks = [np.array([first + i, *range(first, first + 13)]) for i in range(21)]
    batch = policy.batch(seen, chunks)
    logps = policy.score(batch)
    assert logps[:, 0].exp().sum().item() == pytest.approx(1, abs=1e-5)
    logps[0].sum().backward()
    missing = [name for name, p in policy.network.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_scores_see_an_adapter_and_acting_refuses_it(method: str) -> None:
    policy = make()
    seen = observations(2)
    chunks = [sample.model_chunk for sample in policy.act(seen, seeds=[0, 1], temperature=1.0)]
    before = score(policy, seen, chunks)
    adapters.attach(
        policy.module, AdapterPart(method=method, rank=2, alpha=4), seed=0, decoders=policy.adapted
    )
    np.testing.assert_allclose(score(policy, seen, chunks), before, atol=1e-4)
    with torch.no_grad():
        for name, parameter in adapters.parameters(policy.module).items():
            if name.endswith(".B"):
                parameter.fill_(0.3)
    assert np.abs(score(policy, seen, chunks) - before).max() > 0.01
    with adapters.disabled(policy.module):
        np.testing.assert_allclose(score(policy, seen, chunks), before, atol=1e-4)
    with pytest.raises(
        TypeError, match=r"layers\.0\.self_attn\.q_proj is a Linear, expected a plain torch\.nn\.Linear"
    ):
        policy.act(seen, seeds=[0, 1], temperature=1.0)
    with pytest.raises(ValueError, match="belongs to an adapter"):
        state_tensors(policy.module)


# Decoding and sampling


@pytest.mark.parametrize("part", [SMALL, PolicyPart()], ids=["small", "default"])
def test_lean_decoding_equals_the_transformers_forward(part: PolicyPart) -> None:
    """Logits of every step against one teacher-forced forward of the modules, ragged prompts included."""
    policy = make(part)
    seen = observations(3)
    network = policy.network
    with torch.no_grad():
        # Norms other than one, or a forgotten norm weight would not show.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in network.language_model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    chunks = [s.model_chunk for s in policy.act(seen, seeds=range(3), temperature=1.0)]
    batch = policy.batch(seen, chunks)
    with torch.no_grad():
        expected = network(batch)
        decoder = PackedDecoder(
            network.language_model, first_id=network.action_first_id, stop_id=network.action_stop_id
        )
        image_tokens = policy.encode_context(batch)
        prefix = network.embed(batch.prompt_BT, image_tokens, batch.proprio_BP)
        lengths = (batch.prompt_mask_BT.sum(dim=1) + image_tokens.shape[1] + 1).tolist()
        # Noise so large at the chosen token that decoding is forced along the recorded chunk.
        forced = F.one_hot(batch.chunk_BL.T - network.action_first_id, part.bins) * 1e6
        chosen, logits = decode(decoder, prefix, lengths, forced)
    assert len(set(lengths)) == 3
    assert torch.equal(chosen.T + network.action_first_id, batch.chunk_BL)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_recorded_log_probabilities_are_the_score(temperature: float) -> None:
    policy = make()
    seen = observations(6)
    samples = policy.act(seen, seeds=range(6), temperature=temperature)
    recorded = np.stack([sample.logps for sample in samples])
    assert recorded.dtype == np.float32
    np.testing.assert_allclose(score(policy, seen, [s.model_chunk for s in samples]), recorded, atol=1e-4)
    for sample in samples:
        assert sample.actions.shape == (2, 7)
        assert sample.actions.dtype == np.float32
        np.testing.assert_array_equal(policy.encode(sample.actions), sample.model_chunk)


def test_greedy_takes_the_likeliest_token_whatever_the_seed() -> None:
    policy = make()
    seen = observations(1)
    chunk = policy.act(seen, seeds=[0], temperature=0)[0].model_chunk
    np.testing.assert_array_equal(policy.act(seen, seeds=[9], temperature=0)[0].model_chunk, chunk)
    with torch.no_grad():
        logits = policy.network(policy.batch(seen, [chunk]))[0]
    np.testing.assert_array_equal(logits.argmax(dim=-1) + policy.network.action_first_id, chunk)


def test_a_seed_fixes_its_own_sample_alone() -> None:
    policy = make()
    seen = observations(4)
    first = policy.act(seen, seeds=[5, 6, 7, 8], temperature=1.0)
    moved = policy.act([seen[2], seen[0]], seeds=[7, 1], temperature=1.0)
    np.testing.assert_array_equal(moved[0].model_chunk, first[2].model_chunk)
    assert (moved[1].model_chunk != first[0].model_chunk).any()
    np.testing.assert_array_equal(gumbel_noise([3, 4], 5, 6)[:, 1], gumbel_noise([4], 5, 6)[:, 0])


def test_sampled_frequencies_match_the_probabilities() -> None:
    """First token of 2,000 samples from one observation: Pearson's chi-squared over the bins, at T = 1 and 2."""
    policy = make(PolicyPart.model_validate({**SMALL.model_dump(), "chunk": 1, "bins": 7}))
    seen = observations(1)
    first = policy.network.action_first_id
    with torch.no_grad():
        logits = policy.network(policy.batch(seen, [np.full(7, first)]))[0, 0]
    for temperature in (1.0, 2.0):
        samples = policy.act(seen * 2000, seeds=range(2000), temperature=temperature)
        counts = np.bincount([s.model_chunk[0] - first for s in samples], minlength=7)
        expected = 2000 * torch.softmax(logits.double() / temperature, dim=-1).numpy()
        assert expected.min() > 5
        assert expected.max() > 1.5 * expected.min()
        # 99.9 % point of chi-squared with 6 degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < 22.46


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(range(50), 56, 21)
    assert noise.shape == (56, 50, 21)
    # Mean is Euler's constant, variance pi^2 / 6; 58,800 draws.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"agentview": np.zeros((16, 16, 3), np.uint8)},
            r"agentview is uint8 \[16, 16, 3\], expected uint8 \[32",
        ),
        ({"wrist": np.zeros((32, 32, 3), np.float32)}, "wrist is float32"),
        ({"proprio": np.full(8, np.nan, np.float32)}, "proprio must be 8 finite numbers"),
    ],
)
def test_observations_that_do_not_fit_are_named(change: dict[str, np.ndarray], message: str) -> None:
    policy = make()
    seen = observations(2)
    with pytest.raises(ValueError, match=f"observation 1: {message}"):
        policy.act([seen[0], replace(seen[1], **change)], seeds=[0, 1], temperature=1.0)


def test_requests_and_chunks_that_do_not_fit_are_named() -> None:
    policy = make()
    seen = observations(2)
    with pytest.raises(ValueError, match="2 observations need as many seeds, got 1"):
        policy.act(seen, seeds=[0], temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be 0"):
        policy.act(seen, seeds=[0, 1], temperature=float("nan"))
    with pytest.raises(ValueError, match=r"chunk 0 has shape \[13\], expected \[14\]"):
        policy.batch(seen[:1], [np.full(13, 100)])
    with pytest.raises(ValueError, match="token id 3 is no action token"):
        policy.batch(seen[:1], [np.full(14, 3)])
    with pytest.raises(ValueError, match="a chunk is 2 actions, got 3"):
        policy.encode(np.zeros((3, 7)))


# Weights


def snapshot(tensors: dict[str, np.ndarray]) -> WeightSnapshot:
    return WeightSnapshot(version=4, content_hash="", tensors=tensors)


def test_weights_are_fixed_by_the_seed_and_travel_whole() -> None:
    torch.manual_seed(123)
    expected_next = torch.rand(1)
    torch.manual_seed(123)
    a, b, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.rand(1), expected_next)
    assert weights_hash(state_tensors(a.module)) == weights_hash(state_tensors(b.module))
    assert weights_hash(state_tensors(a.module)) != weights_hash(state_tensors(other.module))
    tensors = state_tensors(a.module)
    for array in tensors.values():
        array.setflags(write=False)
    other.load(snapshot(tensors))
    assert weights_hash(state_tensors(other.module)) == weights_hash(tensors)
    seen = observations(2)
    before = a.act(seen, seeds=[0, 1], temperature=1.0)
    for x, y in zip(before, other.act(seen, seeds=[0, 1], temperature=1.0), strict=True):
        np.testing.assert_array_equal(x.logps, y.logps)


def test_names_are_openvlas() -> None:
    names = set(state_tensors(make().module))
    assert {
        "projector.fc1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.lm_head.weight",
    } <= names
    # Constants do not travel.
    assert not any(name.endswith((".mean", ".std", "position_ids", "inv_freq")) for name in names)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype", "finite"])
def test_bad_snapshots_are_refused_whole(fault: str) -> None:
    policy = make()
    before = weights_hash(state_tensors(policy.module))
    tensors = {name: array + 1 for name, array in state_tensors(policy.module).items()}
    name = "language_model.lm_head.weight"
    match fault:
        case "missing":
            del tensors[name]
            message = f"snapshot 4 lacks the tensor {name}"
        case "extra":
            tensors["language_model.bias"] = np.zeros(1, np.float32)
            message = r"snapshot 4 has the tensor language_model\.bias, which this policy lacks"
        case "shape":
            tensors[name] = tensors[name].T
            message = rf"{name} has shape \[32, 114\], expected \[114, 32\]"
        case "dtype":
            tensors[name] = tensors[name].astype(np.float64)
            message = f"{name} is float64, expected float32"
        case _:
            tensors[name][3, 4] = np.inf
            message = f"{name} has 1 non-finite values"
    with pytest.raises(ValueError, match=message):
        policy.load(snapshot(tensors))
    assert weights_hash(state_tensors(policy.module)) == before


def test_loaded_weights_are_what_is_decoded_next() -> None:
    policy, other = make(seed=1), make(seed=2)
    seen = observations(1)
    policy.act(seen, seeds=[0], temperature=1.0)
    policy.load(snapshot(state_tensors(other.module)))
    np.testing.assert_array_equal(
        policy.act(seen, seeds=[0], temperature=1.0)[0].logps,
        other.act(seen, seeds=[0], temperature=1.0)[0].logps,
    )
