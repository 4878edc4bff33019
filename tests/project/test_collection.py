"""Every process of a run under xdist has to find the same tests, or none of them starts."""

import os
import subprocess
import sys
from pathlib import Path


def test_another_process_at_another_time_finds_the_same_tests(request):
    root = Path(__file__).parents[2]
    here = {item.nodeid for item in request.session.items}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-m", ""],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-2000:]
    assert here <= set(found.stdout.splitlines()), sorted(here - set(found.stdout.splitlines()))[:5]
