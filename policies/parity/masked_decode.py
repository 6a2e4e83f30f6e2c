"""Family `masked_decode`: MaskGIT-style parallel decoding of given logits under given noise.

A pure function: what the network would answer at every iteration is an input. How a recording of it is laid out is
specified nowhere: the names below, and the further ones of `_ALIASES`, are readings of what it may call them. Read are,
with K iterations, B rows, L tokens, V vocabulary, and `case<i>/` in front of every name when config.json has a list
`cases`:

* config.json: `mask_token_id`; `num_iter` where the inputs do not say it; `start_iter` (0); `choice_temperature` (1);
  `use_remask` (no); `mask_scheduling_method`, of which `cosine` alone is read.
* inputs: `logits` [K, B, L, V], [B, K, L, V], or [B, L, V] for every iteration alike; `init_ids` [B, L] (all hidden
  without it); the draws of tokens as `sampled_ids` [K, B, L], or their noise [K, B, L, V] as `token_gumbel`,
  `token_uniform` or `token_exponential` (greedy without any); the noise of the choice [K, B, L] as `choice_gumbel` or
  `choice_uniform`.
* expected: `final_ids` [B, L]; by iteration, [K, B, L] or [B, K, L]: `final_seqs` (the completed chunk), `masks` (what
  is hidden again), `next_ids` (the chunk with those hidden), `confidence` (where finite); `mask_len` [K, B], [B, K] or
  [K].

The final chunk alone would come out of many a wrong decoder: of every case something by iteration has to be expected
too. With a `start_iter` inputs and expected tensors may be of all K iterations or of those alone that are run. What is
computed is the released decoder's own function (arXiv 2508.20072); policies here never draw the mask token and keep
every token that was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from objectives import masked_diffusion
from policies.parity.fixture import Family, Fixture, FixtureError, Output, Outputs

_ALIASES = {
    "mask_token_id": ("mask_id",),
    "choice_temperature": ("temperature",),
    "start_iter": (),
    "mask_scheduling_method": ("mask_schedule", "schedule"),
    "logits": ("token_logits",),
    "init_ids": ("input_ids", "tokens"),
    "sampled_ids": ("token_draws",),
    "token_gumbel": ("gumbel_tokens", "sample_gumbel"),
    "token_uniform": ("uniform_tokens", "sample_uniform"),
    "token_exponential": ("exponential_tokens", "sample_exponential"),
    "choice_gumbel": ("gumbel", "gumbel_choice", "mask_gumbel"),
    "choice_uniform": ("uniform", "uniform_choice", "mask_uniform"),
    "final_ids": ("final_tokens", "output_ids", "decoded_ids"),
    "final_seqs": ("sampled", "sampled_ids", "samples"),
    "masks": ("masked", "masking", "mask"),
    "next_ids": ("next_seqs", "cur_seqs"),
    "confidence": ("confidences",),
    "mask_len": ("mask_lens", "mask_counts"),
}
"""Name -> other names it is also read under: guesses, none of them specified."""
_BY_ITERATION = ("final_seqs", "masks", "next_ids", "confidence", "mask_len")
_INPUTS = ("logits", "init_ids", "sampled_ids", "token_gumbel", "token_uniform", "token_exponential")
_CHOSEN = 1e30
"""Gumbel noise that makes one token certain."""
_SMALL = 1e-20
"""What the released decoder adds inside its logarithms."""


def compute(fixture: Fixture) -> Outputs:
    """Every expected tensor of a known name. Raises FixtureError naming what is missing or cannot be read."""
    if fixture.weights:
        raise FixtureError(
            f"{fixture.folder / 'weights.safetensors'}: masked_decode decodes given logits and reads no network, "
            f"found {sorted(fixture.weights)[0]!r} and others"
        )
    cases = fixture.config.get("cases")
    if cases is None:
        return _case(fixture, fixture.config, "")
    found: dict[str, Output] = {}
    for i, case in enumerate(cases):
        found |= _case(fixture, {**fixture.config, **case}, f"case{i}/")
    return found


def _case(fixture: Fixture, settings: Mapping[str, Any], prefix: str) -> dict[str, Output]:
    mask_id, schedule = (_lookup(settings, name) for name in ("mask_token_id", "mask_scheduling_method"))
    where = fixture.folder / "config.json"
    if mask_id is None:
        raise FixtureError(f"{where} lacks 'mask_token_id'; it has {sorted(settings)}")
    if schedule not in (None, "cosine"):
        raise FixtureError(f"{where}: mask_scheduling_method is {schedule!r}; 'cosine' alone is read here")
    start = int(_lookup(settings, "start_iter") or 0)
    logits_KBLV = _logits(fixture, settings, prefix, start)
    iterations, rows, length = logits_KBLV.shape[:3]
    init_BL = _input(fixture, prefix, "init_ids", (rows, length))
    init_BL = torch.full((rows, length), mask_id) if init_BL is None else init_BL.long()
    token_noise = _token_noise(fixture, prefix, logits_KBLV, start)
    temperature = _lookup(settings, "choice_temperature")
    choice_noise = _choice_noise(fixture, prefix, (iterations, rows, length), start)
    if choice_noise is None and temperature != 0:
        raise _unreadable(fixture, prefix, "noise of the choice (or choice_temperature 0)", "choice_gumbel")
    answers = iter(logits_KBLV)
    decoding = masked_diffusion.parallel_decode(
        lambda _: next(answers),
        init_BL,
        masked_diffusion.DecodingNoise(
            tokens_KBLV=torch.zeros_like(logits_KBLV) if token_noise is None else token_noise,
            choice_KBL=torch.zeros(iterations, rows, length) if choice_noise is None else choice_noise,
        ),
        mask_id=mask_id,
        choice_temperature=1.0 if temperature is None else temperature,
        use_remask=bool(settings.get("use_remask", False)),
        start=start,
        as_released=True,
    )
    unknown_B = (init_BL == mask_id).sum(dim=-1)
    counts = [
        masked_diffusion.remask_counts(unknown_B, start + k, start + iterations) for k in range(iterations)
    ]
    computed = {
        "final_ids": decoding.samples_KBL[-1],
        "final_seqs": decoding.samples_KBL,
        "masks": decoding.masks_KBL,
        "next_ids": torch.where(decoding.masks_KBL, mask_id, decoding.samples_KBL),
        "confidence": decoding.confidences_KBL,
        "mask_len": torch.stack(counts),
    }
    return _outputs(fixture, prefix, computed, init_BL, start)


def _outputs(
    fixture: Fixture, prefix: str, computed: Mapping[str, torch.Tensor], init_BL: torch.Tensor, start: int
) -> dict[str, Output]:
    found = {}
    for name, value in computed.items():
        # Nothing follows the last iteration: what it would hide again means nothing.
        live = torch.ones_like(value, dtype=torch.bool)
        if not name.startswith("final") and len(value) > 1:
            live[-1] = False
        for key in (name, *_ALIASES[name]):
            expected = fixture.expected.get(prefix + key)
            if expected is None:
                continue
            own, where = value, live
            if start and name != "final_ids" and start + len(value) in expected.shape[:2]:
                own, where = _from_the_first(name, value, live, init_BL, start)
            where = _oriented(name, where, expected)
            if where.shape == expected.shape:
                where = where & expected.isfinite()
            found[prefix + key] = Output(_oriented(name, own, expected), where=where)
    if not any(
        prefix + key in found for name in ("final_ids", "final_seqs") for key in (name, *_ALIASES[name])
    ):
        raise FixtureError(
            f"{fixture.folder / 'expected.safetensors'} has no decoded tokens that are known here: expected "
            f"{prefix}final_ids or {prefix}final_seqs, found {sorted(fixture.expected)}"
        )
    return found


def _from_the_first(
    name: str, value: torch.Tensor, live: torch.Tensor, init_BL: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and live places with the iterations before `start`: the released decoder's chunks of those are what was
    given, then zeros; nothing else is known of them."""
    before = value.new_zeros(start, *value.shape[1:])
    if name == "final_seqs":
        before[0] = init_BL
    idle = torch.full_like(before, name == "final_seqs", dtype=torch.bool)
    return torch.cat([before, value]), torch.cat([idle, live])


