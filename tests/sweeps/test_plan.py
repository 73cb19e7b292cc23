"""What a sweep file asks for: its jobs, what they share, and bad files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sweep as script
from fmp_core.errors import UserError
from fmp_core.sweeps.jobs import Job, settings_hash
from fmp_core.sweeps.plan import plan, read_sweep
from sweep_jobs import sweep_of

DEFENSE = Path(__file__).resolve().parents[2] / "defense"


def test_the_matrix_and_its_names(place: Path) -> None:
    entries = [
        {"defense": "fmp", "p": [4, 8], "eps": ["1/255", "4/255"]},
        "ft-only",
        {"defense": "fmp", "name": "tuned", "lr": 0.1},
    ]
    jobs = plan(sweep_of(defenses=entries, seeds=[0, 3], ours={"epochs": 2}))
    names = ["fmp-p4-eps1_255", "fmp-p4-eps4_255", "fmp-p8-eps1_255", "fmp-p8-eps4_255", "ft-only", "tuned"]
    assert sorted(job.folder.name for job in jobs) == sorted([*names, *(f"{name}-s3" for name in names)])
    by_name = {job.folder.name: job for job in jobs}
    command = " ".join(by_name["fmp-p8-eps4_255-s3"].command)
    for flag in ("--p 8", "--eps 4/255", "--random_seed 3", "--epochs 2", "--device cpu", "--defense_name fmp-p8-eps4_255-s3"):
        assert flag in command
    assert by_name["ft-only"].settings["selection"] == "none" and by_name["ft-only"].shared_work is None
    rankings = {name: job.shared_work for name, job in by_name.items()}
    assert rankings["fmp-p4-eps1_255"] == rankings["fmp-p8-eps1_255"] == rankings["tuned"]
    assert len({rankings[name] for name in ("fmp-p4-eps1_255", "fmp-p4-eps4_255", "fmp-p4-eps1_255-s3")}) == 3


def test_numbers_that_belong_together_are_one_flag(place: Path) -> None:
    """... of a setting that takes several; of others, a list in an entry of ``defenses`` is one run per item."""
    command = " ".join(plan(sweep_of(ours={"lr_scheduler": "MultiStepLR", "steplr_milestones": [5, 8]}))[0].command)
    assert "--steplr_milestones 5,8" in command
    (one,) = plan(sweep_of(defenses=[{"defense": "fmp", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}]))
    assert "--mean 0.5,0.4,0.3 --std 0.2,0.2,0.2" in " ".join(one.command)
    assert len(plan(sweep_of(defenses=[{"defense": "fmp", "mean": ["0.5", "0.4"], "std": 0.2}]))) == 2


def test_the_names_of_our_defenses_say_how_maps_are_selected(place: Path) -> None:
    jobs = plan(sweep_of(defenses=["fmp", "ft-only", "random-prune"]))
    assert {job.method: job.settings["selection"] for job in jobs} == {
        "fmp": "frg",
        "ft-only": "none",
        "random-prune": "random",
    }
    assert plan(sweep_of(defenses=[{"defense": "fmp", "name": None}]))[0].folder.name == "fmp"  # "name:" and nothing after it


def test_minutes_are_seconds_for_a_job(place: Path) -> None:
    assert sweep_of(timeout=1.5).seconds == 90 and sweep_of().seconds is None


def test_what_is_shared(place: Path) -> None:
    """Runs that rank alike share the ranking; strong ones share the search for triggers, whatever the paper's count needs."""

    def shared(**entry: Any) -> int:
        works = [job.shared_work for job in plan(sweep_of(defenses=[{"defense": "fmp", **entry}]))]
        return len(works) - len(set(works) - {None})

    assert shared(p=[4, 8], lr=[0.1, 0.2], wait=[True, False]) == 7
    assert shared(ranking="racing", p=[4, 8]) == 0  # only the maps near the cut are scored in full
    assert shared(preset="strong", budget=[0.01, 0.05], p=[4, 8], eps=[0.1, 0.2], distill=[0, 1], masked=[True, False]) == 31
    assert shared(preset="strong", ratio=[0.1, 0.2]) == 0 and shared(preset="strong", dtype=["fp32", "bf16"]) == 0
    assert shared(preset="strong", budget=[0.01, 0.05], fresh=True) == 2  # each searches, and waits for nobody
    assert (
        len({job.shared_work for job in plan(sweep_of(defenses=["fmp", {"defense": "fmp", "name": "s", "preset": "strong"}]))})
        == 2
    )


def test_what_changes_no_result_reruns_nothing(place: Path) -> None:
    def hashes(**ours: Any) -> set[str]:
        return {settings_hash(job) for job in plan(sweep_of(ours=ours))}

    assert hashes() == hashes(report=False, wait=True, tensorboard=True, quiet=True, chunk=8, memory=512, frequency_save=1)
    assert len(hashes() | hashes(p=8) | hashes(test_images=50) | hashes(ratio=0.2) | hashes(frequency_test=0)) == 5


