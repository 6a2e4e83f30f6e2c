"""The preference learner on a small policy of the real classes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from configs.policy import VisionPart
from configs.preference import AdapterPart, GuardPart, PreferencePart
from learners.decisions import DecisionPool
from learners.preference import PreferenceLearner
from learners.report import Tripwire
from learners.terms import Draw, Side, accumulate_gradients, lowest_logratio, refer
from policies.make import make_policy
from policies.protocol import DecisionBatch, Policy
from policies.weights import adapters
from tests.learning import (
    ADAPTER,
    PART,
    SIZE,
    TOKENS,
    demonstration,
    episode,
    new_policy,
    observations,
    pairs_of,
)
from trajectories.records import Trajectory


def new_learner(
    policy: Policy, part: PreferencePart, adapter: AdapterPart = ADAPTER, drop: float = 0.5
) -> PreferenceLearner:
    return PreferenceLearner(
        policy,
        adapter=adapter,
        preference=part,
        guard=GuardPart(chosen_drop=drop),
        base_hash="start",
        seed=0,
    )


def same(
    first: dict[str, np.ndarray],
    second: dict[str, np.ndarray],
    *,
    but: tuple[str, ...] = ("generator", "updates"),
) -> bool:
    """Whatever happened, what the next update draws is something else."""
    assert set(first) == set(second)
    return all(np.array_equal(first[name], second[name]) for name in first if name not in but)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("reference", ["behaviour", "start"])
def test_the_first_step_of_the_acting_policy_is_exactly_undecided(method: str, reference: str) -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 3)
    part = PreferencePart(steps=1, reference=reference, preference_weight=1)
    report = new_learner(policy, part, AdapterPart(method=method, rank=4, alpha=8)).update(pairs, (), ())
    first = report.history[0]
    assert report.stopped == ""
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["chosen_logratio"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2) + 0.2 * first["anchor_nll"], abs=1e-5)
    assert "success_nll" not in first
    assert "demo_nll" not in first


def test_recorded_and_recomputed_references_agree_on_the_start_policy_s_own_episodes() -> None:
    histories = []
    for reference in ("behaviour", "start"):
        policy = new_policy()
        pairs = pairs_of(policy, 3)
        part = PreferencePart(steps=5, reference=reference, lr=1e-3, beta=0.1)
        histories.append(new_learner(policy, part).update(pairs, (), ()).history)
    # Before the first step no pair is decided, and rounding alone says which side is ahead.
    for history in histories:
        history[0].pop("accuracy")
    for recorded, recomputed in zip(*histories, strict=True):
        assert recorded == pytest.approx(recomputed, abs=1e-3)


@pytest.mark.parametrize(("credit", "beta"), [("value", 0.5), ("uniform", 0.1)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_learning_tells_chosen_from_rejected(method: str, credit: str, beta: float) -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 4)
    successes = [pair.chosen for pair in pairs]
    demos = [demonstration(seed=50)]
    part = PreferencePart(
        steps=40,
        lr=5e-3,
        credit=credit,
        preference_weight=1,
        beta=beta,
        rejected_floor=0.2,
        decisions_per_trajectory=10,
        demo_weight=1,
    )
    learner = new_learner(policy, part, AdapterPart(method=method, rank=4, alpha=8))
    steps: list[int] = []
    report = learner.update(pairs, successes, demos, on_step=lambda step, metrics: steps.append(step))
    first, last = report.history[0], report.metrics
    assert report.stopped == ""
    assert report.steps == 40
    assert steps == list(range(1, 41))
    assert last["preference_loss"] < 0.3 * first["preference_loss"]
    assert last["accuracy"] == 1
    assert last["margin"] > 1
    assert last["chosen_logratio"] > 0.01
    assert last["rejected_logratio"] < -0.01
    assert last["success_nll"] < first["success_nll"]
    assert last["demo_nll"] < first["demo_nll"]
    assert report.summary()["margin"] == last["margin"]


def test_ipo_settles_at_its_target_margin() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 3)
    part = PreferencePart(
        steps=60, lr=1e-3, beta=0.1, loss="ipo", anchor_weight=0, decisions_per_trajectory=20
    )
    report = new_learner(policy, part).update(pairs, (), ())
    # h -> 1 / (2 beta), and the margin is beta h.
    assert report.history[0]["preference_loss"] == pytest.approx(25, abs=0.1)
    assert report.metrics["margin"] == pytest.approx(0.5, abs=0.02)


def test_micro_batched_gradients_equal_one_pass_over_the_whole_objective() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 5, length=10)
    successes = [episode(policy, seed=77, outcome="success", length=12)]
    demos = [demonstration(seed=51)]
    adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
    parameters = adapters.parameters(policy.module)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pool = DecisionPool(policy, start_reference=False, micro_batch=64)
    pool.hold([t for pair in pairs for t in (pair.chosen, pair.rejected)] + successes + demos, update=0)
    some = torch.tensor([1, 3, 4, 8])
    sides = [
        (
            Side(rows=pool.rows(pair.chosen), weights=torch.ones(len(pair.chosen.decisions))),
            Side(rows=pool.rows(pair.rejected)[some], weights=torch.tensor([0.1, 0.2, 0.3, 2.0])),
        )
        for pair in pairs
    ]
    draw = Draw(pairs=sides, successes=pool.rows(successes[0]), demos=pool.rows(demos[0])[:3])
    assert sum(len(side.rows) for pair in sides for side in pair) > 64

    part = PreferencePart(
        preference_weight=1,
        proximal_weight=0.3,
        beta=0.05,
        rejected_floor=0.02,
        success_weight=0.2,
        demo_weight=0.1,
    )
    with adapters.merged_forward(policy.module):
        metrics = accumulate_gradients(draw, pool, part)
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    policy.module.zero_grad()

    def score(trajectory: Trajectory) -> torch.Tensor:
        chunks = [
            d.sample.model_chunk if trajectory.policy_version >= 0 else policy.encode(d.sample.actions)
            for d in trajectory.decisions
        ]
        return policy.score(policy.batch([d.observation for d in trajectory.decisions], chunks))

    def recorded(trajectory: Trajectory) -> torch.Tensor:
        return torch.from_numpy(np.stack([d.sample.logps for d in trajectory.decisions]))

    losses, proximal, anchors, held, margins = [], [], [], [], []
    for pair, (_, side) in zip(pairs, sides, strict=True):
        chosen = score(pair.chosen)
        anchors.append(-chosen)
        rejected = (score(pair.rejected) - recorded(pair.rejected))[some].sum(-1)
        held.append(rejected < -0.02 * TOKENS)
        bounded = rejected.clamp(min=-0.02 * TOKENS)
        margin = (chosen - recorded(pair.chosen)).sum() - (side.weights * bounded).sum()
        margins.append(0.05 * margin.item())
        losses.append(-torch.nn.functional.logsigmoid(0.05 * margin))
        sums = torch.stack([(chosen - recorded(pair.chosen)).sum(), (side.weights * rejected).sum()])
        both_ways = torch.nn.functional.logsigmoid(torch.stack([0.05 * sums, -0.05 * sums]))
        proximal.append(-both_ways.sum() / 2)
    whole = (
        torch.stack(losses).mean()
        + 0.3 * torch.stack(proximal).mean()
        + 0.2 * torch.cat(anchors).mean()
        - 0.2 * score(successes[0]).mean()
        - 0.1 * score(demos[0])[:3].mean()
    )
    whole.backward()
    share = torch.cat(held).float().mean().item()
    assert 0 < share < 1
    assert metrics["held"] == pytest.approx(share)
    assert metrics["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert metrics["margin_std"] == pytest.approx(np.std(margins, ddof=1), abs=1e-4)
    assert metrics["loss"] == pytest.approx(whole.item(), abs=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert "margin_std" not in accumulate_gradients(replace(draw, pairs=sides[:1]), pool, part)


@pytest.mark.parametrize(("patch", "merge", "again"), [(8, 2, []), (2, 1, [2])])
def test_a_context_is_kept_unless_its_images_take_less(patch: int, merge: int, again: list[int]) -> None:
    vision = VisionPart(width=16, layers=1, heads=2, patch=patch, merge=merge)
    part = PART.model_copy(update={"vision": vision})
    policy = make_policy(part, image_size=SIZE, seed=0, device=torch.device("cpu"))
    one = episode(policy, seed=0, outcome="success")
    encoded: list[int] = []
    encode = policy.encode_context

    def counted(batch: DecisionBatch) -> torch.Tensor:
        encoded.append(len(batch))
        return encode(batch)

    policy.encode_context = counted  # type: ignore[method-assign]
    pool = DecisionPool(policy, start_reference=False, micro_batch=4)
    pool.hold([one], update=0)
    pool.hold([one], update=1)
    assert encoded == [4, 2]
    encoded.clear()
    some = [4, 1]
    decisions = [one.decisions[i] for i in some]
    batch = policy.batch([d.observation for d in decisions], [d.sample.model_chunk for d in decisions])
    torch.testing.assert_close(pool.score(pool.rows(one)[some]), policy.score(batch), rtol=0, atol=1e-5)
    assert encoded == again
    features = torch.cat([encode(batch).mean(dim=1), batch.proprio_BP], dim=1)
    torch.testing.assert_close(pool.features(one)[some], features, rtol=0, atol=1e-5)
    entry = pool._entries[one.trajectory_id]
    kept = [entry.batch.agentview_BHWC, entry.batch.wrist_BHWC]
    if entry.context is not None:
        kept.append(entry.context)
    images = 6 * 2 * SIZE * SIZE * 3
    assert 0 < sum(tensor.untyped_storage().nbytes() for tensor in kept) <= images


def test_a_step_refers_to_what_its_terms_look_at() -> None:
    policy = new_policy()
    (pair,) = pairs_of(policy, 1)
    adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
    pool = DecisionPool(policy, start_reference=True, micro_batch=64)
    pool.hold([pair.chosen, pair.rejected], update=0)
    chosen, rejected = pool.rows(pair.chosen), pool.rows(pair.rejected)
    sides = [Side(rows=rows, weights=torch.ones(len(rows))) for rows in (chosen, rejected)]
    draw = Draw(pairs=[(sides[0], sides[1])], successes=chosen[:0], demos=chosen[:0])
    anchored = PreferencePart(preference_weight=0, proximal_weight=0, anchor_weight=1)
    assert refer(draw, pool, anchored)
    assert "anchor_nll" in accumulate_gradients(draw, pool, anchored)
    with pytest.raises(RuntimeError, match="call refer first"):
        pool.reference(rejected)
    assert refer(draw, pool, PreferencePart())
    assert pool.reference(rejected).shape == (6, TOKENS)


def test_what_is_recorded_or_computed_is_not_computed_again() -> None:
    policy = new_policy()
    one, demo = episode(policy, seed=0, outcome="success"), demonstration(seed=1)
    adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
    scored: list[int] = []
    score = policy.score

    def counted(batch: DecisionBatch, *args: torch.Tensor, **noise: torch.Tensor) -> torch.Tensor:
        scored.append(len(batch))
        return score(batch, *args, **noise)

    policy.score = counted  # type: ignore[method-assign]
    pool = DecisionPool(policy, start_reference=False, micro_batch=64)
    pool.hold([one, demo], update=0)
    recorded, unknown = pool.rows(one), pool.rows(demo)
    both = torch.cat([recorded, unknown])
    assert pool.refer(unknown[:2], torch.zeros_like(unknown[:2]))
    assert pool.refer(both, torch.zeros_like(both))
    assert pool.refer(both, torch.zeros_like(both))
    assert scored == [2, 4]
    expected = torch.from_numpy(np.stack([d.sample.logps for d in one.decisions]))
    assert torch.equal(pool.reference(recorded), expected)
    with adapters.disabled(policy.module):
        torch.testing.assert_close(pool.reference(unknown), pool.score(unknown), rtol=0, atol=1e-5)


def test_the_reference_gets_no_gradient() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 2)
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    part = PreferencePart(steps=3, reference="start")
    new_learner(policy, part).update(pairs, (), ())
    after = policy.module.state_dict()
    for name, tensor in before.items():
        layer, _, kind = name.rpartition(".")
        kept = after[name] if name in after else after[f"{layer}.base_layer.{kind}"]
        assert torch.equal(kept, tensor), name
    assert all(p.grad is None for name, p in policy.module.named_parameters() if "lora_" not in name)


def test_the_proximal_term_holds_both_sides_nearer_to_the_reference() -> None:
    final = {}
    for weight in (0.0, 2.0):
        policy = new_policy()
        pairs = pairs_of(policy, 2)
        part = PreferencePart(
            steps=40, lr=2e-3, preference_weight=1, proximal_weight=weight, rejected_floor=50, anchor_weight=0
        )
        report = new_learner(policy, part, drop=50).update(pairs, (), ())
        assert ("proximal_loss" in report.metrics) == (weight > 0)
        if weight:
            assert report.history[0]["proximal_loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
        final[weight] = report.metrics
    distance = {w: abs(f["chosen_reward"]) + abs(f["rejected_reward"]) for w, f in final.items()}
    assert distance[2.0] < 0.5 * distance[0.0]
    assert final[2.0]["margin"] > 0.1


def test_the_proximal_term_alone_pulls_a_policy_back() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 2)
    away = PreferencePart(steps=30, lr=2e-3, preference_weight=1, rejected_floor=50, anchor_weight=0)
    learner = new_learner(policy, away, drop=50)
    learner.update(pairs, (), ())
    back = PreferencePart(
        steps=30, lr=2e-3, beta=1, preference_weight=0, proximal_weight=1, anchor_weight=0, success_weight=0
    )
    policy_2 = new_policy()
    learner_2 = new_learner(policy_2, back, drop=50)
    learner_2.restore(learner.adapter())
    history = learner_2.update(pairs, (), ()).history
    assert history[-1]["proximal_loss"] < 0.5 * history[0]["proximal_loss"]
    assert history[0]["loss"] == pytest.approx(history[0]["proximal_loss"])
    assert "preference_loss" not in history[0]


def test_the_floor_keeps_rejected_chunks_from_dragging_the_chosen_down() -> None:
    """Without it this problem shows likelihood displacement: a growing margin, and the chosen log-prob falling."""
    final = {}
    for floor in (0.05, 50.0):
        policy = new_policy()
        pairs = pairs_of(policy, 2)
        part = PreferencePart(
            steps=60,
            lr=2e-3,
            credit="uniform",
            rejected_floor=floor,
            decisions_per_trajectory=12,
            anchor_weight=0,
        )
        final[floor] = new_learner(policy, part, drop=50).update(pairs, (), ()).metrics
    assert final[50.0]["margin"] > final[0.05]["margin"] > 1
    assert final[50.0]["held"] == 0
    assert final[50.0]["chosen_logratio"] < -0.05
    assert final[0.05]["held"] > 0.9
    assert final[0.05]["chosen_logratio"] > 0.05


@pytest.mark.parametrize(("lr", "beta", "reason"), [(0.1, 20.0, "fell"), (1e30, 0.1, "not finite")])
def test_a_destructive_update_trips_and_is_undone_to_the_bit(lr: float, beta: float, reason: str) -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 3)
    learner = new_learner(policy, PreferencePart(steps=4, lr=1e-3))
    assert learner.update(pairs, (), ()).stopped == ""
    kept = learner.state()
    seen = observations(2, 9)
    batch = policy.batch(seen, [d.sample.model_chunk for d in pairs[0].chosen.decisions[:2]])
    scores = policy.score(batch).detach()

    reckless = PreferencePart(steps=100, lr=lr, beta=beta, anchor_weight=0, grad_clip=1e9)
    policy_2 = new_policy()
    learner_2 = new_learner(policy_2, reckless)
    learner_2.load_state(kept)
    report = learner_2.update(pairs, (), ())
    assert report.stopped == "tripped"
    assert reason in report.reason
    assert 1 <= report.steps < 100
    assert report.value < -0.5 or not math.isfinite(report.value)
    assert same(learner_2.state(), kept)
    assert torch.equal(policy_2.score(batch).detach(), scores)


def test_a_reference_that_is_not_finite_trips() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 2)
    learner = new_learner(policy, PreferencePart(steps=3, reference="start"))
    kept = learner.state()
    with torch.no_grad():
        policy.module.get_parameter("language_model.lm_head.weight")[-1, 0] = torch.nan
    report = learner.update(pairs, (), ())
    assert (report.stopped, report.steps) == ("tripped", 0)
    assert report.reason == "reference log-prob is not finite"
    assert same(learner.state(), kept)


def test_the_last_step_is_judged_too() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 2)
    learner = new_learner(policy, PreferencePart(steps=1, lr=30.0, anchor_weight=0))
    kept = learner.state()
    report = learner.update(pairs, (), ())
    assert report.stopped == "tripped"
    assert report.steps == 1
    assert same(learner.state(), kept)


def test_tripwire_judges_the_running_mean_and_what_is_not_finite() -> None:
    tripwire = Tripwire(0.5, window=3)
    for logratio in (-0.9, -0.8, 0.4):  # two steps say little; the mean of three is -0.43
        assert tripwire.check(logratio, loss=1.0) is None
    assert tripwire.check(-1.0, loss=1.0) is None
    trip = tripwire.check(-1.0, loss=1.0)
    assert trip is not None
    assert trip.value == pytest.approx(-1.6 / 3)
    infinite = Tripwire(0.5, window=3).check(0.0, loss=1.0, grad_norm=math.inf)
    assert infinite is not None
    assert infinite.reason == "grad_norm is not finite"


def test_the_tripwire_watches_the_lower_of_the_likelihoods_there_are() -> None:
    assert lowest_logratio({"chosen_logratio": -0.2, "success_logratio": 0.1}) == -0.2
    assert lowest_logratio({"success_logratio": 0.1, "rejected_logratio": -3.0}) == 0.1
    assert lowest_logratio({"demo_nll": 2.0}) == 0.0
    for one, other in ((0.1, math.nan), (math.nan, 0.1)):
        assert math.isnan(lowest_logratio({"chosen_logratio": one, "success_logratio": other}))


def test_success_only_training_needs_no_pairs() -> None:
    policy = new_policy()
    successes = [episode(policy, seed=i, outcome="success") for i in range(3)]
    part = PreferencePart(steps=40, lr=5e-3, preference_weight=0, batch_size=12, demo_weight=0)
    report = new_learner(policy, part).update((), successes, [demonstration(5)])
    assert report.stopped == ""
    assert report.metrics["success_nll"] < 0.9 * report.history[0]["success_nll"]
    assert report.metrics["success_logratio"] > 0.1
    assert "preference_loss" not in report.metrics
    assert "demo_nll" not in report.metrics


def test_nothing_to_learn_from_changes_nothing_and_says_so() -> None:
    policy = new_policy()
    learner = new_learner(policy, PreferencePart(steps=5))
    kept = learner.state()
    report = learner.update((), (), [demonstration(5)])
    assert report.stopped == "skipped"
    assert report.steps == 0
    assert "no pairs and no successes" in report.reason
    assert same(learner.state(), kept, but=())


def test_demonstrations_alone_are_learned_from_where_they_alone_have_a_weight() -> None:
    weights = ("preference_weight", "proximal_weight", "anchor_weight", "success_weight")
    nothing: dict[str, Any] = {**dict.fromkeys(weights, 0), "demo_weight": 1, "steps": 3, "lr": 5e-3}
    report = new_learner(new_policy(), PreferencePart(**nothing)).update((), (), [demonstration(5)])
    assert report.stopped == ""
    assert report.history[-1]["demo_nll"] < report.history[0]["demo_nll"]
    for weight in weights:
        learner = new_learner(new_policy(), PreferencePart(**{**nothing, weight: 1}))
        assert learner.update((), (), [demonstration(5)]).stopped == "skipped", weight


def test_a_learner_continues_exactly_from_its_state() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 3)
    part = PreferencePart(steps=3, lr=1e-3)
    learner = new_learner(policy, part)
    learner.update(pairs, (), ())
    saved = learner.state()
    learner.update(pairs, (), ())
    again = new_learner(new_policy(), part)
    again.load_state(saved)
    again.update(pairs, (), ())
    assert same(again.state(), learner.state(), but=())
    assert not same(again.state(), saved)


def test_restoring_takes_up_an_earlier_adapter() -> None:
    policy = new_policy()
    pairs = pairs_of(policy, 3)
    batch = policy.batch(observations(2, 9), [d.sample.model_chunk for d in pairs[0].chosen.decisions[:2]])
    start = policy.score(batch).detach()
    learner = new_learner(policy, PreferencePart(steps=3, lr=5e-3))
    learner.update(pairs, (), ())
    good = learner.adapter()
    good_scores = policy.score(batch).detach()
    learner.update(pairs, (), ())
    assert not torch.equal(policy.score(batch), good_scores)
    learner.restore(good)
    assert torch.equal(policy.score(batch), good_scores)
    assert not any(name.startswith("optimizer") for name in learner.state())
    learner.restore(None)
    torch.testing.assert_close(policy.score(batch), start, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="for base other"):
        learner.restore(replace(good, base_hash="other"))


def test_damaged_recorded_log_probs_are_refused() -> None:
    policy = new_policy()
    pair = pairs_of(policy, 1)[0]
    pair.chosen.decisions[2].sample.logps[3] = np.nan
    with pytest.raises(ValueError, match=pair.chosen.trajectory_id):
        new_learner(policy, PreferencePart(steps=1)).update([pair], (), ())
