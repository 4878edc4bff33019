"""A rank that fails, hangs or is killed ends all ranks within seconds and is named; no process remains."""

import os
import signal
import subprocess
import sys
import time

import kit
import pytest

from saferlhf_fast.runtime import process_identity, watchdog

SMALL, LARGE = (str(kit.SUPPORT / f"watch_{name}.py") for name in ("small", "worker"))


def ranks(arguments, world=2, **env):
    """Starts ranks on this machine without a launcher, rank 0 hosts the store; returns a list of Popen."""
    port = kit.free_port()
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{kit.ROOT}:{kit.SUPPORT}",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **env,
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(world)
    ]


def wait_for(processes, timeout):
    """Waits for the ranks and asserts that no process remains; returns ([exit code], [stderr])."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    return [process.returncode for process in processes], errors


def run_small(fault, faulty_ranks, timeout=60, interval=0.3, world=2):
    """Runs watch_small.py in `world` ranks with a fault; returns ([exit code], [stderr])."""
    return wait_for(ranks([SMALL, fault, faulty_ranks, timeout, interval], world), 90)


def test_a_rank_that_raises_ends_the_ranks_that_wait_for_it():
    codes, (first, second) = run_small("raise", "1")
    assert codes == [1, 1]
    assert "[rank 1] bug: RuntimeError: no tokens left" in second and second.count("\n") == 1
    assert first.startswith("[rank 0] ended: rank 1 (") and first.endswith(
        "): RuntimeError: no tokens left\n"
    )
    assert first.count("\n") == 1


def test_a_killed_rank_is_named_even_if_it_hosted_the_store():
    codes, (_, second) = run_small("kill", "0")
    assert codes == [-signal.SIGKILL, 1]
    assert "[rank 1] ended: rank 0 (" in second and "is gone, and the store with it" in second


def test_a_rank_that_hangs_is_named_with_its_line_of_code():
    codes, errors = run_small("hang", "1", timeout=3)
    assert codes == [1, 1]
    for line in errors:
        assert (
            "ended: rank 1 (" in line
            and "threading.py" in line
            and "(engine.timeout)" in line
            and "rank 0 (" not in line
        )


def test_the_same_error_on_all_ranks_is_printed_once():
    codes, errors = run_small("refuse", "0,1")
    assert codes == [2, 2] and errors == ["error: row 3: expected a prompt, got none\n", ""]


def test_one_process_has_no_watchdog():
    watchdog.begin(1.0)
    assert watchdog._watchdog is None and watchdog.failed(ValueError("x")) is None
    watchdog.end()


def stub(timeout=10.0):
    """A Watchdog without a store or a thread; its `post` returns the fault."""
    watcher = object.__new__(watchdog.Watchdog)
    watcher.rank, watcher.world, watcher.near = 0, 3, [1]
    watcher.timeout, watcher.interval, watcher.doubts = timeout, 1.0, False
    watcher.who = [{"host": f"node{r}", "pid": 100 + r} for r in range(3)]
    watcher.silent = dict.fromkeys(range(3), (None, 0.0))
    watcher.post = lambda fault: fault
    return watcher


def beat(count=1, stood=0.0, waits=True, collectives=5, state="runs", at="x.py:1 f"):
    return {
        "count": count,
        "stood": stood,
        "waits": waits,
        "collectives": collectives,
        "state": state,
        "at": at,
    }


def test_the_rank_that_does_not_wait_and_is_behind_is_blamed_for_a_hang():
    watcher = stub()
    assert watcher._hang({0: beat(stood=9.9), 1: beat(), 2: beat(waits=False)}) is None
    assert watcher._hang({0: beat(stood=10), 1: beat(), 2: beat(waits=False)}).rank == 2
    behind = watcher._hang(
        {0: beat(stood=10), 1: beat(waits=False, collectives=5), 2: beat(waits=False, collectives=4)}
    )
    assert behind.rank == 2 and "rank 1" not in behind.line  # rank 1 may wait in a read of its GPU
    all_wait = watcher._hang({r: beat(stood=10, at=f"x.py:{r} f") for r in range(3)})
    assert "waited for each other" in all_wait.line and "rank 2 at x.py:2 f" in all_wait.line
    assert watcher._hang({0: beat(stood=99, state="ended"), 1: beat(), 2: beat()}) is None


def test_silence_counts_only_for_ranks_on_other_machines():
    watcher = stub(timeout=600.0)
    for _ in range(60):  # LOST is 120 s
        assert watcher._silence({0: beat(), 1: beat(), 2: beat()}, 2.0) is None
    assert watcher._silence({0: beat(), 1: beat(), 2: beat(count=2)}, 2.0) is None
    for _ in range(60):
        assert watcher._silence({0: beat(), 1: beat(), 2: beat(count=2)}, 2.0) is None
    # rank 1 is on this machine, where its process still runs
    assert watcher._silence({0: beat(), 1: beat(), 2: beat(count=2)}, 2.0).gone == (2,)
    assert watcher._silence({0: beat(), 1: beat(), 2: beat(count=2, state="ended")}, 2.0) is None
    watcher.doubts = True
    assert watcher._silence({0: beat(), 1: beat(), 2: beat(count=2)}, 2.0).gone == (2,)


def test_a_dead_process_is_not_confused_with_a_later_one_of_the_same_pid():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = {"pid": process.pid, "born": process_identity.start_time(process.pid)}
    assert process_identity.is_running(who) and not process_identity.is_running({**who, "born": "1"})
    process.kill()
    deadline = time.monotonic() + 10
    # the process has ended, but its exit code is not read yet
    while process_identity.is_running(who) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process_identity.is_running(who)
    process.communicate()


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault, codes, cause",
    [
        ("kill", [1, -9, 1], "rank 1 ("),
        ("raise", [1, 1, 1], "no tokens left"),
        ("interrupt", [130, 130, 130], None),
    ],
)
def test_a_fault_of_one_of_three_ranks_ends_the_others(fault, codes, cause):
    exit_codes, errors = run_small(fault, "1", world=3)
    assert exit_codes == codes
    for r in (0, 2):
        assert errors[r].count("\n") == (cause is not None) and (cause or "") in errors[r]


@pytest.mark.faults
def test_ranks_that_exit_after_sigterm_report_no_fault():
    codes, errors = run_small("early", "0,1")
    assert codes == [143, 143] and errors == ["", ""]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    base = kit.make_model(folder / "model")
    scores = kit.make_scores(folder, base)
    data = kit.make_data(folder / "data", n=16)
    return [
        "ppo-lag",
        f"model={base}",
        f"reward={scores['reward']}",
        f"cost={scores['cost']}",
        f"data={data['prompts']}",
        "max_length=32",
        "ppo.batch_size=2",
        "ppo.max_steps=4",
        "log.progress=false",
    ]


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault, faulty, codes, cause",
    [
        ("raise", "1", [1, 1], "RuntimeError: no tokens left"),
        ("hang", "1", [1, 1], "hangs at saferlhf_fast/rollout/sample.py"),
        ("kill", "1", [1, -9], "rank 1 ("),
        ("kill", "0", [-9, 1], "rank 0 ("),
    ],
)
def test_a_fault_in_the_middle_of_a_rollout_ends_all_ranks(recipe, tmp_path, fault, faulty, codes, cause):
    """The ranks end within engine.timeout (12 s here) and 30 s more, plus the time for their start."""
    processes = ranks(
        [LARGE, *recipe, f"output={tmp_path / 'out'}", "engine.timeout=0.2"], FAULT=fault, FAULTY=faulty
    )
    exit_codes, errors = wait_for(processes, 120)
    assert exit_codes == codes
    of_the_other = errors[1 - int(faulty)]
    assert cause in of_the_other.splitlines()[-1] and of_the_other.count(" ended: ") == 1, of_the_other
    assert not (tmp_path / "out" / "finished.json").exists()
