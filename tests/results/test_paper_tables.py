"""The paper's experiments: what each needs, and ours beside the published figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import paper_tables
import pytest
from fmp_core.metrics import HEADLINES, METRICS
from fmp_core.results.paper import (
    BASELINES,
    FIGURES,
    NOT_RUNNABLE,
    SCALES,
    TABLES,
    defense_folder,
    notes,
    published,
    record_name,
    scaled_rows,
    sweep_content,
)
from fmp_core.results.paper_comparison import compare, comparison_text, draw_figure
from fmp_core.settings import load_settings
from fmp_core.sweeps.plan import make_sweep, plan
from matplotlib.figure import Figure
from PIL import Image
from result_files import metrics_json, three_rows, write

FULL, DEMO = SCALES["full"], SCALES["demo"]


def test_the_published_rows() -> None:
    sizes = {table: len(published(table)) for table in TABLES}
    assert sizes == {"1a": 48, "1b": 48, "1c": 48, "2": 25, "3": 25, "4": 5, "5": 6, "6": 25, "7": 30}
    for table in TABLES:
        rows = published(table)
        assert rows["source"].str.endswith(f"Table {table}").all()
        assert rows[["test_acc", "test_asr"]].ge(0).all(axis=None) and rows[["test_acc", "test_asr"]].le(1).all(axis=None)
        known = {"fmp", "no defense", *BASELINES, *NOT_RUNNABLE}
        assert set(rows["defense"]) <= known
    average = published("1a").query("defense == 'fmp' and attack == 'AVG'").iloc[0]
    assert (average["test_acc"], average["test_asr"], average["test_ra"]) == (0.9213, 0.0286, 0.874)


def test_printed_averages_are_those_of_the_rows_but_for_the_noted_one() -> None:
    for table in ("1a", "1b", "1c"):
        rows = published(table)
        own = rows[rows["attack"] != "AVG"].groupby("defense")[["test_acc", "test_asr", "test_ra"]].mean()
        printed = rows[rows["attack"] == "AVG"].set_index("defense")[["test_acc", "test_asr", "test_ra"]]
        wrong = (printed - own).abs().gt(0.00011).stack()
        assert list(wrong[wrong].index) == ([("fmp", "test_ra")] if table == "1a" else [])


def test_the_contradictions_are_noted() -> None:
    assert any("100 %" in note for note in notes("1a")) and any("88.98" in note for note in notes("6"))
    query = "attack == 'wanet' and defense == 'fmp'"
    wanet = {table: published(table).query(query)["test_ra"].iloc[-1] for table in ("1a", "6", "7")}
    assert wanet == {"1a": 0.9216, "6": 0.8898, "7": 0.8898}
    assert notes("5") == []


def test_the_papers_size_of_each_table() -> None:
    def jobs(table: str, backdoorbench: str | None = None) -> list[str]:
        content = sweep_content(table, FULL, backdoorbench, [])
        return [job.name for job in plan(make_sweep(content, "test"))]

    assert len([name for name in jobs("2") if name.endswith(".record")]) == 25
    assert sorted(name for name in jobs("5") if not name.endswith(".record")) == sorted(
        ["badnet_cifar10.fmp", *(f"badnet_cifar10.fmp-p{p}" for p in (2, 4, 8, 16, 32))]
    )
    assert "badnet_cifar10.fmp-eps16_255" in jobs("4") and "wanet_cifar10.fmp-ratio1.0" in jobs("3")
    assert {name.split(".")[1] for name in jobs("1b")} == {"record", "fmp", "ft-only"}


def test_a_table_about_p_costs_one_ranking() -> None:
    jobs = plan(make_sweep(sweep_content("5", FULL, None, ["badnet_cifar10"]), "test"))
    assert len(jobs) == 6 and len({job.shared_work for job in jobs}) == 1


def test_baselines_are_run_by_backdoorbench(tmp_path: Path) -> None:
    (tmp_path / "defense").mkdir()
    for name in BASELINES:
        (tmp_path / "defense" / f"{name}.py").touch()
    jobs = plan(make_sweep(sweep_content("1a", SCALES["small"], str(tmp_path), []), "test"))
    assert {job.method for job in jobs if job.kind == "backdoorbench"} == {"ft", "fp", "clp", "anp", "nc", "nad"}
    ft = " ".join(next(job for job in jobs if job.method == "ft").command)
    assert "-- --epochs 3 --batch_size 256 --lr 0.01 --ratio 0.1 --random_seed 0" in ft


def results(table: str, scale_name: str) -> pd.DataFrame:
    """A tidy table in which ours is 1 point worse than published everywhere."""
    rows = []
    for row in scaled_rows(table, SCALES[scale_name]).itertuples():
        if row.defense in {"fmp", "no defense"}:
            about = {"record": record_name(row, SCALES[scale_name]), "method": defense_folder(row), "origin": "ours"}
            about |= {"pratio": row.pratio, "model": SCALES[scale_name].record["model"], "attack": row.attack, "target": "0"}
            rows.append(
                {**about, "test_images": None, "seed": None, **{metric: getattr(row, metric) - 0.01 for metric in METRICS}}
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("table", TABLES)
def test_ours_published_difference(table: str) -> None:
    compared = compare(table, FULL, results(table, "full"))
    ours = compared[compared["defense"] == "fmp"]
    assert ours["difference_test_acc"].tolist() == pytest.approx([-1] * len(ours))
    if table in ("1a", "1b", "1c"):
        average = ours[ours["attack"] == "AVG"].iloc[0]
        printed = published(table).query("defense == 'fmp' and attack == 'AVG'").iloc[0]
        assert average["published_test_asr"] == pytest.approx(100 * printed["test_asr"], abs=0.011)
    text, markdown = comparison_text(table, FULL, compared), comparison_text(table, FULL, compared, markdown=True)
    for content in (text, markdown):
        assert "scale: full: the paper's" in content and "-1.00" in content
        assert all(note in content for note in notes(table))
        assert ("published only" in content) == (table in ("6", "7"))


def test_what_was_not_run_is_said_as_it_is() -> None:
    """Not asked for, failed, failed on one attack, or run by us in place of BackdoorBench: each is another sentence."""
    have = results("1a", "small")
    ft = have[have["method"] == "fmp"].assign(method="ft-only")
    frame = pd.concat([have[(have["method"] != "fmp") | (have["record"] != "blended_cifar10_small")], ft])
    compared = compare("1a", SCALES["small"], frame)
    text = comparison_text("1a", SCALES["small"], compared)
    assert "Not run: fp, clp, anp, nc, nad, which are BackdoorBench's; --backdoorbench runs them." in text
    assert "Without a result: fmp (Blended); not run yet, or failed." in text and "The row ft is this project's" in text
    with_bb = comparison_text("1a", SCALES["small"], compared, backdoorbench=True)
    assert "Without a result: fp, clp, anp, nc, nad, fmp (Blended);" in with_bb and "Not run:" not in with_bb
    figures = results("5", "demo")
    text = comparison_text("5", DEMO, compare("5", DEMO, figures[figures["method"] != "fmp-p8"]))
    assert "Without a result: fmp at p 8;" in text and "BackdoorBench" not in text
    sample = comparison_text("5", DEMO, compare("5", DEMO, figures.assign(test_images=50)))
    assert "Without a result: fmp at p 2, fmp at p 8, fmp at p 64;" in sample


def test_another_attack_is_not_shown_as_the_papers() -> None:
    """A record of the row's name may hold another attack; our SSBA-like stands for SSBA, and a sentence says so."""
    have = results("1a", "full")
    ssba, blended = have["attack"] == "ssba", have["attack"] == "blended"
    frame = have.assign(attack=have["attack"].mask(ssba, "ssba_like"), target=have["target"].mask(blended, "all-to-all"))
    compared = compare("1a", FULL, frame)
    own = compared[compared["defense"] == "fmp"].set_index("attack")["ours_test_acc"]
    assert own[["badnet", "ssba"]].notna().all() and pd.isna(own["blended"])
    assert "SSBA is this project's SSBA-like attack here" in comparison_text("1a", FULL, compared)
    assert "SSBA-like" not in comparison_text("1a", FULL, compare("1a", FULL, have))
    by_bb = pd.concat([have, have[have["method"] == "fmp"].assign(method="ft", origin="backdoorbench")])
    by_both = pd.concat([by_bb, have[have["method"] == "fmp"].assign(method="ft-only", test_acc=0)])
    assert compare("1a", FULL, by_both).set_index("defense").loc["ft", "ours_test_acc"].gt(50).all()


