"""Pictures of the dashboard for the README: a run folder as its page shows it, light, dark and on a phone.

    python -m benchmarks.screenshots runs/quickstart [--compare runs/other] [--output docs/screenshots]

Wants chromium (`make browser`).
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from dashboard.server import Dashboard

SIZES = {"light": (1280, 1480), "dark": (1280, 1480), "phone": (360, 1800)}
"""Width and height of each picture, CSS pixels."""
MOST_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--compare", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("docs/screenshots"))
    arguments = parser.parse_args()
    program = shutil.which("chromium")
    if program is None:
        sys.exit("no chromium on PATH; `make browser` installs it")
    arguments.output.mkdir(parents=True, exist_ok=True)
    dashboard = Dashboard(arguments.run, compare=arguments.compare)
    dashboard.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name in SIZES:
            path = arguments.output / f"dashboard-{name}.png"
            print(f"{path}: {take(browser, dashboard.url, name, path) / 1000:.0f} kB")
        browser.close()
    dashboard.stop()


def take(browser: Browser, url: str, name: str, path: Path) -> int:
    """Writes one picture of at most MOST_BYTES; returns its size in bytes."""
    width, height = SIZES[name]
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if name == "dark" else "light",
        reduced_motion="reduce",
        device_scale_factor=1.5 if name == "phone" else 1,
    )
    page.goto(url)
    page.wait_for_selector("html[data-updates]", state="attached")
    if page.locator("#contrast-pick option").count():
        page.wait_for_selector("#contrast-body canvas")
        # Late enough for the two to differ.
        last = int(page.get_attribute(".controls input", "max") or "0")
        page.fill(".controls input", str(last // 2))
        page.evaluate("document.activeElement.blur(); scrollTo({top: 0, behavior: 'instant'})")
    page.wait_for_timeout(700)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # 256 colours hold a page of flat colours, and take a third of the bytes.
    shot.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    page.close()
    size = path.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"{path} has {size} bytes, more than {MOST_BYTES}; lower SIZES in benchmarks/screenshots.py")
    return size


if __name__ == "__main__":
    main()
