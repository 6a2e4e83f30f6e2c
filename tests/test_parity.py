"""Golden fixtures: those on this machine agree, and the verb says what it found."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from objectives import masked_diffusion
from policies.parity.check import FAMILIES, check_fixture, compare
from policies.parity.fixture import Comparison, Fixture, FixtureError, Output, load_fixture

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PAIRLOOM_SHARED", ROOT.parent / "shared"))
GOLDEN = sorted(file.parent for file in SHARED.glob("parity/*/config.json"))
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason=f"no golden fixtures in {SHARED / 'parity'}"))


@pytest.mark.parametrize("folder", GOLDEN or [ABSENT], ids=lambda folder: getattr(folder, "name", "none"))
def test_recorded_numbers_agree(folder: Path) -> None:
    fixture = load_fixture(folder)
    assert fixture.config["family"] in FAMILIES
    results = list(check_fixture(fixture))
    assert [result for result in results if not result.passed] == []
    assert len(results) >= 10


# The verb


def write_fixture(folder: Path, **expected: list[float]) -> Path:
    """One step of the stochastic sampler whose mean is half the sample and whose std is 1."""
    folder.mkdir()
    config = {"family": "flow_sde", "cases": [{"num_steps": 2, "noise_level": 1.0}]}
    (folder / "config.json").write_text(json.dumps(config))
    sample = torch.tensor([[2.0, -4.0]])
    inputs = {
        "case0/step_index": torch.tensor([0]),
        "sample": sample,
        "velocity": torch.zeros(1, 2),
        "prev_sample": torch.tensor([[1.0, -2.0]]),
        "variance_noise": torch.ones(1, 2),
    }
    save_file(inputs, folder / "inputs.safetensors")
    tensors = {f"case0/{name}": torch.tensor(value) for name, value in expected.items()}
    save_file(tensors, folder / "expected.safetensors")
    return folder


def parity(*folders: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "parity", *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_verb_prints_a_line_a_tensor_and_exits_zero_when_all_agree(tmp_path: Path) -> None:
    good = write_fixture(
        tmp_path / "good", given_prev_logprob=[-0.9189385], sampled_prev=[[2.0, -1.0]], unknown=[0.0]
    )
    done = parity(good, good)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{good} (flow_sde): 2 of 3 expected tensors"
    assert [line.split() for line in lines[1:3]] == [
        ["case0/given_prev_logprob", lines[1].split()[1], "pass"],
        ["case0/sampled_prev", lines[2].split()[1], "pass"],
    ]
    assert all("e-" in line.split()[1] or line.split()[1] == "0.00e+00" for line in lines[1:3])
    assert lines[3] == "not compared, for nothing here computes it: case0/unknown"
    assert lines[-1] == "parity: 4 tensors compared, 0 failed"


def test_the_verb_goes_on_after_what_fails_and_exits_one(tmp_path: Path) -> None:
    bad = write_fixture(tmp_path / "bad", given_prev_logprob=[-0.8], mean=[[1.0, -2.0]])
    thin = write_fixture(tmp_path / "thin", mean=[[1.0, -2.0]])
    odd = write_fixture(tmp_path / "odd", mean=[[1.0, -2.0]])
    (odd / "config.json").write_text(
        json.dumps({"family": "flow_sde", "cases": [{"num_steps": None, "noise_level": 1}]})
    )
    done = parity(bad, tmp_path / "missing", odd, thin)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == f"pairloom: {tmp_path / 'missing'} is not a fixture: it has no config.json"
    assert second.startswith(
        f"pairloom: {odd}: config.json, inputs or expected tensors do not fit the family"
    )
    assert "TypeError" in second
    lines = done.stdout.splitlines()
    assert lines[1] == "case0/given_prev_logprob  1.19e-01  fail"
    assert lines[2].endswith("pass")
    assert lines[5].startswith("*/given_prev_logprob  nan  fail  (required")
    assert lines[-1] == "parity: 3 tensors compared, 4 failed"


# Reading and comparing


def test_what_is_not_a_fixture_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path / "one", mean=[0.0])
    fixture = load_fixture(folder)
    with pytest.raises(FixtureError, match=r"unknown family 'flow_sda', nearest is 'flow_sde'"):
        list(check_fixture(replace(fixture, config={**fixture.config, "family": "flow_sda"})))
    with pytest.raises(FixtureError, match="case 0 lacks 'noise_level'"):
        list(check_fixture(replace(fixture, config={"family": "flow_sde", "cases": [{"num_steps": 2}]})))
    with pytest.raises(FixtureError, match=r"step_index must lie in 0 \.\. 1, got \[2\]"):
        list(check_fixture(replace(fixture, inputs=fixture.inputs | {"case0/step_index": torch.tensor([2])})))
    (folder / "expected.safetensors").write_bytes(b"damaged")
    with pytest.raises(FixtureError, match=r"expected\.safetensors cannot be read"):
        load_fixture(folder)
    (folder / "expected.safetensors").unlink()
    with pytest.raises(FixtureError, match=r"expected\.safetensors is missing"):
        load_fixture(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FixtureError, match="is not JSON"):
        load_fixture(folder)


@pytest.mark.parametrize(
    ("output", "expected", "difference", "passed"),
    [
        (Output(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.00005]), 5e-5, True),
        (Output(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.001]), 1e-3, False),
        (Output(torch.tensor([1.0, 2000.0]), relative=1e-3), torch.tensor([1.0, 2001.0]), 1.0, True),
        (Output(torch.tensor([0.7]), relative=1e-3), torch.tensor([0.7005]), 5e-4, False),
        (Output(torch.tensor([1.5, 2000.0]), relative=1e-3), torch.tensor([1.0, 2001.0]), 1.0, False),
        (
            Output(torch.tensor([9.0, 2.0]), where=torch.tensor([False, True])),
            torch.tensor([1.0, 2.0]),
            0,
            True,
        ),
        (Output(torch.tensor([-math.inf])), torch.tensor([-math.inf]), 0, True),
        (Output(torch.tensor([5.0]), relative=1e-3), torch.tensor([-math.inf]), math.inf, False),
        (Output(torch.tensor([math.nan])), torch.tensor([0.0]), math.nan, False),
        (Output(torch.tensor([0.0])), torch.tensor([math.nan]), math.nan, False),
        (Output(torch.zeros(2)), torch.zeros(2, 1), math.nan, False),
        (Output(torch.zeros(2), where=torch.tensor(False)), torch.zeros(2), math.nan, False),
    ],
)
def test_a_comparison_passes_within_the_tolerance(
    output: Output, expected: torch.Tensor, difference: float, passed: bool
) -> None:
    result = compare("x", output, expected)
    assert result.passed is passed
    assert result.difference == pytest.approx(difference, rel=1e-2, abs=1e-9, nan_ok=True)


# Masked decoding


def masked_fixture(
    inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **settings: Any
) -> Fixture:
    return Fixture(
        folder=Path("masked"),
        config={"family": "masked_decode", "mask_token_id": 4, **settings},
        weights={},
        inputs=inputs,
        expected=expected,
    )


def recorded_decoding() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Five tokens of four, in three iterations, two rows: the first all hidden, the second with one given."""
    noise = masked_diffusion.decoding_noise([1, 2], iterations=3, length=5, vocabulary=4)
    logits = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    init = torch.tensor([[4, 4, 4, 4, 4], [4, 3, 4, 4, 4]])
    answers = iter(logits)
    decoding = masked_diffusion.parallel_decode(lambda _: next(answers), init, noise, mask_id=4)
    inputs = {
        "logits": logits,
        "init_ids": init,
        "token_gumbel": noise.tokens_KBLV,
        "choice_gumbel": noise.choice_KBL,
    }
    # 5 hidden at first: floor(5 cos(pi / 6)) = 4, floor(5 cos(pi / 3)) = 2, 1; of 4 hidden 3, 1 (just below 2), 1.
    assert decoding.masks_KBL.sum(dim=-1).tolist() == [[4, 3], [2, 1], [1, 1]]
    return inputs, {
        "final_seqs": decoding.samples_KBL.transpose(0, 1),
        "mask_len": decoding.masks_KBL.sum(-1),
    }


