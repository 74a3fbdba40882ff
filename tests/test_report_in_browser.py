"""The page in a real browser: it loads from its file alone, shows its pictures, and follows dark and light mode."""

from __future__ import annotations

import json
import shutil

import pytest
from builders import make_point, make_table, write_folder

from fp8gate.calibrate.report.page import write_report

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


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(browser, page, width):
    opened(browser, page)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_this_would_notice_a_picture_from_elsewhere(browser, page, tmp_path):
    """The page's policy refuses it, and the console says so."""
    bad = tmp_path / "index.html"
    bad.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/a.png"></body>'))
    opened(browser, bad)
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
