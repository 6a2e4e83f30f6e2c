"""Family `dpo`: preference losses on token log-probabilities, and on flow-matching errors.

Keys are `<source>/<form>/beta<b>/ls<label smoothing>/<what>`, `<source>/beta<b>/<metrics>/<name>` and
`<flow source>/beta<b>/<what>`. Forms that `objectives/` does not offer are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from objectives import dpo, flow_matching
from policies.parity.fixture import Family, Fixture, FixtureError, Output, Outputs

_FORM = re.compile(
    r"trl(?P<version>[\d.]+)/(?P<form>\w+)/beta(?P<beta>[^/]+)/ls(?P<smoothing>[^/]+)/(?P<what>\w+)"
)
_METRIC = re.compile(r"trl[\d.]+/beta(?P<beta>[^/]+)/(?P<kind>metric|per_pair_rewards)/(?P<what>[\w/]+)")
_FLOW = re.compile(r"(?:flow_grpo_dpo|diffusion_dpo)/(?:beta(?P<beta>[^/]+)/)?(?P<what>\w+)")
_SIDES = ("chosen", "rejected")
_LOSSES = ("losses", "mean_loss")
_LOSS_RELATIVE = 1e-3
"""Of large losses: a beta of 5000 on a mean of squares magnifies its last bit."""
_LAST_BIT = 1e-7
"""Of a mean of squares about 1, from one order of summation to another. In the flow form four of them are taken from
each other and magnified by beta (5000): the sigmoid's argument, also one near zero, is as far off, and so is what
depends on it."""
_RELATIVE = 1e-6
"""Of everything else: eight last bits of float32. Rewards and log-probabilities of hundreds are no more exact."""


def compute(fixture: Fixture) -> Outputs:
    """What can be stated of the expected tensors. Raises FixtureError for inputs or numbers that do not fit."""
    return dict(_outputs(fixture))


def _outputs(fixture: Fixture) -> Iterator[tuple[str, Output]]:
    for name in fixture.expected:
        where, magnified = None, 0.0
        if match := _FORM.fullmatch(name):
            value = _form_output(fixture, name, match)
            if match["what"] == "grad_policy_token_logps":
                where = torch.cat([_mask(fixture, side) for side in _SIDES])
        elif match := _METRIC.fullmatch(name):
            value = _metric(fixture, match["kind"], match["what"], _beta(fixture, name, match["beta"]))
        elif match := _FLOW.fullmatch(name):
            beta = _beta(fixture, name, match["beta"]) if match["beta"] else None
            value = _flow_output(fixture, match["what"], beta)
            magnified = _LAST_BIT * (beta or 0.0)
        else:
            value = None
        if value is not None:
            relative = _LOSS_RELATIVE if name.rpartition("/")[2] in _LOSSES else _RELATIVE
            yield name, Output(value, where=where, relative=max(relative, magnified), slack=magnified)


def _number(fixture: Fixture, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise FixtureError(
            f"{fixture.folder / 'expected.safetensors'}: {text!r} in {name} is not a number"
        ) from error


def _beta(fixture: Fixture, name: str, text: str) -> float:
    beta = _number(fixture, name, text)
    if not 0 < beta < math.inf:
        raise FixtureError(
            f"{fixture.folder / 'expected.safetensors'}: beta is {text} in {name}, expected a finite number above 0"
        )
    return beta


# Token log-probabilities


def _form_output(fixture: Fixture, name: str, match: re.Match[str]) -> torch.Tensor | None:
    beta, smoothing = _beta(fixture, name, match["beta"]), _number(fixture, name, match["smoothing"])
    tokens = {side: _tokens(fixture, side).requires_grad_() for side in _SIDES}
    # From 1.0 on TRL's sigmoid form has no label smoothing; before, it is conservative DPO.
    if match["form"] == "sigmoid" and not match["version"].startswith("0."):
        smoothing = 0.0
    loss = _loss(fixture, match["form"], tokens, beta, smoothing)
    if loss is None:
        return None
    match match["what"]:
        case "losses":
            return loss.losses
        case "mean_loss":
            return loss.losses.mean()
        case "chosen_rewards":
            return loss.chosen_rewards
        case "rejected_rewards":
            return loss.rejected_rewards
        case "grad_policy_token_logps":
            gradients = torch.autograd.grad(loss.losses.mean(), [tokens[side] for side in _SIDES])
            return torch.cat(gradients)
        case _:
            return None


def _loss(
    fixture: Fixture, form: str, tokens: dict[str, torch.Tensor], beta: float, smoothing: float
) -> dpo.PreferenceLoss | None:
    chosen, rejected = (_log_ratios(fixture, side, tokens[side]) for side in _SIDES)
    if form in ("ipo", "sigmoid_norm"):
        chosen = chosen / _mask(fixture, "chosen").sum(dim=-1)
        rejected = rejected / _mask(fixture, "rejected").sum(dim=-1)
    match form:
        case "sigmoid":
            return dpo.sigmoid_loss(chosen, rejected, beta=beta, label_smoothing=smoothing)
        case "sigmoid_norm":
            return dpo.sigmoid_loss(chosen, rejected, beta=beta)
        case "robust":
            return dpo.robust_loss(chosen, rejected, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return dpo.ipo_loss(chosen, rejected, beta=beta)
        case _:
            return None


def _tokens(fixture: Fixture, side: str) -> torch.Tensor:
    return fixture.input(f"policy_{side}_token_logps").clone()


def _mask(fixture: Fixture, side: str) -> torch.Tensor:
    mask, logps = fixture.input(f"{side}_token_mask"), fixture.input(f"policy_{side}_token_logps")
    if mask.shape != logps.shape:
        raise FixtureError(
            f"{fixture.folder / 'inputs.safetensors'}: {side}_token_mask has shape {list(mask.shape)}, "
            f"expected that of policy_{side}_token_logps, {list(logps.shape)}"
        )
    return mask.bool()


def _log_ratios(fixture: Fixture, side: str, policy_tokens: torch.Tensor) -> torch.Tensor:
    mask = _mask(fixture, side)
    reference = torch.where(mask, fixture.input(f"ref_{side}_token_logps"), 0).sum(dim=-1)
    return torch.where(mask, policy_tokens, 0).sum(dim=-1) - reference


def _metric(fixture: Fixture, kind: str, what: str, beta: float) -> torch.Tensor | None:
    """What TRL logs beside any loss, float64: per pair, or the mean over pairs."""
    tokens = {side: _tokens(fixture, side) for side in _SIDES}
    loss = _loss(fixture, "sigmoid", tokens, beta, 0.0)
    assert loss is not None
    masks = {side: _mask(fixture, side) for side in _SIDES}
    values = {
        **{f"logps/{side}": torch.where(masks[side], tokens[side], 0).sum(dim=-1) for side in _SIDES},
        "rewards/chosen": loss.chosen_rewards,
        "rewards/rejected": loss.rejected_rewards,
        "rewards/margins": loss.chosen_rewards - loss.rejected_rewards,
        "rewards/accuracies": loss.chosen_rewards > loss.rejected_rewards,
    }
    value = values.get(what if kind == "metric" else f"rewards/{what}")
    if value is None:
        return None
    return value.double().mean() if kind == "metric" else value.double()


# Flow


def _flow_output(fixture: Fixture, what: str, beta: float | None) -> torch.Tensor | None:
    velocity = fixture.input("flow_model_pred").clone().requires_grad_()
    policy = _flow_losses(fixture, velocity)
    reference = _flow_losses(fixture, fixture.input("flow_ref_pred"))
    chosen, rejected = flow_matching.log_ratios(policy, reference).chunk(2)
    if beta is None:
        return {"theta_mse": policy, "ref_mse": reference, "w_l_diff": -2 * (chosen - rejected)}.get(what)
    loss = dpo.sigmoid_loss(chosen, rejected, beta=beta)
    margins = loss.chosen_rewards - loss.rejected_rewards
    match what:
        case "inside_term":
            return margins
        case "implicit_acc":
            return (margins > 0).float().mean()
        case "losses":
            return loss.losses
        case "mean_loss":
            return loss.losses.mean()
        case "grad_model_pred":
            return torch.autograd.grad(loss.losses.mean(), velocity)[0]
        case _:
            return None


def _flow_losses(fixture: Fixture, velocity: torch.Tensor) -> torch.Tensor:
    """One draw of every chunk, whatever axes the fixture gives it."""
    noise, clean = fixture.input("flow_noise"), fixture.input("flow_model_input")
    if not velocity.shape == noise.shape == clean.shape or len(velocity) % 2:
        raise FixtureError(
            f"{fixture.folder / 'inputs.safetensors'}: flow_model_pred, flow_ref_pred, flow_noise and "
            f"flow_model_input must share one shape with an even number of rows, got {list(velocity.shape)}, "
            f"{list(noise.shape)}, {list(clean.shape)}"
        )
    rows = len(velocity)
    flat = clean.reshape(rows, 1, -1)
    losses = flow_matching.flow_losses(
        velocity.reshape(rows, 1, 1, -1), noise.reshape(rows, 1, 1, -1), flat, torch.ones_like(flat).bool()
    )
    return losses.squeeze(1)


FAMILY = Family(
    compute=compute,
    required=(
        "*/sigmoid/*/losses",
        "trl0*/sigmoid/*/ls*[1-9]*/losses",
        "*/ipo/*/losses",
        # TRL 1 has the rewards of every pair apart from any loss.
        "*/chosen_rewards or */per_pair_rewards/chosen",
        "*/rejected_rewards or */per_pair_rewards/rejected",
        "flow*/beta*/losses",
        "*/inside_term",
    ),
)
