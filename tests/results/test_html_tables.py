"""The page of tables, as text and in a real browser (Debian's chromium through playwright; skipped where either is absent)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fmp_core.results.tables import ABOUT, Table, to_html
from PIL import Image

METHODS = ["no defense", "fmp", "ft", "nad (published)"]
ACCURACIES = {"no defense": 92.0, "fmp": 91.0, "ft": 93.5, "nad (published)": 90.0}


def page_file(folder: Path) -> Path:
    means = pd.DataFrame({("badnet", "test_acc"): ACCURACIES, ("badnet", "test_asr"): {"fmp": 8.0}}).loc[METHODS]
    about, lost = pd.DataFrame("0.1", METHODS, ABOUT), pd.DataFrame({"badnet": 92.0 - means["badnet", "test_acc"]})
    table = Table("cifar10", means, means * 0 + 0.5, about, lost)
    file = folder / "tables.html"
    file.write_text(to_html([table]), encoding="utf-8")
    return file


def test_columns_are_headed_by_attack_and_metric(tmp_path: Path) -> None:
    text = page_file(tmp_path).read_text(encoding="utf-8")
    heads = [word.strip() for word in re.findall(r"<th [^>]*>([^<]*)</th>", text.split("<tbody>")[0])]
    assert [word for word in heads if word not in ("", "&nbsp;")] == ["BadNets", "Method", *ABOUT, "Acc", "ASR"]


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium here")
    file, complaints = page_file(tmp_path), []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 700, "height": 400}, color_scheme=scheme)
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(file.as_uri())
            names = page.locator("tbody th")
            assert names.all_inner_texts() == METHODS
            page.get_by_role("button", name="Acc").click()
            assert names.all_inner_texts() == sorted(METHODS, key=lambda name: ACCURACIES[name])
            page.get_by_role("button", name="Acc").click()
            assert names.all_inner_texts() == sorted(METHODS, key=lambda name: -ACCURACIES[name])
            page.get_by_role("button", name="ASR").click()
            assert names.all_inner_texts()[0] == "fmp"  # empty cells stay below
            page.screenshot(path=tmp_path / f"{scheme}.png")
        browser.close()
    assert complaints == []
    brightness = {}
    for scheme in ("light", "dark"):
        with Image.open(tmp_path / f"{scheme}.png") as image:
            pixels = np.asarray(image.convert("RGB"), dtype=int)
        brightness[scheme] = pixels.mean()
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        assert ((green > red + 20) & (green > blue + 10)).sum() > 500  # the bars
    assert brightness["light"] > 200 and brightness["dark"] < 60
