"""report.html in a real browser: quiet console, hover, arrow keys, and a phone's width. Skipped where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.metrics import METRICS
from fmp_core.report import page as page_module
from fmp_core.report.data import Run, Trigger
from made_runs import VERDICT, made_run, scored_maps

pytestmark = pytest.mark.slow

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
CONVS, MAPS = 20, 240  # 4800 feature maps, as PreActResNet18 has
COUNTS = np.random.default_rng(0).integers(24, 32, (CONVS, MAPS))
LONG = "features.denseblock3.denselayer24.conv2"  # a name as torchvision has them
LAYERS = {LONG if number == 7 else f"layer{number}.conv": correct.tolist() for number, correct in enumerate(COUNTS)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with 4800 feature maps and of two other defenses beside it."""
    long = [f"The attack reported other figures in {'/a/folder/of/a/long/name' * 4}/attack_df_summary.csv: Acc 12 % here."]
    maps, figures = scored_maps(LAYERS, margins=True), dict.fromkeys(METRICS, 0.5)
    run = made_run(maps, attack_figures=figures, test_images=500, warnings=long, record="badnet_" + "x" * 80)
    return written(tmp_path_factory.mktemp("page"), run)


@pytest.fixture(scope="module")
def by_trigger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose maps were selected by an inverted trigger."""
    maps = scored_maps(LAYERS).drop(columns=["correct", "samples", "margin", "rank"])
    maps = maps.assign(moved=1 / (1 + maps["channel"]), pruned=maps["channel"] < 2)
    return written(tmp_path_factory.mktemp("by_trigger"), made_run(maps, verdict=VERDICT))


def written(folder: Path, run: Run) -> Path:
    """The page, with a trigger's activation changes but without pictures, which need a model."""
    tac = torch.from_numpy(np.random.default_rng(1).random(CONVS * MAPS))
    nothing = torch.zeros(0)
    trigger = Trigger(None, run.layers, nothing, nothing, nothing, tac)  # type: ignore[arg-type]
    others = {name: dict.fromkeys(METRICS, 0.5) for name in ("ft", "a-defense-of-a-long-name=0.1-seed=3")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "pictures", lambda _run, _trigger: None)
        text = page_module.page(run, 10, trigger, "", others)
    assert len(text.encode()) < 5_000_000
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


def opened(browser: Any, report: Path, noise: list[str], width: int = 1200, **about: Any) -> Any:
    tab = browser.new_context(viewport={"width": width, "height": 900}, **about).new_page()
    tab.on("console", lambda message: noise.append(message.text))
    tab.on("pageerror", lambda error: noise.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else noise.append(request.url))
    tab.goto(report.as_uri())
    return tab


def test_hover_and_arrow_keys_name_the_map(browser: Any, report: Path):
    noise: list[str] = []
    tab = opened(browser, report, noise)
    assert tab.locator(".strip canvas").count() == CONVS + 1 and tab.locator("#tip").is_hidden()
    strip = tab.locator(".strip canvas").nth(4)
    strip.scroll_into_view_if_needed()
    strip.hover(position={"x": 5, "y": 20})
    tip = tab.locator("#tip")
    assert "layer3.conv, channel" in tip.inner_text() and f"rank 1 of {MAPS}, pruned" in tip.inner_text()
    assert f"{COUNTS[3].min()} of 32 correct" in tip.inner_text() and "TAC" in tip.inner_text()
    tab.mouse.move(2, 2)
    assert tip.is_hidden()
    strip.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert f"rank 2 of {MAPS}" in tip.inner_text() and noise == []


def test_another_p_shows_what_would_change(browser: Any, report: Path):
    noise: list[str] = []
    tab = opened(browser, report, noise)
    pruned, tied, found = (tab.locator(".strip").nth(1).locator(":scope > span").nth(i) for i in (1, 2, 3))
    assert pruned.inner_text().startswith("3")
    for p in (8, 128):
        tab.locator(f"input[name=p][value='{p}']").check(force=True)
        count, correct = MAPS // p, sorted(COUNTS[0])
        ties = correct.count(correct[count]) if correct[count - 1] == correct[count] else 0
        assert (pruned.inner_text().split()[0], tied.inner_text().split()[0]) == (str(count), str(ties))
        assert int(found.inner_text().split()[0]) <= count
    tab.locator("input[name=axis][value=even]").check(force=True)
    assert noise == []


def test_maps_selected_by_an_inverted_trigger_stand_in_its_order(browser: Any, by_trigger: Path):
    noise: list[str] = []
    tab = opened(browser, by_trigger, noise)
    strip = tab.locator(".strip canvas").nth(4)
    strip.focus()
    tab.keyboard.press("ArrowRight")
    assert "layer3.conv, channel 0" in tab.locator("#tip").inner_text()
    assert "activation changed by 1" in tab.locator("#tip").inner_text()
    assert tab.locator(".strip").nth(1).locator(":scope > span").nth(1).inner_text().startswith("2")
    tab.locator("input[name=axis][value=even]").check(force=True)
    assert tab.locator("input[name=p]").count() == 0 and noise == []


# Elements whose content is wider than they are, so that a part of it is cut off or must be scrolled to.
CUT_OFF = """() => [...document.querySelectorAll('.wide, .strip > span, td, th, pre, p, figure')]
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1200, "dark")])
def test_it_fits_and_follows_the_colour_scheme(browser: Any, report: Path, width: int, scheme: str):
    noise: list[str] = []
    tab = opened(browser, report, noise, width, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and tab.evaluate(CUT_OFF) == []
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    # A strip is drawn in the colours of the scheme, and so is the ink of the charts.
    ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert (sum(map(int, ink.strip("rgb()").split(","))) > 380) == (scheme == "dark")
    assert noise == []
