"""Processes: one for each local GPU, or those of srun, mpirun and deepspeed; signals and exit codes."""

import os
import signal
import subprocess
import sys
import threading
import time

import kit
import pytest

from saferlhf_fast import cli
from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime import launcher, process_environment

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[3-4]",
}


# ---------------------------------------------------------------- processes that another launcher starts


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    stub(tmp_path, "scontrol", 'echo "$@" > "$(dirname "$0")/arguments"; echo node3; echo node4')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def stub(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def adopted(**environ):
    process_environment.adopt(environ)
    return environ


def test_srun_variables_are_translated_to_torchrun_variables(scontrol):
    variables = adopted(**SLURM)
    assert (scontrol / "arguments").read_text() == "show hostnames node[3-4]\n"
    assert [variables[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == [
        "5",
        "8",
        "1",
        "node3",
    ]
    assert 20000 <= int(variables["MASTER_PORT"]) < 30000
    assert adopted(**SLURM | {"SLURM_PROCID": "0"})["MASTER_PORT"] == variables["MASTER_PORT"]
    assert adopted(**SLURM | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != variables["MASTER_PORT"]
    assert adopted(**SLURM | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"  # --gpus-per-task=1
    assert adopted(**SLURM | {"CUDA_VISIBLE_DEVICES": "2,3"})["LOCAL_RANK"] == "1"
    assert adopted(**SLURM | {"SLURM_STEP_NODELIST": "alone"})["MASTER_ADDR"] == "alone"


def test_a_batch_script_one_task_and_a_launcher_under_srun_change_no_variable():
    script = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    for environ in (script, SLURM | {"SLURM_NTASKS": "1"}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {}):
        assert adopted(**environ) == environ
    given = SLURM | {"RANK": "1", "WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert adopted(**given) == given


def test_a_slurm_step_without_a_known_first_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        adopted(**SLURM)
    assert adopted(**SLURM, SLURM_LAUNCH_NODE_IPADDR="10.0.0.9")["MASTER_ADDR"] == "10.0.0.9"
    assert adopted(**SLURM, MASTER_ADDR="10.0.0.8")["MASTER_ADDR"] == "10.0.0.8"


def test_mpirun_variables_are_translated_to_torchrun_variables():
    ompi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    variables = adopted(**ompi, OMPI_COMM_WORLD_LOCAL_SIZE="2", MASTER_ADDR="node1", MASTER_PORT="29500")
    assert [variables[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")] == [
        "3",
        "4",
        "1",
        "29500",
    ]
    assert adopted(**ompi, OMPI_COMM_WORLD_LOCAL_SIZE="4")["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR"):
        adopted(**ompi, OMPI_COMM_WORLD_LOCAL_SIZE="2")
    variables = adopted(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="0", MASTER_ADDR="a")
    assert (variables["RANK"], variables["LOCAL_RANK"]) == ("1", "0")


def test_the_option_local_rank_of_deepspeed_is_not_read_as_a_setting(capsys):
    assert cli.main(["--local_rank=1", "stf"]) == 2
    assert "unknown command 'stf'" in capsys.readouterr().err


# ---------------------------------------------------------------- the number of processes


def never():
    raise AssertionError("this function must not be called")


def gpus(monkeypatch, installed, usable):
    monkeypatch.setattr(launcher.metadata, "version", lambda name: "2.13.0+cu130")
    monkeypatch.setattr(launcher, "installed", lambda: installed)
    monkeypatch.setattr(launcher, "_gpus", lambda: usable)


@pytest.mark.parametrize(
    "named, count",
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("2,-1,3", 1), ("0,9,1", 1), ("GPU-1a,GPU-2b", 2)],
)
def test_gpus_are_counted_as_cuda_does_without_torch(named, count, monkeypatch):
    gpus(monkeypatch, 4, 4)
    assert launcher.visible({} if named is None else {"CUDA_VISIBLE_DEVICES": named}) == count
    monkeypatch.setattr(launcher, "installed", lambda: 0)
    assert launcher.visible({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0


def test_the_settings_are_checked_before_one_process_per_gpu_is_chosen(monkeypatch):
    gpus(monkeypatch, 4, 4)
    seen, environ = [], {}
    assert launcher.wanted(None, lambda: seen.append(environ["WORLD_SIZE"]), environ) == 4
    assert seen == ["4"] and environ == {}
    # the number of torch counts, and the check is repeated with it
    monkeypatch.setattr(launcher, "_gpus", lambda: 2)
    assert launcher.wanted(None, lambda: seen.append(environ["WORLD_SIZE"]), environ) == 2 and seen == [
        "4",
        "4",
        "2",
    ]
    monkeypatch.setattr(launcher, "_gpus", never)
    with pytest.raises(UserError, match="no data"):
        launcher.wanted(None, lambda: (_ for _ in ()).throw(UserError("no data")), environ)
    assert environ == {}


def test_one_process_is_chosen_without_a_check(monkeypatch):
    gpus(monkeypatch, 1, 1)
    assert launcher.wanted(None, never, {}) == 1
    gpus(monkeypatch, 4, 4)
    assert launcher.wanted("1", never, {}) == 1
    assert launcher.wanted(None, never, {"RANK": "0", "WORLD_SIZE": "2"}) == 1
    monkeypatch.setattr(launcher.metadata, "version", lambda name: "2.13.0+cpu")
    assert launcher.wanted(None, never, {}) == 1
    assert launcher.wanted("3", lambda: None, {}) == 3


def test_wrong_numbers_of_processes_are_refused(monkeypatch):
    gpus(monkeypatch, 2, 2)
    for number, environ, line in (
        ("0", {}, "from 1 on, got 0"),
        ("x", {}, "got x"),
        ("", {}, "--processes"),
        ("3", {}, "at most 2"),
        ("3", {"RANK": "0", "WORLD_SIZE": "2"}, "has started 2 already"),
    ):
        with pytest.raises(UserError, match=line):
            launcher.wanted(number, lambda: None, environ)


def test_bad_settings_are_refused_before_torch_is_imported_and_processes_are_started():
    code = (
        "import sys; from saferlhf_fast.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, "sft", "model=/no/where", "data=a/b", "output=o", "--processes", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=kit.ROOT,
    )
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1), (
        completed.stderr
    )
    assert completed.stderr.startswith("error: model: /no/where does not exist")


def test_commands_of_one_process_refuse_the_option_processes(capsys):
    assert cli.main(["demo", "--processes", "2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --processes: demo ") and err.count("\n") == 1


# ---------------------------------------------------------------- signals and exit codes


@pytest.fixture
def group(monkeypatch):
    """A function that runs a Python script in several ranks, with `rank` set; returns the exit code."""
    monkeypatch.setattr(launcher, "_store", lambda listener: listener.close())
    monkeypatch.setattr(launcher, "SETTLE", 0.5)

    def run(script, processes=2, grace="20"):
        text = f"import os, signal, sys, time; rank = int(os.environ['RANK'])\n{script}"
        monkeypatch.setattr(launcher, "_command", lambda words: [sys.executable, "-c", text])
        return launcher.start([], processes, grace)

    return run


def when(path, call):
    """Calls a function, in a thread, as soon as a file exists."""

    def wait():
        while not path.exists():
            time.sleep(0.01)
        call()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(
    "script, code, line",
    [
        ("pass", 0, ""),
        ("sys.exit(2 * (rank == 1))", 2, ""),
        ("sys.exit(143)", 143, ""),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)",
            137,
            "error: rank 1 (process ",
        ),
        (
            "os.kill(os.getpid(), signal.SIGTERM) if rank == 0 else time.sleep(60)",
            143,
            "error: rank 0 (process ",
        ),
    ],
)
def test_the_exit_code_is_returned_and_the_other_ranks_are_ended(group, script, code, line, capfd):
    assert group(script) == code
    out, err = capfd.readouterr()
    assert out.startswith("starting 2 processes on this machine") and out.count("\n") == 1
    assert err.startswith(line) and err.count("\n") == (line != "")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_reaches_all_ranks_and_the_launcher_waits_for_them(group, tmp_path, number, code):
    script = f"""
def stop(number, frame):
    time.sleep(1)                                       # a checkpoint
    open(f'{tmp_path}/saved{{rank}}', 'w').close()
    os._exit(128 + number)
signal.signal({int(number)}, stop)
open(f'{tmp_path}/ready{{rank}}', 'w').close()
time.sleep(60)"""
    when(tmp_path / "ready0", lambda: when(tmp_path / "ready1", lambda: os.kill(os.getpid(), number)))
    # a process that a shell starts with & ignores SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert group(script) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(p.name for p in tmp_path.glob("saved*")) == ["saved0", "saved1"]


def test_ranks_that_do_not_end_are_killed_after_the_grace_period(group, tmp_path):
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f'{tmp_path}/ready{{rank}}', 'w').close()
time.sleep(60)"""
    when(tmp_path / "ready0", lambda: when(tmp_path / "ready1", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    start = time.monotonic()
    assert group(script, grace="1") == 137 and time.monotonic() - start < 20


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(kit.ROOT)!r})
from saferlhf_fast.runtime import launcher
launcher._store = lambda listener: listener.close()
launcher._command = lambda words: [sys.executable, "-c", '''
import os, sys, time
sys.path.insert(0, {str(kit.ROOT)!r})
from saferlhf_fast.runtime import launcher, process_environment
process_environment.adopt()
open("{tmp_path}/" + str(os.getpid()), "w").close()
time.sleep(60)''']
launcher.start([], 2)"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    assert len(children) == 2
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
