"""The figure of ASR against lost accuracy: which points are drawn, where, and what cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path

import collect as script
import numpy as np
import pandas as pd
import pytest
from fmp_core.results.collect import collect
from fmp_core.results.figure import draw
from fmp_core.results.tables import Table, build_tables
from matplotlib.container import ErrorbarContainer
from result_files import metrics_json, three_rows, write


def frame_of(**attacks: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """Tidy rows of {method: (Acc, ASR)} per attack, in percent; ``attacked`` is the model before any defense."""
    rows = [
        {"method": name.replace("attacked", "no defense"), "attack": attack, "test_acc": acc / 100, "test_asr": asr / 100}
        for attack, found in attacks.items()
        for name, (acc, asr) in found.items()
    ]
    frame = pd.DataFrame(rows).assign(dataset="gtsrb", model="resnet18", pratio=0.1, origin="ours")
    frame = frame.assign(record=frame["attack"], defense=frame["method"], test_images=pd.NA, seed=pd.NA, ratio=0.1)
    frame = frame.assign(record_seed=0, record_digest="d", settings_digest="s", code="c")
    before = frame["record"].map(frame[frame["defense"] == "no defense"].set_index("record")["test_acc"])
    frame = frame.assign(acc_lost=(before - frame["test_acc"]).mask(frame["defense"] == "no defense"))
    return frame.assign(test_ra=0.5, der=0.5, rir=0.5, baseline="attack", seconds=60.0, reused=None, target=None)


def table(**attacks: dict[str, tuple[float, float]]) -> Table:
    return build_tables(frame_of(**attacks))[0]


def points(tables: list[Table]) -> dict[str, dict[str, tuple[float, float]]]:
    """Title of each panel -> {method: (accuracy lost, ASR)}."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for axes in draw(tables).axes:
        bars = [part for part in axes.containers if isinstance(part, ErrorbarContainer)]
        spots = {str(bar.lines[0].get_label()): bar.lines[0].get_xydata()[0] for bar in bars}
        found[axes.get_title()] = {name: (round(x, 6), round(y, 6)) for name, (x, y) in spots.items()}
    return found


def test_a_panel_per_attack_shows_what_each_defense_costs() -> None:
    badnet = {"attacked": (91.0, 95.0), "ft": (92.0, 60.0), "clp": (88.0, 3.0), "ft (published)": (99.0, 1.0)}
    drawn = points([table(badnet=badnet, wanet={"attacked": (90.0, 80.0), "ft": (89.5, 1.0)})])
    assert drawn == {"BadNets": {"clp": (3.0, 3.0), "ft": (-1.0, 60.0)}, "WaNet": {"ft": (0.5, 1.0)}}


def test_bars_are_deviations_over_seeds_of_accuracy_across_and_of_asr_upwards() -> None:
    both = [(92.0, 60.0), (90.0, 20.0)]
    seeds = [frame_of(badnet={"attacked": (91.0, 95.0), "ft": found}).assign(seed=seed) for seed, found in enumerate(both)]
    (axes,) = draw(build_tables(pd.concat(seeds, ignore_index=True))).axes
    (container,) = (part for part in axes.containers if isinstance(part, ErrorbarContainer))
    bars = np.concatenate([lines.get_segments() for lines in container.lines[2]])  # [bar, end, (x, y)]
    assert np.ptp(bars, axis=1).max(axis=0) == pytest.approx([2 * 2**0.5, 2 * 800**0.5])


