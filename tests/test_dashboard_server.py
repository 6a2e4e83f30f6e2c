"""The dashboard's server: who gets in, where it listens, and what it sends when the run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from dashboard.server import FIRST_PORT, TOKEN_VARIABLE, Dashboard, DashboardError
from tests.synthetic_run import Writer, episode
from trajectories.records import Cell

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-of-this-test"


@pytest.fixture
def run(tmp_path: Path) -> Writer:
    """A run that goes on."""
    writer = Writer(tmp_path / "live")
    writer.publish(0)
    writer.contrast(0, size=32)
    return writer


@pytest.fixture
def served(run: Writer) -> Iterator[Dashboard]:
    dashboard = Dashboard(run.folder, token=TOKEN)
    dashboard.start()
    yield dashboard
    dashboard.stop()


def port_of(dashboard: Dashboard) -> int:
    return int(dashboard.url.split(":")[2].split("/")[0])


def get(dashboard: Dashboard, path: str, **headers: str) -> HTTPResponse:
    connection = HTTPConnection("127.0.0.1", port_of(dashboard), timeout=10)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("path", ["/", "/api/state", "/api/events", "/static/app.js", "/no/such/page"])
@pytest.mark.parametrize("headers", [{}, bearer("wrong"), bearer(""), {"Cookie": "pairloom_1=wrong"}])
def test_without_the_token_nothing_is_seen(served: Dashboard, path: str, headers: dict[str, str]) -> None:
    answer = get(served, path, **headers)
    text = answer.read().decode()
    assert answer.status == 401
    assert text.count("\n") == 1
    assert "open the address with ?token=... that the run, or `launch.py dashboard`, printed" in text


def test_a_wrong_token_in_the_address_is_refused(served: Dashboard) -> None:
    answer = get(served, f"/?token={TOKEN}x")
    assert answer.status == 401
    assert answer.getheader("set-cookie") is None


def test_the_address_becomes_a_cookie(served: Dashboard) -> None:
    answer = get(served, f"/?token={TOKEN}")
    assert (answer.status, answer.getheader("location")) == (303, "/")
    cookie = answer.getheader("set-cookie") or ""
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    page = get(served, "/", Cookie=cookie.split(";")[0])
    assert page.status == 200
    assert b"<title>Pairloom</title>" in page.read()


def test_a_bearer_gets_the_state_and_strict_headers(served: Dashboard) -> None:
    answer = get(served, "/api/state", **bearer(TOKEN))
    state = json.loads(answer.read())
    assert state["sections"]["run"]["folder"] == "live"
    assert state["sections"]["run"]["status"] == "running"
    policy = answer.getheader("content-security-policy") or ""
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert answer.getheader("x-content-type-options") == "nosniff"
    assert answer.getheader("cache-control") == "no-store"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8266", ""])
def test_another_host_name_is_refused_even_with_the_token(served: Dashboard, host: str) -> None:
    assert get(served, "/api/state", Host=host, **bearer(TOKEN)).status == 400


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8266"])
def test_the_machines_own_names_are_served(served: Dashboard, host: str) -> None:
    assert get(served, "/api/state", Host=host, **bearer(TOKEN)).status == 200


def test_an_appended_episode_is_sent_within_three_seconds(served: Dashboard, run: Writer) -> None:
    since = json.loads(get(served, "/api/state", **bearer(TOKEN)).read())["since"]
    events = get(served, f"/api/events?since={since}", **bearer(TOKEN))
    assert (events.getheader("content-type") or "").startswith("text/event-stream")
    cell = Cell(suite="libero_object", task_id=1, init_state=8, seed=3)
    written = time.monotonic()
    run.episodes([episode("evaluation", -1, cell, "success", version=0, time=run.now)])
    while not (line := events.readline().decode()).startswith("data:"):
        assert line, "the stream ended"
    taken = time.monotonic() - written
    sections = json.loads(line.removeprefix("data:"))
    assert set(sections) == {"run", "success", "heat", "compare"}
    assert sections["success"]["all"]["held_out"][0]["successes"] == 1
    assert taken < 3, f"{taken:.2f} s"


def test_who_comes_back_gets_what_was_missed(served: Dashboard, run: Writer) -> None:
    since = json.loads(get(served, "/api/state", **bearer(TOKEN)).read())["since"]
    run.mine(0, 40)
    headers = bearer(TOKEN) | {"Last-Event-ID": since}
    events = get(served, "/api/events", **headers)
    while not (line := events.readline().decode()).startswith("data:"):
        assert line, "the stream ended"
    assert set(json.loads(line.removeprefix("data:"))) == {"run", "pairs"}


def test_a_stored_episode_is_shown(served: Dashboard) -> None:
    state = json.loads(get(served, "/api/state", **bearer(TOKEN)).read())
    found = state["sections"]["contrast"]["latest"][0]
    sheet = json.loads(get(served, f"/api/sheet/{found['success']}", **bearer(TOKEN)).read())
    assert (sheet["size"], len(sheet["steps"]), sheet["env_steps"]) == (32, 11, 88)
    picture = get(served, f"/api/sheet/{found['success']}.jpg", **bearer(TOKEN))
    assert picture.getheader("content-type") == "image/jpeg"
    assert picture.read()[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", ["0" * 24, "..%2f..%2frecipe", "recipe.yaml", "x%00"])
def test_no_other_file_is_shown(served: Dashboard, name: str) -> None:
    assert get(served, f"/api/sheet/{name}", **bearer(TOKEN)).status == 404


def test_a_port_in_use_is_refused_and_none_takes_the_next(served: Dashboard, run: Writer) -> None:
    taken = port_of(served)
    assert taken >= FIRST_PORT
    with pytest.raises(DashboardError, match=rf"port {taken}: Address already in use; choose another"):
        Dashboard(run.folder, port=taken)
    second = Dashboard(run.folder)
    assert port_of(second) > taken
    second.stop()


def test_a_stopped_server_leaves_its_port(run: Writer) -> None:
    first = Dashboard(run.folder)
    first.start()
    stream = get(first, "/api/events", **bearer(first.url.split("=")[1]))
    assert stream.status == 200
    first.stop()
    again = Dashboard(run.folder, port=port_of(first))
    again.start()
    assert get(again, "/").status == 401
    again.stop()


def test_other_machines_are_let_in_only_with_a_chosen_token(
    run: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(
        DashboardError, match=rf"0\.0\.0\.0 can be reached from other machines; set {TOKEN_VARIABLE}"
    ):
        Dashboard(run.folder, host="0.0.0.0")
    monkeypatch.setenv(TOKEN_VARIABLE, "chosen")
    open_to_all = Dashboard(run.folder, host="0.0.0.0")
    assert open_to_all.url.endswith("/?token=chosen")
    open_to_all.stop()


@pytest.mark.parametrize("host", ["no.such.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_said_to_be_the_mistake(
    run: Writer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "chosen")
    with pytest.raises(DashboardError) as refused:
        Dashboard(run.folder, host=host)
    said = str(refused.value)
    assert said.startswith(f"dashboard host {host}: ")
    assert "Unknown error" not in said
    assert said.endswith(
        "; give --host (dashboard.host in a recipe) a name or address of this machine, or leave it at 127.0.0.1"
    )


def test_tokens_are_new_each_time(run: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    pages = [Dashboard(run.folder) for _ in range(2)]
    tokens = {page.url.split("=")[1] for page in pages}
    for page in pages:
        page.stop()
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 32


@pytest.mark.parametrize("port", [70_000, 0, -1])
def test_a_port_that_is_none_is_refused(run: Writer, port: int) -> None:
    with pytest.raises(DashboardError, match=rf"port {port}: ports are 1 to 65535"):
        Dashboard(run.folder, port=port)


def test_the_verb_serves_until_ctrl_c(run: Writer) -> None:
    command = [sys.executable, "launch.py", "dashboard", str(run.folder)]
    # A shell starts what it sends to the background with interrupts ignored, and so would this test's child be.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    serving = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    assert serving.stderr is not None
    said = serving.stderr.readline()
    address = said.split(" is shown at ")[1].split(" ")[0]
    host, _, token = address.removeprefix("http://").partition("/?token=")
    connection = HTTPConnection(host, timeout=10)
    connection.request("GET", "/api/state", headers=bearer(token))
    assert connection.getresponse().status == 200
    serving.send_signal(signal.SIGINT)
    assert serving.communicate(timeout=60)[1] == ""
    assert serving.returncode == 0


def test_the_verb_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "launch.py", "dashboard", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "is not a run folder: it has no recipe.yaml" in ended.stderr
