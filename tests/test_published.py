"""Published weights by recipe: each paradigm's policy from a folder, and its learning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.policy import FlowPart, PolicyPart
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import SupervisedPart
from learners.preference import PreferenceLearner
from learners.supervised import SupervisedLearner
from policies.diffusion import DiffusionPolicy
from policies.flow import FlowPolicy
from policies.make import make_policy
from policies.pi0.folder import open_pi0
from policies.pi0.inputs import PublishedInputs
from policies.pi0.norm_stats import normalise, pad_dims, read_norm_stats
from policies.pi0.preprocessing import prompt_ids, resize_with_pad
from policies.pi0.sizes import Pi0Config
from policies.protocol import Policy
from policies.published import PublishedError, check_published, located
from policies.weights import adapters
from policies.weights.merging import merge
from policies.weights.snapshots import state_tensors
from tests.openpi_steps import rotate_180, to_model_range, unnormalise
from tests.published_tiny import (
    CPU,
    HEADS,
    PI0,
    STATS,
    episode,
    observations,
    pi0_network,
    write_lerobot_stats,
    write_pi0,
)
from trajectories.records import PreferencePair, Trajectory, WeightSnapshot

KINDS = ["openvla", "pi0", "pi05", "diffusion"]
FLOWS = ["pi0", "pi05"]
CHUNKS = {"openvla": 1, "pi0": 3, "pi05": 3, "diffusion": 8}


def made(part: PolicyPart, **options: Any) -> Policy:
    return make_policy(part, image_size=64, seed=0, device=CPU, **options)


# Acting


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_acts_as_its_checkpoint_allows(kind: str, known: dict[str, PolicyPart]) -> None:
    policy, seen = made(known[kind]), observations(3)
    samples = policy.act(seen, seeds=[5, 6, 7], temperature=1.0)
    for sample, one, seed in zip(samples, seen, (5, 6, 7), strict=True):
        assert sample.actions.shape == (CHUNKS[kind], 7)
        assert sample.actions.dtype == np.float32
        assert np.abs(sample.actions).max() <= 1
        assert set(np.abs(sample.actions[:, 6])) == {1.0}
        (alone,) = policy.act([one], seeds=[seed], temperature=1.0)
        np.testing.assert_allclose(alone.actions, sample.actions, atol=1e-4)
    batch, keys = policy.batch(seen, [sample.model_chunk for sample in samples]), torch.arange(3)
    score = policy.score(batch, noise_keys=keys)
    assert score.shape == (3, policy.tokens)
    assert policy.tokens == 7 * CHUNKS[kind]
    kept = policy.score(batch, policy.encode_context(batch), noise_keys=keys)
    torch.testing.assert_close(kept, score)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [28, 224, 256])
def test_cameras_of_any_size_will_do(kind: str, size: int, known: dict[str, PolicyPart]) -> None:
    (sample,) = made(known[kind]).act(observations(1, size=size), seeds=[0], temperature=0)
    assert np.isfinite(sample.actions).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_without_weights_takes_a_snapshot(kind: str, known: dict[str, PolicyPart]) -> None:
    part = known[kind].model_copy(update={"dtype": "bfloat16"})
    filled, empty = made(part), made(part, filled=False)
    assert {p.dtype for p in filled.module.parameters()} == {torch.bfloat16}
    empty.load(WeightSnapshot(version=0, content_hash="", tensors=state_tensors(filled.module)))
    seen = observations(2)
    for one, other in zip(
        *(p.act(seen, seeds=[1, 2], temperature=1.0) for p in (filled, empty)), strict=True
    ):
        np.testing.assert_array_equal(one.model_chunk, other.model_chunk)


def upright(image: np.ndarray) -> np.ndarray:
    """The simulator's own image, whose rows begin at the bottom."""
    return image[::-1]