def test_an_average_is_not_of_two_programs_and_other_seeds_are_named() -> None:
    have = results("1a", "full")
    one = have[(have["method"] == "fmp") & (have["attack"] == "badnet")]
    ours = have[have["method"] == "fmp"].assign(method="ft-only")
    compared = compare("1a", FULL, pd.concat([have, ours, one.assign(method="ft", origin="backdoorbench"), one]))
    average = compared[compared["attack"] == "AVG"].set_index("defense")["ours_test_acc"]
    assert pd.isna(average["ft"]) and pd.notna(average["fmp"])
    text = comparison_text("1a", FULL, compared)
    assert "The row ft of Blended, Low Frequency, SSBA, WaNet is this project's ft-only" in text
    assert "Means over different numbers of seeds: fmp (BadNets 2, Blended 1, Low Frequency 1, SSBA 1, WaNet 1)." in text


def test_a_shrunken_table_says_so() -> None:
    compared = compare("5", DEMO, results("5", "demo"))
    assert compared["value"].tolist() == ["2", "8", "64"]
    text = comparison_text("5", DEMO, compared)
    assert "scikit-learn's digits" in text and "not whether the figures agree" in text


@pytest.mark.parametrize("number", ["1", "4"])  # five panels, one panel
def test_figures(number: str, tmp_path: Path) -> None:
    table = FIGURES[number]
    draw_figure(tmp_path / "f.png", number, FULL, compare(table, FULL, results(table, "full")))
    with Image.open(tmp_path / "f.png") as image:
        assert image.size[0] >= 400
        colours = image.convert("RGB").getcolors(2**24)
        assert colours is not None and len(colours) > 50


