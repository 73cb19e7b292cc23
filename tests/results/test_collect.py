"""Results of every shape as one tidy table, and the table in every rendering."""

from __future__ import annotations

import json
import os
from pathlib import Path

import collect
import pandas as pd
import pytest
import torch
from fmp_core.metrics import defense_effectiveness
from fmp_core.results.collect import join_leaderboard, read_leaderboard
from fmp_core.results.html_tables import to_html
from fmp_core.results.read import UnreadableError, read_result
from fmp_core.results.tables import build_tables, to_latex, to_markdown, to_text

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


def metrics_json(acc: float, asr: float, ra: float, seed: int = 0) -> str:
    after = {"test_acc": acc, "test_asr": asr, "test_ra": ra}
    before = {"test_acc": 0.95, "test_asr": 1.0, "test_ra": 0.0}
    return json.dumps({"after": after, "before": before, "dataset": "cifar10", "model": "preactresnet18", "seed": seed})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two records with a defense of each shape; every value says which."""
    badnet = tmp_path / "badnet_cifar10"
    write(badnet / "attack_df_summary.csv", three_rows(0.9, 0.98, 0.01))
    info = {"attack": "badnet", "dataset": "cifar10", "model": "preactresnet18", "pratio": 0.1, "random_seed": 0}
    torch.save(info, badnet / "info.pickle")
    place = badnet / "defense"
    write(place / "ft" / "ft_df_summary.csv", three_rows(0.91, 0.5, 0.4))
    write(place / "ft" / "log" / "x.log", "... {'random_seed': 7, ...")
    write(place / "fp" / "finetune_df_summary.csv", three_rows(0.92, 0.6, 0.3))
    write(place / "fp" / "prune_log_summary.csv", ",num_pruned,test_acc,test_asr,test_ra\nlast,350,0.1,0.1,0.1\n")
    write(place / "clp" / "clp_df_summary.csv", one_row(0.8, 0.1, 0.7))
    write(place / "anp" / "anp_df_summary.csv", one_row(0.81, 0.2, 0.6))
    write(place / "anp" / "threshold_df.csv", one_row(0.0, 0.0, 0.0))
    write(place / "nad" / "nad_df_summary.csv", three_rows(0.89, 0.3, 0.5))
    write(place / "nad" / "nad_te_df_summary.csv", three_rows(0.1, 0.1, 0.1))
    write(place / "nc" / "nc_df_summary.csv", one_row(0.9, 0.98, 0.01))
    write(place / "ft-sam" / "log" / "d-sam_df_summary.csv", three_rows(0.88, 0.05, 0.8, head=""))
    write(place / "npd" / "npd_df_summary.csv", three_rows(88.0, 7.0, 75.0, head=""))
    write(place / "mcr" / "mcr_df_summary.csv", ",test_acc,test_asr,test_ra,t\n0,0.03,0.87,0.8,0.1\n")
    write(place / "fmp" / "metrics.json", metrics_json(0.93, 0.02, 0.9))
    write(place / "fmp-s1" / "metrics.json", metrics_json(0.91, 0.04, 0.88, seed=1))
    (place / "only-cached" / "cache").mkdir(parents=True)
    blended = tmp_path / "blended_cifar10" / "defense"
    write(blended / "fmp" / "metrics.json", metrics_json(0.8, 0.1, 0.7))
    return tmp_path


def tidy(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "out.csv")


def test_every_shape_is_read_as_fractions(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main([str(root), "--csv", str(root / "out.csv")]) == 0
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
    # blended has neither info.pickle nor attack_df: the name and our own test before the defense stand in
    assert rows.loc[("blended_cifar10", "fmp"), "attack"] == "blended"
    assert rows.loc[("blended_cifar10", "no defense"), "test_asr"] == 1.0
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
    assert collect.main([str(root), "--csv", str(root / "out.csv")]) == 0
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
    assert collect.main([str(root), "--csv", str(root / "out.csv")]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 4
    assert "info.pickle" in error and "several results" in error and "cannot be read" in error
    assert tidy(root).set_index(["record", "defense"]).loc[("badnet_cifar10", "no defense"), "test_asr"] == 1.0  # our own test


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.log")
    write(tmp_path / "ft_df_summary.csv", one_row(0.1, 0.2, 0.3))
    assert read_result(tmp_path).seed is None
    (tmp_path / "ft_df_summary.csv").unlink()
    os.mkfifo(tmp_path / "ft_df_summary.csv")
    with pytest.raises(UnreadableError, match="no regular file"):
        read_result(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "ft_df_summary.csv", "wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(UnreadableError, match="larger than 16 MiB"):
        read_result(tmp_path)


def test_names_cannot_inject_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x\x1b]0;<script>|_&"
    write(tmp_path / "badnet_cifar10" / "defense" / name / "metrics.json", metrics_json(0.9, 0.1, 0.8))
    out = [f"--{kind}={tmp_path / kind}" for kind in ("html", "latex", "markdown")]
    assert collect.main([str(tmp_path), *out]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    html, latex, markdown = ((tmp_path / kind).read_text() for kind in ("html", "latex", "markdown"))
    assert "x?]0;&lt;script&gt;|_&amp;" in html and "<script>|" not in html
    assert r"|\_\&" in latex and r"\|\_" in markdown


def test_seeds_are_averaged_and_the_best_is_marked(root: Path) -> None:
    frame = collect.collect(root, pytest.fail)
    tables = build_tables(frame)
    assert [table.title for table in tables] == ["cifar10, preactresnet18, poison rate 10 %", "cifar10, preactresnet18"]
    cells = tables[0].cells
    assert cells["fmp", "badnet", "test_acc"].text() == "92.00±1.41"  # of 93 and 91, sample standard deviation
    assert cells["ft", "badnet", "test_acc"].text() == "91.00"
    best = {(method, metric) for method, _, metric in tables[0].best}
    tied = {("fmp", "test_acc"), ("fp", "test_acc"), ("fmp", "test_asr"), ("mcr", "test_asr")}
    assert best == tied | {("fmp", "test_ra"), ("fmp", "der")}


def frame_of(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    """Tidy rows of (record, attack, method, accuracy)."""
    columns = ["record", "attack", "method", "test_acc"]
    rest = {"test_asr": 0.5, "test_ra": 0.5, "der": 0.5, "dataset": "d", "model": "m", "pratio": 0.1, "origin": "ours"}
    return pd.DataFrame(rows, columns=columns).assign(**rest, record_seed=pd.array([None] * len(rows), dtype="Int64"))


def test_the_average_is_over_every_attack_or_absent() -> None:
    rows = [("a", "badnet", "fmp", 0.8), ("b", "blended", "fmp", 0.9), ("a", "badnet", "ft", 0.7)]
    (table,) = build_tables(frame_of(*rows))
    assert table.attacks == ["badnet", "blended", "AVG"]
    assert table.value("fmp", ("AVG", "test_acc")) == "85.00" and table.value("ft", ("AVG", "test_acc")) == "-"


def test_different_records_of_one_attack_are_not_mixed() -> None:
    (table,) = build_tables(frame_of(("a", "badnet", "fmp", 0.8), ("b", "badnet", "fmp", 0.6)))
    assert table.attacks == ["a", "b", "AVG"]
    seeds = frame_of(("a", "badnet", "fmp", 0.8), ("b", "badnet", "fmp", 0.6)).assign(record_seed=[0, 1])
    (table,) = build_tables(seeds)
    assert table.attacks == ["badnet"] and table.cells["fmp", "badnet", "test_acc"].mean == pytest.approx(70)


def test_methods_are_ordered_as_people_count() -> None:
    rows = [("a", "badnet", name, 0.5) for name in ("fmp-p16", "fmp-p4", "ft (published)", "no defense", "fmp")]
    (table,) = build_tables(frame_of(*rows))
    assert table.methods == ["no defense", "fmp", "fmp-p4", "fmp-p16", "ft (published)"]


def test_renderings(root: Path) -> None:
    table = build_tables(collect.collect(root, pytest.fail))[0]
    text = to_text(table, 200)
    assert "92.00±1.41*" in text and "BadNets" in text
    markdown = to_markdown(table)
    assert "| Method | BadNets Acc | BadNets ASR | BadNets RA | BadNets DER |" in markdown and "**92.00±1.41**" in markdown
    latex = to_latex(table)
    assert r"\toprule" in latex and r"\textbf{92.00\,$\pm$\,1.41}" in latex and r"Acc $\uparrow$ & ASR $\downarrow$" in latex
    html = to_html([table])
    assert html.count("<tr") == 2 + len(table.methods) and 'data-value="92.000000"' in html
    assert "http" not in html  # self-contained


def test_a_narrow_terminal_gets_blocks() -> None:
    rows = [(name, name, "fmp", 0.5) for name in ("badnet", "blended", "lf", "ssba")]
    text = to_text(build_tables(frame_of(*rows))[0], 60)
    assert max(map(len, text.splitlines())) <= 60 and text.count("method") >= 2


def board(path: Path) -> Path:
    head = ",dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
    where = "cifar10,preactresnet18,badnet"
    lines = [f"0,{where},no defense,0.1,0.91,0.95,0.05", f"1,{where},ft,0.1,0.9,0.2,0.7", f"2,{where},nad,0.1,-1,-1,-1"]
    lines += [f"3,{where},ft,0.05,0.9,0.2,0.7", "4,gtsrb,preactresnet18,badnet,ft,0.1,0.9,0.2,0.7", f"5,{where},fp,0.1,,,"]
    write(path, head + "\n".join(lines) + "\n")
    return path


def test_the_leaderboard_is_joined_and_labelled(root: Path) -> None:
    file = board(root / "board.csv")
    assert collect.main([str(root), "--leaderboard", str(file), "--csv", str(root / "out.csv")]) == 0
    published = tidy(root)[tidy(root)["origin"] == "published"]
    assert published["method"].tolist() == ["no defense (published)", "ft (published)"]
    assert published["der"].tolist()[1] == pytest.approx((0.75 - 0.01 + 1) / 2)
    frame = join_leaderboard(collect.collect(root, pytest.fail), read_leaderboard(file))
    assert "ft (published)" in build_tables(frame)[0].methods


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", "\0\0"])
def test_another_csv_is_no_leaderboard(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / "board.csv", text)
    assert collect.main([str(root), "--leaderboard", str(root / "board.csv")]) == 2
    assert "--leaderboard" in capsys.readouterr().err


def test_nothing_to_collect_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main([str(tmp_path)]) == 2
    assert collect.main([str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "no defense results" in error and "There is no folder" in error


def test_effectiveness_is_bbs_formula() -> None:
    before = {"test_acc": 0.9, "test_asr": 1.0, "test_ra": 0.0}
    assert defense_effectiveness(before, {"test_acc": 0.8, "test_asr": 0.1, "test_ra": 0.8}) == pytest.approx(0.9)
    assert defense_effectiveness(before, {"test_acc": 0.95, "test_asr": 1.0, "test_ra": 0.0}) == pytest.approx(0.5)


@pytest.mark.shared
def test_real_outputs_of_backdoorbench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shared = Path(__file__).resolve().parents[3] / "shared" / "records" / "bb_outputs"
    if not shared.is_dir():
        pytest.skip("the project's real records are not here")
    assert collect.main([str(shared), "--csv", str(tmp_path / "out.csv")]) == 0
    frame = pd.read_csv(tmp_path / "out.csv").set_index("defense")
    assert {"ft", "fp", "anp", "clp", "nc", "nad", "rnp", "ft-sam", "npd", "sau"} <= set(frame.index)
    assert frame.loc["npd", "test_acc"] == pytest.approx(1 / 43) and frame.loc["fp", "test_asr"] == 0
    assert "i-bau" in capsys.readouterr().err  # ended before it wrote a result
