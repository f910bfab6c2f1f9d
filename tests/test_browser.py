# ruff: noqa: E402 - what is optional is looked for first
"""The explorer's page in a browser: what it shows is what the library says, by clicks and by keys."""

import base64
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra web is not installed")
sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

import golddiff as gd
from serving import Serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
ROWS = 300
expect = sync.expect if CHROMIUM else None


class Server:
    """`golddiff serve` in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, "-m", "golddiff", "serve", "digits", "--limit", str(ROWS), "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().split()[-1]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def bank():
    return gd.Bank.build("digits", limit=ROWS)


@pytest.fixture(scope="module")
def server(bank):
    running = Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture
def fresh(browser, server):
    """An empty page; in the end nothing was asked of anyone but the server, and the console has no errors."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(15_000)
    page.asked, page.wrong, page.expected_errors = [], [], 0
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    yield page
    assert all(url.startswith((server.address, "data:")) for url in page.asked)
    if not page.expected_errors:
        assert page.wrong == []
    page.close()


@pytest.fixture
def page(fresh, server):
    """The page when its first run is done."""
    fresh.goto(server.address)
    done(fresh)
    return fresh


def done(page, state="finished", panel="main"):
    page.wait_for_selector(f".panel[data-panel={panel}][data-state={state}]")


def steps_of(bank, method="golddiff", seed=0, steps=10, label=None, **options):
    return list(gd.trajectory(gd.denoiser(method, bank, **options), [seed], steps=steps, labels=label))