def test_each_line_shows_the_figures_that_its_label_names(tmp_path: Path, saved_figures: list[Figure]) -> None:
    draw_figure(tmp_path / "f.png", "4", FULL, compare(FIGURES["4"], FULL, results(FIGURES["4"], "full")))
    (axes,) = saved_figures[0].axes
    drawn = {str(line.get_label()): line.get_ydata().tolist() for line in axes.lines}
    rows, expected = published(FIGURES["4"]), {}
    for metric in METRICS:
        expected[f"{HEADLINES[metric]} published"] = pytest.approx((100 * rows[metric]).tolist())
        expected[f"{HEADLINES[metric]} ours"] = pytest.approx((100 * rows[metric] - 1).tolist())
    assert drawn == expected


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_on_an_empty_folder(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_tables.main(["--table", "5", "--scale", "demo", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "--save_folder_name badnet_digits_demo" in printed and printed.count("defense/fmp.py") == 3
    assert paper_tables.main(["--table", "5", "--no_run"]) == 2  # nothing is there
    assert "There is no folder record" in capsys.readouterr().err
    assert paper_tables.main(["--table", "5", "--csv", "o", "--markdown", "./o"]) == 2
    assert capsys.readouterr().err == "paper_tables: --csv and --markdown name one file, o; give each its own.\n"
    (empty / "record").mkdir()
    files = [f"--csv={empty / 'o.csv'}", f"--markdown={empty / 'o.md'}", f"--output={empty}"]
    assert paper_tables.main(["--table", "7", "--figure", "4", "--no_run", *files]) == 0
    printed = capsys.readouterr().out
    assert (
        "deepinspect (published only)" in printed and "87.65" in printed and "Without a result: the attacked model" in printed
    )
    assert {path.name for path in empty.iterdir()} == {"record", "o.csv", "o.md", "figure_4_full.png"}
    assert set(pd.read_csv(empty / "o.csv", dtype=str)["table"]) == {"5", "7"}


def test_settings_for_slurm_come_from_a_file(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--table", "5", "--scale", "demo", "--dry_run", "--launcher", "slurm", "--slurm", "s.yaml"]
    assert paper_tables.main(command) == 2 and "Slurm file s.yaml cannot be read" in capsys.readouterr().err
    write(empty / "s.yaml", "{partition: gpu, gpus: 1}")
    assert paper_tables.main(command) == 0
    write(empty / "s.yaml", "{partitoin: gpu}")
    assert paper_tables.main(command) == 2 and "did you mean partition" in capsys.readouterr().err


def test_digits_for_backdoorbench_are_refused_before_anything_runs(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_tables.main(["--table", "1a", "--scale", "demo", "--backdoorbench", str(empty)]) == 2
    error = capsys.readouterr().err
    assert "uses digits, which BackdoorBench cannot read (it knows cifar10, " in error
    assert list(empty.iterdir()) == []


def test_results_of_other_settings_are_left_out(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result under the right name is shown only if it was made as the table says."""
    record = empty / "record" / "badnet_cifar10_small" / "defense"
    for name, ranked in (("fmp", 8), ("fmp-p2", 64)):
        settings = dataclasses.asdict(load_settings({"epochs": 3, "frg_samples": ranked, "frequency_test": 0}))
        write(
            record / name / "metrics.json",
            metrics_json(0.93, 0.02, 0.9, settings={**settings, "p": 64}, model="preactresnet18"),
        )
    for name, lr in (("ft", "0.01"), ("fp", "0.1")):
        write(record / name / f"{name}_df_summary.csv", three_rows(0.91, 0.5, 0.4))
        logged = f"{{'epochs': 3, 'batch_size': 256.0, 'lr': {lr}, 'ratio': 0.1, 'random_seed': 0}}"
        write(record / name / "x.log", f"INFO\n{logged}\n")
    command = ["--table", "1a", "5", "--scale", "small", "--no_run", "--csv", "o.csv"]
    assert paper_tables.main(command) == 0
    said = capsys.readouterr().err
    assert "table 1a: badnet_cifar10_small/defense/fp is left out: lr 0.1 instead of 0.01" in said
    assert "table 5: badnet_cifar10_small/defense/fmp-p2 is left out: frg_samples 64 instead of 8, p 64 instead of 2" in said
    shown = (
        pd.read_csv("o.csv", dtype={"table": str}).query("attack == 'badnet'").set_index(["table", "value"])["ours_test_acc"]
    )
    assert shown["1a", "fmp"] == 93 and shown["1a", "ft"] == 91 and shown["5", "64"] == 93
    write(record / "ft" / "run_defense.json", json.dumps({"dtype": "bf16"}))
    assert paper_tables.main(command) == 0
    assert "badnet_cifar10_small/defense/ft is left out: dtype bf16 instead of fp32" in capsys.readouterr().err
    assert pd.isna(shown["1a", "fp"]) and pd.isna(shown["5", "2"])
    stamp = {"hash": "0" * 64, "method": "record", "seed": None, "seconds": 1.0}
    write(record.parent / "attack_result.pt", "")
    write(record.parent / "sweep.json", json.dumps(stamp))  # another sweep made the record
    assert paper_tables.main(command) == 0
    assert "1a: badnet_cifar10_small/defense/fmp is left out: a sweep made the record with" in capsys.readouterr().err
    assert pd.read_csv("o.csv")["ours_test_acc"].isna().all()


def test_the_seeds_that_were_asked_for_are_averaged(empty: Path) -> None:
    place = empty / "record" / "badnet_cifar10_small" / "defense"
    for seed, accuracy in ((0, 0.93), (1, 0.91), (2, 0.5)):
        given = load_settings({"epochs": 3, "frg_samples": 8, "frequency_test": 0, "random_seed": seed})
        text = metrics_json(accuracy, 0.02, 0.9, seed=seed, settings=dataclasses.asdict(given))
        write(place / (f"fmp-s{seed}" if seed else "fmp") / "metrics.json", text)
    command = ["--table", "1a", "--scale", "small", "--no_run", "--csv", "o.csv", "--seeds", "0", "1"]
    assert paper_tables.main(command) == 0
    (row,) = pd.read_csv("o.csv").query("attack == 'badnet' and defense == 'fmp'").to_dict("records")
    assert row["runs"] == 2 and row["ours_test_acc"] == pytest.approx(92)


@pytest.mark.parametrize("other", [{"model": "vgg19"}, {"pratio": 0.5}], ids=["model", "rate"])
def test_records_of_another_model_or_poison_rate_are_left_out(other: dict[str, Any]) -> None:
    assert compare("1a", FULL, results("1a", "full").assign(**other))["ours_test_acc"].isna().all()


def test_a_failure_in_one_table_is_the_commands(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([1, 0])
    monkeypatch.setattr("fmp_core.sweeps.paper.run_sweep", lambda *_: next(codes))
    (empty / "record").mkdir()
    assert paper_tables.main(["--table", "1a", "5", "--scale", "demo"]) == 1
