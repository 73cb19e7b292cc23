"""Tables of collected results: averages, marks, order, and their renderings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import collect as script
import pandas as pd
import pytest
from fmp_core.results.collect import collect
from fmp_core.results.tables import build_tables, to_html, to_latex, to_markdown, to_text
from result_files import frame_of, marked


def test_seeds_are_averaged_and_the_best_is_marked(root: Path) -> None:
    frame = collect(root, pytest.fail)
    tables = build_tables(frame)
    assert [table.title for table in tables] == ["cifar10, preactresnet18, poison rate 10 %", "cifar10, preactresnet18"]
    texts = tables[0].texts()
    assert texts.loc["fmp", ("badnet", "test_acc")] == "92.00±1.41"  # of 93 and 91, sample standard deviation
    assert texts.loc["ft", ("badnet", "test_acc")] == "91.00"
    best = marked(tables[0])
    tied = {("fmp", "test_acc"), ("fp", "test_acc"), ("fmp", "test_asr"), ("mcr", "test_asr")}
    assert best == tied | {("fmp", "test_ra"), ("fmp", "der"), ("fmp", "rir")}


def test_the_average_is_over_every_attack_or_absent() -> None:
    rows = [("a", "badnet", "fmp", 0.8), ("b", "blended", "fmp", 0.9), ("a", "badnet", "ft", 0.7)]
    (table,) = build_tables(frame_of(*rows))
    assert table.attacks == ["badnet", "blended", "AVG"]
    average = table.texts()["AVG", "test_acc"]
    assert average["fmp"] == "85.00" and average["ft"] == "-"


def test_different_records_of_one_attack_are_not_mixed() -> None:
    (table,) = build_tables(frame_of(("a", "badnet", "fmp", 0.8), ("b", "badnet", "fmp", 0.6)))
    assert table.attacks == ["a", "b", "AVG"]
    seeds = frame_of(("a", "badnet", "fmp", 0.8), ("b", "badnet", "fmp", 0.6)).assign(record_seed=[0, 1])
    (table,) = build_tables(seeds)
    assert table.attacks == ["badnet"] and table.means.loc["fmp", ("badnet", "test_acc")] == pytest.approx(70)
    (table,) = build_tables(seeds.assign(record_digest=["patch of 3", "patch of 5"]))  # other settings: no seeds of one attack
    assert table.attacks == ["a", "b", "AVG"]


def test_all_to_all_is_an_attack_of_its_own() -> None:
    rows = [("a", "badnet", "fmp", 0.8), ("b", "blended", "fmp", 0.9), ("c", "badnet", "fmp", 0.6)]
    frame = frame_of(*rows).assign(target=["0", None, "all-to-all"], record_digest=["all2one", None, "all2all"])
    (table,) = build_tables(frame)
    assert table.attacks == ["badnet", "badnet all-to-all", "blended", "AVG"]
    assert table.means["badnet all-to-all", "test_acc"].to_dict() == {"fmp": pytest.approx(60)}
    assert "BadNets all-to-all Acc" in to_markdown(table)


def test_results_of_other_settings_are_no_seeds_of_one_method() -> None:
    frame = frame_of(("a", "badnet", "fmp", 0.8), ("a", "badnet", "fmp", 0.6)).assign(defense=["fmp", "fmp-s1"])
    (table,) = build_tables(frame)
    assert table.means["badnet", "test_acc"].to_dict() == {"fmp": pytest.approx(70)}
    (table,) = build_tables(frame.assign(settings_digest=["10 epochs", "3 epochs"]))
    assert table.means["badnet", "test_acc"].to_dict() == {"fmp": pytest.approx(80), "fmp-s1": pytest.approx(60)}
    (table,) = build_tables(frame.assign(settings_digest=["10 epochs", None]))  # nor those that nobody knows the settings of
    assert table.methods == ["fmp", "fmp-s1"]
    (table,) = build_tables(frame.assign(seed=[0, 0]))  # nor a copy of a folder
    assert table.methods == ["fmp", "fmp-s1"]
    (table,) = build_tables(frame.assign(seed=[0, 1]))
    assert table.methods == ["fmp"]


def test_methods_are_ordered_as_people_count() -> None:
    rows = [
        ("a", "badnet", name, 0.5)
        for name in ("fmp-p16", "fmp-p4", "ft (published)", "lr0.1", "no defense", "lr0.05", "lr0.10", "fmp")
    ]
    (table,) = build_tables(frame_of(*rows))
    assert table.methods == ["no defense", "fmp", "fmp-p4", "fmp-p16", "lr0.05", "lr0.1", "lr0.10", "ft (published)"]


def test_renderings(root: Path) -> None:
    table = build_tables(collect(root, pytest.fail))[0]
    text = to_text(table, 200)
    assert "92.00±1.41*" in text and "BadNets" in text
    markdown = to_markdown(table)
    assert (
        "| Method | ratio | minutes | BadNets Acc | BadNets ASR | BadNets RA | BadNets DER | BadNets RIR |" in markdown
        and "**92.00±1.41**" in markdown
    )
    latex = to_latex(table)
    assert r"\toprule" in latex and r"\textbf{92.00\,$\pm$\,1.41}" in latex and r"Acc $\uparrow$ & ASR $\downarrow$" in latex
    html = to_html([table])
    assert html.count("<tr>") == 2 + len(table.methods) and ">92.00±1.41<" in html and "var(--good) 92.0%" in html
    assert "http" not in html  # self-contained


def test_a_narrow_terminal_gets_blocks() -> None:
    rows = [(name, name, "fmp", 0.5) for name in ("badnet", "blended", "lf", "ssba")]
    text = to_text(build_tables(frame_of(*rows))[0], 60)
    assert max(map(len, text.splitlines())) <= 60 and text.count("ratio") >= 2


def test_different_shares_of_clean_data_are_a_note(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: root / kind for kind in ("html", "latex", "markdown")}
    assert script.main([str(root), *(f"--{kind}={file}" for kind, file in files.items())]) == 0
    for text in (capsys.readouterr().out, *(file.read_text() for file in files.values())):
        assert text.count("different shares of clean data (0.05: ft; 0.1: fmp)") == 1  # not in blended's table
    (table,) = build_tables(frame_of(("a", "badnet", "fmp", 0.8), ("a", "badnet", "ft", 0.9)))
    assert table.notes == [] and table.texts().loc["ft", ("", "ratio")] == "0.1"


def test_minutes_are_the_mean_of_whole_runs(root: Path) -> None:
    frame = frame_of(*((record, record, "fmp", 0.8) for record in "abc"), ("a", "a", "ft", 0.8), ("a", "a", "no defense", 0.9))
    frame = frame.assign(seconds=[60.0, 84.0, 6.0, 9.0, None], reused=[None, None, "ranking", "fine-tuning", None])
    (table,) = build_tables(frame)
    assert table.texts()["", "minutes"].to_dict() == {"no defense": "-", "fmp": "1.2", "ft": "-"}
    said = "Minutes leave out runs that were continued, or read scores or a verdict from a cache: fmp 1 of 3, ft 1 of 1."
    assert said in table.notes and said in to_text(table)
    metrics = root / "badnet_cifar10/defense/fmp/metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"reused": ["ranking", "fine-tuning"]}))
    rows = collect(root, pytest.fail).set_index(["record", "defense"])["reused"]
    assert rows["badnet_cifar10", "fmp"] == "ranking, fine-tuning" and pd.isna(rows["badnet_cifar10", "ft"])


def test_published_rows_do_not_compete(root: Path) -> None:
    rows = frame_of(("a", "badnet", "fmp", 0.8), ("a", "badnet", "ft", 0.7), ("", "badnet", "ft (published)", 0.99))
    (table,) = build_tables(rows.assign(origin=["ours", "backdoorbench", "published"]))
    assert ("fmp", "test_acc") in marked(table) and not any(method == "ft (published)" for method, _ in marked(table))
    assert "font-style: italic" in to_html([table])


def test_a_mean_that_lacks_a_record_is_not_the_best_and_a_note_says_so() -> None:
    rows = [("a", "badnet", "fmp", 0.8), ("b", "badnet", "fmp", 0.6), ("b", "badnet", "ft", 0.9)]
    (table,) = build_tables(frame_of(*rows).assign(record_seed=[0, 1, 1]))
    assert table.notes == ["Means over fewer records than others, so not to be compared with them: ft on BadNets lacks a."]
    assert {method for method, _ in marked(table)} <= {"fmp"}
    assert table.partial == {("badnet", "ft")}
    attacked = [("a", "badnet", "no defense", 0.9), ("b", "badnet", "no defense", 0.9), ("a", "badnet", "fmp", 0.8)]
    (table,) = build_tables(frame_of(*attacked).assign(record_seed=[0, 1, 0], seed=None))
    assert table.partial == {("badnet", "fmp")} and "fmp on BadNets lacks b" in table.notes[0]


def test_a_mean_of_a_figure_is_of_all_results_or_absent() -> None:
    """An attack whose own figures cannot be read has no DER; that of another record is not the mean of both."""
    rows = frame_of(
        ("a", "badnet", "ft", 0.8), ("b", "badnet", "ft", 0.6), ("a", "badnet", "fmp", 0.7), ("b", "badnet", "fmp", 0.7)
    )
    rows = rows.assign(record_seed=[0, 1, 0, 1], der=[0.9, None, 0.7, 0.7], acc_lost=[0.1, None, 0.2, 0.2])
    (table,) = build_tables(rows)
    assert table.means["badnet", "der"].to_dict() == {"fmp": pytest.approx(70), "ft": pytest.approx(float("nan"), nan_ok=True)}
    assert table.stds["badnet", "der"].isna().to_dict() == {"fmp": False, "ft": True}
    assert table.means["badnet", "test_acc"]["ft"] == pytest.approx(70) and ("fmp", "der") not in marked(table)
    assert table.lost["badnet"].isna().to_dict() == {"fmp": False, "ft": True}


def test_a_record_called_like_an_attack_keeps_its_own_column() -> None:
    frame = frame_of(("badnet", "badnet", "fmp", 0.8), ("patch5", "badnet", "fmp", 0.6), ("", "badnet", "fmp (published)", 0.9))
    (table,) = build_tables(frame.assign(record_digest=["a", "b", None], origin=["ours", "ours", "published"]))
    assert table.attacks[:3] == ["badnet", "patch5", "record badnet"]
    assert table.means["badnet", "test_acc"].dropna().to_dict() == {"fmp (published)": pytest.approx(90)}


def test_an_attack_that_was_only_published_does_not_take_our_average() -> None:
    rows = [("a", "badnet", "fmp", 0.8), ("b", "blended", "fmp", 0.9), ("", "wanet", "ft (published)", 0.7)]
    (table,) = build_tables(frame_of(*rows).assign(origin=["ours", "ours", "published"]))
    assert table.texts()["AVG", "test_acc"].to_dict() == {"fmp": "85.00", "ft (published)": "-"}


def test_an_oracle_is_not_the_best() -> None:
    (table,) = build_tables(frame_of(("a", "badnet", "ablate-oracle", 0.9), ("a", "badnet", "fmp", 0.8)))
    assert ("ablate-oracle", "test_acc") not in marked(table)


def test_one_row_of_several_settings_has_a_note() -> None:
    frame = frame_of(("a", "badnet", "fmp", 0.8), ("b", "blended", "fmp", 0.9))
    (table,) = build_tables(frame)
    assert not table.notes
    (table,) = build_tables(frame.assign(settings_digest=["3 epochs", "10 epochs"]))
    assert table.notes == ["Settings differ between attacks, so AVG mixes them: fmp."]


def test_a_row_means_the_same_on_every_attack() -> None:
    """Settings that differ on one attack make rows of their own on all."""
    rows = [(record, record, "fmp", accuracy) for record in ("badnet", "blended") for accuracy in (0.8, 0.6)]
    frame = frame_of(*rows).assign(defense=["fmp", "fmp-s1"] * 2, seed=[0, 1] * 2)
    (table,) = build_tables(frame)
    assert table.methods == ["fmp"]
    (table,) = build_tables(frame.assign(settings_digest=["a", "b", "a", "a"]))
    assert table.methods == ["fmp", "fmp-s1"] and table.means.loc["fmp", ("blended", "test_acc")] == pytest.approx(80)


def test_other_settings_on_another_record_of_an_attack_are_no_seeds() -> None:
    """Folders of one name on records that differ in their seed: a sweep was edited and interrupted between them."""
    frame = frame_of(("a", "badnet", "fmp", 0.93), ("b", "badnet", "fmp", 0.8), ("c", "badnet", "fmp", 0.7))
    frame = frame.assign(record_seed=[0, 1, 2], seed=0, settings_digest=["a", "b", None])
    (table,) = build_tables(frame)
    names = ["fmp (settings a)", "fmp (settings b)", "fmp (settings unknown)"]
    assert table.methods == names and table.means["badnet", "test_acc"].tolist() == pytest.approx([93, 80, 70])
    (table,) = build_tables(frame.assign(settings_digest=["a", "a", "b"]))
    assert table.means["badnet", "test_acc"].to_dict() == pytest.approx({names[0]: 86.5, names[1]: 70})


def test_a_mixture_in_one_row_has_a_note() -> None:
    frame = frame_of(("a", "badnet", "ft", 0.8), ("b", "blended", "ft", 0.9))
    (table,) = build_tables(frame.assign(origin=["ours", "backdoorbench"]))
    assert table.notes == ["Results of this project and of BackdoorBench's script of that name are in one row: ft."]
    (table,) = build_tables(frame.assign(code=["1111111", "2222222"]))
    assert table.notes == ["Results of different commits of this project are in one row: ft."]


def test_means_over_different_numbers_of_seeds_have_a_note() -> None:
    rows = [("a", "badnet", "fmp", 0.8), ("a", "badnet", "fmp", 0.6), ("b", "blended", "fmp", 0.9)]
    frame = frame_of(*rows).assign(seed=[0, 1, 0], defense=["fmp", "fmp-s1", "fmp"])
    assert build_tables(frame)[0].notes == ["Means over different numbers of seeds: fmp (BadNets 2, Blended 1)."]
    one_attack = frame.assign(attack="badnet", record_seed=[0, 0, 1])  # two records of it
    assert build_tables(one_attack)[0].notes == ["Means over different numbers of seeds: fmp (BadNets 1 or 2)."]


def test_a_record_itself_can_be_collected(root: Path) -> None:
    (root / "badnet_cifar10" / "attack_result.pt").write_text("a model")
    frame = collect(root / "badnet_cifar10", pytest.fail)
    assert set(frame["record"]) == {"badnet_cifar10"} and "fmp" in set(frame["defense"])


def test_without_pyarrow_nothing_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert script.main([str(root), "--csv", str(root / "out.csv"), "--parquet", str(root / "out.parquet")]) == 2
    assert "needs pyarrow" in capsys.readouterr().err and not (root / "out.csv").exists()
