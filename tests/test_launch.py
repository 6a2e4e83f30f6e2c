"""The command line as a person uses it: what goes wrong is one line and exit code 2, and a job can be submitted."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from actors.placement import PlacementError, require_listener
from launch import app

ROOT = Path(__file__).parents[1]


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def invoke(*arguments: str) -> Result:
    """The same in this process: starting one takes seconds, most of it importing torch and Ray."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = list(root.handlers)
    try:
        return CliRunner().invoke(app, list(arguments))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "configs/quickstart.yaml", "preferences.beta=1"), "preference"),
        (("train", "configs/quickstar.yaml"), "configs/quickstart.yaml"),
        (("train", "configs/quickstart.yaml", "environment.assets=no/such/folder"), "no/such/folder"),
        (("train", "configs/quickstart.yaml", "start=no/such/run"), "no/such/run"),
        (
            ("train", "configs/quickstart.yaml", "tasks.suite=libero_10"),
            "no scripted expert for libero_10 task",
        ),
        (
            ("collect", "configs/quickstart.yaml", "tasks.suite=libero_10"),
            "no scripted expert for libero_10 task",
        ),
        (("train", "configs/quickstart.yaml", "policy.decoder.width=90"), "decoder.width 90"),
        (("train", "configs/quickstart.yaml", "environment.image_size=100"), "image_size 100"),
        (("evaluate", "no/such/run"), "no/such/run"),
        (("compare", "no/such/run", "no/such/other"), "no/such/run"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = invoke(*arguments, *([f"root={tmp_path}"] if arguments[0] in ("train", "collect") else []))
    assert done.exit_code == 2
    complaint = done.stderr.strip().splitlines()[-1]
    assert complaint.startswith("pairloom: ")
    assert said in complaint
    assert isinstance(done.exception, SystemExit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "collect"])
@pytest.mark.parametrize("root", ["/proc/runs", "/proc"])
def test_a_root_that_cannot_be_written_is_refused_before_ray_starts(
    verb: str, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even root can write in /proc. That Ray is not asked shows in its address, which would be refused."""
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    done = invoke(verb, str(ROOT / "configs" / "quickstart.yaml"), f"root={root}")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"pairloom: {root} cannot be written (No such file or directory); set root to a folder that can be written"
    )


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path / "recipe.yaml")
    (tmp_path / "events.jsonl").write_text("one\ntwo\n")
    done = launch("evaluate", str(tmp_path))
    assert done.returncode == 2
    assert "events.jsonl: a line is damaged" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_more_gpus_than_exist_stop_the_run_before_it_starts(tmp_path: Path) -> None:
    done = launch("train", "configs/quickstart.yaml", "serving.gpus_per_actor=8", f"root={tmp_path}")
    assert done.returncode == 2
    assert "asks for 8 GPUs and the cluster has 0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        done = launch("train", str(ROOT / "configs" / "quickstart.yaml"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"pairloom: no Ray answers at RAY_ADDRESS={address} (Connection refused); see that the cluster is up (`ray "
        "status`) and can be reached from here, or unset RAY_ADDRESS to run on this machine alone"
    )
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 100  # most of it imports; Ray alone tries for minutes


@pytest.mark.parametrize("address", ["nonsense", ":6379", "127.0.0.1:66666"])
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    with pytest.raises(PlacementError) as refused:
        require_listener(address)
    assert str(refused.value) == (
        f"RAY_ADDRESS is {address!r}, expected auto or local or the host:port of a cluster's head, such as "
        "10.0.0.1:6379; unset it to run on this machine alone"
    )


@pytest.mark.parametrize("mode", ["tokn", ""])
def test_a_mode_of_authentication_that_ray_does_not_know_is_refused(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself takes it for `disabled`."""
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    done = invoke("train", str(ROOT / "configs" / "quickstart.yaml"), f"root={tmp_path}")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == (
        f"pairloom: RAY_AUTH_MODE is {mode!r}, expected token or disabled; set it to token, or unset it, which is the "
        "same"
    )
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_demands_a_token_which_is_not_here_says_where_it_goes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listens:
        address = f"127.0.0.1:{listens.getsockname()[1]}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", "from actors.placement import connect; connect()"],
            cwd=ROOT,
            env=environment | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.stderr.splitlines()[-1] == (
        f"actors.placement.PlacementError: cannot join the Ray cluster on {address}: Token authentication is enabled "
        "but no authentication token was found; see that it is up (`ray status`), and that RAY_AUTH_MODE and the token "
        "in RAY_AUTH_TOKEN, or else in ~/.ray/auth_token, are its own"
    )