@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_does_what_openpis_policy_does(kind: str, known: dict[str, PolicyPart]) -> None:
    """Step by step, from openpi's own pieces: three cameras, the last absent, prompts padded to their full length."""
    part, adaptive = known[kind], kind == "pi05"
    seen = observations(2)
    samples = made(part).act(seen, seeds=[3, 4], temperature=1.0)
    found = open_pi0(str(part.checkpoint))
    network = found.network()
    stats = read_norm_stats(str(part.checkpoint), quantile=adaptive)
    views = [[upright(o.agentview), upright(o.wrist)] for o in seen]
    images = [
        [to_model_range(resize_with_pad(rotate_180(image), PI0.vision.image)) for image in pair]
        for pair in views
    ]
    pixels = torch.from_numpy(np.stack([np.stack([*pair, np.zeros_like(pair[0])]) for pair in images]))
    states = [normalise(o.proprio.astype(np.float64), stats["state"], quantile=adaptive) for o in seen]
    told = [
        prompt_ids(
            o.instruction,
            encode=found.prompts.encode,
            bos_id=2,
            length=200 if adaptive else 48,
            state_S=state if adaptive else None,
        )
        for o, state in zip(seen, states, strict=True)
    ]
    prompt, mask = (torch.from_numpy(np.stack(column)) for column in zip(*told, strict=True))
    prefix = network.embed_prefix(pixels, torch.tensor([[True, True, False]] * 2), prompt, mask)
    noise = [np.random.Generator(np.random.Philox(key=s)).standard_normal((5, 9), np.float32) for s in (3, 4)]
    state = torch.from_numpy(np.stack([pad_dims(s, 10) for s in states])).float()
    chunks = network.sample(network.encode_prefix(prefix), torch.from_numpy(np.stack(noise)), 4, state)
    for sample, chunk in zip(samples, chunks.numpy(), strict=True):
        actions = unnormalise(chunk.astype(np.float64), stats["actions"], quantile=adaptive)
        expected = np.clip(actions, -1, 1)
        expected[:, 6] = np.where(actions[:, 6] > 0, 1, -1)
        np.testing.assert_allclose(sample.actions, expected[:3], atol=1e-5)
        np.testing.assert_allclose(sample.model_chunk.reshape(5, 7), expected, atol=1e-5)


def test_pi05_reads_its_state_unless_told_not_to(known: dict[str, PolicyPart]) -> None:
    (seen,) = observations(1)
    (moved,) = observations(1, seed=9)
    other = replace(seen, proprio=moved.proprio)
    for told in (True, False):
        part = known["pi05"].model_copy(update={"flow": FlowPart(steps=4, state_in_prompt=told)})
        chunks = [s.model_chunk for s in made(part).act([seen, other], seeds=[1, 1], temperature=1.0)]
        assert (np.abs(chunks[0] - chunks[1]).max() > 1e-3) == told


def test_pi05_may_be_told_a_state_filled_up_with_zeros(known: dict[str, PolicyPart]) -> None:
    """As LeRobot trained pi05_libero_finetuned: 32 numbers, a padded zero falling into the middle bin."""
    found, (seen,) = open_pi0(str(known["pi05"].checkpoint)), observations(1)
    plain, filled = (
        PublishedInputs(found, FlowPart(state_words=words)).told([seen])[0][0].tolist() for words in (8, 32)
    )
    (zero,) = found.prompts.encode("128")
    end = found.prompts.encode(";\nAction: ")
    assert plain[-len(end) :] == end
    assert filled == [*plain[: -len(end)], *[zero] * 24, *end]


def test_lerobot_s_folder_brings_its_own_statistics(known: dict[str, PolicyPart], tmp_path: Path) -> None:
    """In the file that policy_preprocessor.json names; actions come out as by openpi's of the same numbers."""
    part = known["pi05"]
    shutil.copytree(str(part.checkpoint), tmp_path / "lerobot")
    shutil.rmtree(tmp_path / "lerobot" / "assets")
    write_lerobot_stats(tmp_path / "lerobot")
    theirs = part.model_copy(update={"checkpoint": str(tmp_path / "lerobot")})
    seen = observations(2)
    chunks = [made(p).act(seen, seeds=[3, 4], temperature=1.0)[1].model_chunk for p in (part, theirs)]
    np.testing.assert_allclose(*chunks, atol=1e-5)


