"""The page in a real browser: it loads from its file alone, shows its pictures, and follows dark and light mode."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager

import pytest
from builders import make_point, make_table, write_folder
from contrast import AA, contrast

from fp8gate.calibrate.report.page.write_page import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,1000"),
)
GROUND = {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}
IMAGES = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.currentSrc, i.alt])"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser here: apt-get install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    shapes = [(m, k, n) for m in (1024, 8192) for k in (1024, 4096) for n in (1024, 4096)]
    tables = [
        make_table(*(make_point(*at, at[2] / 2048) for at in shapes), recipe=recipe)
        for recipe in ("rowwise", "rowwise_with_gw_hp")
    ]
    return write_report([write_folder(folder, *tables) / "nvidia-h200"], folder / "out")[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, page, scheme="light"):
    """The page, in this mode; what earlier pages logged is forgotten."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def requested(browser):
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_it_loads_from_its_file_alone(browser, page, tmp_path):
    """Nothing beside it: a copy elsewhere is the whole page."""
    copy = tmp_path / "index.html"
    copy.write_bytes(page.read_bytes())
    opened(browser, copy)
    assert browser.title == "fp8gate: NVIDIA H200"
    urls = requested(browser)
    assert [url for url in urls if not url.startswith("data:")] == [copy.as_uri()]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_picture_is_there_in_both_modes(browser, page, scheme):
    opened(browser, page, scheme)
    images = browser.execute_script(IMAGES)
    assert len(images) == 4
    for complete, width, height, _, alt in images:
        assert complete
        assert min(width, height) > 300
        assert "speedup" in alt or "maps" in alt
    assert browser.get_log("browser") == []


def test_pictures_and_ground_follow_the_mode(browser, page):
    shown = {}
    for scheme, ground in GROUND.items():
        opened(browser, page, scheme)
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == ground
        shown[scheme] = {source for _, _, _, source, _ in browser.execute_script(IMAGES)}
    assert not shown["light"] & shown["dark"]


@contextmanager
def window(browser, width):
    """The page in a window of this width."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [360, 500, 1400])
def test_nothing_is_wider_than_the_window(browser, page, width):
    """Tables and wide pictures scroll in boxes of their own, also when everything is open."""
    opened(browser, page)
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    with window(browser, width):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        texts = "[...document.querySelectorAll('p, li, h1, h2, h3, summary')]"
        assert browser.execute_script(f"return {texts}.filter(e => e.scrollWidth > innerWidth).length") == 0


@pytest.mark.parametrize("width", [500, 1400])
def test_the_verdict_comes_first_and_fits(browser, page, width):
    opened(browser, page)
    with window(browser, width):
        first = "return [document.querySelector('section').id, document.querySelector('table').className]"
        assert browser.execute_script(first) == ["verdict", "verdict"]
        box = "const b = document.querySelector('table.verdict').parentElement; return [b.scrollWidth, b.clientWidth]"
        needed, shown = browser.execute_script(box)
        assert needed <= shown
        text = browser.execute_script("return document.querySelector('#verdict').innerText")
        assert "llama3-8b" in text
        assert "predicted from the table" in text


def test_a_narrow_window_has_an_overview_of_its_own_that_is_not_scaled_down(browser, page):
    opened(browser, page)
    shown = {}
    for width in (500, 1400):
        with window(browser, width):
            opened(browser, page)
            natural, drawn = browser.execute_script(
                "const i = document.images[0]; return [i.naturalWidth, i.getBoundingClientRect().width]"
            )
            shown[width] = natural
            assert drawn > 0.75 * natural or width == 1400
    assert shown[500] < 700 < shown[1400]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(browser, page, scheme):
    opened(browser, page, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    pairs = browser.execute_script(
        """const ground = e => { const c = getComputedStyle(e).backgroundColor;
             return c === 'rgba(0, 0, 0, 0)' && e.parentElement ? ground(e.parentElement) : c };
           return [...new Set([...document.querySelectorAll('p, li, th, td, a, summary, .note, .muted')].map(
             e => getComputedStyle(e).color + ' on ' + ground(e)))]"""
    )
    assert len(pairs) >= 5
    for pair in pairs:
        ink, ground = (rgb(colour) for colour in pair.split(" on "))
        assert contrast(ink, ground) > AA, pair


def rgb(css):
    return [int(part) / 255 for part in re.findall(r"\d+", css)[:3]]


def test_this_would_notice_a_picture_from_elsewhere(browser, page, tmp_path):
    """The page's policy refuses it, and the console says so."""
    bad = tmp_path / "index.html"
    bad.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/a.png"></body>'))
    opened(browser, bad)
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
