"""The report page in a real browser: charts, filters, the episode reader, hostile text, narrow windows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dagger.observability.report import write_report
from megatron_dagger.observability.report_data import gather
from megatron_dagger.observability.rundir import read_run
from megatron_dagger.store.aggregated import DataStore
from tests.support.run_directory import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")

if CHROMIUM is None or CHROMEDRIVER is None:
    pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the extra dev)")

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-quic", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "synthetic", rounds=3, tasks=6, heldout=4)
    write_report(run, data=DataStore.open(run / "data.zarr"), evaluations=DataStore.open(run / "evaluations.zarr"))
    return run


@pytest.fixture(scope="module")
def episodes(run: Path) -> list[dict[str, Any]]:
    stores = [DataStore.open(run / name) for name in ("data.zarr", "evaluations.zarr")]
    listed: list[dict[str, Any]] = gather(read_run(run), *stores, max_episodes=200)["episodes"]
    return listed


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER, log_output=os.devnull)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def visit(browser: Any, run: Path) -> Iterator[Callable[..., Any]]:
    """Yield a function that opens a page. Afterwards the console and the list of fetched resources must be empty."""

    def opened(path: Path = run / "report.html", *, width: int = 1200, height: int = 900, dark: bool = False) -> Any:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(path.as_uri())
        return browser

    yield opened
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def css(browser: Any, selector: str) -> list[Any]:
    elements: list[Any] = browser.find_elements("css selector", selector)
    return elements


def choose(browser: Any, name: str, value: str) -> None:
    [option] = [o for o in css(browser, f"#filter-{name} option") if o.get_attribute("value") == value]
    option.click()


def test_charts_have_curves_axes_labels_and_hover_values(visit: Callable[..., Any]) -> None:
    browser = visit()
    for name in ("success", "teacher", "agreement", "labels", "loss", "drift"):
        [figure] = css(browser, f"#chart-{name}")
        assert figure.find_element("tag name", "figcaption").text
        texts = [t.text for t in figure.find_elements("css selector", "svg text")]
        assert len([t for t in texts if any(c.isdigit() for c in t)]) >= 4, texts  # tick labels
        assert any(t in ("round", "optimizer step, all rounds") or t.startswith("turn of") for t in texts)
        assert "NaN" not in figure.get_attribute("innerHTML")
    assert len(css(browser, "#chart-success .curve")) == 3
    assert len(css(browser, "#chart-success .band")) == 2
    assert len(css(browser, "#chart-agreement .curve")) == 3
    assert len(css(browser, "#chart-labels .bar")) == 3
    assert len(css(browser, "#rounds tbody tr")) == 3
    assert len(css(browser, "#chart-drift .curve")) == 2
    assert [row.text.split()[0] for row in css(browser, "#drift-rounds tbody tr")] == ["1", "2"], "the diagnosed rounds"
    assert css(browser, "#numbers b")[0].text.endswith("%")
    assert not css(browser, "#tip")[0].is_displayed()
    for name, expected in (
        ("success", "held out:"),
        ("loss", "running mean"),
        ("agreement", "From turn"),
        ("labels", "labelled turn"),
        ("drift", "off it:"),
    ):
        [area] = css(browser, f"#chart-{name} .area")
        webdriver.ActionChains(browser).scroll_to_element(area).move_to_element(area).perform()
        assert css(browser, "#tip")[0].is_displayed()
        assert expected in css(browser, "#tip")[0].text


def test_filters_narrow_the_list(visit: Callable[..., Any], episodes: list[dict[str, Any]]) -> None:
    browser = visit()

    def names() -> list[str]:
        return [item.text for item in css(browser, "#list .item b")]

    def expected(**values: Any) -> list[str]:
        return [e["task"] for e in episodes if all(e[k] == v for k, v in values.items())]

    assert names() == expected()
    choose(browser, "round", "1")
    assert names() == expected(round=1)
    choose(browser, "kind", "heldout")
    assert names() == expected(round=1, kind="heldout")
    choose(browser, "outcome", "unsolved")
    assert names() == expected(round=1, kind="heldout", solved=False)
    choose(browser, "round", "")
    choose(browser, "kind", "")
    choose(browser, "outcome", "turn_limit")
    assert names() == expected(stop="turn_limit") != []
    choose(browser, "outcome", "")
    choose(browser, "differ", "no")
    agreeing = [e["task"] for e in episodes if not any("would" in t for t in e["turns"])]
    assert names() == agreeing
    assert 0 < len(agreeing) < len(episodes)
    choose(browser, "differ", "")
    css(browser, "#filter-text")[0].send_keys("CACHE")
    assert names() == [e["task"] for e in episodes if "cache" in e["task"]] != []
    css(browser, "#filter-text")[0].send_keys("nothing")
    assert names() == []
    assert "No episode matches." in css(browser, "#list")[0].text


def test_an_episode_is_read_turn_by_turn(visit: Callable[..., Any], episodes: list[dict[str, Any]]) -> None:
    browser = visit()

    def is_mixed(episode: dict[str, Any]) -> bool:
        turns = episode["turns"]
        return {t["by"] for t in turns} == {"student", "teacher"} and any("would" in t for t in turns)

    number, episode = next((i, e) for i, e in enumerate(episodes) if i and is_mixed(e))
    css(browser, "#list .item")[number].click()
    [reader] = css(browser, "#reader")
    assert reader.find_element("tag name", "h3").text == episode["task"]
    turns = css(browser, "#reader .turn")
    assert len(turns) == len(episode["turns"])
    for shown, turn in zip(turns, episode["turns"], strict=True):
        badges = [b.text for b in shown.find_elements("class name", "badge")]
        assert badges == [turn["by"], *(["teacher differs"] if "would" in turn else [])]
        texts = [p.get_property("textContent") for p in shown.find_elements("tag name", "pre")]
        assert texts == [turn["saw"], turn["did"], *([turn["would"]] if "would" in turn else [])]
    [outcome] = css(browser, "#reader .outcome")
    assert outcome.text.startswith("Solved" if episode["solved"] else "Not solved")
    selected = [i for i, e in enumerate(css(browser, "#list .item")) if e.get_attribute("aria-selected") == "true"]
    assert selected == [number]
    [previous] = [b for b in css(browser, "#reader nav button") if b.text == "Previous"]
    previous.click()
    assert css(browser, "#reader h3")[0].text == episodes[number - 1]["task"]


def test_hostile_text_stays_text(visit: Callable[..., Any], episodes: list[dict[str, Any]]) -> None:
    browser = visit()
    hostile = [i for i, e in enumerate(episodes) if any("window.hacked" in t["saw"] for t in e["turns"])]
    assert hostile
    css(browser, "#list .item")[hostile[0]].click()
    texts = [p.get_property("textContent") for p in css(browser, "#reader pre")]
    assert any("<script>window.hacked=1</script>" in t and "&amp;␛[31m" in t for t in texts)
    assert browser.execute_script("return [window.hacked, document.scripts.length, document.images.length]") == [
        None,
        2,
        0,
    ]


def test_light_and_dark_schemes_and_the_switch(visit: Callable[..., Any]) -> None:
    colours = {}
    for dark in (False, True):
        browser = visit(dark=dark)
        colours[dark] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colours[False] != colours[True]
    css(browser, "#theme")[0].click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == colours[False]


@pytest.mark.parametrize("width", [360, 390, 820, 1200])
def test_the_page_fits_the_window(visit: Callable[..., Any], width: int) -> None:
    browser = visit(width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    small = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect())"
        ".filter(b => b.left < 0 || b.right > innerWidth).length"
    )
    assert small == 0


def test_on_a_phone_the_episode_replaces_the_list(visit: Callable[..., Any]) -> None:
    browser = visit(width=390, height=844)
    [listing], [reader] = css(browser, "#list"), css(browser, "#reader")
    assert listing.is_displayed()
    assert not reader.is_displayed()
    css(browser, "#list .item")[1].click()
    assert reader.is_displayed()
    assert not listing.is_displayed()
    css(browser, "#reader .back")[0].click()
    assert listing.is_displayed()
    assert not reader.is_displayed()


def test_the_page_of_a_run_without_finished_stages(visit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: <img src=x onerror=alert(1)>\ndagger: {rounds: 3}\n")
    browser = visit(write_report(tmp_path))
    assert css(browser, "h1")[0].text == "<img src=x onerror=alert(1)>"
    assert len([e for e in css(browser, "figure .empty") if e.text == "Nothing yet."]) == 5
    assert not css(browser, "#drift")[0].is_displayed()
    assert css(browser, "#lede")[0].text == "No stage of this run has finished yet."