@pytest.mark.parametrize("delta", [False, True])
def test_a_chunk_goes_to_the_networks_scale_and_back(delta: bool, known: dict[str, PolicyPart]) -> None:
    inputs = PublishedInputs(open_pi0(str(known["pi0"].checkpoint)), FlowPart(delta_actions=delta))
    seen = observations(2)
    batch = inputs.stack(seen, CPU)
    actions = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 5, 7)).astype(np.float32))
    scaled = inputs.to_model(actions, batch)
    torch.testing.assert_close(inputs.from_model(scaled, batch), actions, rtol=0, atol=1e-5)
    x, mean, std = (actions[1, 2, 1].item(), *(STATS["actions"][k][1] for k in ("mean", "std")))
    assert scaled[1, 2, 1].item() == pytest.approx((x - delta * seen[1].proprio[1] - mean) / std, abs=1e-4)
    gripper = (actions[1, 2, 6].item() - STATS["actions"]["mean"][6]) / STATS["actions"]["std"][6]
    assert scaled[1, 2, 6].item() == pytest.approx(gripper, abs=1e-4)


def test_demonstrated_actions_fill_a_flows_horizon(known: dict[str, PolicyPart]) -> None:
    policy = made(known["pi05"])
    actions = np.arange(21, dtype=np.float32).reshape(3, 7) / 21
    chunk = policy.encode(actions).reshape(5, 7)
    np.testing.assert_array_equal(chunk[:3], actions)
    np.testing.assert_array_equal(chunk[3:], actions[[2, 2]])


def test_what_is_not_executed_is_not_scored(known: dict[str, PolicyPart]) -> None:
    """The tail's own errors do not count, though what is executed attends to it."""
    policy = made(known["pi05"])
    assert isinstance(policy, FlowPolicy)
    seen, keys = observations(1), torch.zeros(1, dtype=torch.int64)
    batch = policy.batch(seen, [np.zeros(35, np.float32)])
    errors = policy._errors(batch, None, keys, draws=4)
    assert errors.shape == (1, 4, 3, 9)
    expected = -errors[..., :7].mean(dim=1).flatten(1) / 2
    torch.testing.assert_close(policy.score(batch, noise_keys=keys), expected)


def test_mask_is_a_padding_id_that_padding_leaves_free(known: dict[str, PolicyPart]) -> None:
    policy = made(known["diffusion"])
    assert isinstance(policy, DiffusionPolicy)
    seen = observations(1)
    batch = policy.batch(seen, [policy.act(seen, seeds=[0], temperature=1.0)[0].model_chunk])

    def score_with(row: int) -> torch.Tensor:
        embedding = policy.network.language_model.model.embed_tokens.weight
        before = embedding[row].clone()
        with torch.no_grad():
            embedding[row] += 1
            score = policy.score(batch, noise_keys=torch.tensor([0]))
            embedding[row] = before
        return score

    plain = policy.score(batch, noise_keys=torch.tensor([0])).detach()
    assert torch.equal(score_with(32000), plain)
    assert (score_with(32001) - plain).abs().max() > 1e-6


