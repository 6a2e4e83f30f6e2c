"""Every paradigm learns: the supervised start, and preferences under a surrogate score."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.loader import RecipeError, load_recipe
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import SupervisedPart
from learners.decisions import NOISE_DRAWS, DecisionPool, noise_keys
from learners.preference import PreferenceLearner
from learners.supervised import SupervisedLearner
from learners.terms import Draw, Side, accumulate_gradients, refer
from policies.flow import FlowPolicy
from policies.protocol import Policy
from policies.weights import adapters
from tests.paradigms import PARADIGMS, SURROGATES, new, observations
from trajectories.records import ActionSample, Cell, Decision, Outcome, PreferencePair, Trajectory

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def episode(policy: Policy, *, seed: int, outcome: Outcome) -> Trajectory:
    """What the policy would have recorded on random observations."""
    seen = observations(6, seed)
    samples = policy.act(seen, seeds=[100 * seed + k for k in range(6)], temperature=1.0)
    return Trajectory(
        cell=Cell(suite="libero_goal", task_id=0, init_state=seed // 2, seed=seed),
        decisions=tuple(
            Decision(observation=o, sample=s, executed=2) for o, s in zip(seen, samples, strict=True)
        ),
        outcome=outcome,
        env_steps=12,
        policy_version=0,
        policy_hash="start",
    )


def pairs_of(policy: Policy) -> list[PreferencePair]:
    return [
        PreferencePair(
            chosen=episode(policy, seed=2 * i, outcome="success"),
            rejected=episode(policy, seed=2 * i + 1, outcome="timeout"),
        )
        for i in range(3)
    ]


def learner_of(policy: Policy, **settings: object) -> PreferenceLearner:
    part = PreferencePart.model_validate({"reference": "start", "preference_weight": 1.0, **settings})
    return PreferenceLearner(
        policy,
        adapter=AdapterPart(rank=4, alpha=8),
        preference=part,
        guard=GuardPart(chosen_drop=5),
        base_hash="start",
        seed=0,
    )


@pytest.mark.parametrize("name", PARADIGMS)
def test_before_its_first_step_a_learner_is_undecided(name: str) -> None:
    policy = new(name)
    pairs = pairs_of(policy)
    first = learner_of(policy, steps=1).update(pairs, [pair.chosen for pair in pairs], ()).history[0]
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    for metric in ("margin", "chosen_logratio", "rejected_logratio", "success_logratio"):
        assert first[metric] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", PARADIGMS)
def test_a_learner_tells_chosen_from_rejected_and_the_floor_holds_it(name: str) -> None:
    policy = new(name)
    pairs = pairs_of(policy)
    learner = learner_of(
        policy, steps=40, lr=4e-3, beta=0.3, rejected_floor=0.2, credit="uniform", decisions_per_trajectory=6
    )
    report = learner.update(pairs, [pair.chosen for pair in pairs], ())
    first, last = report.history[0], report.metrics
    assert report.stopped == ""
    assert last["preference_loss"] < 0.7 * first["preference_loss"]
    assert last["accuracy"] > 0.9
    assert last["success_nll"] < first["success_nll"]


def test_a_flow_update_says_how_its_score_was_calibrated() -> None:
    policy = new("pi0")
    pairs = pairs_of(policy)
    report = learner_of(policy, steps=2).update(pairs, [pair.chosen for pair in pairs], ())
    assert report.summary()["velocity_error"] > 0
    assert report.history[0]["success_nll"] == pytest.approx(
        0.5, abs=0.1
    )  # half a nat an element, by definition


def test_a_score_is_calibrated_in_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = new("pi0")
    assert isinstance(policy, FlowPolicy)
    sizes: list[int] = []
    plain = policy._errors
    monkeypatch.setattr(
        policy,
        "_errors",
        lambda batch, *args, **more: sizes.append(len(batch)) or plain(batch, *args, **more),
    )
    learner = learner_of(policy, steps=1, micro_batch=4)
    learner._calibrate([pair.chosen for pair in pairs_of(policy)])  # of six decisions each
    assert sizes == [4, 2] * 3
    other = learner_of(new("pi0"), steps=1, micro_batch=64)
    other._calibrate([pair.chosen for pair in pairs_of(policy)])
    assert learner._calibration == pytest.approx(other._calibration)


@pytest.mark.parametrize("name", PARADIGMS)
def test_a_beta_that_is_sought_spreads_the_logits_by_one_and_presses_no_harder(name: str) -> None:
    policy = new(name)
    pairs = pairs_of(policy)
    settings = {"steps": 8, "lr": 1e-3, "credit": "uniform", "decisions_per_trajectory": 6}
    told = learner_of(policy, **settings).update(pairs, (), ()).metrics
    assert (told["beta"], told["spread_pairs"]) == (0.1, 3)
    assert told["logit_std"] == pytest.approx(0.1 / told["beta_for_unit_std"])
    learner = learner_of(new(name), beta=None, **settings)
    found = learner.update(pairs, (), ()).metrics
    assert found["beta_for_unit_std"] == pytest.approx(told["beta_for_unit_std"], rel=1e-3)
    assert found["beta"] == 0.1  # eight steps, after the last of which it was found
    assert learner._part.first_beta == found["beta_for_unit_std"]
    assert learner._part.preference_weight * learner._part.first_beta == pytest.approx(0.1)
    again = learner_of(new(name), beta=None, **settings)
    again.update(pairs[2:], (), ())
    again.load_state(learner.state())
    assert again._part == learner._part
    second = learner.update(pairs, (), ()).metrics
    assert second["beta"] == found["beta_for_unit_std"]
    assert "logit_std" not in second  # it is looked at once
    assert 0.2 < second["margin_std"] < 5  # of the logits: beta times the margins
    learner.restore(None)
    assert learner._part.first_beta == 0.1  # the update that it was found in is gone


def test_looking_at_the_spread_changes_nothing_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(after: int) -> dict[str, np.ndarray]:
        monkeypatch.setattr("learners.preference.AFTER_STEPS", after)
        policy = new("autoregressive")
        learner = learner_of(policy, steps=4)
        learner._dropout = 0.3
        for _, layer in adapters.adapted_layers(policy.module):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
        learner.update(pairs_of(new("autoregressive")), (), ())
        return learner.adapter().factors

    looked, last = trained(2), trained(4)
    for layer, factors in looked.items():
        for key, array in factors.items():
            np.testing.assert_array_equal(array, last[layer][key])


def test_a_beta_is_sought_of_the_sigmoid_form_alone() -> None:
    for setting in ("loss=ipo", "proximal_weight=0.1"):
        with pytest.raises(RecipeError, match=rf"preference.beta=null with preference.{setting}: a spread"):
            load_recipe(QUICKSTART, ["preference.beta=null", f"preference.{setting}"])


def test_an_update_that_trips_forgets_the_beta_that_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learners.preference.AFTER_STEPS", 3)
    policy = new("autoregressive")
    pairs = pairs_of(policy)
    learner = learner_of(policy, beta=None, steps=20, lr=0.3)
    learner._guard = GuardPart(chosen_drop=1e-4)
    seen: list[bool] = []
    report = learner.update(pairs, (), (), on_step=lambda step, _: seen.append(learner._spread is not None))
    assert report.stopped == "tripped"
    assert seen[:5] == [False, False, False, True, True]
    assert learner._spread is None
    assert learner._part.first_beta == 0.1


@pytest.mark.parametrize("name", SURROGATES)
def test_a_kept_reference_is_of_the_same_noise_as_the_score(name: str) -> None:
    policy = new(name)
    learner_of(policy)
    pool = DecisionPool(policy, start_reference=True, micro_batch=64)
    one, other = episode(policy, seed=0, outcome="success"), episode(policy, seed=1, outcome="timeout")
    pool.hold([one, other], update=0)
    rows = pool.rows(other)
    scores = [pool.score(rows, noise).detach().numpy() for noise in range(NOISE_DRAWS)]
    with pytest.raises(RuntimeError, match="call refer first"):
        pool.reference(rows, 0)
    for noise, score in enumerate(scores):
        pool.refer(rows, torch.full_like(rows, noise))
        np.testing.assert_allclose(pool.reference(rows, noise).numpy(), score, atol=1e-5)
    assert (scores[0] != scores[1]).any()
    assert pool.noise_draws == NOISE_DRAWS


@pytest.mark.parametrize("name", SURROGATES)
def test_the_sides_of_a_pair_share_their_noise_and_other_decisions_have_other_noise(name: str) -> None:
    policy = new(name)
    seen: list[torch.Tensor] = []
    score = policy.score

    def recorded(*args: object, noise_keys: torch.Tensor) -> torch.Tensor:
        seen.append(noise_keys)
        return score(*args, noise_keys=noise_keys)

    pairs = pairs_of(policy)
    pool = DecisionPool(policy, start_reference=True, micro_batch=64)
    adapters.attach(policy.module, AdapterPart(rank=4), seed=0, decoders=policy.adapted)
    pool.hold([side for pair in pairs for side in (pair.chosen, pair.rejected)], update=0)
    policy.score = recorded  # type: ignore[method-assign]
    weights = torch.ones(2)
    sides = [
        (
            Side(rows=pool.rows(pair.chosen)[[0, 3]], weights=weights),
            Side(rows=pool.rows(pair.rejected)[[5, 1]], weights=weights),
        )
        for pair in pairs
    ]
    successes = torch.cat([pool.rows(pair.chosen) for pair in pairs])
    draw = Draw(pairs=sides, successes=successes, demos=successes[:0], noise=7)
    part = PreferencePart(reference="start")
    assert refer(draw, pool, part)
    seen.clear()
    metrics = accumulate_gradients(draw, pool, part)
    of_pairs, of_successes = seen
    chosen, rejected = of_pairs.view(2, len(pairs), 2)
    assert torch.equal(chosen, rejected)
    assert len(chosen.unique()) == 6
    assert len(of_successes.unique()) == 18
    for ratio in ("chosen_logratio", "rejected_logratio", "success_logratio"):
        assert metrics[ratio] == pytest.approx(0, abs=1e-5)


def test_every_update_has_noise_and_references_of_its_own() -> None:
    groups, draws = torch.tensor([89_049, 0, 8003]), torch.tensor([7, 0, 2])
    assert noise_keys(groups, draws, 0).tolist() == [712_399, 0, 64_026]
    assert noise_keys(groups, draws, 3).tolist() == [712_399 + 3 * 2**32, 3 * 2**32, 64_026 + 3 * 2**32]
    policy = new("pi0")
    learner_of(policy)
    pool = DecisionPool(policy, start_reference=True, micro_batch=64)
    one = episode(policy, seed=0, outcome="success")
    references = []
    for update in (0, 1, 0):
        pool.hold([one], update=update)
        rows = pool.rows(one)
        with pytest.raises(RuntimeError, match="call refer first"):
            pool.reference(rows)
        assert pool.refer(rows, torch.zeros_like(rows))
        np.testing.assert_allclose(pool.reference(rows).numpy(), pool.score(rows).detach().numpy(), atol=1e-5)
        references.append(pool.reference(rows))
    assert not torch.equal(references[0], references[1])
    assert torch.equal(references[0], references[2])


@pytest.mark.parametrize("name", ["pi0", "diffusion"])
def test_a_surrogate_s_learner_continues_exactly_from_its_state(name: str) -> None:
    policy = new(name)
    pairs = pairs_of(policy)
    learner = learner_of(policy, steps=2)
    learner.update(pairs[:1], (), ())
    saved = learner.state()
    learner.update(pairs, (), ())
    again = learner_of(new(name), steps=2)
    again.update(pairs[2:], (), ())  # of another calibration
    again.update(pairs[2:], (), ())  # and more of them
    again.load_state(saved)
    again.update(pairs, (), ())
    expected = learner.state()
    found = again.state()
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    assert ("calibration.velocity_error" in saved) == (name == "pi0")


@pytest.mark.parametrize("name", PARADIGMS)
def test_actions_that_were_not_executed_count_nothing(name: str) -> None:
    policy = new(name)
    whole = episode(policy, seed=0, outcome="success")
    *first, last = whole.decisions
    ended = replace(whole, decisions=(*first, replace(last, executed=1)))
    pool = DecisionPool(policy, start_reference=not policy.exact, micro_batch=64)
    pool.hold([ended], update=0)
    rows = pool.rows(ended)
    learner_of(policy)
    pool.refer(rows, torch.zeros_like(rows))
    for scores in (pool.score(rows), pool.reference(rows)):
        assert (scores[-1, 7:] == 0).all()
        assert (scores[-1, :7] != 0).any()
        assert (scores[:-1] != 0).any(dim=1).all()


def test_a_surrogate_has_no_recorded_reference() -> None:
    with pytest.raises(ValueError, match=r"preference\.reference=start"):
        DecisionPool(new("diffusion"), start_reference=False, micro_batch=64)
    with pytest.raises(RecipeError, match=r"preference\.reference=behaviour needs recorded log-probs"):
        load_recipe("configs/tiny_pi05.yaml", ["preference.reference=behaviour"])


@pytest.mark.parametrize("name", PARADIGMS)
def test_a_supervised_start_is_learned(name: str) -> None:
    policy = new(name)
    rng = np.random.default_rng(0)
    demo = replace(episode(policy, seed=3, outcome="success"), policy_version=-1, policy_hash="expert")
    actions = np.sign(rng.normal(size=(2, 7))).astype(np.float32)
    sample = ActionSample(actions=actions, model_chunk=actions, logps=np.zeros(0, np.float32))
    demo = replace(demo, decisions=tuple(replace(d, sample=sample) for d in demo.decisions))
    learner = SupervisedLearner(
        policy,
        SupervisedPart(steps=120, warmup_steps=5, lr=3e-3, batch_size=6, image_shift=1),
        seed=0,
        demos=[demo],
    )
    losses: list[float] = []
    learner.fit(on_step=lambda step, metrics: losses.append(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:10])
