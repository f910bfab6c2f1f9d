"""Pictures of the explorer for the docs: python benchmarks/screenshots.py (needs chromium, cifar10 and the extras)."""

import argparse
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
COLOURS = 256


@contextmanager
def served(*bank: str):
    """The address of `golddiff serve` with a bank."""
    command = [sys.executable, "-m", "golddiff", "serve", *bank, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().split()[-1]
        server.send_signal(signal.SIGINT)


def finished(page: Page, panel: str = "main") -> None:
    page.wait_for_selector(f".panel[data-panel={panel}][data-state=finished]", timeout=120_000)


def at_step(page: Page, step: int) -> None:
    page.locator("#slider").fill(str(step - 1))
    page.wait_for_selector(f"#golden[data-step='{step - 1}']", timeout=60_000)


def pick(page: Page, y: float, x: float) -> None:
    """Clicks a pixel, given as parts of height and width."""
    mean = page.locator(".panel[data-panel=main] .pick")
    box = mean.bounding_box()
    mean.click(position={"x": box["width"] * x, "y": box["height"] * y})
    page.wait_for_selector("#pixel-list .thumb", timeout=60_000)
    page.mouse.move(0, 0)


def explorer(page: Page) -> None:
    at_step(page, 7)
    page.locator("#check").click()
    page.wait_for_selector("#check-status:has-text('Largest')", timeout=120_000)


def sources(page: Page) -> None:
    at_step(page, 8)
    pick(page, 0.5, 0.35)
    page.locator("#map-button").click()
    page.wait_for_selector(".map:visible", timeout=120_000)
    page.mouse.move(0, 0)


def compare(page: Page) -> None:
    page.locator("#other").select_option("optimal")
    finished(page, "compare")
    at_step(page, 7)
    row = page.locator("#golden .thumb").first
    row.hover()
    row.locator(".remove").click()
    page.locator("#drop-class").select_option("5")
    page.locator("#drop").click()
    finished(page, "without")


def phone(page: Page) -> None:
    at_step(page, 8)


def save(page: Page, path: Path) -> None:
    """A screenshot in 256 colours, which keeps it small."""
    page.wait_for_timeout(600)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    out = parser.parse_args().out
    desk, hand = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
    plans: list[tuple[tuple[str, ...], str, dict[str, int], str, Callable[[Page], None]]] = [
        (("cifar10", "--limit", "5000"), "explorer", desk, "light", explorer),
        (("cifar10", "--limit", "5000"), "explorer-sources", desk, "light", sources),
        (("digits",), "explorer-compare", desk, "dark", compare),
        (("cifar10", "--limit", "5000"), "explorer-phone", hand, "light", phone),
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        for bank in dict.fromkeys(plan[0] for plan in plans):
            with served(*bank) as address:
                for _, name, size, scheme, act in (plan for plan in plans if plan[0] == bank):
                    page = browser.new_page(viewport=size, color_scheme=scheme)
                    page.goto(address)
                    finished(page)
                    act(page)
                    save(page, out / f"{name}.png")
                    page.close()
        browser.close()


if __name__ == "__main__":
    main()