# Learning


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("dora", "bfloat16")]
)
def test_published_weights_are_the_reference_and_are_learned_from(
    kind: str, method: str, dtype: str, known: dict[str, PolicyPart]
) -> None:
    """Pairs alone, no demonstrations: at first the policy is the reference, and what is learned can be served."""
    part = known[kind].model_copy(update={"dtype": dtype})
    policy = made(part)
    base = state_tensors(policy.module)
    pairs = [
        PreferencePair(
            chosen=episode(policy, seed=2 * i, outcome="success"),
            rejected=episode(policy, seed=2 * i + 1, outcome="timeout"),
        )
        for i in range(2)
    ]
    learner = PreferenceLearner(
        policy,
        adapter=AdapterPart(method=method, rank=4, alpha=8),
        preference=PreferencePart(
            reference="start", demo_weight=0, success_weight=0, steps=3, lr=0.01, micro_batch=4
        ),
        guard=GuardPart(chosen_drop=100),
        base_hash="",
        seed=0,
    )
    report = learner.update(pairs, [], [])
    assert report.steps == 3
    first, *_, last = report.history
    assert first["preference_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert abs(first["chosen_logratio"]) < 1e-4
    assert abs(last["chosen_logratio"]) > 1e-4
    served = made(part, filled=False)
    merged = merge(base, learner.adapter())
    served.load(WeightSnapshot(version=1, content_hash="", tensors=merged))
    batch = policy.batch(*decided(pairs[0].chosen))
    with torch.no_grad(), adapters.merged_forward(policy.module):
        trained = policy.score(batch, noise_keys=torch.arange(3)).sum()
    untrained = made(part)
    for other in (served, untrained):
        if isinstance(policy, FlowPolicy) and isinstance(other, FlowPolicy):
            other.variance = policy.variance
    there, start = (p.score(batch, noise_keys=torch.arange(3)).sum() for p in (served, untrained))
    assert abs(there - trained) < 0.2 * abs(trained - start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_supervised_start_goes_on_from_published_weights(kind: str, known: dict[str, PolicyPart]) -> None:
    policy = made(known[kind])
    part = SupervisedPart(steps=20, batch_size=4, lr=3e-3, warmup_steps=2)
    learner = SupervisedLearner(policy, part, seed=0, demos=[scripted(policy, kind)])
    losses: list[float] = []
    learner.fit(on_step=lambda _, metrics: losses.append(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert all(p.grad is None for p in policy.module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_on_bfloat16_weights_that_stay_bfloat16(
    kind: str, known: dict[str, PolicyPart]
) -> None:
    policy = made(known[kind].model_copy(update={"dtype": "bfloat16"}))
    before = state_tensors(policy.module)
    adapters.attach(policy.module, AdapterPart(rank=4, alpha=8), seed=0, decoders=policy.adapted)
    part = SupervisedPart(steps=20, batch_size=4, lr=2e-2, warmup_steps=2, trains="adapter")
    learner = SupervisedLearner(policy, part, seed=0, demos=[scripted(policy, kind)])
    losses: list[float] = []
    learner.fit(on_step=lambda _, metrics: losses.append(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert 0 < adapters.merge_in(policy.module) < 0.01
    after = state_tensors(policy.module)
    assert {name: a.dtype for name, a in after.items()} == {name: a.dtype for name, a in before.items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(any(name.startswith(f"{decoder}.layers.") for decoder in policy.adapted) for name in changed)


def scripted(policy: Policy, kind: str) -> Trajectory:
    """A demonstration of random actions."""
    rng = np.random.default_rng(0)
    demo = episode(policy, seed=0, outcome="success", length=4)
    decisions = [
        replace(d, sample=replace(d.sample, actions=rng.uniform(-1, 1, (CHUNKS[kind], 7))))
        for d in demo.decisions
    ]
    return replace(demo, decisions=tuple(decisions), policy_version=-1)


def decided(trajectory: Trajectory) -> tuple[list[Any], list[np.ndarray]]:
    return [d.observation for d in trajectory.decisions], [d.sample.model_chunk for d in trajectory.decisions]


# Sizes and statistics of pi-0


@pytest.mark.parametrize("adaptive", [False, True], ids=FLOWS)
@pytest.mark.parametrize("layout", ["openpi", "LeRobot"])
def test_sizes_come_from_the_tensors(layout: str, adaptive: bool, tmp_path: Path) -> None:
    config = {"type": "pi05" if adaptive else "pi0", "chunk_size": 5, **HEADS}
    found = open_pi0(write_pi0(tmp_path / "x", adaptive=adaptive, layout=layout, config=config))
    assert found.config == Pi0Config(
        adaptive=adaptive,
        vision=PI0.vision,
        vlm=PI0.vlm,
        expert=PI0.expert,
        vocab=PI0.vocab,
        horizon=5,
        action_dim=9,
        state_dim=9 if adaptive else 10,
    )


def test_statistics_may_lie_elsewhere(own: Callable[[str], PolicyPart], tmp_path: Path) -> None:
    part = own("pi05")
    (tmp_path / "folder" / "assets").rename(tmp_path / "elsewhere")
    with pytest.raises(PublishedError, match=r"folder has no norm_stats\.json"):
        check_published(part, image_size=64)
    part = part.model_copy(update={"norm_stats": str(tmp_path / "elsewhere" / "libero")})
    assert check_published(part, image_size=64) == 4 * sum(
        p.numel() for p in pi0_network(adaptive=True).parameters()
    )


def test_actors_are_told_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    part = located(PolicyPart(paradigm="flow", checkpoint="a/b", norm_stats="c"))
    assert (part.checkpoint, part.norm_stats) == (str(tmp_path / "a/b"), str(tmp_path / "c"))
    assert located(PolicyPart()) == PolicyPart()
