"""The report of a run: one markdown page that says what happened, with plots and videos. Reads the run folder only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dashboard.curves import plot_margins
from dashboard.plots import plot_pairs, plot_success
from dashboard.rates import Rate, flips, rate_of
from dashboard.run_folder import Run, read_run
from dashboard.story import story
from dashboard.vector import vector_section
from dashboard.videos import Contrast, find_contrasts, task_instructions, write_strip, write_video
from dashboard.wording import counted, duration, interval, number, p_value, percent, table_row

MAX_VIDEOS = 3
STAND_IN_WARNING = (
    "The simulator drew and simulated procedural stand-in assets, not LIBERO's own. Results on stand-ins are "
    "comparable with each other and **not comparable with published tables**."
)


def write_report(run_folder: Path) -> Path:
    """Writes `report.md`, `plots/*.png` and `videos/*` into the run folder, from the files the run left there.

    A run that did not finish gets a report of what there is.

    Returns:
        The path of `report.md`.

    Raises:
        FileNotFoundError: this is not a run folder.
        ValueError: one of its files is damaged; the message names it.
    """
    run = read_run(run_folder)
    plot_success(run, run_folder / "plots" / "success.png")
    plot_pairs(run, run_folder / "plots" / "pairs.png")
    plot_margins(run, run_folder / "plots" / "margins.png")
    contrasts = find_contrasts(run, MAX_VIDEOS)
    for contrast in contrasts:
        write_video(contrast, run_folder / "videos" / f"{contrast.name}.mp4")
        write_strip(contrast, run_folder / "videos" / f"{contrast.name}.png")
    sections = (
        _result(run),
        story(run),
        _success(run, task_instructions(run)),
        _learning(run),
        vector_section(run),
        _faults(run),
        _contrasts(contrasts),
        _speed(run),
        _stack(run),
    )
    report = run_folder / "report.md"
    report.write_text("\n\n".join("\n".join(section) for section in sections if section) + "\n")
    return report


def _result(run: Run) -> list[str]:
    tasks = run.recipe.tasks
    lines = [f"# Run `{run.recipe.name}`", ""]
    ids = ", ".join(str(task_id) for task_id in tasks.task_ids)
    where = f"{tasks.suite}, task{'s' if len(tasks.task_ids) > 1 else ''} {ids}"
    if not run.result:
        return [*lines, f"**This run did not finish:** it left no result. {where}; {_method(run)}."]
    result = run.result
    before, after, p = result["success_before"], result["success_after"], result["mcnemar_p"]
    lines += [
        f"**Held-out success {percent(before)} -> {percent(after)}** ({_verdict(run, before, after, p)})",
        "",
        f"{where}; {_method(run)}.",
        f"{_held_out(run)}.",
        f"95 % Wilson intervals: {interval(result['wilson_before'])} before, "
        f"{interval(result['wilson_after'])} after. Exact McNemar test on the paired cells: p {p_value(p)}.",
        f"{duration(result['wall_s'])} in all; {result['env_steps_per_s']:.0f} simulator steps per second.",
    ]
    if _stands_in(run):
        lines += ["", f"> {STAND_IN_WARNING}"]
    return lines


def _method(run: Run) -> str:
    """What learned and from what, in brief."""
    recipe = run.recipe
    adapter = f"{ {'lora': 'LoRA', 'dora': 'DoRA'}[recipe.adapter.method] } of rank {recipe.adapter.rank}"
    part = recipe.preference
    credit = {"value": "decisive chunks", "uniform": "whole trajectories"}[part.credit]
    beta = "a beta found in the first update" if part.beta is None else f"beta {part.beta:g}"
    dpo = f"{part.loss} DPO on {credit} with {beta}"
    loss = dpo if part.preference_weight else "no preference term"
    return f"{adapter}, {loss}, {recipe.schedule} schedule, training seed {recipe.seed}"


def _held_out(run: Run) -> str:
    """How many cells the result rests on, and how many of the manifest it leaves out."""
    tasks, paired = run.recipe.tasks, run.result["held_out_episodes"]
    manifest = (
        len(tasks.task_ids) * len(tasks.held_out_init_states) * len(run.recipe.evaluation.sampling_seeds)
    )
    text = f"{counted(paired, 'held-out episode')}, the same cells before and after"
    if paired == manifest:
        return text
    faulty = [episode.cell for episode in run.phase("evaluation") if episode.faulty]
    given_up = manifest - paired - len(set(faulty))
    reasons = [f"{counted(len(faulty), 'episode')} ended in a fault"] if faulty else []
    reasons += [f"{given_up} never ended"] if given_up else []
    return f"{text} ({manifest - paired} of {manifest} cells left out: {', '.join(reasons)})"


def _verdict(run: Run, before: float, after: float, p: float) -> str:
    if not run.occurrences("promoted"):
        return "no new version was promoted, so the start is still in force"
    if p >= 0.05:
        return "no significant difference on this many episodes"
    return "a significant improvement" if after > before else "significantly worse"


def _success(run: Run, instructions: Mapping[tuple[str, int], str]) -> list[str]:
    lines = ["## Success by task and version", "", "![Success by task and version](plots/success.png)", ""]
    versions, episodes = run.evaluated_versions(), run.paired_evaluation()
    if not versions:
        return [*lines, "No held-out episodes."]
    heads = [f"version {version}" for version in versions]
    compared = ["gained", "lost"] if len(versions) > 1 else []
    lines += [table_row("task", *heads, *compared), table_row(*["---"] * (1 + len(heads) + len(compared)))]
    groups = [
        (_task_name(task, instructions), [e for e in episodes if e.task == task]) for task in run.tasks()
    ]
    for name, group in [*groups, ("**all**", episodes)]:
        by_version = [[e for e in group if e.policy_version == version] for version in versions]
        change = flips(by_version[0], by_version[-1])
        cells = [_rate(rate_of(part)) for part in by_version]
        lines.append(table_row(name, *cells, *[str(change.gained), str(change.lost)][: len(compared)]))
    lines += ["", "Successes / episodes, rate and 95 % Wilson interval."]
    if compared:
        lines.append("Only cells that every version finished without a fault count.")
        between = f"version {versions[0]} to version {versions[-1]}"
        lines.append(f"Gained and lost: held-out cells whose outcome changed from {between}.")
    return lines


def _task_name(task: tuple[str, int], instructions: Mapping[tuple[str, int], str]) -> str:
    suite, task_id = task
    return f"{suite} {task_id}: {instructions[task]}" if task in instructions else f"{suite} {task_id}"


def _learning(run: Run) -> list[str]:
    lines = [
        "## Pairs and learning",
        "",
        "![Pairs](plots/pairs.png)",
        "",
        "![Margins](plots/margins.png)",
        "",
    ]
    if not any(numbers.get("pairs") for numbers in run.rounds().values()):
        lines += ["No pairs were mined: no initial state gave both a success and a failure.", ""]
    lines += _by_round(
        run,
        ("pairs", "pairs", 0),
        ("steps", "steps", 0),
        ("margin", "margin", 2),
        ("its deviation", "margin_std", 2),
        ("ranked right", "accuracy", 2),
        ("chosen log-ratio", "chosen_logratio", 3),
        ("log-ratio of successes", "success_logratio", 3),
        ("rejected log-ratio", "rejected_logratio", 3),
    )
    lag = run.recipe.preference.max_staleness
    return [
        *lines,
        "",
        "A group is every episode from one initial state under one version; pairs are within a group. A round learns "
        f"from all pairs of versions at most {lag} behind, the canary's episodes among them. Margin, its standard "
        "deviation over a step's pairs, share of pairs ranked right and log-ratios (nats per token, to the reference "
        "policy) are means of the last steps.",
    ]


def _speed(run: Run) -> list[str]:
    columns = (
        ("env steps/s", "env_steps_per_s", 1),
        ("decisions per batch", "batch_fill", 1),
        ("ms per batch", "act_ms", 1),
    )
    return ["## Speed of the rollouts", "", *_by_round(run, *columns)]


def _by_round(run: Run, *columns: tuple[str, str, int]) -> list[str]:
    """A table of rounds; a column is a heading, the metric's name and its decimals."""
    lines = [
        table_row("round", *[head for head, _, _ in columns]),
        table_row(*["---:"] * (len(columns) + 1)),
    ]
    for index, numbers in sorted(run.rounds().items()):
        cells = [number(numbers.get(key), digits) for _, key, digits in columns]
        lines.append(table_row(str(index), *cells))
    return lines


