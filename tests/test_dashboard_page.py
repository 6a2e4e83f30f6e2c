"""The dashboard's page in a real browser: Debian's Chromium, without a screen."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from dashboard.server import Dashboard
from tests.synthetic_run import Writer, episode, weights_hash, write_run
from trajectories.records import Cell

DRAWN = "performance.getEntriesByName('drawn')[0].startTime"
"""Milliseconds from navigation until every section was drawn."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "the page's tests drive chromium; `make browser` installs it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        # The first page of a fresh browser pays for the browser's own start.
        found.new_page().goto("about:blank")
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """A finished run, compared with another; to be looked at alone."""
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / name, seed=seed) for seed, name in enumerate(("synthetic", "other"))]
    dashboard = Dashboard(runs[0], compare=runs[1:])
    dashboard.start()
    yield dashboard
    dashboard.stop()


Open = Callable[..., Page]


@pytest.fixture
def look(browser: Browser) -> Iterator[Open]:
    """Opens a dashboard in a fresh profile, waits until it is drawn, and afterwards wants a clean console."""
    said: list[str] = []
    contexts = []

    def opened(
        dashboard: Dashboard, *, width: int = 1280, scheme: str = "light", motion: str = "reduce"
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion=motion
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(dashboard.url)
        page.wait_for_selector("html[data-updates]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def see_everything(page: Page) -> None:
    """Scroll through the page, so that every plot comes into view."""
    height = page.evaluate("document.documentElement.scrollHeight")
    for top in range(0, height, 400):
        page.evaluate(f"scrollTo(0, {top})")
        page.wait_for_timeout(30)


def quickest(look: Open, dashboard: Dashboard, *, within_ms: float) -> tuple[Page, float]:
    """A page, and the milliseconds until it was drawn: of at most three looks the first that was quick enough, else the
    last one. Other work shares the machine, and one look may find it busy."""
    for _ in range(3):
        page = look(dashboard)
        taken = page.evaluate(DRAWN)
        if taken < within_ms:
            break
    return page, taken


def test_it_loads_within_a_second(served: Dashboard, look: Open) -> None:
    _, taken = quickest(look, served, within_ms=1000)
    print(f"drawn after {taken:.0f} ms")
    assert taken < 1000, f"drawn after {taken:.0f} ms"


def test_the_address_loses_its_token(served: Dashboard, look: Open) -> None:
    assert "token" not in look(served).url


def test_every_section_shows_the_run(served: Dashboard, look: Open) -> None:
    page = look(served)
    see_everything(page)
    assert page.title() == "synthetic · Pairloom"
    assert page.inner_text("#status").startswith("■ finished")
    assert "not comparable with published tables" in page.inner_text("#warning")
    assert "87.5 %" in page.inner_text("#tiles")
    assert page.locator("#success-tasks tbody tr").count() == 4
    assert page.locator("#heat td").count() == 4 * 50
    assert page.locator("#pairs-body tbody tr").count() == 6
    assert page.locator(".plot canvas").count() == 1 + 8 + 4
    assert page.locator("#actors-body tbody tr").first.inner_text().split()[:4] == ["0", "5", "✓", "in"]
    assert weights_hash(5)[:8] in page.inner_text("#actors-body")
    assert "4 of 4 rollout actors ready" in page.inner_text("#cluster-body")
    assert "Autoscaler: " in page.inner_text("#cluster-body")
    assert "rollout: no spot machine is left in this zone" in page.inner_text("#cluster-body")
    assert "undone by the tripwire" in page.inner_text("#incidents-body")
    assert page.locator("#compare-body tbody tr").count() == 2


def test_an_appended_line_shows_without_a_reload(tmp_path: Path, look: Open) -> None:
    run = Writer(tmp_path / "live")
    run.publish(0)
    dashboard = Dashboard(run.folder)
    dashboard.start()
    page = look(dashboard)
    page.evaluate("document.body.dataset.same = 'page'")
    assert page.inner_text("#status").startswith("● running")
    run.update(0, 30)
    run.event("tripped", round=0, version=0, reason="chosen log-prob fell")
    cell = Cell(suite="libero_object", task_id=1, init_state=8, seed=3)
    run.episodes([episode("evaluation", -1, cell, "success", version=0, time=run.now)])
    page.wait_for_selector("#incidents-body >> text=undone by the tripwire", timeout=5000)
    page.wait_for_selector("#heat td.all", timeout=5000)
    assert page.get_attribute("body", "data-same") == "page"
    dashboard.stop()


def test_it_says_when_the_server_is_gone_and_finds_it_again(tmp_path: Path, browser: Browser) -> None:
    run = Writer(tmp_path / "live")
    dashboard = Dashboard(run.folder, token="kept")
    dashboard.start()
    port = int(dashboard.url.split(":")[2].split("/")[0])
    page = browser.new_context().new_page()
    page.goto(dashboard.url)
    page.wait_for_selector("#link.up")
    assert page.is_hidden("#lost")
    dashboard.stop()
    page.wait_for_selector("#lost", state="visible", timeout=6000)
    run.publish(0)
    again = Dashboard(run.folder, port=port, token="kept")
    again.start()
    page.wait_for_selector("#lost", state="hidden", timeout=10_000)
    page.wait_for_selector(f"#tiles >> text={weights_hash(0)[:8]}", timeout=5000)
    page.context.close()
    again.stop()


def test_without_the_token_there_is_one_line(served: Dashboard, browser: Browser) -> None:
    page = browser.new_context().new_page()
    answer = page.goto(served.url.split("?")[0])
    assert answer is not None
    assert answer.status == 401
    assert page.inner_text("body").startswith("401: the token is missing or wrong")
    page.context.close()


def test_a_success_and_a_failure_play_in_step(served: Dashboard, look: Open) -> None:
    page = look(served, motion="no-preference")
    page.wait_for_selector("#contrast-body canvas")
    assert page.inner_text(".controls button >> nth=0") == "❚❚ Pause"
    page.wait_for_selector("#contrast-body >> text=step 16 of 88")
    page.fill(".controls input", "12")
    assert page.inner_text(".controls button >> nth=0") == "► Play"
    assert page.inner_text(".side.good span") == "ended after 88 steps"
    assert page.inner_text(".side.poor span") == "step 96 of 128"
    pixel = "c => [...c.getContext('2d').getImageData(40, 20, 1, 1).data]"
    assert page.locator(".side canvas").first.evaluate(pixel)[3] == 255
    assert page.locator("#contrast-pick option").count() == 6


def test_reduced_motion_starts_still(served: Dashboard, look: Open) -> None:
    page = look(served)
    page.wait_for_selector("#contrast-body canvas")
    assert page.inner_text(".controls button >> nth=0") == "► Play"
    page.click(".controls button >> nth=0")
    page.wait_for_selector("#contrast-body >> text=step 8 of 88")


def test_the_keyboard_reaches_everything(served: Dashboard, look: Open) -> None:
    page = look(served)
    page.wait_for_selector("#contrast-body canvas")
    see_everything(page)
    page.evaluate("scrollTo(0, 0)")
    reached = []
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(e => e.id || e.getAttribute('href') || e.className || e.tagName)(document.activeElement)"
            )
        )
    wanted = ["#success", "theme", "success-task", "plot-area", "contrast-pick", "to-compare"]
    assert [name for name in wanted if name not in reached] == []
    assert reached[0] == "#success"  # skips to the results
    page.focus("#heat td[tabindex='0']")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.inner_text("#heat-says").startswith("object 1, state 2: ")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.focus("#learning-body .plot-area")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#learning-body .readout >> nth=0").startswith("optimizer step 360: chosen ")