def test_one_ratio_for_all(place: Path) -> None:
    for name, flag in (("ft", "--ratio"), ("clp", "--u")):
        (place / "bb" / "defense").mkdir(parents=True, exist_ok=True)
        (place / "bb" / "defense" / f"{name}.py").write_text(f"parser.add_argument('{flag}', type=float)")
    given = {"backdoorbench": "bb", "ratio": 0.05}
    jobs = plan(sweep_of(defenses=["fmp", "ft-only", "ft", "clp", {"defense": "ft", "name": "more", "ratio": 0.2}], **given))
    ratios = {job.method: job.settings.get("ratio") for job in jobs}
    assert ratios == {"fmp": 0.05, "ft-only": 0.05, "ft": 0.05, "clp": None, "more": 0.2}
    for job in jobs:
        assert ("--ratio" in job.command) == (job.method != "clp")


def test_records_are_a_matrix_too(place: Path) -> None:
    entry = {"dataset": "digits", "pratio": [0.1, 0.05], "epochs": 2}
    jobs = plan(sweep_of(records=[entry, {"name": "my_{dataset}", "dataset": "digits"}, "r"]))
    made = [job for job in jobs if job.kind == "record"]
    assert [job.record for job in made] == ["badnet_digits-pratio0.1", "badnet_digits-pratio0.05", "my_digits"]
    assert "--save_folder_name badnet_digits-pratio0.05" in " ".join(made[1].command)
    assert [job.record for job in jobs if job.kind == "ours"] == [*(job.record for job in made), "r"]


def test_processes_run_under_torchrun(place: Path) -> None:
    (job,) = plan(sweep_of(processes=2, defenses=[{"defense": "fmp", "p": 32}]))
    assert job.command[1:6] == ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")
    script = place / "words.py"
    script.write_text("import os, sys; print(sys.argv[1:] if os.environ['RANK'] == '0' else '')")
    command = [str(script) if word.endswith("fmp.py") else word for word in job.command]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)  # torchrun reads no flag of ours, such as --p
    assert "'--p', '32'" in ran.stdout


def test_a_defense_of_backdoorbench(place: Path) -> None:
    (place / "bb" / "defense").mkdir(parents=True)
    (place / "bb" / "defense" / "ft.py").touch()
    jobs = plan(sweep_of(defenses=[{"defense": "ft", "epochs": 2}], backdoorbench="bb", seeds=[0, 1]))
    assert [job.folder.name for job in jobs] == ["ft", "ft-s1"]
    assert all(job.writes == Path("record/r/defense/ft") for job in jobs)
    command = jobs[1].command
    assert command[command.index("--") + 1 :] == ("--epochs", "2", "--random_seed", "1")
    assert command[4:6] == ("--defense", "ft")


def test_another_checkout_decides_by_its_code_and_settings(place: Path) -> None:
    script, own = Path("bb/defense/ft.py"), Path("bb/config/defense/ft/config.yaml")
    for file in (script, own):
        file.parent.mkdir(parents=True)
        file.touch()

    def decided(checkout: str = "bb") -> str:
        (job,) = plan(sweep_of(defenses=["ft"], backdoorbench=checkout))
        return settings_hash(job)

    before = decided()
    Path("bb").rename("moved")
    assert decided("moved") == before
    Path("moved", own.relative_to("bb")).write_text("lr: 0.5\n")
    changed = decided("moved")
    Path("moved", script.relative_to("bb")).write_text("print(1)\n")
    assert len({before, changed, decided("moved")}) == 3


