"""A pytest plugin that ends an xdist process whose GPU context a test has broken.

xdist then starts a new process. Otherwise every later test of that process would fail too.
"""

import os
import time

import pytest


@pytest.hookimpl(trylast=True)  # after xdist has sent the report
def pytest_runtest_logreport(report):
    if not report.failed or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        time.sleep(0.5)
        os._exit(70)