def _contrasts(contrasts: Sequence[Contrast]) -> list[str]:
    lines = ["## A success and a failure from the same initial state", ""]
    if not contrasts:
        return [*lines, "No initial state has both among the stored trajectories."]
    for contrast in contrasts:
        lines += [
            f"**{contrast.title}**: [video](videos/{contrast.name}.mp4)",
            "",
            f"![{contrast.title}](videos/{contrast.name}.png)",
            "",
        ]
    return lines[:-1]


def _faults(run: Run) -> list[str]:
    lines = ["## Faults and restarts", ""]
    reasons = Counter((e.phase, e.policy_version, e.fault) for e in run.episodes if e.faulty)
    for (phase, version, reason), count in reasons.most_common(10):
        of = f" of version {version}" if version >= 0 else ""
        lines.append(f"* {counted(count, 'episode')} quarantined ({phase}{of}): {reason}")
    # An event with an attempt number comes from an episode whose actor died; one without it was listed above.
    given_up = [event for event in run.occurrences("quarantined") if "attempt" in event]
    for count, what in (
        (
            len(run.occurrences("requeued")),
            "run again from the start, because the rollout actor died or hung",
        ),
        (len(given_up), "given up: the rollout actor died each time"),
    ):
        if count:
            lines.append(f"* {counted(count, 'episode')} {what}")
    restarts = Counter(
        (str(event.get("kind", "rollout")), str(event["reason"]))
        for event in run.occurrences("actor_restarted")
    )
    for (kind, reason), count in restarts.most_common():
        lines.append(f"* {counted(count, 'restart')} of {kind} actors: {reason}")
    if len(lines) == 2:
        lines.append("None: no episode was quarantined, no actor restarted.")
    return lines


def _stack(run: Run) -> list[str]:
    lines = ["## The stack", ""]
    if not run.fingerprint:
        return [*lines, "No fingerprint was written."]
    lines += [table_row("", ""), table_row("---", "---")]
    for name, value in _flat(run.fingerprint):
        lines.append(table_row(name, f"`{value}`"))
    return [*lines, "", "The recipe as it was resolved: [recipe.yaml](recipe.yaml)."]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _stands_in(run: Run) -> bool:
    return "stand-in" in str(run.result.get("assets", ""))


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "-"
    return f"{rate.successes}/{rate.episodes} = {percent(rate.value)} ({interval(rate.interval)})"
