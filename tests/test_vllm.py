"""vLLM as the engine of the token policy, really run where it is installed: `make test-vllm`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.parameter_server import ParameterServer, pull_snapshot
from actors.pipeline import train
from actors.placement import PlacementError, check_fits, connect
from actors.policy import PolicyActor
from configs.loader import load_recipe
from configs.policy import PolicyPart
from configs.preference import AdapterPart
from configs.schema import LearnerPart, RolloutPart, ServingPart
from learners.checkpoint import load_checkpoint, save_checkpoint
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import Engine
from policies.make import make_policy
from policies.weights import adapters
from policies.weights.adapter_files import adapter_from_tensors
from policies.weights.merging import merge
from policies.weights.snapshots import state_tensors
from tests.test_paradigm_loops import LITTLE, TINY, metrics
from trajectories.codec import load_trajectory
from trajectories.hashing import weights_hash
from trajectories.journal import read_journal
from trajectories.records import ActionSample, AdapterWeights, Observation, WeightSnapshot

if TYPE_CHECKING:
    from policies.decoding.vllm_engine import VllmEngine

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not INSTALLED, reason="vLLM is not installed here: `make test-vllm` runs this"
)
PART = PolicyPart(bins=21, chunk=2)
"""The tiny policy, whose heads of 24 vLLM's CPU attention does not know; chunks of 14 tokens."""
ADAPTER = AdapterPart(method="dora", rank=4, alpha=8)
INSTRUCTIONS = (
    "open the middle drawer of the cabinet",
    "pick up the alphabet soup and place it in the basket",
)


def make(seed: int) -> AutoregressivePolicy:
    policy = make_policy(PART, image_size=32, seed=seed, device=torch.device("cpu"))
    assert isinstance(policy, AutoregressivePolicy)
    return policy


