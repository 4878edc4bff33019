"""Other processes and hosts that write to folders, played in this process: what tests share."""

import contextlib
import os

from saferlhf_fast.config import load
from saferlhf_fast.runtime import folder_claims, process_identity, run_lock

HOST = "pid:[4026531836]"  # outside containers
SPACE = "boot-a" + HOST
BORN = process_identity.start_time(os.getpid())
ELSEWHERE = {"host": "node2", "space": "boot-b" + HOST, "machine": "n"}


class Process:
    """A process that claims folders: by default another one of this machine, which is running."""

    def __init__(self, monkeypatch, job=None, machine="m", **identity):
        self.monkeypatch, self.held = monkeypatch, {}
        process = {"host": "node1", "pid": os.getpid(), "born": BORN, "space": SPACE, **identity}
        self.here = folder_claims.Here(process, machine, job)

    @contextlib.contextmanager
    def acting(self):
        """What happens inside is done by this process."""
        with self.monkeypatch.context() as patch:
            patch.setattr(run_lock, "_held", self.held)
            patch.setattr(folder_claims, "here", lambda: self.here)
            patch.setattr(process_identity, "machine_id", lambda: self.here.machine)
            yield

    def hold(self, folder):
        with self.acting():
            run_lock.hold(folder)

    def die(self):
        """Ends without a word, as after SIGKILL: the claims stay, nobody touches them."""
        for lock in self.held.values():
            lock.stopping.set()
            lock.thread.join()


def processes(monkeypatch):
    """For a fixture: makes processes whose claims beat 20 times a second, and releases them at the end."""
    monkeypatch.setattr(folder_claims, "BEAT", 0.05)
    monkeypatch.setattr(folder_claims, "LIMIT", 10.0)
    monkeypatch.setattr(run_lock, "CONFIRM", 0.02)
    monkeypatch.setattr(run_lock, "QUICK", 100)  # a busy machine may let a thread wait for a second
    made = []

    def make(**about):
        made.append(Process(monkeypatch, **about))
        return made[-1]

    yield make
    for one in made:
        with one.acting():
            run_lock.release_all()


def claims(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("in_use."))


def taken(process, folder):
    """Another host takes a folder over, as after a long stall of its process."""
    other = process(**ELSEWHERE)
    with other.acting():
        number = folder_claims.read_claims(folder)[-1].number
        folder_claims.create(folder / f"in_use.{number + 1}.json", other.here)
        (folder / f"in_use.{number}.json").unlink()


def configs(tmp_path):
    """A function that makes a config of sft over a model folder and a data file."""
    (tmp_path / "llama").mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (tmp_path / "llama" / name).write_text(text)
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    given = {"model": tmp_path / "llama", "data": tmp_path / "data.json", "output": tmp_path / "runs" / "sft"}
    return lambda **changes: load.load("sft", None, {key: str(x) for key, x in {**given, **changes}.items()})
