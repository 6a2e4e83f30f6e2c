"""Training held apart from a capability vector, of whole weights and of adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.loader import RecipeError, load_recipe
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart, SupervisedPart
from learners.capability import CapabilityError, Vector, extract
from learners.checkpoint import load_checkpoint, save_checkpoint
from learners.merging import merge
from learners.orthogonality import FLOOR, AdapterPenalty, FullPenalty
from learners.preference import PreferenceLearner
from learners.supervised import SupervisedLearner
from objectives.orthogonal import cosine_penalty, elementwise_penalty, squared_cosine
from policies.protocol import Policy
from policies.weights import adapters
from policies.weights.snapshots import state_tensors
from tests.learning import ADAPTER, demonstration, new_policy, pairs_of
from trajectories.records import WeightSnapshot

DEMOS = [demonstration(1), demonstration(2)]
ELEMENTWISE = CapabilityPart(vector="gamma", penalty="elementwise", penalty_weight=1e-2)
COSINE = CapabilityPart(vector="gamma", penalty="cosine", penalty_weight=10.0)


def vector_of(policy: Policy, seed: int = 0, scale: float = 0.05) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in state_tensors(policy.module).items()
    }


def train(
    policy: Policy,
    part: CapabilityPart | None = None,
    vector: dict[str, np.ndarray] | None = None,
    steps: int = 4,
) -> dict[str, np.ndarray]:
    penalty = None
    if part is not None and vector is not None:
        penalty = FullPenalty(policy.module, part, vector)
    supervised = SupervisedPart(steps=steps, batch_size=4, warmup_steps=1, lr=5e-3)
    SupervisedLearner(policy, supervised, seed=0, demos=DEMOS, penalty=penalty).fit()
    return state_tensors(policy.module)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("part", [ELEMENTWISE, COSINE], ids=["elementwise", "cosine"])
def test_the_vector_of_two_equal_runs_changes_nothing_to_the_bit(
    part: CapabilityPart, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, "base", state_tensors(new_policy().module), {})
    save_checkpoint(tmp_path, "sft", train(new_policy()), {})
    extract(tmp_path / "base", sft=tmp_path / "sft", aux=tmp_path / "sft", out=tmp_path / "gamma")
    vector = Vector(tmp_path / "gamma")
    assert all(not array.any() for array in vector.values())
    assert FullPenalty(new_policy().module, part, vector).value().item() == 0
    assert same(train(new_policy(), part, vector), train(new_policy()))


def test_training_from_a_base_with_nothing_of_the_vector_is_plain_training(tmp_path: Path) -> None:
    base = new_policy()
    save_checkpoint(tmp_path, "base", state_tensors(base.module), {})
    save_checkpoint(tmp_path, "sft", train(new_policy()), {})
    save_checkpoint(tmp_path, "aux", train(new_policy(), steps=6), {})
    extract(tmp_path / "base", sft=tmp_path / "sft", aux=tmp_path / "aux", out=tmp_path / "gamma")
    for alpha, equal in ((0.0, True), (1.0, False)):
        merge(tmp_path / "base", tmp_path / "gamma", alpha=alpha, out=tmp_path / f"meta-{alpha}")
        policy = new_policy()
        tensors, _ = load_checkpoint(tmp_path / f"meta-{alpha}")
        policy.load(WeightSnapshot(version=0, content_hash="", tensors=tensors))
        assert same(train(policy), train(new_policy())) is equal


def test_the_elementwise_gradient_pulls_every_weight_back_by_what_the_vector_weighs() -> None:
    policy = new_policy()
    vector = vector_of(policy)
    penalty = FullPenalty(policy.module, ELEMENTWISE, vector)
    name, weight = next((n, p) for n, p in policy.module.named_parameters() if p.dim() == 2)
    assert penalty.add_gradients() == {"orthogonal_penalty": 0.0}
    assert weight.grad is None or not weight.grad.any()
    policy.module.zero_grad()
    moved = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight += moved
    gamma = torch.from_numpy(vector[name])
    found = penalty.add_gradients()["orthogonal_penalty"]
    assert found == pytest.approx((gamma * moved).abs().sum().item(), rel=1e-4)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 1e-2 * gamma.abs() * moved.sign())


@pytest.mark.parametrize("part", [ELEMENTWISE, COSINE], ids=["elementwise", "cosine"])
def test_gradients_without_a_graph_are_those_with_one(part: CapabilityPart) -> None:
    policy = new_policy()
    penalty = FullPenalty(policy.module, part, vector_of(policy))
    with torch.no_grad():
        for i, parameter in enumerate(policy.module.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    (part.weight * penalty.value()).backward()
    expected = [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]
    policy.module.zero_grad()
    found = penalty.add_gradients()["orthogonal_penalty"]
    assert found == pytest.approx(penalty.value().item(), rel=1e-5)
    grads = [p.grad for p in policy.module.parameters() if p.grad is not None]
    assert len(grads) == len(expected) > 10
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("part", [ELEMENTWISE, COSINE], ids=["elementwise", "cosine"])
def test_a_held_apart_run_moves_less_along_the_vector(part: CapabilityPart) -> None:
    began = state_tensors(new_policy().module)
    plain = train(new_policy(), steps=20)
    vector = {name: plain[name] - began[name] for name in began}  # the very way that plain training goes
    held = train(new_policy(), part.model_copy(update={"penalty_weight": 10.0}), vector, steps=20)

    def along(weights: dict[str, np.ndarray]) -> float:
        changes = {n: torch.from_numpy(weights[n] - began[n]) for n in began}
        gamma = {n: torch.from_numpy(array) for n, array in vector.items()}
        form = elementwise_penalty if part.penalty == "elementwise" else cosine_penalty
        return form(gamma, changes).item()

    assert along(held) < 0.7 * along(plain)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_s_penalty_is_that_of_its_merged_weights(method: str) -> None:
    policy = new_policy()
    vector = vector_of(policy)
    part = AdapterPart(method=method, rank=4, alpha=8)
    adapters.attach(policy.module, part, seed=0, decoders=policy.adapted)
    penalty = AdapterPenalty(policy.module, COSINE, vector)
    assert penalty.value().item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for parameter in adapters.parameters(policy.module).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    cosines = []
    for name, layer in adapters.adapted_layers(policy.module):
        base = layer.get_base_layer().get_parameter("weight").detach()
        change = adapters._merged_weight(layer) - base
        cosines.append(squared_cosine(torch.from_numpy(vector[f"{name}.weight"]), change, floor=FLOOR))
    expected = torch.stack(cosines).mean()
    torch.testing.assert_close(penalty.value(), expected, rtol=1e-5, atol=1e-7)
    own = list(adapters.parameters(policy.module).values())
    by_graph = torch.autograd.grad(penalty.value(), own)
    for one, other in zip(by_graph, torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    own[0].grad = torch.ones_like(own[0])
    assert penalty.add_gradients()["orthogonal_penalty"] == pytest.approx(penalty.value().item(), rel=1e-5)
    own[0].grad -= 1
    for parameter, other in zip(own, by_graph, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, COSINE.weight * other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", [ELEMENTWISE, COSINE], ids=["elementwise", "cosine"])
def test_in_bfloat16_the_sum_over_many_weights_does_not_stall(part: CapabilityPart) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.ParameterList(torch.randn(32, 32, generator=generator).bfloat16() for _ in range(300))
    gamma = {str(i): np.full((32, 32), 0.05, np.float32) for i in range(300)}
    penalty = FullPenalty(module, part, gamma)
    with torch.no_grad():
        for weight in module:
            weight += 0.1 * torch.randn(32, 32, generator=generator).bfloat16()
    said = penalty.add_gradients()["orthogonal_penalty"]
    assert said == pytest.approx(penalty.value().item(), rel=2e-2)
    assert all(weight.grad.any() for weight in module)


def test_a_round_s_update_is_held_apart_too() -> None:
    def cosine_after(capability: CapabilityPart | None) -> float:
        policy = new_policy()
        pairs = pairs_of(policy, 2)
        vector = vector_of(policy)
        gradient = {name: array.copy() for name, array in vector.items()}
        learner = PreferenceLearner(
            policy,
            adapter=ADAPTER,
            preference=PreferencePart(reference="start", credit="uniform", demo_weight=0, steps=15, lr=5e-3),
            guard=GuardPart(chosen_drop=100),
            base_hash="",
            seed=0,
            capability=capability,
            vector=gradient,
        )
        report = learner.update(pairs, [pair.chosen for pair in pairs], [])
        assert report.steps == 15
        assert ("orthogonal_penalty" in report.metrics) is (capability is not None)
        if capability is not None:
            cosines = [
                torch.cosine_similarity(
                    torch.from_numpy(vector[f"{name}.weight"]).flatten(),
                    (adapters._merged_weight(layer) - layer.get_base_layer().weight.detach()).flatten(),
                    dim=0,
                ).item()
                for name, layer in adapters.adapted_layers(policy.module)
            ]
            assert report.metrics["vector_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
            most = max(cosines, key=abs)
            assert report.metrics["vector_cosine_most"] == pytest.approx(most, abs=1e-4)
        return AdapterPenalty(policy.module, COSINE, vector).value().item()

    assert cosine_after(COSINE) < 0.5 * cosine_after(None)


def test_what_an_adapter_cannot_do_is_refused() -> None:
    policy = new_policy()
    vector = vector_of(policy)
    adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
    with pytest.raises(ValueError, match="elementwise is of whole weights"):
        AdapterPenalty(policy.module, ELEMENTWISE, vector)
    with pytest.raises(CapabilityError, match="names none of the weights"):
        AdapterPenalty(policy.module, COSINE, {"other.weight": np.ones((2, 2), np.float32)})
    name = next(n for n in vector if n.startswith("language_model") and n.endswith("q_proj.weight"))
    with pytest.raises(ValueError, match="extracted from another network"):
        AdapterPenalty(policy.module, COSINE, {name: np.ones((2, 2), np.float32)})


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            "quickstart",
            ["capability.vector=gamma"],
            "penalty=elementwise with rollouts.rounds=2: a round trains an",
        ),
        ("quickstart", ["supervised.init=base", "supervised.steps=0"], "supervised.steps=0 trains nothing"),
        ("ddvla_libero", ["supervised.auxiliary=spatial"], "auxiliary=spatial is for policies made here"),
        (
            "openvla_libero",
            ["supervised.trains=adapter"],
            "trains=adapter with supervised.steps=0 trains nothing",
        ),
        ("quickstart", ["supervised.trains=adapter"], "trains=adapter on random weights; name trained ones"),
        (
            "capability",
            ["supervised.trains=adapter", "supervised.init=base", "capability.vector=gamma"],
            "penalty=elementwise with supervised.trains=adapter, whose change",
        ),
        (
            "capability",
            ["supervised.trains=adapter", "supervised.init=base", "supervised.auxiliary=future"],
            "auxiliary=future trains visual tokens, which an adapter leaves as they are",
        ),
        (
            "capability",
            ["supervised.trains=adapter", "supervised.init=base", "adapter.dropout=0.1"],
            "adapter.dropout=0.1 with supervised.trains=adapter: .* set adapter.dropout=0",
        ),
        (
            "openvla_libero",
            ["supervised.steps=10"],
            "swallows AdamW's small steps; set supervised.trains=adapter",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(recipe: str, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"configs/{recipe}.yaml", changes)