def test_few_test_images_and_bf16_are_for_backdoorbench_and_decide(place: Path) -> None:
    (place / "bb" / "defense").mkdir(parents=True)
    (place / "bb" / "defense" / "ft.py").write_text("")

    def jobs(**keys: Any) -> list[Job]:
        return plan(sweep_of(defenses=["fmp", "ft"], backdoorbench="bb", **keys))

    ours, theirs = jobs(backdoorbench_test_images=500)
    assert "--test_images" not in ours.command
    assert theirs.command[theirs.command.index("--test_images") + 1] == "500"
    assert theirs.command.index("--test_images") < theirs.command.index("--")
    whole = jobs()
    assert settings_hash(whole[0]) == settings_hash(ours) and settings_hash(whole[1]) != settings_hash(theirs)
    assert "--test_images" not in whole[1].command
    ours, theirs = jobs(backdoorbench_dtype="bf16")
    assert theirs.command[theirs.command.index("--dtype") + 1] == "bf16" and "--dtype" not in (*ours.command, *whole[1].command)
    assert settings_hash(whole[0]) == settings_hash(ours) and settings_hash(whole[1]) != settings_hash(theirs)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"defences": []}, "unknown key 'defences'"),
        ({"records": []}, "records is [], but must be a list"),
        ({"records": "r"}, "records is 'r', but must be a list"),
        ({"records": [3]}, "neither the name of a record"),
        ({"records": [{"name": "{oops}"}]}, "which may use {attack}, {dataset}"),
        ({"records": [{"name": 2024}]}, "name 2024 must be a text"),
        ({"records": [{"name": "{attack"}]}, "name '{attack' must be a text"),
        ({"records": [{"name": "{epochs:d}", "epochs": "x"}]}, "must be a text"),
        ({"records": [{"attack": "none"}]}, "a clean control has pratio: 0"),
        ({"defenses": [{"defense": "fmp", "random_seed": [1, 2]}]}, "what the key seeds of the sweep gives"),
        ({"ours": {"random_seed": 7}}, "what the key seeds of the sweep gives"),
        ({"defenses": ["ft-only"], "ours": {"selection": "frg"}}, "ft-only has a selection of its own"),
        ({"slurm": {"time": "02:00:00"}}, "slurm: time is '02:00:00', but must be a whole number of at least 1"),
        ({"slurm": {"memory_gb": "16GB"}}, "slurm: memory_gb is '16GB', but must be a number above 0"),
        ({"slurm": {"setup": "module load cuda"}}, "but must be a list of shell lines"),
        ({"records": [{"dataset": "a/b"}]}, "the folder it is in is the sweep's dataset_path"),
        ({"device": "tpu"}, "device is 'tpu', but must be auto, cpu"),
        ({"records": [{"epoch": 3}]}, "'epoch' is not a flag of make_record.py"),
        ({"records": [{"pratio": 2}]}, "records: pratio of badnet_digits is 2, but must be a number"),
        ({"seeds": [-1]}, "whole numbers"),
        ({"seeds": [0, 1, 0]}, "seeds has 0 twice"),
        ({"seeds": [True]}, "whole numbers"),
        ({"workers": 0}, "workers is 0"),
        ({"timeout": "x"}, "timeout is 'x'"),
        ({"ratio": 0.1, "ours": {"ratio": 0.2}}, "ratio is said twice"),
        ({"name": "a/b"}, "it names a folder"),
        ({"ours": 3}, "ours is 3, but must be 'key: value' lines"),
        (
            {"slurm": {"partitio": "x"}},
            "slurm is {'partitio': 'x'}, but must be 'key: value' lines with the keys partition, time",
        ),
        ({"defenses": [{"p": 3}]}, "neither the name of a defense"),
        ({"defenses": [{"defense": "fmp", "name": "../x"}]}, "name is '../x', but must be a folder name"),
        ({"defenses": [{"defense": "fmp", "name": "\xfcn\xef"}]}, "must be a folder name of at most 100 letters"),
        ({"defenses": [{"defense": "fmp", "name": "x" * 99}], "seeds": [1]}, "must be a folder name of at most 100 letters"),
        ({"records": [{"name": "x" * 101}]}, "but must be a folder name of at most 100 letters"),
        ({"records": ["r", "../record/r"]}, "Two jobs of the sweep would write record/../record/r/defense/fmp"),
        ({"defenses": [{"defense": "fmp", "pp": 3}]}, "'pp' is not a setting"),
        ({"defenses": [{"defense": "fmp", "device": "cpu"}]}, "'device' is not a setting of fmp that a sweep can give"),
        ({"defenses": [{"defense": "fmp", "p": 0}]}, "--p is 0"),
        ({"defenses": ["fmp", {"defense": "fmp", "lr": 0.1}]}, "Two jobs of the sweep would write record/r/defense/fmp"),
        ({"defenses": ["ft"]}, "the sweep needs the key backdoorbench"),
        ({"defenses": ["ft"], "backdoorbench": "/nowhere"}, "there is no /nowhere/defense/ft.py"),
        ({"defenses": ["ft"], "backdoorbench": "bb", "records": [{"epochs": 1}]}, "it knows no dataset digits"),
    ],
)
def test_a_bad_sweep_is_one_sentence(place: Path, keys: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bb" / "defense").mkdir(parents=True)
    (place / "bb" / "defense" / "ft.py").touch()
    (place / "s.yaml").write_text(json.dumps({"records": ["r"], "defenses": ["fmp"], **keys}))
    assert script.main(["s.yaml"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (place / "sweeps").exists()


@pytest.mark.parametrize("text", ["[1]", "a: [", "\0"])
def test_not_a_sweep_file(place: Path, text: str) -> None:
    (place / "s.yaml").write_text(text)
    with pytest.raises(UserError, match="Sweep file"):
        read_sweep(place / "s.yaml")


def test_a_dry_run_runs_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "s.yaml").write_text("records: [r]\ndefenses: [fmp, ft-only]\n")
    assert script.main(["s.yaml", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "# r.ft-only\n" in printed and "--selection none" in printed and "# 2 jobs" in printed
    assert not (place / "sweeps").exists() and not (place / "record" / "r" / "defense").exists()


def test_an_entry_overrides_what_is_said_of_all(place: Path) -> None:
    (job,) = plan(sweep_of(defenses=[{"defense": "fmp", "name": "short", "epochs": 1}], ours={"epochs": 9}))
    assert "--epochs 1" in " ".join(job.command) and job.settings["epochs"] == 1
