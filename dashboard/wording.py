"""Numbers as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence


def table_row(*cells: str) -> str:
    """One row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def percent(value: float) -> str:
    """A share in [0, 1] as `41.2 %`."""
    return f"{100 * value:.1f} %"


def interval(bounds: Sequence[float]) -> str:
    """Two shares in [0, 1] as `31.0 to 52.0 %`."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def p_value(value: float) -> str:
    """A p-value with its relation: `= 0.013` or `< 0.0001`."""
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def counted(count: int, noun: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: float | None, digits: int) -> str:
    """A number with this many decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
