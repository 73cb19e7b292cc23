"""A sweep through a real Slurm: munged, slurmctld and slurmd are started for the test, with a one-node configuration.

apt-get install slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins        # skipped where these are absent
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sweep as script
from conftest import RECORD
from fmp_core.sweeps.jobs import Outcome, finished
from fmp_core.sweeps.slurm import run_submitit
from sweep_jobs import LEAVING, order, sweep_of, wait_for, working

pytestmark = pytest.mark.slow  # daemons are started; `make test-all`
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "squeue"]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def idle() -> bool:
    answer = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True)
    return answer.stdout.strip() == "idle"


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing or os.geteuid() != 0:  # slurmd starts jobs as their users
        pytest.skip(f"no Slurm to start here (missing: {', '.join(missing) or 'root'})")
    folder = Path(tempfile.mkdtemp(prefix="fmp_slurm_", dir="/tmp"))  # short: sockets have short names
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, user="root", **ports))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/key", *files]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        daemons = [subprocess.Popen(munge, stderr=subprocess.DEVNULL)]
        try:
            wait_for((folder / "munge.socket").exists, "munged did not start")
            daemons += [subprocess.Popen(["slurmctld", "-D"], stderr=subprocess.DEVNULL)]
            daemons += [subprocess.Popen(["slurmd", "-D", "-N", host], stderr=subprocess.DEVNULL)]
            wait_for(idle, f"Slurm did not start: {folder}")
            yield
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
            for daemon in reversed(daemons):
                daemon.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_sweep_through_slurm(slurm: None, place: Path) -> None:
    pytest.importorskip("submitit")
    jobs = [working("a", 0.3, shared_work="k"), working("b", code="raise SystemExit(4)"), working("x", shared_work="k")]
    dies = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"  # as an out-of-memory kill of the whole job does
    jobs.append(working("dies", code=dies))
    ended: dict[str, Outcome] = {}
    sweep = sweep_of(slurm={"partition": "debug", "time": 5, "cpus": 1})
    run_submitit(jobs, sweep, lambda job, outcome: ended.update({job.folder.name: outcome}), poll=0.5)
    assert set(ended) == {"a", "b", "x", "dies"}
    assert "exit code 4" in str(ended["b"].problem) and ended["dies"].problem
    assert finished(jobs[0]) and finished(jobs[2])
    assert order() == ["a begins", "a ends", "x begins", "x ends"]  # the sibling waited for the ranking


def test_a_cancelled_job_leaves_its_files_in_order(slurm: None, place: Path) -> None:
    """Its process is in a session of its own, which the signal that submitit ignores does not reach."""
    pytest.importorskip("submitit")
    ended: list[Outcome] = []
    sweep = sweep_of(slurm={"partition": "debug", "time": 5, "cpus": 1})
    jobs = [working("a", code=LEAVING + "pathlib.Path('began').touch()\ntime.sleep(120)\n")]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_submitit, jobs, sweep, lambda _, outcome: ended.append(outcome), poll=0.5)
        wait_for(Path("began").exists, "the job did not begin")
        subprocess.run(["scancel", "--user=root"], check=True)
        running.result(600)
    assert Path("left in order").exists() and "ended by SIGTERM" in str(ended[0].problem)


def test_fmp_through_slurm_after_a_kill(slurm: None, workplace: Path) -> None:
    """The launcher is killed with its jobs submitted; they go on, and a rerun finds them done."""
    pytest.importorskip("submitit")
    (workplace / "s.yaml").write_text(
        f"records: [{RECORD}]\ndefenses: [ft-only]\nours: {{epochs: 0, ratio: 0.2}}\ndevice: cpu\n"
        "slurm: {partition: debug, time: 5, cpus: 1}\n"
    )
    command = [sys.executable, script.__file__, "s.yaml", "--launcher", "slurm"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: bool(list(workplace.glob("sweeps/s/submitit/*_submitted.pkl"))), "nothing was submitted")
        process.send_signal(signal.SIGKILL)
    assert script.main(["s.yaml", "--launcher", "slurm"]) == 0
    logs = list(workplace.glob("sweeps/s/logs/*"))
    assert [log.name for log in logs] == [f"{RECORD}.ft-only.log"]
    assert (workplace / "record" / RECORD / "defense" / "ft-only" / "metrics.json").is_file()
