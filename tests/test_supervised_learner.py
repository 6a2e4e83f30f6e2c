"""The supervised learner on a small policy of the real classes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError

import actors.learner
from actors.learner import Learner
from actors.monitor import MonitorActor
from actors.placement import connect
from configs.preference import GuardPart, PreferencePart
from configs.supervised import CapabilityPart, SupervisedPart
from learners.checkpoint import load_checkpoint
from learners.decisions import stack
from learners.supervised import SupervisedLearner, schedule
from policies.protocol import Policy
from policies.weights import adapters
from tests.learning import ADAPTER, PART, SIZE, demonstration, new_policy
from trajectories.hashing import weights_hash


def test_supervised_training_reproduces_the_demonstrations() -> None:
    policy = new_policy()
    demo = demonstration(seed=4)
    part = SupervisedPart(steps=150, batch_size=6, lr=5e-3, warmup_steps=10, image_shift=0)
    learner = SupervisedLearner(policy, part, seed=0, demos=[demo])
    losses: list[float] = []
    last = learner.fit(on_step=lambda step, metrics: losses.append(metrics["loss"]))
    assert losses[0] > 1
    assert last["loss"] < 0.1
    samples = policy.act([d.observation for d in demo.decisions], seeds=[0] * 6, temperature=0)
    # Five bins over [-1, 1]: the nearest centre is at most a quarter of the way to the next ones off.
    for sample, decision in zip(samples, demo.decisions, strict=True):
        assert np.array_equal(sample.model_chunk, policy.encode(decision.sample.actions))
    with pytest.raises(RuntimeError, match="all 150 steps"):
        learner.step()


def test_supervised_training_repeats_to_the_bit() -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        policy = new_policy()
        part = SupervisedPart(steps=5, batch_size=4, warmup_steps=2)
        SupervisedLearner(policy, part, seed=seed, demos=[demonstration(1), demonstration(2)]).fit()
        return policy.module.state_dict()

    first, second, other = train(0), train(0), train(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_trained_alone_and_is_part_of_the_weights_in_the_end(method: str) -> None:
    def train(steps: int) -> tuple[Policy, list[float]]:
        policy, losses = new_policy(), []
        part = SupervisedPart(
            steps=steps, batch_size=6, lr=2e-2, warmup_steps=5, image_shift=0, trains="adapter"
        )
        with_method = ADAPTER.model_copy(update={"method": method})
        adapters.attach(policy.module, with_method, seed=0, decoders=policy.adapted)
        learner = SupervisedLearner(policy, part, seed=0, demos=[demonstration(4)])
        learner.fit(on_step=lambda step, metrics: losses.append(metrics["loss"]))
        with torch.no_grad():
            before = policy.score(stack(policy, demonstration(4)))
            adapters.merge_in(policy.module)
            torch.testing.assert_close(
                policy.score(stack(policy, demonstration(4))), before, rtol=0, atol=1e-3
            )
        return policy, losses

    policy, losses = train(60)
    assert losses[-1] < 0.5 * losses[0]
    start, left = new_policy().module.state_dict(), policy.module.state_dict()
    assert start.keys() == left.keys()
    changed = {name for name in start if not torch.equal(start[name], left[name])}
    assert changed == {
        name for name in start if ".layers." in name and "language" in name and "_proj" in name
    }
    again, _ = train(60)
    assert all(torch.equal(left[name], tensor) for name, tensor in again.module.state_dict().items())


def test_an_adapter_that_does_not_merge_is_what_a_person_is_told_of() -> None:
    policy = new_policy()
    adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
    with torch.no_grad():
        next(iter(adapters.parameters(policy.module).values()))[0, 0] = torch.inf
    with pytest.raises(
        FloatingPointError, match=r"start does not merge \(adapter factor A of .*; lower supervised.lr"
    ):
        actors.learner._merge_in(policy.module)


def test_supervised_training_without_demonstrations_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one demonstration"):
        SupervisedLearner(new_policy(), SupervisedPart(), seed=0, demos=[])


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    shares = [schedule(step, warmup=4, total=12) for step in (0, 3, 4, 8, 11)]
    assert shares == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0380602], abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"auxiliary": "future"}, {"trains": "adapter"}], ids=str)
def test_supervised_training_continues_to_the_bit_from_its_state(changes: dict[str, str]) -> None:
    part = SupervisedPart.model_validate({"steps": 7, "batch_size": 4, "warmup_steps": 2} | changes)

    def learner() -> tuple[Policy, SupervisedLearner]:
        policy = new_policy()
        if part.trains == "adapter":
            adapters.attach(policy.module, ADAPTER, seed=0, decoders=policy.adapted)
        demos = [demonstration(1), demonstration(2)]
        return policy, SupervisedLearner(policy, part, seed=0, demos=demos)

    whole, straight = learner()
    _, begun = learner()
    for _ in range(3):
        begun.step()
    saved = begun.state()
    begun.step()
    policy, other = learner()
    other.step()
    other.load_state(saved)
    assert other.steps_done == 3
    assert other.fit() == straight.fit()
    ours, theirs = policy.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(KeyError, match=r"weight\.0"):
        other.load_state({})


@ray.remote
class SavesAtOnce(Learner):
    """Leaves its state after every step."""

    def __init__(self, monitor: str) -> None:
        actors.learner.SAVE_EVERY_S = -1.0
        actors.learner.SAVING_SHARE = 1e9
        actors.learner.PROGRESS_EVERY = 1
        super().__init__(
            policy=PART,
            supervised=SupervisedPart(steps=8, batch_size=4, warmup_steps=2),
            capability=CapabilityPart(),
            adapter=ADAPTER,
            preference=PreferencePart(),
            guard=GuardPart(),
            image_size=SIZE,
            seed=0,
            threads=1,
            monitor=monitor,
        )

    def die_after(self, step: int) -> int:
        """Have the process killed where it would take another step than the first `step`; returns its pid."""
        plain = SupervisedLearner.step

        def stepped(learner: SupervisedLearner) -> dict[str, float]:
            if learner.steps_done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(learner)

        SupervisedLearner.step = stepped  # type: ignore[method-assign]
        return os.getpid()


@pytest.mark.ray
def test_a_learner_that_dies_in_the_supervised_start_goes_on_where_it_saved_last(tmp_path: Path) -> None:
    connect()
    demos = [demonstration(1), demonstration(2)]
    monitor = MonitorActor.options(name="monitor-supervised", num_cpus=0).remote()
    ended = {}
    for name in ("straight", "killed"):
        learner = SavesAtOnce.options(num_cpus=0, max_restarts=1).remote("monitor-supervised")  # type: ignore[attr-defined]
        run = tmp_path / name
        ray.get(monitor.pop.remote())
        if name == "killed":
            ray.get(learner.die_after.remote(5))
            with pytest.raises(RayActorError):
                ray.get(learner.supervise.remote(demos, folder=str(run / "checkpoints")))
            assert [path.name for path in (run / "supervised").iterdir()] == ["s00000005"]
            ray.get(learner.__ray_ready__.options(max_task_retries=-1).remote())
            ray.get(monitor.pop.remote())
        metrics = ray.get(learner.supervise.remote(demos, folder=str(run / "checkpoints")))
        taken = [line["step"] for line in ray.get(monitor.pop.remote())[1]]
        assert taken == list(range(6 if name == "killed" else 1, 9))
        assert not (run / "supervised").exists()
        ended[name] = metrics, weights_hash(load_checkpoint(run / "checkpoints" / "start")[0])
        ray.kill(learner)
    assert ended["killed"] == ended["straight"]
    ray.kill(monitor)


def test_a_state_that_finds_no_room_costs_the_training_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = SupervisedLearner(
        new_policy(), SupervisedPart(steps=3, batch_size=4), seed=0, demos=[demonstration(1)]
    )
    learner.step()
    held = sum(array.nbytes for name, array in learner.state().items() if name[0] in "wo")
    assert learner.state_bytes == pytest.approx(held, rel=0.01)
    (tmp_path / "file").write_text("")
    said = actors.learner._save(learner, tmp_path / "file" / "states")  # a folder that cannot be made
    assert "Not a directory" in said
    assert said.endswith("the supervised start begins again from what was saved before")
    assert actors.learner._save(learner, tmp_path / "room") == ""
    monkeypatch.setattr(SupervisedLearner, "state_bytes", 1 << 60)
    said = actors.learner._save(learner, tmp_path / "states")
    assert said.startswith("the state takes 1073741824.0 GiB, ")
    assert not (tmp_path / "states").exists()
    assert learner.fit()["loss"] > 0