def observations(count: int) -> list[Observation]:
    """Random images and states; prompts of two lengths in turn."""
    rng = np.random.default_rng(0)
    return [
        Observation(
            agentview=rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def engine() -> VllmEngine:
    """The one vLLM of this process."""
    # An extra: this module is collected without it.
    from policies.decoding.vllm_engine import VllmEngine

    policy = make(0)
    network = policy.network
    return VllmEngine(
        network.language_model,
        first_id=network.action_first_id,
        stop_id=network.action_stop_id,
        tokens=policy.tokens,
        max_batch=4,
    )


def act(
    policy: AutoregressivePolicy, engine: Engine, count: int = 5, *, temperature: float = 0.0
) -> list[ActionSample]:
    """What a policy decides with an engine for a time; five are more than vLLM was given room for at once."""
    own, policy.engine = policy.engine, engine
    samples = policy.act(observations(count), seeds=range(count), temperature=temperature)
    policy.engine = own
    return samples


def tokens(samples: list[ActionSample]) -> np.ndarray:
    return np.stack([sample.model_chunk for sample in samples])


def assert_alike(mine: list[ActionSample], torchs: list[ActionSample]) -> None:
    np.testing.assert_array_equal(tokens(mine), tokens(torchs))
    for one, other in zip(mine, torchs, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=1e-4)


def snapshot(policy: AutoregressivePolicy, adapter: AdapterWeights | None = None) -> WeightSnapshot:
    weights = merge(state_tensors(policy.module), adapter)
    return WeightSnapshot(version=1, content_hash=weights_hash(weights), tensors=weights)


def trained_adapter(policy: AutoregressivePolicy) -> AdapterWeights:
    """A DoRA adapter that changes what the policy does; the policy keeps it."""
    base_hash = weights_hash(state_tensors(policy.module))
    adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters(policy.module).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return adapters.extract(policy.module, base_hash=base_hash)


@needs_vllm
@pytest.mark.vllm
def test_greedy_tokens_are_the_torch_engines_before_and_after_a_snapshot(engine: VllmEngine) -> None:
    policy = make(0)
    before = act(policy, engine)
    assert_alike(before, act(policy, policy.engine))
    policy.load(snapshot(make(1)))
    after = act(policy, engine)
    assert_alike(after, act(policy, policy.engine))
    assert (tokens(before) != tokens(after)).any()


@needs_vllm
@pytest.mark.vllm
def test_a_merged_dora_is_served_and_an_unmerged_one_refused(engine: VllmEngine) -> None:
    policy, adapted = make(0), make(0)
    before = act(policy, engine)
    policy.load(snapshot(policy, trained_adapter(adapted)))
    after = act(policy, engine)
    assert_alike(after, act(policy, policy.engine))
    assert (tokens(before) != tokens(after)).any()
    with pytest.raises(TypeError, match=r"belongs to an adapter; vLLM is served merged weights, so merge it"):
        act(adapted, engine)
    assert_alike(act(policy, engine), after)


@needs_vllm
@pytest.mark.vllm
def test_two_versions_share_an_engine_in_turn(engine: VllmEngine) -> None:
    fleet, candidate = make(0), make(1)
    for policy in (fleet, candidate, candidate, fleet):
        assert_alike(act(policy, engine), act(policy, policy.engine))


@needs_vllm
@pytest.mark.vllm
def test_weights_that_an_optimizer_moved_are_noticed(engine: VllmEngine) -> None:
    policy = make(0)
    before = act(policy, engine)
    optimizer = torch.optim.SGD(policy.network.language_model.parameters(), lr=0.03)
    batch = policy.batch(observations(5), [sample.model_chunk for sample in before])
    policy.score(batch).sum().backward()
    optimizer.step()
    after = act(policy, engine)
    assert_alike(after, act(policy, policy.engine))
    assert (tokens(before) != tokens(after)).any()


@needs_vllm
@pytest.mark.vllm
def test_a_seed_alone_fixes_the_draws_and_they_are_torchs(engine: VllmEngine) -> None:
    policy = make(0)
    drawn = act(policy, engine, temperature=1.0)
    assert_alike(drawn, act(policy, policy.engine, temperature=1.0))
    assert_alike(drawn[:2], act(policy, engine, 2, temperature=1.0))
    assert_alike(act(policy, engine, temperature=0.3), act(policy, policy.engine, temperature=0.3))
    scored = policy.score(policy.batch(observations(5), [sample.model_chunk for sample in drawn]))
    np.testing.assert_allclose(np.stack([s.logps for s in drawn]), scored.detach(), rtol=0, atol=1e-4)


@needs_vllm
@pytest.mark.vllm
def test_a_prefix_without_room_is_refused(engine: VllmEngine) -> None:
    lengths = [1011]
    prefix = torch.zeros(1, lengths[0], PART.decoder.width)
    with pytest.raises(ValueError, match=r"1011 tokens and a chunk of 14 exceed the 1024 .*engine=torch"):
        engine.decode(make(0).network.language_model, prefix, lengths, seeds=[0], temperature=0.0)


@needs_vllm
@pytest.mark.vllm
def test_heads_widen_to_the_next_size_that_is_known() -> None:
    # An extra: this module is collected without it.
    from policies.decoding.vllm_engine import served_head_size, served_weights

    assert [served_head_size(size, "cpu") for size in (24, 32, 65, 128)] == [32, 32, 80, 128]
    assert served_head_size(24, "cuda") == 24
    with pytest.raises(ValueError, match=r"the decoder's are 513 wide; use serving\.engine=torch"):
        served_head_size(513, "cpu")
    config = LlamaConfig(
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=9,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    served = served_weights(model, first_id=5, stop_id=9, served_size=8)
    layer = "model.layers.0.self_attn."
    shapes = {name: tuple(tensor.shape) for name, tensor in served.items()}
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (4, 12)
    assert (shapes[f"{layer}q_proj.weight"], shapes[f"{layer}k_proj.bias"]) == ((16, 12), (8,))
    assert shapes[f"{layer}o_proj.weight"] == (12, 16)
    for name, tensor in served_weights(model, first_id=0, stop_id=9, served_size=6).items():
        assert torch.equal(tensor, model.state_dict()[name])


@needs_vllm
@pytest.mark.vllm
@pytest.mark.ray
def test_a_policy_actor_serves_two_versions_with_vllm(tmp_path: Path) -> None:
    """As the fleet and a candidate ask for them, in turn; its process has a vLLM of its own."""
    connect()
    policy = make(0)
    save_checkpoint(tmp_path, "start", state_tensors(policy.module), {})
    server = ParameterServer(start_checkpoint=str(tmp_path / "start"), saved=str(tmp_path), num_shards=1)
    server.publish(None)
    server.publish(trained_adapter(make(0)), keep=[0])
    actor = PolicyActor.options(num_cpus=0.5).remote(
        policy=PART, serving=ServingPart(engine="vllm"), image_size=32, shards=server.names
    )
    try:
        for version in (0, 1, 0):
            policy.load(pull_snapshot(server.shards, version))
            asked = [
                actor.act.remote(seen, seed=i, version=version, temperature=1.0)
                for i, seen in enumerate(observations(3))
            ]
            answers = cast("list[tuple[ActionSample, str]]", ray.get(asked, timeout=300))
            assert_alike([sample for sample, _ in answers], act(policy, policy.engine, 3, temperature=1.0))
            assert {told for _, told in answers} == {weights_hash(state_tensors(policy.module))}
    finally:
        for handle in (actor, *server.shards):
            ray.kill(handle)


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed here")
def test_a_recipe_for_vllm_is_refused_where_it_is_not_installed() -> None:
    """Before a cluster is looked at, and so before any actor starts."""
    with pytest.raises(
        PlacementError, match=r"serving\.engine=vllm needs vLLM, which is not.*make setup-vllm"
    ):
        check_fits(rollouts=RolloutPart(), serving=ServingPart(engine="vllm"), learner=LearnerPart())


@needs_vllm
@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.libero
def test_a_whole_run_is_driven_through_vllm(tmp_path: Path) -> None:
    """Start, rollouts, update, canary, evaluation: every decision but the expert's is vLLM's, under weights that are
    handed over as they are published."""
    train(load_recipe(TINY, [f"root={tmp_path}", "name=served", *LITTLE, "serving.engine=vllm"]))
    run = tmp_path / "served"
    published = {line["version"]: line["hash"] for line in metrics(run, "published")}
    assert list(published) == [0, 1]
    episodes = read_journal(run / "episodes.jsonl")
    assert not any(episode["outcome"] == "fault" for episode in episodes)
    driven = [episode for episode in episodes if episode["policy_version"] >= 0]
    assert {(e["policy_version"], e["policy_hash"]) for e in driven} == set(published.items())
    base, _ = load_checkpoint(run / "checkpoints" / "start")
    learned = adapter_from_tensors(*load_checkpoint(run / "checkpoints" / "v0001"))
    part = load_recipe(run / "recipe.yaml").policy
    policy = make_policy(part, image_size=32, seed=1, device=torch.device("cpu"))
    stored = [load_trajectory(path) for path in sorted((run / "trajectories").iterdir())]
    assert {trajectory.policy_version for trajectory in stored} == {0, 1}
    for trajectory in stored:
        version = trajectory.policy_version
        tensors = merge(base, learned) if version else base
        policy.load(WeightSnapshot(version=version, content_hash="", tensors=tensors))
        seen = [decision.observation for decision in trajectory.decisions]
        chunks = [decision.sample.model_chunk for decision in trajectory.decisions]
        recorded = np.stack([decision.sample.logps for decision in trajectory.decisions])
        scored = policy.score(policy.batch(seen, chunks)).detach().numpy()
        np.testing.assert_allclose(recorded, scored, rtol=0, atol=2e-3)
