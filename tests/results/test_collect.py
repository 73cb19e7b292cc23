"""Results of every shape as one tidy table, and the table in every rendering."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import collect as script
import pandas as pd
import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.metrics import ratings
from fmp_core.results.collect import collect, join_leaderboard, read_leaderboard
from fmp_core.results.read import read_result
from fmp_core.results.tables import Table, build_tables, to_html, to_latex, to_markdown, to_text

T5 = "clean_test_loss_avg_over_batch,bd_test_loss_avg_over_batch,test_acc,test_asr,test_ra"


def three_rows(acc: float, asr: float, ra: float, head: str = "epoch,batch,train_epoch_loss_avg_over_batch,train_acc") -> str:
    """BB's summary: the last values, the largest, and whether NaN occurred."""
    some = ",".join("1" for _ in head.split(",")) + "," if head else ""
    no = ",".join(["False"] * (some.count(",") + 5))
    lead = f"{head}," if head else ""
    return f",{lead}{T5}\nlast,{some}1.5,nan_value,{acc},{asr},{ra}\nvalid_max,{some}9,,1.0,1.0,1.0\nexist_nan_value,{no}\n"


def one_row(acc: float, asr: float, ra: float) -> str:
    return f",{T5}\n0,1.5,2.5,{acc},{asr},{ra}\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def metrics_json(acc: float, asr: float, ra: float, seed: int = 0, before_acc: float = 0.9, **more: Any) -> str:
    after = {"test_acc": acc, "test_asr": asr, "test_ra": ra}
    before = {"test_acc": before_acc, "test_asr": 0.985, "test_ra": 0.0}
    content = {"dataset": "cifar10", "model": "preactresnet18", "seed": seed, "settings": {"ratio": 0.1}}
    return json.dumps({"after": after, "before": before, **content, **more})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two records with a defense of each shape; every value says which."""
    badnet = tmp_path / "badnet_cifar10"
    write(badnet / "attack_df_summary.csv", three_rows(0.9, 0.98, 0.01))
    info = {"attack": "badnet", "dataset": "cifar10", "model": "preactresnet18", "pratio": 0.1, "random_seed": 0}
    torch.save(info, badnet / "info.pickle")
    place = badnet / "defense"
    write(place / "ft" / "ft_df_summary.csv", three_rows(0.91, 0.5, 0.4))
    write(place / "ft" / "log" / "x.log", "... {'cleaning_ratio': 0.5,\n 'ratio': 0.05,\n 'random_seed': 7, ...")
    write(place / "fp" / "finetune_df_summary.csv", three_rows(0.92, 0.6, 0.3))
    write(place / "fp" / "prune_log_summary.csv", ",num_pruned,test_acc,test_asr,test_ra\nlast,350,0.1,0.1,0.1\n")
    write(place / "clp" / "clp_df_summary.csv", one_row(0.8, 0.1, 0.7))
    write(place / "clp" / "run_defense.log", "loading\n\nexit code 0 after 68 s; CPU 48 s\n")
    write(place / "anp" / "anp_df_summary.csv", one_row(0.81, 0.2, 0.6))
    write(place / "anp" / "threshold_df.csv", one_row(0.0, 0.0, 0.0))
    write(place / "nad" / "nad_df_summary.csv", three_rows(0.89, 0.3, 0.5))
    write(place / "nad" / "nad_te_df_summary.csv", three_rows(0.1, 0.1, 0.1))
    write(place / "nc" / "nc_df_summary.csv", one_row(0.9, 0.98, 0.01))
    write(place / "ft-sam" / "log" / "d-sam_df_summary.csv", three_rows(0.88, 0.05, 0.8, head=""))
    write(place / "npd" / "npd_df_summary.csv", three_rows(88.0, 7.0, 75.0, head=""))
    write(place / "mcr" / "mcr_df_summary.csv", ",test_acc,test_asr,test_ra,t\n0,0.03,0.87,0.8,0.1\n")
    spent = {"seconds": {"load": 1.5, "ranking": 2}, "cpu_seconds": 3.25}
    write(place / "fmp" / "metrics.json", metrics_json(0.93, 0.02, 0.9, **spent))
    write(place / "fmp-s1" / "metrics.json", metrics_json(0.91, 0.04, 0.88, seed=1))
    (place / "only-cached" / "cache").mkdir(parents=True)
    blended = tmp_path / "blended_cifar10" / "defense"
    write(blended / "fmp" / "metrics.json", metrics_json(0.8, 0.1, 0.7))
    return tmp_path


def tidy(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "out.csv")


def test_every_shape_is_read_as_fractions(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(root), "--csv", str(root / "out.csv")]) == 0
    frame = tidy(root)
    assert list(frame.columns[:5]) == ["record", "defense", "test_acc", "test_asr", "test_ra"]
    found = frame[frame["record"] == "badnet_cifar10"].set_index("defense")[["test_acc", "test_asr", "test_ra"]]
    expected = {
        "no defense": (0.9, 0.98, 0.01),
        "ft": (0.91, 0.5, 0.4),
        "fp": (0.92, 0.6, 0.3),
        "clp": (0.8, 0.1, 0.7),
        "anp": (0.81, 0.2, 0.6),
        "nad": (0.89, 0.3, 0.5),
        "nc": (0.9, 0.98, 0.01),
        "ft-sam": (0.88, 0.05, 0.8),
        "npd": (0.88, 0.07, 0.75),
        "mcr": (0.87, 0.03, 0.8),
        "fmp": (0.93, 0.02, 0.9),
        "fmp-s1": (0.91, 0.04, 0.88),
    }
    assert set(found.index) == set(expected)
    for name, values in expected.items():
        assert tuple(found.loc[name]) == pytest.approx(values), name
    rows = frame.set_index(["record", "defense"])
    assert rows.loc[("badnet_cifar10", "ft"), "seed"] == 7
    assert rows.loc[("badnet_cifar10", "ft"), "der"] == pytest.approx((0.48 + 1) / 2)
    assert rows.loc[("badnet_cifar10", "clp"), "der"] == pytest.approx((0.88 - 0.1 + 1) / 2)
    spent = rows.loc["badnet_cifar10"][["seconds", "cpu_seconds"]]
    assert spent.loc["clp"].tolist() == [68, 48] and spent.loc["fmp"].tolist() == [3.5, 3.25] and spent.loc["ft"].isna().all()
    # blended has neither info.pickle nor attack_df: the name and our own test before the defense stand in
    assert rows.loc[("blended_cifar10", "fmp"), "attack"] == "blended"
    assert rows.loc[("blended_cifar10", "no defense"), "test_asr"] == 0.985
    assert rows.loc[("badnet_cifar10", "ft"), "ratio"] == 0.05 and rows.loc[("badnet_cifar10", "fmp"), "ratio"] == 0.1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("ft_df_summary.csv", "", "has no rows"),
        ("ft_df_summary.csv", three_rows(1.2, 0, 0), "test_acc '1.2', which is no fraction"),
        ("ft_df_summary.csv", ",test_acc,test_asr,test_ra\nlast,nan_value,0.1,0.1\n", "'nan_value', which is no fraction"),
        ("ft_df_summary.csv", ",epoch,batch\nlast,1,2\n", "has no test_acc, test_asr, test_ra"),
        ("ft_df_summary.csv", 'a,"\n\0', "has no"),
        ("metrics.json", "[" * 100_000, "is not JSON"),
        ("metrics.json", "[1]", "does not hold a JSON object"),
        ("metrics.json", '{"after": {"test_acc": true, "test_asr": 0, "test_ra": 0}}', "test_acc 'True'"),
        ("metrics.json", '{"before": 3}', "has no metrics after"),
        ("notes.txt", "", "no *_df_summary.csv"),
        ("sweep.json", "{", "is not JSON"),
    ],
)
def test_a_bad_file_is_one_warning_and_the_others_go_on(
    root: Path, name: str, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root / "badnet_cifar10" / "defense" / "bad" / name, text)
    assert script.main([str(root), "--csv", str(root / "out.csv")]) == 0
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and str(root / "badnet_cifar10" / "defense" / "bad") in error
    assert "bad" not in set(tidy(root)["defense"]) and len(tidy(root)) == 14


def test_damaged_or_hostile_attack_files_are_warnings(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / "badnet_cifar10" / "info.pickle", "no torch file")
    write(root / "badnet_cifar10" / "attack_df_summary.csv", "x")
    write(root / "blended_cifar10" / "defense" / "two" / "a_df_summary.csv", one_row(0, 0, 0))
    write(root / "blended_cifar10" / "defense" / "two" / "b_df_summary.csv", one_row(0, 0, 0))
    (root / "blended_cifar10" / "defense" / "ft").mkdir()
    (root / "blended_cifar10" / "defense" / "ft" / "ft_df_summary.csv").write_bytes(b"\xff\xfe\x00")
    assert script.main([str(root), "--csv", str(root / "out.csv")]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 4
    assert "info.pickle" in error and "several results" in error and "cannot be read" in error
    assert (
        tidy(root).set_index(["record", "defense"]).loc[("badnet_cifar10", "no defense"), "test_asr"] == 0.985
    )  # our own test


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.log")
    write(tmp_path / "ft_df_summary.csv", one_row(0.1, 0.2, 0.3))
    assert read_result(tmp_path).seed is None
    (tmp_path / "ft_df_summary.csv").unlink()
    os.mkfifo(tmp_path / "ft_df_summary.csv")
    with pytest.raises(UserError, match="no regular file"):
        read_result(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "ft_df_summary.csv", "wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(UserError, match="larger than 16 MiB"):
        read_result(tmp_path)


def test_names_cannot_inject_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x\x1b]0;<script>|_&"
    write(tmp_path / "badnet_cifar10" / "defense" / name / "metrics.json", metrics_json(0.9, 0.1, 0.8))
    out = [f"--{kind}={tmp_path / kind}" for kind in ("html", "latex", "markdown")]
    assert script.main([str(tmp_path), *out]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    html, latex, markdown = ((tmp_path / kind).read_text() for kind in ("html", "latex", "markdown"))
    assert "x?]0;&lt;script&gt;|_&amp;" in html and "<script>|" not in html
    assert r"|\_\&" in latex and r"\|\_" in markdown


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


def marked(table: Table) -> set[tuple[str, str]]:
    """(method, metric) of the cells that are the best of their column."""
    best = table.best()
    return {(method, metric) for method in best.index for attack, metric in best.columns if best.loc[method, (attack, metric)]}


def frame_of(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    """Tidy rows of (record, attack, method, accuracy)."""
    columns = ["record", "attack", "method", "test_acc"]
    rest = {"test_asr": 0.5, "test_ra": 0.5, "der": 0.5, "rir": 0.5, "dataset": "d", "model": "m", "pratio": 0.1}
    whole = {name: pd.array([None] * len(rows), dtype="Int64") for name in ("record_seed", "test_images")}
    return pd.DataFrame(rows, columns=columns).assign(**rest, **whole, origin="ours", ratio=0.1)


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


def test_methods_are_ordered_as_people_count() -> None:
    rows = [("a", "badnet", name, 0.5) for name in ("fmp-p16", "fmp-p4", "ft (published)", "no defense", "fmp")]
    (table,) = build_tables(frame_of(*rows))
    assert table.methods == ["no defense", "fmp", "fmp-p4", "fmp-p16", "ft (published)"]


def test_renderings(root: Path) -> None:
    table = build_tables(collect(root, pytest.fail))[0]
    text = to_text(table, 200)
    assert "92.00±1.41*" in text and "BadNets" in text
    markdown = to_markdown(table)
    assert (
        "| Method | ratio | BadNets Acc | BadNets ASR | BadNets RA | BadNets DER | BadNets RIR |" in markdown
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


def board(path: Path) -> Path:
    head = ",dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
    where = "cifar10,preactresnet18,badnet"
    lines = [f"0,{where},no defense,0.1,0.91,0.95,0.05", f"1,{where},ft,0.1,0.9,0.2,0.7", f"2,{where},nad,0.1,-1,-1,-1"]
    lines += [f"3,{where},ft,0.05,0.9,0.2,0.7", "4,gtsrb,preactresnet18,badnet,ft,0.1,0.9,0.2,0.7", f"5,{where},fp,0.1,,,"]
    write(path, head + "\n".join(lines) + "\n")
    return path


def test_the_leaderboard_is_joined_and_labelled(root: Path) -> None:
    file = board(root / "board.csv")
    assert script.main([str(root), "--leaderboard", str(file), "--csv", str(root / "out.csv")]) == 0
    published = tidy(root)[tidy(root)["origin"] == "published"]
    assert published["method"].tolist() == ["no defense (published)", "ft (published)"]
    assert published["der"].tolist()[1] == pytest.approx((0.75 - 0.01 + 1) / 2)
    frame = join_leaderboard(collect(root, pytest.fail), read_leaderboard(file))
    assert "ft (published)" in build_tables(frame)[0].methods


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", "\0\0"])
def test_another_csv_is_no_leaderboard(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / "board.csv", text)
    assert script.main([str(root), "--leaderboard", str(root / "board.csv")]) == 2
    assert "--leaderboard" in capsys.readouterr().err


def test_nothing_to_collect_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path)]) == 2
    assert script.main([str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "no defense results" in error and "There is no folder" in error


def test_the_ratings_are_bbs_formulas() -> None:
    before = {"test_acc": 0.9, "test_asr": 1.0, "test_ra": 0.0}
    assert ratings(before, {"test_acc": 0.8, "test_asr": 0.1, "test_ra": 0.6}) == pytest.approx({"der": 0.9, "rir": 0.75})
    assert ratings(before, {"test_acc": 0.95, "test_asr": 1.0, "test_ra": 0.0}) == {"der": 0.5, "rir": 0.5}


def test_different_shares_of_clean_data_are_a_note(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: root / kind for kind in ("html", "latex", "markdown")}
    assert script.main([str(root), *(f"--{kind}={file}" for kind, file in files.items())]) == 0
    for text in (capsys.readouterr().out, *(file.read_text() for file in files.values())):
        assert text.count("different shares of clean data (0.05: ft; 0.1: fmp)") == 1  # not in blended's table
    (table,) = build_tables(frame_of(("a", "badnet", "fmp", 0.8), ("a", "badnet", "ft", 0.9)))
    assert table.notes == [] and table.texts().loc["ft", ("", "ratio")] == "0.1"


def test_published_rows_do_not_compete(root: Path) -> None:
    rows = frame_of(("a", "badnet", "fmp", 0.8), ("a", "badnet", "ft", 0.7), ("", "badnet", "ft (published)", 0.99))
    (table,) = build_tables(rows.assign(origin=["ours", "backdoorbench", "published"]))
    assert ("fmp", "test_acc") in marked(table) and not any(method == "ft (published)" for method, _ in marked(table))
    assert "font-style: italic" in to_html([table])


def test_a_sample_of_the_test_images_is_not_mixed_with_the_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = metrics_json(0.99, 0.0, 0.99, seed=2, before_acc=0.5, test_images=50)
    write(root / "badnet_cifar10" / "defense" / "fmp-s2" / "metrics.json", sample)
    assert script.main([str(root), "--csv", str(root / "out.csv")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "Tested on a sample" in printed.out
    rows = tidy(root).set_index(["record", "defense"])
    assert rows.loc[("badnet_cifar10", "fmp-s2"), "test_images"] == 50
    assert rows.loc[("badnet_cifar10", "fmp-s2"), "baseline"] == "our test"  # on the same sample
    table = build_tables(collect(root, pytest.fail))[0]
    assert table.texts().loc["fmp", ("badnet", "test_acc")] == "92.00±1.41"
    assert "fmp (50 test images)" in table.methods and not any("test images" in method for method, _ in marked(table))


def test_our_rows_use_our_baseline_where_the_attacks_figures_are_not_ours(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another preprocessing, say: the attack logged Acc 90, we measure 12."""
    write(root / "badnet_cifar10" / "defense" / "fmp" / "metrics.json", metrics_json(0.1, 0.02, 0.9, before_acc=0.12))
    assert script.main([str(root), "--csv", str(root / "out.csv")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("collect: badnet_cifar10: the attack logged Acc 90.00, ASR 98.00") and "our test gave Acc 12.00" in line
    )
    rows = tidy(root).set_index(["record", "defense"])
    ours, theirs = (rows.loc[("badnet_cifar10", name)] for name in ("fmp", "clp"))
    assert ours["baseline"] == "our test" and ours["der"] == pytest.approx((0.965 - 0.02 + 1) / 2)
    assert theirs["baseline"] == "attack" and theirs["der"] == pytest.approx((0.88 - 0.1 + 1) / 2)
    assert rows.loc[("badnet_cifar10", "no defense (our test)"), "test_acc"] == 0.12


def test_nested_records_are_collected(root: Path) -> None:
    """As ``--save_folder_name cifar10/badnet`` makes them; images and results inside a record are not searched."""
    (root / "cifar10").mkdir()
    (root / "badnet_cifar10").rename(root / "cifar10" / "badnet_cifar10")
    (root / "cifar10" / "badnet_cifar10" / "bd_test_dataset" / "defense").mkdir(parents=True)
    (root / "cifar10" / "ring").symlink_to(root / "cifar10", target_is_directory=True)
    frame = collect(root, pytest.fail)
    assert {"cifar10/badnet_cifar10", "blended_cifar10"} <= set(frame["record"])
    assert frame[frame["record"] == "cifar10/badnet_cifar10"]["attack"].unique().tolist() == ["badnet"]


@pytest.mark.shared
def test_real_outputs_of_backdoorbench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shared = Path(__file__).resolve().parents[3] / "shared" / "records" / "bb_outputs"
    if not shared.is_dir():
        pytest.skip("the project's real records are not here")
    assert script.main([str(shared), "--csv", str(tmp_path / "out.csv")]) == 0
    frame = pd.read_csv(tmp_path / "out.csv").set_index("defense")
    assert {"ft", "fp", "anp", "clp", "nc", "nad", "rnp", "ft-sam", "npd", "sau"} <= set(frame.index)
    assert frame.loc["npd", "test_acc"] == pytest.approx(1 / 43) and frame.loc["fp", "test_asr"] == 0
    assert "i-bau" in capsys.readouterr().err  # ended before it wrote a result
