"""Time and memory of acting, scoring and one preference step at published size, on one CUDA device.

    python -m benchmarks.real_size [--models openvla,pi05,ddvla] [--adapters lora,lora-apart,dora] [--batches 1,8]
                                   [--micro-batch 8] [--output FILE]

Weights are random, which changes neither time nor memory; they are made on the device, so no checkpoint is needed.
Each model's device memory is freed before the next. Peak memory is torch's own count of what it had allocated. What
does not fit the device is reported as such, and the rest is measured all the same. `lora-apart` is LoRA kept apart from
a capability vector of the adapted layers, by the cosine penalty; `penalty_lora-apart` is what the penalty itself takes
of a step, without the noise of two steps.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from benchmarks.published_sizes import openvla_7b
from configs.policy import DiffusionPart, FlowPart
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart
from learners.preference import PreferenceLearner
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.modules import ModuleDecoder
from policies.diffusion import DiffusionPolicy
from policies.encoding.prompts import PromptTokenizer
from policies.flow import FlowPolicy
from policies.openvla.actions import ActionStatistics, OpenVLAActions
from policies.openvla.images import openvla_view
from policies.openvla.inputs import OpenVLAInputs
from policies.openvla.layout import OpenVLALayout
from policies.openvla.network import OpenVLA
from policies.pi0.inputs import PlainInputs
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import PI05, Pi0Config
from policies.protocol import Policy
from policies.weights import adapters
from trajectories.bfloat16 import BFLOAT16
from trajectories.records import Cell, Decision, Observation, Outcome, PreferencePair, Trajectory

Method = Literal["lora", "lora-apart", "dora"]
Measured = dict[str, float] | None
GIB = 1 << 30
PROMPT = "pick up the alphabet soup and place it in the basket"


class WordPrompts:
    """This project's own words, whose ids every published vocabulary has room for; only their number costs."""

    def __init__(self) -> None:
        self._words = PromptTokenizer()

    def stack(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._words.stack(instructions)


@torch.no_grad()
def draw_weights(network: torch.nn.Module) -> None:
    """Small normal weights, so that nothing overflows and no two logits are the same."""
    for parameter in network.parameters():
        parameter.normal_(std=0.02)


def openvla(layout: OpenVLALayout, device: torch.device, dtype: torch.dtype) -> Policy:
    """A token policy of the layout's size with random weights."""
    network = _openvla_network(layout, device, dtype)
    return AutoregressivePolicy(network, inputs=_openvla_inputs(layout, chunk=1), decoder=ModuleDecoder)


def ddvla(layout: OpenVLALayout, device: torch.device, dtype: torch.dtype) -> Policy:
    """A discrete-diffusion policy of the layout's size with random weights, unmasking eight actions at once."""
    network = _openvla_network(layout, device, dtype)
    return DiffusionPolicy(network, inputs=_openvla_inputs(layout, chunk=8), part=DiffusionPart())


def pi05(config: Pi0Config, device: torch.device, dtype: torch.dtype) -> Policy:
    """A flow policy of the configuration's size with random weights, deciding five actions at once."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = Pi0Network(config).eval()
    finally:
        torch.set_default_dtype(default)
    draw_weights(network)
    inputs = PlainInputs(
        PromptTokenizer(), image_size=config.vision.image, adaptive=True, state_in_prompt=True
    )
    return FlowPolicy(network, inputs=inputs, part=FlowPart(), chunk=5)


def _openvla_network(layout: OpenVLALayout, device: torch.device, dtype: torch.dtype) -> OpenVLA:
    network = layout.allocate(device=device, dtype=dtype)
    draw_weights(network)
    return network


def _openvla_inputs(layout: OpenVLALayout, *, chunk: int) -> OpenVLAInputs:
    unit = ActionStatistics(q01=-np.ones(7), q99=np.ones(7), mask=np.array([True] * 6 + [False]))
    size = layout.towers[0].img_size
    return OpenVLAInputs(
        prompts=WordPrompts(),
        actions=OpenVLAActions(layout.actions, unit),
        chunk=chunk,
        image_size=size,
        view=partial(openvla_view, size=size),
    )


def observations(count: int, size: int) -> list[Observation]:
    """Noise for images: what a picture shows does not change what it costs."""
    rng = np.random.default_rng(0)
    return [
        Observation(
            agentview=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=PROMPT,
        )
        for _ in range(count)
    ]


def measure(
    build: Callable[[], Policy],
    *,
    image_size: int,
    batches: Sequence[int],
    methods: Sequence[Method],
    micro_batch: int,
    repeats: int,
) -> dict[str, Any]:
    """Parameters, and milliseconds and peak bytes of `act` and `score` by batch and of a preference step by adapter
    method: `act_1`, `score_1`, `step_lora`, ... What the device has no memory for is None."""
    policy = build()
    timed = partial(_timed, device=next(policy.module.parameters()).device, repeats=repeats)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in policy.module.parameters())}
    for count in batches:
        found |= _passes(policy, observations(count, image_size), timed)
    pair = PreferencePair(
        chosen=_episode(policy, 0, "success", image_size),
        rejected=_episode(policy, 1, "timeout", image_size),
    )
    for turn, method in enumerate(methods):
        if turn:  # an adapter cannot be taken off again
            del policy
            _free()
            policy = build()
        learner = _learner(policy, method, micro_batch)
        found[f"step_{method}"] = timed(partial(learner.update, [pair], [pair.chosen], []))
        if learner.penalty is not None:
            found[f"penalty_{method}"] = timed(learner.penalty.add_gradients)
        del learner
    return found


def _passes(
    policy: Policy, seen: Sequence[Observation], timed: Callable[[Callable[[], object]], Measured]
) -> dict[str, Measured]:
    """`act` and `score` on one batch."""
    count = len(seen)
    act = partial(policy.act, seen, seeds=range(count), temperature=1.0)
    found = {f"act_{count}": timed(act)}
    batch = policy.batch(seen, [sample.model_chunk for sample in act()])
    with torch.no_grad():
        found[f"score_{count}"] = timed(partial(policy.score, batch, noise_keys=torch.arange(count)))
    return found


class Drawn(Mapping[str, np.ndarray]):
    """A vector of random bfloat16 numbers about 0.01, each tensor drawn when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        bits = np.random.default_rng(0).integers(0, 1 << 16, self._shapes[name], dtype=np.uint16)
        return ((bits & np.uint16(0x807F)) | np.uint16(0x3C00)).view(BFLOAT16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _learner(policy: Policy, method: Method, micro_batch: int) -> PreferenceLearner:
    vector = None
    if method == "lora-apart":
        vector = Drawn(
            {
                name: tuple(parameter.shape)
                for name, parameter in policy.module.named_parameters()
                if name.split(".")[-2] in adapters.LINEARS
            }
        )
    return PreferenceLearner(
        policy,
        adapter=AdapterPart(method="dora" if method == "dora" else "lora", rank=32, alpha=64),
        preference=PreferencePart(
            reference="start", credit="uniform", demo_weight=0, steps=1, micro_batch=micro_batch
        ),
        guard=GuardPart(chosen_drop=1e9),
        base_hash="",
        seed=0,
        capability=CapabilityPart(vector="drawn", penalty="cosine"),
        vector=vector,
    )


def _episode(policy: Policy, seed: int, outcome: Outcome, size: int) -> Trajectory:
    seen = observations(4, size)
    samples = policy.act(seen, seeds=range(4), temperature=1.0)
    return Trajectory(
        cell=Cell(suite="libero_object", task_id=0, init_state=0, seed=seed),
        decisions=tuple(
            Decision(observation=o, sample=s, executed=1) for o, s in zip(seen, samples, strict=True)
        ),
        outcome=outcome,
        env_steps=4,
        policy_version=0,
        policy_hash="random",
    )


def _timed(task: Callable[[], object], *, device: torch.device, repeats: int) -> Measured:
    """Median milliseconds after one round of warming up, and the most device memory in use (0 off CUDA); None where
    the device has not enough."""
    cuda = device.type == "cuda"
    durations = []
    try:
        task()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            started = time.perf_counter()
            task()
            if cuda:
                torch.cuda.synchronize(device)
            durations.append(time.perf_counter() - started)
    except torch.cuda.OutOfMemoryError:
        _free()
        return None
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    return {"ms": round(1000 * statistics.median(durations), 2), "peak_bytes": float(peak)}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def show(result: Mapping[str, Any], names: Sequence[str]) -> Table:
    """Milliseconds and GiB at the peak, one row a measurement."""
    table = Table("", *names, title=f"{result['device']}: ms, and GiB at the peak")
    for key in [key for key in result[names[0]] if key != "parameters"]:
        table.add_row(key, *(shown(result[name][key]) for name in names))
    return table


def shown(one: Measured) -> str:
    """One measurement in words."""
    return f"{one['ms']:.0f} ms, {one['peak_bytes'] / GIB:.1f} GiB" if one else "out of memory"


def main(
    models: Annotated[str, typer.Option(help="which, separated by commas")] = "openvla,pi05,ddvla",
    methods: Annotated[
        str, typer.Option("--adapters", help="adapter methods, separated by commas")
    ] = "lora,lora-apart,dora",
    batches: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8",
    micro_batch: Annotated[int, typer.Option(help="decisions in one pass of the step", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="timed runs of each", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print a table, and write JSON when asked, after each model. Without a CUDA device: one line, and exit
    code 2."""
    if not torch.cuda.is_available():
        typer.echo("pairloom: benchmarks.real_size needs a CUDA device, and torch finds none here", err=True)
        raise typer.Exit(2)
    device, dtype = torch.device("cuda"), torch.bfloat16
    build: dict[str, Callable[[], Policy]] = {
        "openvla": lambda: openvla(openvla_7b(), device, dtype),
        "pi05": lambda: pi05(PI05, device, dtype),
        "ddvla": lambda: ddvla(openvla_7b(), device, dtype),
    }
    names, chosen = models.split(","), methods.split(",")
    for given, known, what in ((names, build, "models"), (chosen, get_args(Method), "adapters")):
        if unknown := [one for one in given if one not in known]:
            typer.echo(f"pairloom: {what} are {', '.join(known)}; got {unknown[0]!r}", err=True)
            raise typer.Exit(2)
    result: dict[str, Any] = {
        "dtype": "bfloat16",
        "micro_batch": micro_batch,
        "device": torch.cuda.get_device_name(device),
        "fingerprint": software_fingerprint(),
    }
    for name in names:
        result[name] = measure(
            build[name],
            image_size=PI05.vision.image,
            batches=[int(size) for size in batches.split(",")],
            methods=cast(Sequence[Method], chosen),
            micro_batch=micro_batch,
            repeats=repeats,
        )
        _free()
        if output is not None:
            write_json(output, result)
    Console(width=160).print(show(result, names))


if __name__ == "__main__":
    typer.run(main)
