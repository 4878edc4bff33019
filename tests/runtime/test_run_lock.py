"""One writer for each folder: who is refused, whose claim is taken over, what a run does that lost its own.

Other processes and hosts are played in this process: `Process` has its own claims and its own identity.
"""

import errno
import os
import subprocess
import threading
import time

import pytest
from lock_kit import BORN, ELSEWHERE, HOST, SPACE, claims, processes, taken

from saferlhf_fast.errors import UserError
from saferlhf_fast.models.folders import replacing
from saferlhf_fast.runtime import folder_claims, process_identity, run_folder, run_lock


@pytest.fixture
def process(monkeypatch):
    """Makes processes of this or another host."""
    yield from processes(monkeypatch)


def ended_pid():
    """The number of a process that has ended and is waited for."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def dead_but_not_waited_for():
    """The number of a process that is a zombie until the test run ends."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    while process_identity.start_time(child) is not None:
        time.sleep(0.01)
    return child


DEAD = {
    "ended": lambda: {"pid": ended_pid()},
    "number used again": lambda: {"born": "1"},
    "zombie": lambda: {"pid": dead_but_not_waited_for()},
    "machine started again": lambda: {"space": "boot-0" + HOST},
    "requeued on another host": lambda: {**ELSEWHERE, "job": ("c/7", 0)},
}
WATCHED = {
    "another host": ELSEWHERE,
    "a container of the same name": {"space": "boot-apid:[4026539999]"},
    "another machine of the same name": {"space": "boot-b" + HOST, "machine": "n"},
    "another step of the same job": {**ELSEWHERE, "job": ("c/7", 1)},
    "machines without an id": {"space": "boot-b" + HOST, "machine": ""},
}


@pytest.mark.parametrize("about", [{}, *WATCHED.values()], ids=["here", *WATCHED])
def test_a_second_process_is_refused_by_the_first_one_s_name(process, tmp_path, about):
    first, second = (
        process(**about),
        process(job=("c/7", 1), machine="" if about.get("machine") == "" else "m"),
    )
    first.hold(tmp_path)
    name = rf"pid {os.getpid()} on host node\d since 20.*; heartbeat 0 s ago$"
    with pytest.raises(UserError, match=rf"^output: {tmp_path} is in use by {name}"):
        second.hold(tmp_path)
    assert claims(tmp_path) == ["in_use.1.json"] and not second.held
    with first.acting():
        run_lock.release(tmp_path)
    second.hold(tmp_path)


@pytest.mark.parametrize("about", DEAD.values(), ids=DEAD)
def test_a_dead_process_s_claim_is_taken_over_at_once(process, tmp_path, about, capsys):
    first, second = process(**about()), process(job=("c/7", 1))
    first.hold(tmp_path)
    first.die()
    begun = time.monotonic()
    second.hold(tmp_path)
    assert time.monotonic() - begun < 5 and claims(tmp_path) == ["in_use.2.json"]
    assert f"taken over from pid {first.here.process['pid']} on host" in capsys.readouterr().out


@pytest.mark.parametrize("about", WATCHED.values(), ids=WATCHED)
def test_a_process_that_cannot_be_looked_up_is_dead_after_a_silence(
    process, tmp_path, monkeypatch, about, capsys
):
    monkeypatch.setattr(folder_claims, "LIMIT", 0.6)
    first, second = (
        process(**about),
        process(job=("c/7", 1), machine="" if about.get("machine") == "" else "m"),
    )
    begun = time.monotonic()
    first.hold(tmp_path)
    first.die()
    second.hold(tmp_path)
    assert time.monotonic() - begun > 0.6 and claims(tmp_path) == ["in_use.2.json"]
    assert "s for a sign of life of pid" in capsys.readouterr().out