def test_every_plot_says_what_it_shows(served: Dashboard, look: Open) -> None:
    page = look(served)
    see_everything(page)
    labels = page.eval_on_selector_all(
        ".plot-area", "areas => areas.map(area => area.getAttribute('aria-label'))"
    )
    assert len(labels) == 13
    assert [label for label in labels if "latest at" not in (label or "")] == []
    page.click("#speed-body summary >> nth=0")
    # The numbers are written when they are first asked for.
    expect(page.locator("#speed-body table >> nth=0").locator("tbody tr")).to_have_count(40)
    unnamed = "e => !(e.ariaLabel || e.innerText || e.labels?.length)"
    buttons = page.eval_on_selector_all("button, select, input", f"all => all.filter({unnamed}).length")
    assert buttons == 0


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_sticks_out_of_a_small_screen(served: Dashboard, look: Open, width: int) -> None:
    page = look(served, width=width)
    see_everything(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_and_light_follow_the_system_and_the_button(served: Dashboard, look: Open) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = look(served), look(served, scheme="dark")
    assert (light.evaluate(ground), dark.evaluate(ground)) == ("rgb(246, 245, 242)", "rgb(17, 22, 26)")
    light.click("#theme")
    light.click("#theme")
    assert light.evaluate(ground) == "rgb(17, 22, 26)"
    light.reload()
    light.wait_for_selector("html[data-updates]", state="attached")
    assert light.evaluate(ground) == "rgb(17, 22, 26)"


def write_large(folder: Path) -> Writer:
    """60 tasks under 25 versions, each of their 50 states driven, and 10,000 points in each series."""
    run = Writer(folder, tasks=60)
    for version in range(25):
        run.episodes(
            [
                episode(
                    "evaluation" if state >= 30 else "rollout",
                    version,
                    Cell(suite=suite, task_id=task, init_state=state, seed=version),
                    run.outcome(task, version // 3),
                    version=version,
                    time=run.now,
                )
                for suite, task in run.tasks
                for state in range(version % 2, 50, 2)
            ]
        )
    for index in range(20):
        run.mine(index, 600)
        run.update(index, 500)
    for _ in range(10_000):
        run.now += 5
        run.fleet(24)
    return run


def keep_going(run: Writer) -> None:
    """Lines that change every large section, for two and a half seconds."""
    for state in range(5):
        run.fleet(24)
        run.update(20 + state, 5)
        cell = Cell(suite="libero_object", task_id=state, init_state=state, seed=99)
        run.episodes([episode("rollout", 20, cell, "success", version=24, time=run.now)])
        time.sleep(0.5)


def test_it_survives_ten_thousand_points_a_series_at_sixty_tasks(tmp_path: Path, look: Open) -> None:
    run = write_large(tmp_path / "large")
    dashboard = Dashboard(run.folder)
    dashboard.start()
    page, drawn = quickest(look, dashboard, within_ms=4000)
    size = page.evaluate("fetch('/api/state').then(a => a.text()).then(t => t.length)")
    state = json.loads(page.evaluate("fetch('/api/state').then(a => a.text())"))["sections"]
    columns = [
        len(column)
        for plot in (*state["learning"]["plots"].values(), state["speed"]["act_ms"])
        for column in plot.values()
    ]
    assert 900 < max(columns) <= 1000
    see_everything(page)
    assert page.locator("#heat td").count() == 60 * 50
    # Responsive: while lines arrive, no frame is long in coming.
    writing = threading.Thread(target=keep_going, args=(run,))
    writing.start()
    worst = page.evaluate(
        """async () => { let worst = 0, last = performance.now(); const end = last + 3000;
        while (last < end) { await new Promise(requestAnimationFrame);
          const now = performance.now(); worst = Math.max(worst, now - last); last = now; }
        return worst; }"""
    )
    writing.join()
    run.event("promoted", round=20, version=25, cells=40, before=20, after=25, p_worse=0.9)
    asked = time.monotonic()
    page.wait_for_selector("#incidents-body >> text=Version 25 promoted", timeout=8000)
    updated = time.monotonic() - asked
    figures = (
        f"drawn {drawn:.0f} ms after navigation; {size / 1000:.0f} kB of state; "
        f"longest frame {worst:.0f} ms; an event shown after {updated:.2f} s"
    )
    print(figures)
    assert drawn < 4000, figures
    assert worst < 2000, figures
    assert updated < 6, figures
    dashboard.stop()
