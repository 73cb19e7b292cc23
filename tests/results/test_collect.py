"""Results of every shape as one tidy table, and what collect.py says of files it cannot use."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import collect as script
import pandas as pd
import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.metrics import ratings
from fmp_core.results.collect import collect, join_leaderboard, read_leaderboard
from fmp_core.results.read import read_record, read_result
from fmp_core.results.tables import build_tables
from result_files import marked, metrics_json, one_row, three_rows, tidy, write


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
        ("sweep.json", "{}", "no *_df_summary.csv"),
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
    write(tmp_path / "sweep.json", '{"source": "the digest of a file"}')
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


def board(path: Path) -> Path:
    head = ",dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra\n"
    where = "cifar10,preactresnet18,badnet"
    lines = [f"0,{where},no defense,0.1,0.91,0.95,0.05", f"1,{where},ft,0.1,0.9,0.2,0.7", f"2,{where},nad,0.1,-1,-1,-1"]
    lines += [f"3,{where},ft,0.05,0.9,0.2,0.7", "4,gtsrb,preactresnet18,badnet,ft,0.1,0.9,0.2,0.7"]
    lines += [f"5,{where},fp,0.1,,,", f"6,{where},,0.1,0.9,0.2,0.7"]  # no figures, no defense
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
    all_to_all = collect(root, pytest.fail).assign(target="all-to-all")
    assert "published" not in set(join_leaderboard(all_to_all, read_leaderboard(file))["origin"])


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
        line.startswith("collect: badnet_cifar10: the attack logged Acc 90.00 %  ASR 98.00 %")
        and "our test gave Acc 12.00" in line
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
    said: list[str] = []
    frame = collect(root, said.append)
    assert set(frame["record"]) == {"cifar10/badnet_cifar10", "blended_cifar10"}
    assert said and all(line.endswith("are one record; it is counted once") for line in said)
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


def test_records_are_told_apart_by_what_their_attacks_were_set_to(tmp_path: Path) -> None:
    info = {"attack": "badnet", "dataset": "cifar10", "attack_label_trans": "all2one", "random_seed": 0, "save_path": "here"}
    digests = []
    for change in ({}, {"random_seed": 1, "save_path": "there", "device": "cpu"}, {"attack_label_trans": "all2all"}):
        torch.save({**info, **change}, tmp_path / "info.pickle")
        digests.append(read_record(tmp_path)["record_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_records_are_told_apart_by_the_files_of_their_triggers(tmp_path: Path) -> None:
    digests = []
    for picture in ("a/kitty.jpg", "b/kitty.jpg", "a/noise.jpg"):
        torch.save({"attack": "blended", "attack_trigger_img_path": picture}, tmp_path / "info.pickle")
        digests.append(read_record(tmp_path)["record_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_the_last_run_of_backdoorbench_says_seed_and_ratio(tmp_path: Path) -> None:
    write(tmp_path / "ft_df_summary.csv", three_rows(0.9, 0.1, 0.8))
    for day, seed, ratio in ((1, 0, 0.05), (2, 3, 0.1)):
        write(tmp_path / "log" / f"2026_11_0{day}.log", f"{{'ratio': {ratio}, 'random_seed': {seed}, ")
    assert (read_result(tmp_path).seed, read_result(tmp_path).ratio) == (3, 0.1)


def test_a_number_no_table_can_hold_is_no_seed(tmp_path: Path) -> None:
    write(tmp_path / "metrics.json", metrics_json(0.9, 0.1, 0.8, seed=10**30, test_images=10**30))
    assert read_result(tmp_path).seed is None and read_result(tmp_path).test_images is None


def test_a_record_whose_name_is_not_unicode_stops_no_table(tmp_path: Path) -> None:
    write(tmp_path / "record" / os.fsdecode(b"caf\xe9") / "defense" / "fmp" / "metrics.json", metrics_json(0.8, 0.1, 0.7))
    assert script.main([str(tmp_path / "record"), "--csv", str(tmp_path / "all.csv")]) == 0
    assert "caf\\udce9,fmp" in (tmp_path / "all.csv").read_text("utf-8")


def test_settings_of_backdoorbench_come_from_its_log(tmp_path: Path) -> None:
    """... stamped by a sweep or not, so that runs by hand and other learning rates are no seeds of one method."""

    def digest(name: str, seed: int, rate: float) -> str | None:
        write(tmp_path / name / "ft_df_summary.csv", three_rows(0.9, 0.1, 0.8))
        head = f"[INFO] {{'index': None,\n 'lr': {rate},\n 'random_seed': {seed},\n 'save_path': '{name}',\n 'wd': 0.0005}}\n"
        write(tmp_path / name / "log" / "2026.log", f"2026-11-27 {head}2026-11-27 [INFO] {{'test_acc': 0.{seed}}}\n")
        assert read_result(tmp_path / name).seed == seed
        return read_result(tmp_path / name).settings_digest

    first = digest("a", 0, 0.1)
    assert first is not None and first == digest("b", 1, 0.1) != digest("c", 1, 0.2)


def test_a_result_on_a_record_that_was_replaced_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "badnet_cifar10"
    write(record / "attack_result.pt", "the model of today")
    for name, attacked in (("fmp", "of today"), ("fmp-p4", "of yesterday")):
        digest = hashlib.sha256(f"the model {attacked}".encode()).hexdigest()
        write(record / "defense" / name / "metrics.json", metrics_json(0.8, 0.1, 0.7, attack_result=digest))
        write(record / "defense" / f"ft{name}" / "ft_df_summary.csv", three_rows(0.9, 0.1, 0.8))
        write(record / "defense" / f"ft{name}" / "defense_result.pt", "repaired")
        note = {"attack_result": digest, "defense_result": hashlib.sha256(b"repaired").hexdigest()}
        write(record / "defense" / f"ft{name}" / "run_defense.json", json.dumps(note))
    problems: list[str] = []
    frame = collect(tmp_path, problems.append)
    assert list(frame["defense"]) == ["no defense", "fmp", "ftfmp"]
    assert len(problems) == 2 and "fmp-p4 is a result on another attack_result.pt" in problems[0]
    write(record / "defense" / "ftfmp-p4" / "defense_result.pt", "by BackdoorBench's script, run directly")
    assert "ftfmp-p4" in list(collect(tmp_path, problems.append)["defense"])


def test_what_is_left_of_our_run_is_no_result_of_backdoorbench(tmp_path: Path) -> None:
    write(tmp_path / "fmp_df_summary.csv", three_rows(0.9, 0.1, 0.8))
    with pytest.raises(UserError, match=r"has no metrics\.json, though FMP wrote there"):
        read_result(tmp_path)