def shown(page, name, panel="main"):
    """The pixels of a picture of a panel."""
    source = page.locator(f".panel[data-panel={panel}] .{name}").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def pixels(image):
    return ((image[0].double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def shares(page, place):
    return [
        (int(thumb.get_attribute("data-row")), float(thumb.get_attribute("data-share")))
        for thumb in page.locator(f"{place} .thumb").all()
    ]


def readout(page, term):
    return (
        page.locator("#readout div", has=page.locator("dt", has_text=re.compile(f"^{term}$")))
        .locator("dd")
        .inner_text()
    )


def at_step(page, index):
    """Waits until the sources of a step are shown."""
    page.wait_for_selector(f"#golden[data-step='{index}']")


def test_the_first_run_shows_what_the_library_computes(page, bank):
    last = steps_of(bank)[-1]
    assert np.array_equal(shown(page, "mean"), pixels(last.posterior.mean[0]))
    assert np.array_equal(
        shown(page, "noisy"), pixels(last.x_t[0] / float(torch.hypot(last.noise.alpha, last.noise.sigma)))
    )
    at_step(page, 9)
    rows, weights = last.posterior.weights(0)
    true = dict(zip(rows.tolist(), weights.mean(1).tolist(), strict=True))
    listed = shares(page, "#golden")
    assert len(listed) == 24
    assert [share for _, share in listed] == pytest.approx(sorted(true.values())[::-1][:24])
    assert all(share == pytest.approx(true[row]) for row, share in listed)
    dots = [float(dot.get_attribute("data-ess")) for dot in page.locator("#support-chart .dot.main").all()]
    assert dots == pytest.approx([float(step.posterior.ess.quantile(0.5)) for step in steps_of(bank)])
    assert readout(page, "step") == "10 of 10"
    assert "300 images of 8 × 8" in page.locator("#bank").inner_text()


def test_settings_are_chosen_by_keys_and_enter_runs(page, bank):
    page.locator("#method").select_option("pca")
    page.locator("#label").select_option(label="3")
    page.locator("#steps").fill("4")
    page.locator("#seed").fill("7")
    page.keyboard.press("Enter")
    expect(page.locator("#slider")).to_have_attribute("max", "3")
    done(page)
    assert np.array_equal(shown(page, "mean"), pixels(steps_of(bank, "pca", 7, 4, 3)[-1].posterior.mean[0]))
    assert "seed=7" in page.url
    page.reload()
    done(page)
    assert page.locator("#method").input_value() == "pca"
    assert np.array_equal(shown(page, "mean"), pixels(steps_of(bank, "pca", 7, 4, 3)[-1].posterior.mean[0]))
    page.locator("#retrieval").select_option("paper")
    page.locator("#schedule").select_option("edm")
    page.locator("#sampler").select_option("heun")
    page.locator("#run").click()
    done(page)
    assert readout(page, "σ") == "0.0020" or readout(page, "σ") == "0.00200"
    page.locator("#steps").fill("1000")
    page.locator("#run").click()
    assert not page.evaluate("document.querySelector('#steps').checkValidity()")


def test_steps_are_scrubbed_and_played(page, bank):
    steps = steps_of(bank)
    page.locator("#slider").focus()
    for key, index in (("ArrowLeft", 8), ("Home", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        assert readout(page, "step") == f"{index + 1} of 10"
        assert np.array_equal(shown(page, "mean"), pixels(steps[index].posterior.mean[0]))
    page.locator("h1").click()  # away from any control
    page.keyboard.press("ArrowRight")
    assert readout(page, "step") == "3 of 10"
    assert float(readout(page, "noise σ / α")) == pytest.approx(float(steps[2].noise.rho), rel=0.01)
    at_step(page, 2)
    weights = steps[2].posterior.weights(0)[1]
    assert shares(page, "#golden")[0][1] == pytest.approx(float(weights.mean(1).max()))
    page.keyboard.press("End")
    page.keyboard.press(" ")
    expect(page.locator("#play")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#readout dd").first).to_have_text("2 of 10")
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_attribute("aria-pressed", "false")


def test_a_pixel_shows_its_training_sources(page, bank):
    steps = steps_of(bank)
    mean = page.locator(".panel[data-panel=main] .pick")
    box = mean.bounding_box()
    mean.click(position={"x": box["width"] * 4.5 / 8, "y": box["height"] * 2.5 / 8})
    page.wait_for_selector("#pixel-list[data-y='2'][data-x='4']")
    rows, weights = steps[9].posterior.weights(0, [2 * 8 + 4])
    true = dict(zip(rows.tolist(), weights[:, 0].tolist(), strict=True))
    listed = shares(page, "#pixel-list")
    assert all(share == pytest.approx(true[row]) for row, share in listed)
    assert [share for _, share in listed] == pytest.approx(sorted(true.values())[::-1][: len(listed)])
    mark = page.locator("#pixel-list .mark").first
    assert mark.evaluate("m => [m.style.left, m.style.top]") == ["50%", "25%"]
    mean.focus()
    for key in ("ArrowDown", "ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#pixel-list[data-y='3'][data-x='2']")
    assert shares(page, "#pixel-list")[0][1] == pytest.approx(
        float(steps[9].posterior.weights(0, [3 * 8 + 2])[1].max())
    )
    assert readout(page, "step") == "10 of 10"  # arrows on the mean move the pixel, not the step
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    page.wait_for_selector("#pixel-list[data-step='0']")
    page.keyboard.press("Escape")
    expect(page.locator("#pixel")).to_be_hidden()


def test_the_source_map_says_which_row_dominates(page, bank):
    page.keyboard.press("m")
    expect(page.locator(".panel[data-panel=main] .map")).to_be_visible()
    rows, weights = steps_of(bank)[-1].posterior.weights(0)
    dominant = rows[weights.argmax(0)].reshape(8, 8).numpy()
    colours = shown(page, "map")
    for thumb in page.locator("#golden .thumb:has(.swatch)").all():
        swatch = thumb.locator(".swatch").evaluate("s => getComputedStyle(s).backgroundColor")
        mine = (colours == [int(part) for part in re.findall(r"\d+", swatch)]).all(-1)
        assert np.array_equal(mine, dominant == int(thumb.get_attribute("data-row")))
    page.locator("#map-button").click()
    expect(page.locator(".panel[data-panel=main] .map")).to_be_hidden()


def test_images_and_classes_are_removed_and_put_back(page, bank):
    at_step(page, 9)
    row = shares(page, "#golden")[0][0]
    page.locator(f"#golden .thumb[data-row='{row}'] .remove").click()
    done(page, panel="without")
    true = steps_of(bank.without(rows=[row]))[-1].posterior.mean[0]
    assert np.array_equal(shown(page, "mean", "without"), pixels(true))
    assert page.locator(".panel[data-panel=without] .badge").inner_text() == "1 removed"
    page.locator("#statistics").select_option("keep")
    page.wait_for_timeout(50)
    done(page, panel="without")
    true = steps_of(bank.without(rows=[row], statistics="keep"))[-1].posterior.mean[0]
    assert np.array_equal(shown(page, "mean", "without"), pixels(true))
    page.locator("#drop-class").select_option("8")
    page.locator("#drop").focus()
    page.keyboard.press("Enter")
    lacking = len(bank) - len(bank.without(rows=[row], labels=[8]))
    expect(page.locator(".panel[data-panel=without] .badge")).to_have_text(f"{lacking} removed")
    done(page, panel="without")
    true = steps_of(bank.without(rows=[row], labels=[8], statistics="keep"))[-1].posterior.mean[0]
    assert np.array_equal(shown(page, "mean", "without"), pixels(true))
    page.locator("#which").select_option("without")
    expect(page.locator("#golden .who", has_text=re.compile(" 8$"))).to_have_count(0)
    assert page.locator("#removed .chip").count() == 2
    page.locator("h1").click()
    page.keyboard.press("u")
    assert page.locator("#removed .chip").all_inner_texts()[0].startswith(f"#{row}")
    page.locator("#restore").click()
    expect(page.locator(".panel[data-panel=without]")).to_have_count(0)


def test_two_methods_are_compared(page, bank):
    page.locator("#other").select_option("optimal")
    done(page, panel="compare")
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    for name, method in (("main", "golddiff"), ("compare", "optimal")):
        assert np.array_equal(shown(page, "mean", name), pixels(steps_of(bank, method)[1].posterior.mean[0]))
    assert page.locator("#support-chart .line.compare").count() == 1
    page.locator("#other").select_option("wiener")
    expect(page.locator(".panel[data-panel=compare] h2")).to_have_text("wiener")
    done(page, panel="compare")
    page.locator("#which").select_option("compare")
    expect(page.locator("#golden-note")).to_contain_text("Wiener has no rows")
    assert page.locator("#golden .thumb").count() == 0
    page.locator("#other").select_option("")
    expect(page.locator(".panel")).to_have_count(1)
    page.locator("#method").select_option("els")
    page.locator("#steps").fill("2")
    page.keyboard.press("Enter")
    expect(page.locator("#golden-note")).to_contain_text("weighs patches")


def test_the_check_against_the_exact_scan(page, bank):
    page.locator("#retrieval").select_option("paper")
    page.locator("#run").click()
    done(page)
    page.locator("#check").click()
    expect(page.locator("#check-status")).to_contain_text("Largest error")
    full = gd.denoiser("golddiff", bank, retrieval="full")
    true = [
        float((step.posterior.mean - full(step.x_t, step.noise).mean).double().square().mean().sqrt())
        for step in steps_of(bank, retrieval="paper")
    ]
    table = [float(row.get_attribute("data-rms")) for row in page.locator("#check-table tbody tr").all()]
    assert table == pytest.approx(true, rel=1e-4)
    page.locator("#retrieval").select_option("full")
    page.locator("#run").click()
    done(page)
    page.locator("h1").click()
    page.keyboard.press("e")
    expect(page.locator("#check-status")).to_contain_text("Largest error 0 ")


def test_a_run_is_cancelled(page):
    page.locator("#method").select_option("els")
    page.locator("#steps").fill("200")
    page.locator("#run").click()
    expect(page.locator("#readout dd").first).to_have_text(re.compile("of 200$"))
    page.locator("#cancel").click()
    done(page, "cancelled")
    expect(page.locator(".panel[data-panel=main] .message")).to_contain_text("Cancelled after")
    page.locator("#run").click()
    page.wait_for_selector(".panel[data-panel=main][data-state=running]")
    page.locator("h1").click()
    page.keyboard.press("Escape")
    done(page, "cancelled")
    page.locator("#method").select_option("golddiff")
    page.locator("#steps").fill("3")
    page.keyboard.press("Enter")
    done(page)


def test_two_users_at_once(page, browser, server, bank):
    """Both run at the same time, each gets its own image, and one who leaves half way does not trouble the other."""
    other = browser.new_page()
    other.goto(server.address)
    done(other)
    for user, seed in ((page, "5"), (other, "6")):
        user.locator("#seed").fill(seed)
        user.locator("#steps").fill("12")
        user.locator("#run").click()
    for user, seed in ((page, 5), (other, 6)):
        expect(user.locator("#readout dd").first).to_have_text("12 of 12")
        done(user)
        assert np.array_equal(shown(user, "mean"), pixels(steps_of(bank, seed=seed, steps=12)[-1].posterior.mean[0]))
    other.locator("#method").select_option("els")
    other.locator("#steps").fill("200")
    other.locator("#run").click()
    expect(other.locator("#readout dd").first).to_have_text(re.compile("of 200$"))
    other.close()
    page.locator("#steps").fill("11")
    page.locator("#run").click()
    expect(page.locator("#readout dd").first).to_have_text("11 of 11")
    done(page)
    assert np.array_equal(shown(page, "mean"), pixels(steps_of(bank, seed=5, steps=11)[-1].posterior.mean[0]))


def test_wrong_addresses_say_where_to_go(fresh, server):
    fresh.expected_errors = 1  # the console notes the 404
    assert fresh.goto(f"{server.address}nowhere").status == 404
    fresh.locator("a").click()
    done(fresh)
    fresh.goto("about:blank")
    fresh.goto(f"{server.address}#method=magic&steps=3")
    done(fresh)
    expect(fresh.locator("#banner")).to_contain_text("method=magic")
    assert fresh.locator("#method").input_value() == "golddiff"
    assert readout(fresh, "step") == "3 of 3"
    fresh.asked = [url for url in fresh.asked if url != "about:blank"]


def test_a_run_that_the_bank_refuses_says_why(page):
    page.expected_errors = 1  # the console notes the refusal
    page.locator("#label").select_option("3")
    page.locator("#run").click()
    done(page)
    page.locator("#drop-class").select_option("3")
    page.locator("#drop").click()
    done(page, "failed", "without")
    expect(page.locator(".panel[data-panel=without] .message")).to_contain_text("no image has label 3")


def test_help_and_focus_by_keys(page):
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    reached = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    wanted = {
        "method",
        "retrieval",
        "label",
        "seed",
        "steps",
        "schedule",
        "sampler",
        "run",
        "other",
        "drop",
        "frame pick",
    }
    assert wanted | {"slider", "play", "map-button"} <= reached
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button')]"
        ".filter((e) => !e.labels?.length && !e.textContent.trim() && !e.getAttribute('aria-label')).map((e) => e.id)"
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_one_column_and_no_sideways_scroll(browser, server, scheme):
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    phone.goto(server.address)
    done(phone)
    phone.locator("#other").select_option("optimal")
    done(phone, panel="compare")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [phone.locator(place).bounding_box() for place in ("#panels", "#settings", "#golden")]
    assert len({round(box["x"]) for box in boxes[:2]}) == 1
    dark = phone.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")
    phone.close()


def test_the_server_goes_and_comes_back(browser, bank):
    first = Server()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(first.address)
    done(page)
    first.stop()
    page.locator("#run").click()
    expect(page.locator("#banner")).to_contain_text("The server is gone")
    second = Server(int(first.address.rstrip("/").rsplit(":", 1)[1]))
    try:
        expect(page.locator("#banner")).to_be_hidden(timeout=15_000)
        done(page)
        assert np.array_equal(shown(page, "mean"), pixels(steps_of(bank)[-1].posterior.mean[0]))
        page.locator(".panel .pick").click(position={"x": 5, "y": 5})
        page.wait_for_selector("#pixel-list[data-y='0'][data-x='0'] .thumb")
    finally:
        second.stop()
        page.close()


def test_nothing_in_the_page_names_another_site():
    folder = Path(gd.__file__).parent / "explorer" / "page"
    for file in folder.iterdir():
        found = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+[^\s\"']*", file.read_text())
        assert [url for url in found if not url.startswith("http://www.w3.org/")] == []


def test_a_refusal_is_shown_in_its_words(browser):
    """A server that has no room for any question says so; the page does too."""
    server = Serving(QUESTIONS=0)
    page = browser.new_page()
    page.goto(server.address)
    done(page, "failed")
    said = "too many questions are waiting: ask again in a moment"
    assert page.locator(".panel[data-panel=main] .message").inner_text() == said
    page.close()
    assert server.stop() == (0, "")
