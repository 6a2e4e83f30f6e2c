"""What happened in a run, round by round, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dashboard.rates import rate_of
from dashboard.run_folder import Run
from dashboard.wording import counted, p_value, percent

REFUSED = {
    "rolled_back": "rolled back by the canary",
    "tripped": "stopped by the tripwire",
    "refused": "refused by the parameter server",
    "skipped": "skipped for want of data",
}
"""Events that keep the version in force, and how the summary puts them."""


def story(run: Run) -> list[str]:
    """The lines of the section: how many versions were promoted, the start, and a sentence or more for each round."""
    decided = Counter(str(event["event"]) for event in run.occurrences("promoted", *REFUSED))
    promoted = [event["version"] for event in run.occurrences("promoted")]
    refused = ", ".join(f"{decided[kind]} {words}" for kind, words in REFUSED.items() if decided[kind])
    lines = [
        "## What happened",
        "",
        f"{counted(len(promoted), 'new version')} promoted, {refused or 'none refused'}. "
        f"**The fleet ends on version {promoted[-1] if promoted else 0}.**",
        "",
    ]
    demos = sum(episode.success for episode in run.phase("demonstration"))
    if run.recipe.start is not None:
        lines.append(f"* Supervised start taken from `{run.recipe.start}`: version 0.")
    elif not run.recipe.supervised.steps:
        lines.append(f"* Published weights from `{run.recipe.policy.checkpoint}`: version 0.")
    elif demos:
        through = " through an adapter" if run.recipe.supervised.trains == "adapter" else ""
        lines.append(f"* Supervised start{through} on {counted(demos, 'scripted demonstration')}: version 0.")
    for index, numbers in sorted(run.rounds().items()):
        sentences = [_collected(run, index), _mined(numbers), _learned(run, numbers)]
        sentences += [_fate(run, event) for event in run.events if event.get("round") == index]
        lines.append(f"* **Round {index}.** {' '.join(sentence for sentence in sentences if sentence)}")
    return lines


def _collected(run: Run, index: int) -> str:
    rollouts = [episode for episode in run.phase("rollout") if episode.round == index]
    if not rollouts:
        return ""
    rate, faults = rate_of(rollouts), sum(episode.faulty for episode in rollouts)
    versions = ", ".join(str(version) for version in sorted({e.policy_version for e in rollouts}))
    successful = f", {percent(rate.value)} successful" if rate else ""
    more = f"; {faults} more ended in a fault" if faults else ""
    return f"{rate.episodes if rate else 0} rollouts of version {versions}{successful}{more}."


def _mined(numbers: Mapping[str, Any]) -> str:
    if "pairs" not in numbers:
        return ""
    alike = f"{numbers['states_all_success']} gave only successes and {numbers['states_all_failure']} only failures"
    groups = counted(numbers["states"], "group")
    return f"{counted(numbers['pairs'], 'pair')} from {groups} of rollouts, of which {alike}."


def _learned(run: Run, numbers: Mapping[str, Any]) -> str:
    """What the update did where the tripwire let it end; an update that did not end has an event that says so."""
    watched = [
        numbers[name] for name in ("chosen_logratio", "success_logratio") if numbers.get(name) is not None
    ]
    if numbers.get("stopped") != "" or not watched:
        return ""
    margin = numbers.get("margin")
    to = "" if margin is None else f" to a margin of {margin:.2f}"
    return (
        f"{counted(numbers['steps'], 'step')}{to}, the preferred side's log-ratio at {min(watched):+.3f} nats "
        f"per token (tripwire at {-run.recipe.guard.chosen_drop:g})."
    )


def _fate(run: Run, event: Mapping[str, Any]) -> str:
    """What an event decided about a new version, in a sentence; empty for events that decide nothing."""
    match event["event"]:
        case "promoted":
            return f"Version {event['version']} was **promoted**: {_trial(run, event)}."
        case "rolled_back":
            return f"Version {event['version']} was **rolled back** by the canary: {_trial(run, event)}."
        case "tripped":
            return (
                f"The update was **stopped by the tripwire**: {event['reason']}. The fleet kept its version."
            )
        case "refused":
            return f"What it learned was **refused**: {event['reason']}. The fleet kept its version."
        case "skipped":
            return f"No update: {event['reason']}."
    return ""


def _trial(run: Run, event: Mapping[str, Any]) -> str:
    if not event["cells"]:
        return "no canary cell was driven to its end under both versions"
    canary = [episode for episode in run.phase("canary") if episode.policy_version == event["version"]]
    faults = sum(episode.faulty for episode in canary)
    failures = f", {counted(faults, 'fault')} among the failures," if faults else ""
    return (
        f"{event['after']} successes on {event['cells']} canary cells{failures} against {event['before']} of the "
        f"version in force (one-sided McNemar test of being worse: p {p_value(event['p_worse'])})"
    )