def test_accuracy_is_lost_from_the_test_that_der_compares_with(tmp_path: Path) -> None:
    """The attack logged Acc 90, our test gave 50, another 90: these are compared with their own, BackdoorBench's with 90."""
    write(tmp_path / "badnet_cifar10" / "attack_df_summary.csv", three_rows(0.9, 0.98, 0.01))
    place = tmp_path / "badnet_cifar10" / "defense"
    write(place / "fmp" / "metrics.json", metrics_json(0.48, 0.1, 0.7, before_acc=0.5))
    write(place / "a-first-one" / "metrics.json", metrics_json(0.87, 0.2, 0.6))
    write(place / "ft" / "ft_df_summary.csv", three_rows(0.88, 0.5, 0.4))
    said: list[str] = []
    frame = collect(tmp_path, said.append).assign(model="preactresnet18")
    assert "(fmp); DER and RIR of these rows compare with their own test" in said[0] and len(said) == 1
    assert points(build_tables(frame)) == {"BadNets": {"a-first-one": (3.0, 20.0), "fmp": (2.0, 10.0), "ft": (2.0, 50.0)}}


def test_tests_on_a_sample_are_not_drawn() -> None:
    frame = frame_of(badnet={"attacked": (91.0, 95.0), "fmp": (92.0, 60.0), "ft": (92.0, 60.0)})
    frame.loc[frame["method"] == "fmp", "test_images"] = 500
    assert points(build_tables(frame)) == {"BadNets": {"ft": (-1.0, 60.0)}}


def test_an_attack_without_figures_of_the_attacked_model_is_left_out() -> None:
    assert set(points([table(badnet={"attacked": (91.0, 95.0), "ft": (92.0, 60.0)}, lf={"ft": (90.0, 2.0)})])) == {"BadNets"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    before, after = ({"test_acc": 0.9, "test_asr": asr, "test_ra": 0.1} for asr in (0.98, 0.02))
    folder = tmp_path / "badnet_cifar10" / "defense" / "fmp"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"after": after, "before": before, "seed": 0}))
    return tmp_path


def test_the_figure_is_written(root: Path) -> None:
    assert script.main([str(root), "--figure", str(root / "out.svg")]) == 0
    text = (root / "out.svg").read_text()
    assert text.startswith("<?xml") and "</svg>" in text
    assert script.main([str(root), "--figure", str(root / "again.svg")]) == 0
    assert (root / "again.svg").read_text() == text
    assert script.main([str(root), "--figure", str(root / "out.pdf")]) == 0 and (root / "out.pdf").stat().st_size > 1000
    assert script.main([str(root), "--figure", str(root / "out.png")]) == 0 and (root / "out.png").stat().st_size > 1000


def test_an_unknown_format_is_refused_before_anything_is_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(root), "--csv", str(root / "out.csv"), "--figure", str(root / "out.gif")]) == 2
    assert "must end in .svg, .pdf, .png" in capsys.readouterr().err and not (root / "out.csv").exists()
    assert script.main([str(root), "--csv", str(root / "out.csv"), "--html", str(root / "out.csv")]) == 2
    assert "--csv and --html name one file" in capsys.readouterr().err and not (root / "out.csv").exists()


def test_without_an_attacked_model_there_is_nothing_to_draw(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "badnet_cifar10" / "defense" / "fmp" / "metrics.json"
    path.write_text(json.dumps({"after": json.loads(path.read_text())["after"], "seed": 0}))
    assert script.main([str(root), "--csv", str(root / "out.csv"), "--figure", str(root / "out.svg")]) == 2
    assert "--figure needs" in capsys.readouterr().err and not list(root.glob("out.*"))


def test_means_that_lack_a_record_are_not_drawn() -> None:
    frame = frame_of(badnet={"attacked": (91.0, 95.0), "fmp": (92.0, 60.0), "ft": (92.0, 60.0)})
    second = frame[frame["method"] != "ft"].assign(record="second", record_seed=1)
    assert set(points(build_tables(pd.concat([frame, second], ignore_index=True)))["BadNets"]) == {"fmp"}


def test_the_dotted_line_is_the_attacked_models_success() -> None:
    (axes,) = draw([table(badnet={"attacked": (91.0, 95.0), "ft": (92.0, 60.0)})]).axes
    (line,) = (line for line in axes.lines if line.get_label() == "attacked model")
    assert set(line.get_ydata()) == {95}
