"""Runs a fixture's family and compares what it computes with what the official implementation computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fnmatch import fnmatch

import torch

from policies.parity import dora, flow_sde, masked_decode, openpi, openvla, pi0_transformers, preference
from policies.parity.fixture import TOLERANCE, Comparison, Family, Fixture, FixtureError, Output, Outputs

FAMILIES: dict[str, Family] = {
    "dpo": preference.FAMILY,
    "flow_sde": flow_sde.FAMILY,
    "masked_decode": masked_decode.FAMILY,
    "openpi": openpi.FAMILY,
    "openvla": openvla.FAMILY,
    "peft_dora": dora.FAMILY,
    "pi0_transformers": pi0_transformers.FAMILY,
}
"""Name in config.json -> the family."""


def check_fixture(fixture: Fixture) -> Iterator[Comparison]:
    """Every expected tensor that the family computes, compared; then what had to be compared and was not.

    Raises FixtureError, in one line that names the folder, for an unknown family, or tensors and settings that do not
    fit.
    """
    family = _family(fixture)
    outputs, patterns = _computed(family, fixture)
    compared = [name for name in fixture.expected if name in outputs]
    for name in compared:
        yield compare(name, outputs[name], fixture.expected[name])
    for pattern in patterns:
        if not any(fnmatch(name, one) for name in compared for one in pattern.split(" or ")):
            note = "required, but no expected tensor of this name was compared"
            yield Comparison(name=pattern, difference=float("nan"), passed=False, compared=False, note=note)


def compare(name: str, output: Output, expected: torch.Tensor) -> Comparison:
    """Largest absolute difference where the output means something, and whether it passes everywhere there."""
    value = output.value.detach()
    if value.shape != expected.shape:
        note = f"shape {list(value.shape)}, expected {list(expected.shape)}"
        return Comparison(name=name, difference=float("nan"), passed=False, note=note)
    value, expected = value.double(), expected.double()
    gap = (value - expected).abs()
    gap = torch.where(value == expected, 0.0, gap)  # two infinities of one sign agree
    size = torch.where(expected.isfinite(), expected.abs(), 0.0)  # a share of infinity would allow anything
    large = output.relative * torch.where(size < 1, 0.0, size)
    allowed = torch.clamp(large, min=max(TOLERANCE, output.slack))
    if output.where is not None:
        keep = output.where.expand_as(gap)
        gap, allowed = gap[keep], allowed[keep]
    if not gap.numel():
        return Comparison(name=name, difference=float("nan"), passed=False, note="nothing to compare")
    return Comparison(name=name, difference=gap.max().item(), passed=bool((gap <= allowed).all()))


def _computed(family: Family, fixture: Fixture) -> tuple[Outputs, tuple[str, ...]]:
    """What the family computes, and the patterns of what has to be compared."""
    try:
        with torch.random.fork_rng(devices=[]):
            return family.compute(fixture), family.required + family.required_by(fixture)
    except ValueError as error:
        text = _one_line(error)
        prefix = "" if str(fixture.folder) in text else f"{fixture.folder}: "
        raise FixtureError(prefix + text) from error
    except Exception as error:
        # What is on the disk was written by others; whatever it breaks (a division by a size of nothing, memory that
        # there is not, an assertion of torch's), the other folders are still to be compared.
        raise FixtureError(
            f"{fixture.folder}: config.json, inputs or expected tensors do not fit the family "
            f"{fixture.config['family']!r}: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    """What it says, without the C++ stack that torch may append."""
    return " ".join(str(error).split("Exception raised from")[0].split())


def _family(fixture: Fixture) -> Family:
    name = fixture.setting("family")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    hint = f", nearest is {near[0]!r}" if near else ""
    raise FixtureError(
        f"{fixture.folder / 'config.json'}: unknown family {name!r}{hint}; known: {', '.join(sorted(FAMILIES))}"
    )