def _oriented(name: str, value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """By row or by iteration first, whichever the expected tensor has; the released decoder's own result is by row."""
    if name == "mask_len" and expected.ndim == 1 and bool((value == value[:, :1]).all()):
        return value[:, 0]
    if value.ndim < 2 or name == "final_ids":
        return value
    swapped = value.transpose(0, 1)
    by_row = name == "final_seqs" or value.shape != expected.shape
    return swapped if by_row and swapped.shape == expected.shape else value


def _logits(fixture: Fixture, settings: Mapping[str, Any], prefix: str, start: int) -> torch.Tensor:
    """[K - start, B, L, V] float32."""
    logits = _input(fixture, prefix, "logits", None)
    if logits is None:
        raise _unreadable(fixture, prefix, "logits of every iteration", *_INPUTS[:1])
    total: int | None = settings.get("num_iter")
    if total is None and logits.ndim == 4:
        total = len(logits)
    if not 0 <= start < int(total or 1):
        raise FixtureError(
            f"{fixture.folder / 'config.json'}: start_iter is {start}, expected 0 .. {int(total or 1) - 1}"
        )
    if logits.ndim == 3 and total:
        return logits.float().expand(int(total) - start, *logits.shape)
    if logits.ndim == 4 and total is not None:
        for by_iteration in (logits.float(), logits.float().transpose(0, 1)):
            if len(by_iteration) in (total, total - start):
                return by_iteration[-(total - start) :]
    raise FixtureError(
        f"{fixture.folder / 'inputs.safetensors'}: {prefix}logits has shape {list(logits.shape)}, expected "
        f"[num_iter, B, L, V] or [B, L, V] with num_iter in config.json (it is {settings.get('num_iter')})"
    )


def _token_noise(fixture: Fixture, prefix: str, logits_KBLV: torch.Tensor, start: int) -> torch.Tensor | None:
    shape = tuple(logits_KBLV.shape)
    drawn = _input(fixture, prefix, "sampled_ids", shape[:3], start)
    if drawn is not None:
        return torch.zeros(shape).scatter(-1, drawn.long()[..., None], _CHOSEN)
    gumbel = _input(fixture, prefix, "token_gumbel", shape, start)
    exponential = _input(fixture, prefix, "token_exponential", shape, start)
    if gumbel is None and exponential is not None:
        return -exponential.log()
    return _gumbel(_input(fixture, prefix, "token_uniform", shape, start)) if gumbel is None else gumbel


def _choice_noise(fixture: Fixture, prefix: str, shape: tuple[int, ...], start: int) -> torch.Tensor | None:
    gumbel = _input(fixture, prefix, "choice_gumbel", shape, start)
    return _gumbel(_input(fixture, prefix, "choice_uniform", shape, start)) if gumbel is None else gumbel


def _gumbel(uniform: torch.Tensor | None) -> torch.Tensor | None:
    return None if uniform is None else -(-(uniform + _SMALL).log() + _SMALL).log()


def _input(
    fixture: Fixture, prefix: str, name: str, shape: tuple[int, ...] | None, start: int = 0
) -> torch.Tensor | None:
    """The tensor by iteration, those before `start` left out. Raises FixtureError where it fits in no orientation."""
    for key in (name, *_ALIASES[name]):
        tensor = fixture.inputs.get(prefix + key, fixture.inputs.get(key))
        if tensor is None:
            continue
        if shape is None:
            return tensor
        for oriented in (tensor, tensor.transpose(0, 1) if tensor.ndim >= 3 else tensor):
            if oriented.shape == shape:
                return oriented
            if oriented.shape == (shape[0] + start, *shape[1:]):
                return oriented[start:]
        raise FixtureError(
            f"{fixture.folder / 'inputs.safetensors'}: {key} has shape {list(tensor.shape)}, "
            f"expected {list(shape)}"
        )
    return None


def _lookup(settings: Mapping[str, Any], name: str) -> Any:
    return next((settings[key] for key in (name, *_ALIASES[name]) if key in settings), None)


def _unreadable(fixture: Fixture, prefix: str, what: str, name: str) -> FixtureError:
    names = ", ".join(prefix + key for key in (name, *_ALIASES[name]))
    return FixtureError(
        f"{fixture.folder / 'inputs.safetensors'} lacks the {what}: expected one of {names}; "
        f"found {sorted(fixture.inputs)}"
    )


def _required(fixture: Fixture) -> tuple[str, ...]:
    """Of each case without anything by iteration: what it lacks."""
    cases = fixture.config.get("cases")
    prefixes = [""] if cases is None else [f"case{i}/" for i in range(len(cases))]
    known = [key for name in _BY_ITERATION for key in (name, *_ALIASES[name])]
    return tuple(
        f"{prefix}masks" for prefix in prefixes if not any(prefix + key in fixture.expected for key in known)
    )


FAMILY = Family(compute=compute, required_by=_required)
