"""The same tests with the same numbers, in whichever process, order and second they run."""

import random

import numpy
import pytest
import torch


def pytest_make_parametrize_id(val, argname):
    """bytes go by their argument's name: what gzip packs carries the time, and xdist's processes have to agree on the names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)     # before fixtures, so that theirs are seeded too
def pytest_runtest_setup():
    """Which files a process ran before depends on xdist's timing; the state of the generators must not."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
