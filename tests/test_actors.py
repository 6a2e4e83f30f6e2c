"""The parts of the actor room that need no simulator; where they need a cluster, it is a real one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import typer
from ray.exceptions import RayActorError

from actors.canary import judge
from actors.cells import canary_cells, training_cells
from actors.crew import Crew
from actors.demonstrations import DemonstrationError, demonstrate
from actors.fleet import Fleet
from actors.learning import GONE, Origin, Update, Version, begin, call_learner, end_update
from actors.monitor import MonitorActor
from actors.parameter_server import (
    ParameterServer,
    ParameterServerError,
    assign_shards,
    find_shards,
    pull_snapshot,
)
from actors.placement import (
    PlacementError,
    check_fits,
    check_packs,
    connect,
    learner_ask,
    rollout_ask,
    serving_ask,
    wait_until_placed,
)
from actors.policy import PolicyActor
from actors.rollout import decision_seed
from actors.run_folder import RunFolder
from actors.stages import serving_stats
from configs.loader import load_recipe
from configs.policy import PolicyPart
from configs.preference import GuardPart
from configs.schema import LearnerPart, RolloutPart, ServingPart
from configs.world import TaskPart
from launch import one_line_errors
from learners.checkpoint import save_checkpoint
from learners.report import UpdateReport
from policies.make import make_policy
from policies.weights.adapter_files import adapter_tensors
from policies.weights.snapshots import state_tensors
from trajectories.codec import episode_record
from trajectories.hashing import weights_hash
from trajectories.journal import read_journal
from trajectories.records import AdapterWeights, Cell, Observation, Trajectory

TINY = Path(__file__).parent / "recipes" / "one_task.yaml"


def cell(state: int, seed: int = 0, task: int = 0) -> Cell:
    return Cell(suite="libero_object", task_id=task, init_state=state, seed=seed)


def test_shards_hold_every_tensor_once_and_weigh_the_same() -> None:
    sizes = {"a": 50, "b": 30, "c": 20, "d": 20, "e": 0}
    shards = assign_shards(sizes, 2)
    assert sorted(name for shard in shards for name in shard) == ["a", "b", "c", "d", "e"]
    assert [sum(sizes[n] for n in shard) for shard in shards] == [70, 50]
    assert assign_shards({"a": 1}, 3) == [["a"], [], []]


def test_training_cells_walk_through_the_states_and_never_repeat_a_seed() -> None:
    tasks = TaskPart(
        suite="libero_object",
        task_ids=(0, 8),
        demo_init_states=(0,),
        train_init_states=(0, 1, 2),
        held_out_init_states=(40,),
    )
    part = RolloutPart(init_states_per_round=2, samples_per_state=2)
    first, second = training_cells(tasks, part, 0), training_cells(tasks, part, 1)
    assert len(first) == 2 * 2 * 2
    assert {c.init_state for c in first} == {0, 1}
    assert {c.init_state for c in second} == {2, 0}
    assert not set(first) & set(second)
    assert [c.task_id for c in first[:4]] == [0, 8, 0, 8]


def test_decision_seeds_depend_on_the_cell_and_the_index_alone() -> None:
    assert decision_seed(cell(3), 5) == decision_seed(cell(3), 5)
    assert len({decision_seed(cell(s), i) for s in range(5) for i in range(5)}) == 25


def test_canary_takes_whole_initial_states_from_every_task() -> None:
    driven = [cell(s, seed, task) for task in (0, 1) for s in range(5) for seed in range(4)]
    chosen = canary_cells(driven, GuardPart(canary_episodes=16))
    assert len(chosen) == 16
    assert {(c.task_id, c.init_state) for c in chosen} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert canary_cells(driven, GuardPart(canary_episodes=0)) == []


@pytest.mark.parametrize(
    ("after", "promoted", "p_worse"),
    [
        ([True] * 8 + [False] * 8, True, 1.0),  # nothing changed
        ([False] * 16, False, 1 / 256),  # eight cells lost, none gained: (1/2)^8
        ([False] * 4 + [True] * 4 + [False] * 8, True, 1 / 16),  # four lost: not yet significant
        ([True] * 16, True, 1.0),  # all gained
    ],
)
def test_canary_verdict(after: list[bool], promoted: bool, p_worse: float) -> None:
    cells = [cell(i) for i in range(16)]
    before = dict(zip(cells, [True] * 8 + [False] * 8, strict=True))
    verdict = judge(before, dict(zip(cells, after, strict=True)), GuardPart())
    assert verdict.promoted is promoted
    assert verdict.p_worse == pytest.approx(p_worse)
    assert verdict.before == 8


def test_a_candidate_that_finishes_nothing_is_not_promoted() -> None:
    assert not judge({cell(0): False}, {}, GuardPart()).promoted
    assert judge({}, {}, GuardPart(canary_episodes=0)).promoted


@pytest.fixture(scope="module")
def cluster() -> None:
    connect()


@pytest.mark.ray
def test_more_gpus_than_exist_is_one_clear_line(cluster: None) -> None:
    with pytest.raises(PlacementError, match=r"asks for 4 GPUs and the cluster has 0; lower serving"):
        check_fits(rollouts=RolloutPart(), serving=ServingPart(gpus_per_actor=4), learner=LearnerPart())


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}], None),
        ([{"CPU": 3.0}, {"CPU": 3.0}], "no node has room for a learner of 4 CPUs and 0 GPUs beside"),
        (
            [{"CPU": 4.0}, {"CPU": 1.0}, {"CPU": 1.0}],
            "for a policy actor of 2 CPUs and 0 GPUs beside the rest",
        ),
    ],
)
def test_every_actor_needs_a_node_with_room(nodes: list[dict[str, float]], said: str | None) -> None:
    """Every cluster here has six CPUs in total, which is what is asked for."""
    asks = [serving_ask(ServingPart(cpus_per_actor=2)), learner_ask(LearnerPart(cpus=4))]
    if said is None:
        check_packs(asks, nodes)
    else:
        with pytest.raises(PlacementError, match=f"{said}.*; the nodes have .*; lower .*, or use larger"):
            check_packs(asks, nodes)


def test_shares_of_a_node_add_up() -> None:
    check_packs([rollout_ask(RolloutPart(actors=10, cpus_per_actor=0.1))], [{"CPU": 1.0}])


@pytest.mark.ray
def test_actors_that_find_no_place_are_not_waited_for_for_ever(cluster: None) -> None:
    worker = MonitorActor.options(num_cpus=1000).remote()
    ask = rollout_ask(RolloutPart(cpus_per_actor=1000))
    with pytest.raises(
        PlacementError, match=r"1 of 1 rollout actors did not start in 2 s; each asks for 1000 CPUs"
    ):
        wait_until_placed([worker], ask, deadline_s=2.0)
    ray.kill(worker)


@pytest.mark.ray
def test_shards_merge_from_the_pristine_base_and_agree_on_the_hash(cluster: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {"layer.weight": rng.normal(size=(6, 4)).astype(np.float32), "bias": np.ones(5, np.float32)}
    save_checkpoint(tmp_path, "start", base, {})
    server = ParameterServer(start_checkpoint=str(tmp_path / "start"), saved=str(tmp_path), num_shards=2)
    version, content_hash = server.publish(None)
    assert (version, content_hash) == (0, weights_hash(base))
    factors = {
        "layer": {"A": np.ones((2, 4), np.float32), "B": np.full((6, 2), 0.5, np.float32)},
    }
    adapter = AdapterWeights(method="lora", scaling=2.0, base_hash=content_hash, factors=factors)
    for expected in (1, 2):
        version, content_hash = server.publish(adapter, keep=[0])
        snapshot = pull_snapshot(server.shards, version)
        assert version == expected
        # s B A = 2 * (0.5 + 0.5): the second merge starts from the base again, not from the first
        np.testing.assert_allclose(snapshot.tensors["layer.weight"], base["layer.weight"] + 2.0, rtol=1e-6)
        assert snapshot.content_hash == content_hash == weights_hash(snapshot.tensors)
        assert 0 < server.drift(version) < 1e-6
    assert server.drift(0) == 0
    np.testing.assert_array_equal(pull_snapshot(server.shards, 0).tensors["bias"], base["bias"])
    with pytest.raises(KeyError, match="version 1 is not held"):
        pull_snapshot(server.shards, 1)


@pytest.mark.ray
def test_an_adapter_that_does_not_merge_settles_its_round_and_the_good_version_stays(
    cluster: None, tmp_path: Path
) -> None:
    """One factor is damaged, so one of two shards could merge its share: neither keeps it."""
    recipe = load_recipe(TINY, [f"root={tmp_path}", "name=refused", "learner.threads=1"])
    policy = make_policy(
        recipe.policy, image_size=recipe.environment.image_size, seed=0, device=torch.device("cpu")
    )
    start = tmp_path / "start"
    save_checkpoint(tmp_path, start.name, state_tensors(policy.module), {})
    folder, crew = RunFolder.create(recipe), Crew()
    crew.server = ParameterServer(start_checkpoint=str(start), saved=str(tmp_path), num_shards=2)
    _, start_hash = crew.server.publish(None)
    crew.start_learner(recipe)
    ray.get(crew.learner.load_start.remote(str(start), []))
    ray.get(crew.learner.attach.remote(start_hash))
    adapter = ray.get(crew.learner.adapter.remote())
    layer = next(iter(adapter.factors))
    for value in (1e-3, 1e38):  # what the learner is left with, and what it is said to have learned
        factors = {**adapter.factors[layer], "B": np.full_like(adapter.factors[layer]["B"], value)}
        learned = replace(adapter, factors={**adapter.factors, layer: factors})
        if value < 1:
            ray.get(crew.learner.restore.remote(learned))
    report = UpdateReport(stopped="", reason="", steps=3, value=0.0, metrics={}, history=())
    update = Update(round_index=0, result=ray.put((report, learned)))
    origin = Origin(checkpoint=start, demonstrations=(), content_hash=start_hash)
    good = Version(version=0, content_hash=start_hash, adapter=None)
    try:
        assert end_update(crew, folder, origin, update, good=good, steps=3) is None
        fate = folder.fate(0)
        assert fate is not None
        assert (fate["event"], fate["version"]) == ("refused", 0)
        assert f"{layer}.weight" in fate["reason"]
        back = ray.get(crew.learner.adapter.remote()).factors[layer]["B"]
        np.testing.assert_array_equal(back, adapter.factors[layer]["B"])
        for shard in crew.server.shards:
            with pytest.raises(KeyError, match="version 1 is not held"):
                ray.get(shard.pull.remote(1))
        assert pull_snapshot(crew.server.shards, 0).content_hash == start_hash
        assert crew.server.publish(None, keep=[0])[0] == 1  # the number of the one that was refused
    finally:
        crew.dismiss()
        folder.release()


@pytest.mark.ray
def test_a_shard_that_dies_serves_the_same_weights_again_and_one_that_is_gone_ends_the_run(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"layer.weight": np.eye(3, dtype=np.float32), "bias": np.ones(3, np.float32)}
    save_checkpoint(tmp_path, "start", base, {})
    server = ParameterServer(start_checkpoint=str(tmp_path / "start"), saved=str(tmp_path), num_shards=2)
    hashes = [server.publish(None)[1]]
    adapter = AdapterWeights(
        method="lora",
        scaling=1.0,
        base_hash=hashes[0],
        factors={"layer": {"A": np.ones((1, 3), np.float32), "B": np.ones((3, 1), np.float32)}},
    )
    hashes.append(server.publish(adapter, keep=[0])[1])
    save_checkpoint(tmp_path, "v0001", *adapter_tensors(adapter))
    for shard in server.shards:
        ray.kill(shard, no_restart=False)
    found = find_shards(server.names)
    assert [pull_snapshot(found, version).content_hash for version in (0, 1)] == hashes
    assert server.drift(1) < 1e-6
    assert server.publish(adapter, keep=[1]) == (2, hashes[1])
    ray.kill(server.shards[1])
    while server.names[1] in ray.util.list_named_actors():
        time.sleep(0.1)
    with pytest.raises(ParameterServerError, match=r"raise learner\.parameter_shards"):
        pull_snapshot(found, 2)
    with pytest.raises(ParameterServerError, match=r"raise learner\.parameter_shards"):
        server.publish(adapter)

    @ray.remote(num_cpus=0.1)
    def pull(names: list[str]) -> None:
        pull_snapshot(find_shards(names), 2)

    with pytest.raises(typer.Exit), one_line_errors():
        ray.get(pull.remote(server.names))
    assert capsys.readouterr().err.startswith("pairloom: a parameter-server shard died more than 3 times")


@pytest.mark.ray
def test_a_learner_that_died_while_it_was_idle_is_taken_up_again(cluster: None, tmp_path: Path) -> None:
    """Ray puts a blank one in its place and says nothing; a blank one must learn nothing."""
    recipe = load_recipe(TINY, [f"root={tmp_path}", "name=idle", "learner.threads=1"])
    policy = make_policy(
        recipe.policy, image_size=recipe.environment.image_size, seed=0, device=torch.device("cpu")
    )
    tensors = state_tensors(policy.module)
    save_checkpoint(tmp_path, "start", tensors, {})
    folder, crew = RunFolder.create(recipe), Crew()
    crew.start_learner(recipe)
    origin = Origin(checkpoint=tmp_path / "start", demonstrations=(), content_hash=weights_hash(tensors))
    good = Version(version=0, content_hash=origin.content_hash, adapter=None)
    try:
        begin(crew, folder, origin, good, trained=True)  # it died after it had trained the start
        assert ray.get(crew.learner.adapter.remote()).base_hash == origin.content_hash
        ray.kill(crew.learner, no_restart=False)
        until_gone(crew.learner)
        call_learner(crew, folder, origin, good, "restore", None)
        assert ray.get(crew.learner.adapter.remote()).base_hash == origin.content_hash
        restarts = [e for e in read_journal(folder.path / "events.jsonl") if e["event"] == "actor_restarted"]
        assert [e["kind"] for e in restarts] == ["learner"] * 2
    finally:
        crew.dismiss()
        folder.release()


def until_gone(learner: Any) -> None:
    """Wait until the process that was told to end has ended."""
    for _ in range(100):
        try:
            ray.get(learner.adapter.remote())
        except GONE:
            return
        time.sleep(0.1)
    raise TimeoutError("the learner lives on")


@pytest.mark.ray
def test_a_policy_actor_that_restarted_is_put_down_once(cluster: None, tmp_path: Path) -> None:
    crew, folder = Crew(), RunFolder(tmp_path)
    policy = PolicyActor.options(num_cpus=0.1, max_restarts=-1).remote(
        policy=PolicyPart(), serving=ServingPart(), image_size=64, shards=[]
    )
    crew.policies = [policy]
    try:
        assert serving_stats(crew, folder) == {}
        assert read_journal(tmp_path / "events.jsonl") == []
        ray.kill(policy, no_restart=False)
        serving_stats(crew, folder)
        serving_stats(crew, folder)
    finally:
        ray.kill(policy)
        crew.dismiss()
    (event,) = read_journal(tmp_path / "events.jsonl")
    assert (event["event"], event["kind"], event["actor"]) == ("actor_restarted", "policy", 0)


@pytest.mark.ray
def test_a_policy_actor_says_what_it_serves_before_it_answers_and_again_in_another_process(
    cluster: None, tmp_path: Path
) -> None:
    part = PolicyPart(bins=21)
    start = make_policy(part, image_size=64, seed=0, device=torch.device("cpu"))
    save_checkpoint(tmp_path, "start", state_tensors(start.module), {})
    server = ParameterServer(start_checkpoint=str(tmp_path / "start"), saved=str(tmp_path), num_shards=1)
    version, content_hash = server.publish(None)
    monitor = MonitorActor.options(name="monitor-of-serving", num_cpus=0).remote()
    actor = PolicyActor.options(num_cpus=0.1, max_restarts=-1).remote(
        policy=part, serving=ServingPart(), image_size=64, shards=server.names, monitor="monitor-of-serving"
    )
    blank = np.zeros((64, 64, 3), np.uint8)
    seen = Observation(agentview=blank, wrist=blank, proprio=np.zeros(8, np.float32), instruction="wait")
    answers = []
    for _ in range(2):
        answers += [ray.get(actor.act.remote(seen, seed=1, version=version, temperature=1.0))]
        (said,) = ray.get(monitor.pop_events.remote())  # it is there as soon as there is an answer
        assert (said["event"], said["version"], said["hash"]) == ("serving", version, content_hash)
        ray.kill(actor, no_restart=False)
        actor_is_back(actor)
    assert np.array_equal(answers[0][0].actions, answers[1][0].actions)
    for one in (actor, monitor, *server.shards):
        ray.kill(one)


def actor_is_back(actor: Any) -> None:
    """Wait until the process that was told to end has ended, and another is there."""
    for _ in range(100):
        try:
            if not ray.get(actor.serving.remote()):
                return
        except RayActorError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the actor lives on")


@ray.remote
class Demonstrator:
    """A rollout actor's shell whose expert meets a simulator fault once from state 1, and always in task 8."""

    def demonstration(
        self, cell: Cell, *, part: Any, chunk: int, depth: bool
    ) -> tuple[dict[str, Any], Trajectory]:
        failed = cell.task_id == 8 or (cell.init_state == 1 and cell.seed < 1000)
        trajectory = Trajectory(
            cell=cell,
            decisions=(),
            outcome="fault" if failed else "success",
            fault="diverged" if failed else "",
            env_steps=1,
            policy_version=-1,
            policy_hash="scripted-expert",
        )
        return episode_record(trajectory), trajectory


@pytest.mark.ray
def test_a_failed_demonstration_is_tried_again_from_its_own_state(cluster: None, tmp_path: Path) -> None:
    crew, folder = Crew(), RunFolder(tmp_path)
    actor = Demonstrator.options(num_cpus=0.1).remote()  # type: ignore[attr-defined]
    crew.fleet = Fleet([actor], slots=1, timeout_s=60.0, on_event=folder.event)
    changes = ["tasks.demo_init_states=[0,1,2]", "demonstrations.per_task=3"]
    recipe = load_recipe(TINY, changes)
    try:
        demos = demonstrate(crew, folder, recipe)
        assert [(d.cell.init_state, d.cell.seed) for d in demos] == [(0, 0), (1, 1001), (2, 2)]
        hopeless = load_recipe(TINY, [*changes, "tasks.task_ids=[0,8]"])
        with pytest.raises(
            DemonstrationError, match=r"failed 5 times over; .* of libero_object task: 8 \(3\); lower"
        ):
            demonstrate(crew, folder, hopeless)
    finally:
        ray.kill(actor)
        crew.dismiss()