def failures(fixture: Fixture) -> list[Comparison]:
    return [result for result in check_fixture(fixture) if not result.passed]


def test_a_decoding_is_read_by_row_or_by_iteration() -> None:
    inputs, expected = recorded_decoding()
    assert failures(masked_fixture(inputs, expected)) == []
    by_iteration = {
        "sampled": expected["final_seqs"].transpose(0, 1),
        "final_ids": expected["final_seqs"][:, -1],
    }
    assert failures(masked_fixture(inputs, by_iteration)) == []
    by_row = {name: tensor.transpose(0, 1) if tensor.ndim > 2 else tensor for name, tensor in inputs.items()}
    assert failures(masked_fixture(by_row, expected, num_iter=3)) == []


def test_a_decoding_by_uniform_noise_and_given_draws_is_the_same() -> None:
    inputs, expected = recorded_decoding()
    inputs["choice_uniform"] = (-(-inputs.pop("choice_gumbel").double()).exp()).exp()
    inputs["sampled_ids"] = expected["final_seqs"].transpose(0, 1).clone()
    del inputs["token_gumbel"]
    case = {f"case0/{name}": tensor for name, tensor in inputs.items()}
    results = {f"case0/{name}": tensor for name, tensor in expected.items()}
    assert failures(masked_fixture(case, results, cases=[{"choice_temperature": 1.0}])) == []


