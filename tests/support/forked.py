"""Runs programs in processes that are forked from one that has imported torch, DeepSpeed and transformers.

A fresh interpreter spends six seconds of CPU time on these imports, a forked process none. Tests whose
subject is the interpreter itself (which module is imported when, how a launcher starts ranks) start a fresh
one with `kit.command(fresh=True)`.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["forked_imports"])


def run(arguments, processes=1, timeout=240, env=None, cwd=ROOT):
    """Runs `python ARGUMENTS` in `processes` ranks; returns a CompletedProcess with the output of all ranks.

    arguments: ("-m", module, ...) or (path of a script, ...).
    Raises subprocess.TimeoutExpired after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        program = Program(arguments, processes, out, err, env, cwd)
        code = program.wait(timeout)
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    if code is None:
        raise subprocess.TimeoutExpired(program.arguments, timeout, *texts)
    return subprocess.CompletedProcess(program.arguments, code, *texts)


class Program:
    """A program that runs in several ranks; out, err: files to which all ranks append their output."""

    def __init__(self, arguments, processes, out, err, env=None, cwd=ROOT):
        self.arguments = [str(argument) for argument in arguments]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}", **(env or {})}
        self.ranks = [
            _context.Process(
                target=_run_rank,
                args=(self.arguments, environment | variables, str(cwd), str(out), str(err)),
            )
            for variables in launcher_variables(processes)
        ]
        _start_server()
        for rank in self.ranks:
            rank.start()

    def poll(self, seconds=0.0):
        """Returns the exit code, or None while the program runs; waits for at most `seconds`.

        As under torchrun, the first rank that fails ends the others and gives the exit code.
        """
        running = [rank.sentinel for rank in self.ranks if rank.exitcode is None]
        if running:
            multiprocessing.connection.wait(running, timeout=seconds)
        codes = [rank.exitcode for rank in self.ranks]
        failed = [code for code in codes if code]
        if not failed and None in codes:
            return None
        self.kill()
        return failed[0] if failed else 0

    def wait(self, timeout):
        """Returns the exit code; after `timeout` seconds the program is killed and None is returned."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            code = self.poll(1.0)
            if code is not None:
                return code
        self.kill()
        return None

    def kill(self):
        """Kills the ranks that still run and the processes that they have started."""
        for rank in self.ranks:
            if rank.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
                rank.kill()
            rank.join()


def _start_server():
    """Starts the process that is forked, unless it runs.

    Python before 3.13 does not give it this process's sys.path: it would not find `forked_imports`, and would
    start without it and say nothing.
    """
    paths = [str(ROOT), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        multiprocessing.forkserver.ensure_running()


def launcher_variables(processes):
    """The variables that a launcher sets in each rank; none for one process without a launcher."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = (processes, processes, "127.0.0.1", port)
    return [dict(zip(LAUNCHER, map(str, (rank, rank, *shared)))) for rank in range(processes)]


def _run_rank(arguments, environment, folder, out, err):
    os.setsid()  # a new process group, so that `kill` also ends what this rank starts
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _reseed()
    code = 1
    try:
        assert "forked_imports" in sys.modules, "the fork server could not import forked_imports"
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(error):
    """The exit code of the interpreter after `sys.exit(...)`; text is printed to stderr."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _reseed():
    """Seeds all generators anew: processes with the same state would choose the same names and ports."""
    import numpy
    import torch

    random.seed()
    numpy.random.seed()
    torch.seed()