@pytest.mark.parametrize("skew", [-7200, 7200])
def test_clocks_that_differ_change_nothing(process, tmp_path, monkeypatch, skew):
    first, second = process(**ELSEWHERE), process()
    first.hold(tmp_path)
    first.die()
    path, stop = tmp_path / "in_use.1.json", threading.Event()

    def beat():
        while not stop.wait(0.03):
            os.utime(path, (time.time() + skew,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    with pytest.raises(UserError, match="is in use by"):
        second.hold(tmp_path)
    stop.set()
    thread.join()
    monkeypatch.setattr(folder_claims, "LIMIT", 0.3)
    second.hold(tmp_path)  # silent from now on, whatever the file's date


@pytest.mark.parametrize("content", ["", "{", '{"process": 3}', "[]"])
def test_a_claim_that_cannot_be_read_is_watched(process, tmp_path, monkeypatch, content):
    (tmp_path / "in_use.4.json").write_text(content)
    with (
        process().acting(),
        pytest.raises(UserError, match="in use by a process that has not written its name"),
    ):
        touching = threading.Timer(0.1, os.utime, [tmp_path / "in_use.4.json"])
        touching.start()
        run_lock.hold(tmp_path)
    monkeypatch.setattr(folder_claims, "LIMIT", 0.2)
    process().hold(tmp_path)
    assert claims(tmp_path) == ["in_use.5.json"]


def test_a_copy_of_a_folder_is_not_in_use(process, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_claims, "LIMIT", 0.3)
    original, copy = tmp_path / "run", tmp_path / "copy"
    process().hold(original)
    copy.mkdir()
    (copy / "in_use.1.json").write_bytes((original / "in_use.1.json").read_bytes())
    process().hold(copy)
    with pytest.raises(UserError, match="in use"):
        process().hold(original)


@pytest.mark.parametrize("before", ["nothing", "a dead claim", "a silent host"])
def test_of_many_at_the_same_moment_one_gets_the_folder(process, tmp_path, monkeypatch, before):
    monkeypatch.setattr(folder_claims, "LIMIT", 0.2)
    local = threading.local()
    for turn in range(12):
        folder = tmp_path / str(turn)
        if before != "nothing":
            first = process(**({"pid": 2**22} if before == "a dead claim" else ELSEWHERE))
            first.hold(folder)
            first.die()
        won, refused, start = [], [], threading.Barrier(6)

        def contend(number, folder=folder, won=won, refused=refused, start=start):
            local.here = folder_claims.Here(
                {"host": f"h{number}", "pid": os.getpid(), "born": BORN, "space": SPACE}, "m", None
            )
            start.wait()
            try:
                won.append(run_lock._claim(folder, "output", "in_use"))
            except UserError as error:
                refused.append(str(error))

        with monkeypatch.context() as patch:
            patch.setattr(folder_claims, "here", lambda: local.here)
            threads = [threading.Thread(target=contend, args=[n]) for n in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(won) == 1 and len(refused) == 5 and all("in use by" in line for line in refused), refused
        assert claims(folder) == [won[0][0].name]


# ---------------------------------------------------------------- a claim that is lost


LOSSES = {
    r"its file in_use.1.json was removed": lambda process, folder: (folder / "in_use.1.json").unlink(),
    r"it was taken over by pid \d+ on host node2": taken,
    r"its file in_use.1.json was removed ": lambda process, folder: folder.rename(f"{folder}.moved"),
}


@pytest.mark.parametrize("lose", LOSSES.items(), ids=["removed", "taken", "renamed"])
def test_a_run_that_has_lost_its_folder_writes_no_more(process, tmp_path, lose):
    line, how = lose
    run = process()
    run.hold(tmp_path / "run")
    (lock,) = run.held.values()
    with run.acting():
        run_lock.require_held(tmp_path / "run" / "model")
        with replacing(tmp_path / "run" / "model") as new:
            (new / "config.json").write_text("{}")
        how(process, tmp_path / "run")
        for path in ("run", "run/model"):
            with pytest.raises(
                UserError, match=rf"output: .*/run is not this run's any more: {line.strip()}"
            ):
                run_lock.require_held(tmp_path / path)
        with pytest.raises(UserError, match="not this run's"), replacing(tmp_path / "run" / "model"):
            pass
        with pytest.raises(UserError, match="not this run's"):
            run_folder.finish_run(tmp_path / "run", {})
        run_lock.require_held(tmp_path / "elsewhere")
    lock.thread.join(2)  # it ends by itself
    assert not lock.thread.is_alive() and not (tmp_path / "run" / "finished.json").exists()
    after = claims(tmp_path / "run") if (tmp_path / "run").exists() else []
    with run.acting():
        run_lock.release_all()
    assert after == (claims(tmp_path / "run") if (tmp_path / "run").exists() else [])


def test_the_thread_notices_a_loss_and_touches_the_file(process, tmp_path):
    run = process()
    run.hold(tmp_path)
    (lock,) = run.held.values()
    first = lock.path.stat().st_mtime_ns
    deadline = time.monotonic() + 5
    while lock.path.stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.path.stat().st_mtime_ns > first and not lock.is_lost()
    taken(process, tmp_path)
    lock.thread.join(5)
    assert lock.reason and lock.is_lost()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_hiccups_loses_nothing(process, tmp_path, monkeypatch, code):
    run = process()
    run.hold(tmp_path)
    (lock,) = run.held.values()

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(folder_claims, "read_claim", fail)
        patch.setattr(os, "utime", fail)
        time.sleep(0.3)
        assert not lock.is_lost(look=True)
    before = lock.path.stat().st_mtime_ns
    time.sleep(0.3)
    assert not lock.is_lost(look=True) and lock.path.stat().st_mtime_ns > before