def test_the_final_chunk_alone_is_not_enough() -> None:
    inputs, expected = recorded_decoding()
    final = {"final_ids": expected["final_seqs"][:, -1]}
    (lacking,) = failures(masked_fixture(inputs, final))
    assert (lacking.name, lacking.compared) == ("masks", False)
    assert failures(masked_fixture(inputs, final | {"mask_len": expected["mask_len"]})) == []
    cases = {f"case{i}/{name}": tensor for i in (0, 1) for name, tensor in expected.items()}
    del cases["case1/final_seqs"], cases["case1/mask_len"]
    cases["case1/final_ids"] = final["final_ids"]
    (lacking,) = failures(masked_fixture(inputs, cases, cases=[{}, {}]))
    assert lacking.name == "case1/masks"


def test_a_wrong_token_fails() -> None:
    inputs, expected = recorded_decoding()
    expected["final_seqs"] = expected["final_seqs"].clone()
    expected["final_seqs"][1, -1, 2] ^= 1
    assert [result.name for result in failures(masked_fixture(inputs, expected))] == ["final_seqs"]


def test_a_decoding_that_cannot_be_read_says_what_it_lacks() -> None:
    inputs, expected = recorded_decoding()
    with pytest.raises(FixtureError, match=r"lacks the logits of every iteration.*found \['choice_gumbel'"):
        failures(masked_fixture({k: t for k, t in inputs.items() if k != "logits"}, expected))
    with pytest.raises(FixtureError, match=r"lacks the noise of the choice.*choice_gumbel"):
        failures(masked_fixture({k: t for k, t in inputs.items() if k != "choice_gumbel"}, expected))
    with pytest.raises(FixtureError, match=r"expected final_ids or final_seqs, found \['other'\]"):
        failures(masked_fixture(inputs, {"other": torch.zeros(1)}))
    with pytest.raises(FixtureError, match=r"init_ids has shape \[5\], expected \[2, 5\]"):
        failures(masked_fixture({**inputs, "init_ids": torch.zeros(5)}, expected))
    with pytest.raises(FixtureError, match=r"row 0 has no token 4 to fill"):
        failures(masked_fixture({**inputs, "init_ids": torch.zeros(2, 5)}, expected))
    with pytest.raises(FixtureError, match="reads no network"):
        failures(replace(masked_fixture(inputs, expected), weights={"w": torch.zeros(1)}))
