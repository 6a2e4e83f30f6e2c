"""Where a run's metrics go beside its folder: TensorBoard, Prometheus (through Ray) and Weights & Biases.

`dashboard.metric_names` names the series, `dashboard.samples` makes them from what the run records.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.metrics import Counter, Gauge
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from configs.loader import RecipeError
from configs.operation import TrackingPart
from configs.schema import Recipe
from dashboard.metric_names import METRICS, RUN
from dashboard.samples import Sample, Samples

log = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
"""Folder of the event files in a run's."""


class Sink(Protocol):
    """Takes samples somewhere. Whatever it raises switches it off."""

    name: str

    def record(self, samples: Sequence[Sample], *, at: float) -> None:
        """Take the samples of one moment, `at` seconds since the epoch."""

    def close(self) -> None:
        """Write what is held back."""


class TensorBoardSink:
    """Event files in a folder. They are written in the caller's thread, so that a full disk is an error here: the usual
    SummaryWriter would wait for ever for a thread that has died of it."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        """Begin an event file. Raises OSError when it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")

    def record(self, samples: Sequence[Sample], *, at: float) -> None:
        """Write the samples that belong on a curve. Raises OSError when the disk is full."""
        curves = [sample for sample in samples if sample.step is not None]
        for sample in curves:
            summary = scalar(sample.tag, sample.value)
            self._writer.write_event(Event(wall_time=at, step=sample.step, summary=summary))
        if curves:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class PrometheusSink:
    """Gauges and counters of `ray.util.metrics`, which every node's metrics agent exports as `ray_pairloom_...`."""

    name = "Prometheus"

    def __init__(self, run: str) -> None:
        """`run` labels every series. Raises RuntimeError when Ray is not connected."""
        if not ray.is_initialized():
            raise RuntimeError("Ray, which exports the metrics, is not connected")
        self._run = run
        self._made: dict[str, Gauge | Counter] = {}

    def record(self, samples: Sequence[Sample], *, at: float) -> None:
        """Set gauges and add to counters; a number that is not finite has no place there."""
        for sample in samples:
            labels = {RUN: self._run, **sample.labels}
            metric = self._metric(sample.metric.key)
            if isinstance(metric, Counter):
                if sample.increase > 0:
                    metric.inc(sample.increase, labels)
            elif math.isfinite(sample.value):
                metric.set(sample.value, labels)

    def close(self) -> None:
        """Nothing is held back."""

    def _metric(self, key: str) -> Gauge | Counter:
        if key not in self._made:
            metric = METRICS[key]
            make = Counter if metric.kind == "counter" else Gauge
            self._made[key] = make(metric.name, f"{metric.help}.", (RUN, *metric.labels))
        return self._made[key]


class WandbSink:
    """A run of a Weights & Biases project, its files under `<run>/wandb/`."""

    name = "Weights & Biases"

    def __init__(self, recipe: Recipe, project: str, folder: Path) -> None:
        """Begin the run. Raises what wandb raises, its CommError among them, when it cannot."""
        import wandb  # an extra

        self._run = wandb.init(
            project=project,
            name=recipe.name,
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30, finish_timeout=60),
        )
        for metric in METRICS.values():
            self._run.define_metric(f"{metric.tag.partition('/')[0]}/*", step_metric=metric.axis)

    def record(self, samples: Sequence[Sample], *, at: float) -> None:
        """Log the samples that belong on a curve, those of one axis and step together."""
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for sample in samples:
            if sample.step is not None:
                rows.setdefault((sample.metric.axis, sample.step), {})[sample.tag] = sample.value
        for (axis, step), values in rows.items():
            self._run.log({axis: step, **values})

    def close(self) -> None:
        self._run.finish()


def check_tracking(part: TrackingPart) -> None:
    """Raise RecipeError when Weights & Biases is asked for and cannot be logged to: it is not installed, or there is
    no API key and WANDB_MODE is not `offline`."""
    if part.wandb is None:
        return
    asked = f"tracking.wandb={part.wandb}"
    spec = find_spec("wandb")
    if (
        spec is None or spec.origin is None
    ):  # a folder ./wandb/, which wandb itself leaves behind, is no package
        raise RecipeError(
            f"{asked}, and wandb is not installed; pip install '.[wandb]', or unset tracking.wandb"
        )
    if os.environ.get("WANDB_MODE") == "offline":
        return
    import wandb  # an extra

    if not wandb.login(prompt=False, verify=False):
        raise RecipeError(
            f"{asked}, and there is no API key; set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
        )


class Trackers:
    """Sends what a run records to its sinks. A sink that raises is named in the log once and switched off; it never
    ends a run. May be called from several threads."""

    def __init__(self, sinks: Iterable[Sink], samples: Samples) -> None:
        self._sinks = list(sinks)
        self._samples = samples
        self._lock = threading.Lock()

    def metric(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._send(self._samples.metric, line)

    def episode(self, record: Mapping[str, Any]) -> None:
        """A line of episodes.jsonl."""
        self._send(self._samples.episode, record)

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of events.jsonl."""
        self._send(self._samples.event, event)

    def close(self) -> None:
        """Send what is on no curve yet, and close every sink."""
        self._send(lambda _: self._samples.rest(), {})
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # a tracker's failure is not the run's, whatever it is
                log.warning("%s was not closed: %s", sink.name, _said(error))
        self._sinks = []

    def _send(
        self, samples_of: Callable[[Mapping[str, Any]], Sequence[Sample]], line: Mapping[str, Any]
    ) -> None:
        with self._lock:
            if not self._sinks:
                return
            try:
                samples = samples_of(line)
            except Exception as error:  # a tracker's failure is not the run's, whatever it is
                self._sinks.clear()
                log.warning("metrics go to no tracker any more: %s", _said(error))
                return
            for sink in list(self._sinks) if samples else ():
                try:
                    sink.record(samples, at=line.get("time") or time.time())
                except Exception as error:  # a tracker's failure is not the run's, whatever it is
                    self._sinks.remove(sink)
                    log.warning("metrics go to %s no more: %s", sink.name, _said(error))


def start_trackers(
    recipe: Recipe,
    folder: Path,
    *,
    episodes: Iterable[Mapping[str, Any]] = (),
    events: Iterable[Mapping[str, Any]] = (),
) -> Trackers:
    """The sinks that a recipe asks for. One that cannot start is named in the log and left out.

    `episodes` and `events`: what the run has recorded before, when it is resumed.
    """
    part = recipe.tracking
    makers: list[tuple[str, Callable[[], Sink]]] = []
    if part.tensorboard:
        makers.append((TensorBoardSink.name, lambda: TensorBoardSink(folder / TENSORBOARD)))
    if part.prometheus:
        makers.append((PrometheusSink.name, lambda: PrometheusSink(recipe.name)))
    project = part.wandb
    if project is not None:
        makers.append((WandbSink.name, lambda: WandbSink(recipe, project, folder)))
    sinks: list[Sink] = []
    for name, make in makers:
        try:
            sinks.append(make())
        except Exception as error:  # a tracker's failure is not the run's, whatever it is
            log.warning("metrics do not go to %s: %s", name, _said(error))
    samples = Samples(steps_per_round=recipe.preference.steps)
    samples.replay(episodes, events)
    return Trackers(sinks, samples)


def _said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
