"""`info --cluster`: what a run stands on is checked between all ranks; a rank that is wrong is named."""

import re
import threading
import time

import kit
import pytest

from saferlhf_fast import cli
from saferlhf_fast.commands import preflight
from saferlhf_fast.commands.preflight import shared_folder
from saferlhf_fast.errors import UserError


def made(n=4, **changes):
    """Reports of n ranks on two machines of two GPUs each; changes: {"_3": {"torch": …}} of single ranks."""
    reports = [
        {
            "host": f"node{r // 2}",
            "address": f"10.0.0.{r // 2}",
            "local_rank": r % 2,
            "python": "3.11.7",
            "saferlhf-fast": "0.1.0",
            "commit": "abc",
            "torch": "2.13.0",
            "cuda": "13.0",
            "nccl": "2.29",
            "driver": "580.1",
            "transformers": "5.23.0",
            "deepspeed": "0.19.8",
            "triton": "3.7.1",
            "gpus": ["H100", "H100"],
            "free": 10**12,
        }
        for r in range(n)
    ]
    for rank, values in changes.items():
        reports[int(rank[1:])].update(values)
    return reports


@pytest.mark.parametrize(
    "changes, reasons",
    [
        ({}, []),
        ({"_3": {"torch": "2.12.0"}}, ["rank 3 (node1): torch is 2.12.0, most ranks have 2.13.0"]),
        ({"_0": {"driver": None}}, ["rank 0 (node0): driver is not there, most ranks have 580.1"]),
        (
            {"_2": {"commit": "abd"}, "_3": {"commit": "abd"}},  # as many as others: rank 0's counts
            [
                "rank 2 (node1): commit is abd, most ranks have abc",
                "rank 3 (node1): commit is abd, most ranks have abc",
            ],
        ),
        ({"_2": {"gpus": ["H100"]}}, ["rank 2 (node1): gpus is 1 × H100, most ranks have 2 × H100"]),
        ({"_2": {"gpus": []}}, ["rank 2 (node1): gpus is none, most ranks have 2 × H100"]),
        ({"_3": {"local_rank": 2}}, ["rank 3 (node1): is number 2 of its machine, which shows it 2 GPUs"]),
    ],
)
def test_what_differs_is_named_with_its_rank(changes, reasons):
    assert preflight.compare(made(**changes)) == reasons


def test_a_report_says_what_is_compared_and_the_table_shows_every_rank():
    own = preflight.report()
    assert set(preflight.EQUAL) <= set(own) and own["free"] > 0
    lines = preflight.table(made())
    assert lines[0].startswith("4 ranks on 2 machines, all with python 3.11.7") and len(lines) == 5
    assert "rank   3  node1  10.0.0.1  H100" in lines[4]
    assert preflight.warnings(made(_2={"free": 5 * 10**9})) == [
        "warning: rank 2 (node1): 5.0 GB of disk are free"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--folder", "a", "b"],
        ["--limit", "0"],
        ["--limit", "soon"],
        ["x=1"],
        ["--folder", ""],
        ["--folder", "~nobody-here/x"],
    ],
)
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(UserError):
        preflight.arguments(["--cluster", *words])
    assert cli.main(["info", "--cluster", *words]) == 2 and capsys.readouterr().out == ""


class Threads:
    """Ranks as threads of this process: `problem` needs no more of them than to gather."""

    def __init__(self, rank, world, barrier, board):
        self.rank, self.world, self.barrier, self.board = rank, world, barrier, board

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait(30)
        out = list(self.board)
        self.barrier.wait(30)
        return out


def shared(paths):
    """What each rank says of its folder."""
    world, said = len(paths), [None] * len(paths)
    barrier, board = threading.Barrier(world), [None] * world

    def one(rank):
        said[rank] = shared_folder.problem(paths[rank], Threads(rank, world, barrier, board))

    threads = [threading.Thread(target=one, args=(r,)) for r in range(world)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    return said


def test_a_folder_that_all_see_passes_and_is_left_as_it_was(tmp_path):
    assert shared([tmp_path] * 3) == [None] * 3 and not list(tmp_path.iterdir())


def test_a_folder_that_is_another_one_elsewhere_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "WAIT", 0.3)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = shared([tmp_path / "a", tmp_path / "b"])
    assert said[0] is None and "is it the same folder?" in said[1]
    said = shared([tmp_path / "none", tmp_path / "b"])
    assert said == [f"{tmp_path / 'none'} does not exist; expected the folder that runs write to", None]
    (tmp_path / "file").write_text("")
    assert shared([tmp_path / "b", tmp_path / "file"])[1].endswith(
        "file is a file; expected the folder that runs write to"
    )
    assert shared(["/proc"])[0] == "/proc cannot be written into: No such file or directory"


def test_a_folder_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert preflight.arguments(["--cluster", "--folder", "~/runs"]).folder == f"{tmp_path}/runs"


def test_a_rename_that_is_not_atomic_is_found_out(tmp_path, monkeypatch):
    def slowly(root, number):
        with open(root / "value", "w") as file:
            file.write(f"{number:07d} " * 4096)
            file.flush()
            time.sleep(0.02)
            file.write(f"{number:07d} " * 4096)

    monkeypatch.setattr(shared_folder, "_put", slowly)
    assert "not atomic" in shared([tmp_path] * 2)[1]


def test_two_processes_pass_on_one_machine(tmp_path):
    done = kit.command("info", "--cluster", "--processes", "2", "--folder", tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "starting 2 processes" in done.stdout and "2 ranks on 1 machine" in done.stdout
    assert re.search(r"1 MiB +[\d.]+ ms +[\d.]+ GB/s +bus +[\d.]+ GB/s", done.stdout)
    assert "renames are atomic" in done.stdout and not list(tmp_path.iterdir())


def test_a_rank_that_does_not_show_up_is_named_in_time():
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kit.free_port())}
    done = kit.command("info", "--cluster", "--limit", "1", timeout=60, RANK="0", WORLD_SIZE="3", **where)
    assert done.returncode == 1 and done.stderr.count("did not show up at 127.0.0.1:") == 2
    assert "rank 1: " in done.stderr and "rank 2: " in done.stderr
