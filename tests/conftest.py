"""The same tests with the same numbers, in any process, order and second; and how long each folder took."""

import multiprocessing.process
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch

# that a run may take on two free cores; 0: as long as it likes
LIMIT = int(os.environ.get("TEST_SECONDS", "0"))


def pytest_make_parametrize_id(val, argname):
    """bytes go by their argument's name: what gzip packs carries the time, and xdist's processes have to
    agree on the names.
    """
    return argname if isinstance(val, bytes) else None


def pytest_addoption(parser):
    """`--fast` for the inner loop: `make test-fast`."""
    parser.addoption(
        "--fast",
        action="store_true",
        help="skips each test that starts a Python process, torchrun or a compiler",
    )


@pytest.fixture(autouse=True, scope="session")
def in_this_process(request):
    """Under --fast, skips a test at the moment when it starts a process or compiles."""
    if not request.config.getoption("--fast"):
        yield
        return
    popen = subprocess.Popen.__init__

    def start(self, args, *more, **options):
        program = args if isinstance(args, str) else os.fspath(args[0])
        if Path(program).name.startswith(("python", "torchrun", "nvcc", "gcc", "g++", "bash", "make")):
            pytest.skip("--fast: starts a process")
        popen(self, args, *more, **options)

    def skip(*args, **options):
        pytest.skip("--fast: starts a process or compiles")

    with (
        mock.patch.object(subprocess.Popen, "__init__", start),
        mock.patch.object(multiprocessing.process.BaseProcess, "start", skip),
        mock.patch.object(torch, "compile", skip),
    ):
        yield


@pytest.hookimpl(tryfirst=True)  # before fixtures, so that they are seeded too
def pytest_runtest_setup():
    """Which files a process ran before depends on xdist's timing; the state of the generators must not."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_sessionstart(session):
    """Starts the clock that `pytest_terminal_summary` reads."""
    session.config.begun = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    """Prints the seconds of each folder under tests/, fixtures included, and those of the whole run."""
    seconds = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "duration"):
            folder = (
                report.nodeid.split("/")[1]
                if report.nodeid.startswith("tests/")
                else report.nodeid.split("/")[0]
            )
            seconds[folder] += report.duration
    if sum(seconds.values()) < 60:
        return
    terminalreporter.section("seconds by folder, of all processes")
    for folder, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:7.0f}  {folder}")
    limit = f"; the limit is {LIMIT}" if LIMIT else ""
    terminalreporter.write_line(f"{time.monotonic() - config.begun:7.0f}  from beginning to end{limit}")


def pytest_sessionfinish(session):
    """Fails a run that took longer than its limit, where CI_TIME_GATE=1 asks for that."""
    late = LIMIT and time.monotonic() - session.config.begun > LIMIT
    if (
        os.environ.get("CI_TIME_GATE") == "1"
        and late
        and session.exitstatus == 0
        and not hasattr(session.config, "workerinput")
    ):
        session.exitstatus = 1