def test_help_explains_every_field() -> None:
    done = invoke("train", "--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "preference.beta" in text
    assert "DPO inverse temperature" in text


def test_assets_says_which_kind_is_in_force() -> None:
    done = invoke("assets")
    assert done.exit_code == 0
    assert "complete for all 40 tasks" in done.stdout


@pytest.mark.libero
@pytest.mark.ray
def test_a_corrupt_start_is_named(trained_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained_run, copy)
    weights = copy / "checkpoints" / "start" / "tensors.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    recipe = ROOT / "tests" / "recipes" / "one_task.yaml"
    done = launch("train", str(recipe), f"start={copy}", f"root={tmp_path / 'runs'}")
    assert done.returncode == 2
    complaint = done.stderr.strip().splitlines()[-1]
    assert "tensors.safetensors was altered" in complaint


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head with token authentication, and the environment that may talk to it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # A head of its own beside whatever else runs here: the agent that starts jobs has a fixed port by default.
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    process = subprocess.Popen(
        f"ray start --head --block --num-cpus=2 --port={port} --dashboard-port={dashboard} "
        f"--dashboard-agent-listen-port={agent} --object-store-memory=500000000".split(),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(["ray", "job", "list", "--address", address], environment)
        yield address, environment
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.libero
@pytest.mark.ray
def test_a_job_is_submitted_with_a_token(
    trained_run: Path, head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head
    settings = [f"start={trained_run}", f"root={tmp_path}", "rollouts.rounds=1", "name=job"]
    settings += ["rollouts.init_states_per_round=1", "rollouts.samples_per_state=2", "tasks.task_ids=[0]"]
    settings += ["tasks.held_out_init_states=[40,41]", "environment.max_steps=40"]
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", "."]
    command = [*submit, "--", "python", "launch.py", "train", "configs/quickstart.yaml", *settings]
    stranger = {**environment, "RAY_AUTH_TOKEN": "0" * 32}
    refused = subprocess.run(command, env=stranger, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert not (tmp_path / "job").exists()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "job" / "result.json").read_text())
    assert result["held_out_episodes"] == 4  # two states, two sampling seeds


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(command: list[str], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 90
    while subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, "the Ray head did not come up in 90 s"
        time.sleep(1)


def test_a_capability_vector_is_extracted_and_merged_and_another_base_refused(tmp_path: Path) -> None:
    for name, value in {"base": 0.0, "sft": 1.0, "aux": 3.0}.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((2, 2), value)}, tmp_path / name / "model.safetensors")
    base, sft, aux, gamma = (str(tmp_path / name) for name in ("base", "sft", "aux", "gamma"))
    made = invoke("capability", "extract", base, sft, aux, "--out", gamma)
    assert json.loads(made.stdout) | {"base_hash": ""} == {
        "vector": gamma,
        "base_hash": "",
        "weights": 1,
        "gamma_over_sft": 2.0,
        "cosine": 1.0,
    }
    merged = invoke("capability", "merge", base, gamma, "--alpha", "0.5", "--out", str(tmp_path / "meta"))
    assert json.loads(merged.stdout)["alpha"] == 0.5
    assert (load_file(tmp_path / "meta" / "model.safetensors")["w"] == 1).all()
    refused = invoke("capability", "merge", sft, gamma, "--out", str(tmp_path / "other"))
    assert refused.exit_code == 2
    assert refused.stderr.startswith("pairloom: ")
    assert refused.stderr.count("\n") == 1
    lonely = invoke("capability", "train", "--vector", gamma)
    assert lonely.exit_code == 2
    assert lonely.stderr == "pairloom: capability train needs --init, the weights to fine-tune\n"
    of_nothing = invoke("capability", "train", "--init", sft, "--alpha", "3")
    assert of_nothing.stderr == "pairloom: --alpha 3 without --vector: name the vector that it is of\n"
    no_number = invoke("capability", "train", "--init", base, "--vector", gamma, "--alpha", "nan")
    assert (no_number.exit_code, no_number.stderr) == (
        2,
        "pairloom: alpha is nan, expected a finite number; the paper's is 1.1\n",
    )
    strange = invoke("capability", "train", "--vector", gamma, "--init", sft)
    assert strange.exit_code == 2
    assert "was extracted from the base" in strange.stderr
