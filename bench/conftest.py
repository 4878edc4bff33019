"""How speed is measured: check results first, and read the clock only when the device has finished.

`measure` checks and times one function and stores what table.py, targets.py and compare.py need. On a GPU,
times are those of the device (events), after the caches were overwritten; the pytest-benchmark figures next
to them are those of the waiting host. A peer that cannot be imported, gives wrong results or fails is skipped
with its reason. If a version of this library fails, the run fails.
"""

import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
# if false, the folder above is saferlhf_fast/ of an installed wheel
CHECKOUT = (HERE.parent / "setup.py").is_file()
sys.path.insert(0, str(HERE))
if CHECKOUT and (HERE.parent / "build" / "peers").is_dir():
    sys.path.append(str(HERE.parent / "build" / "peers"))

import ceilings  # noqa: E402
import clock  # noqa: E402
import exact  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import shapes  # noqa: E402

from saferlhf_fast.version import __version__  # noqa: E402

DEVICE = ceilings.DEVICE
FOREIGN = ("eager", "bare products")  # versions that are neither this library's nor in peers.py


def pytest_addoption(parser):
    parser.addoption(
        "--budget",
        type=float,
        default=None,
        help="seconds after which the remaining rows are reported as not measured",
    )
    parser.addoption("--ours", action="store_true", help="only the versions of this library and eager torch")


def pytest_collect_file(file_path, parent):
    """Collects bench_*.py as the tests of this folder."""
    named = parent.session.isinitpath(file_path)  # pytest itself collects a file that is given by name
    patterns = parent.config.getini("python_files")
    if named or any(file_path.match(pattern) for pattern in patterns):
        return None
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    """Measures every row n times with BENCH_TURNS=n: all rows once before any row a second time.

    Other work that keeps the machine busy for some seconds then disturbs one turn of a row, not the row. The
    fastest turn is used.
    """
    turns = int(os.environ.get("BENCH_TURNS", "1"))
    if turns > 1 and "version" in metafunc.fixturenames:
        metafunc.fixturenames.append("turn")
        metafunc.parametrize("turn", range(turns))


def version_of(item):
    return item.callspec.params.get("version") if hasattr(item, "callspec") else None


def foreign(item):
    """True for a version that is not this library's."""
    version = version_of(item)
    return version in FOREIGN or any(version in kind for kind in peers.PEERS.values())


def pytest_collection_modifyitems(config, items):
    """Sorts the rows: those that the targets need come first.

    So a peer that breaks the device, or the end of the time, does not cost them. The order is: this library,
    eager and the bare products on full shapes; then peers; this library on the other shapes; torch.compile.
    """

    def third(item):
        return foreign(item) and version_of(item) not in FOREIGN

    def full(item):
        return item.callspec.params.get("shape") in shapes.FULL if hasattr(item, "callspec") else True

    def turn(item):
        return (3 if "compile" in version_of(item) else 1) if third(item) else (0 if full(item) else 2)

    if config.getoption("--ours"):
        items[:] = [item for item in items if version_of(item) and not third(item)]

    def again(item):
        return item.callspec.params.get("turn", 0) if hasattr(item, "callspec") else 0

    items.sort(key=lambda item: (turn(item), again(item)))
    config.started, config.not_measured, config.ceilings = time.monotonic(), [], None
    config.total, config.ended = len(items), 0


def not_measured(item, reason):
    op = item.path.stem.removeprefix("bench_")
    params = item.callspec.params if hasattr(item, "callspec") else {}
    shape = params.get("shape")
    item.config.not_measured.append(
        {
            "op": op,
            "version": params.get("version", item.name),
            "reason": reason,
            "shape": shapes.name(shape) if shape else "",
        }
    )
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    budget = pyfuncitem.config.getoption("--budget")
    if budget and time.monotonic() - pyfuncitem.config.started > budget:
        not_measured(pyfuncitem, f"the time ({budget:.0f} s) was up")
    try:
        return (yield)
    except peers.Missing as missing:
        not_measured(pyfuncitem, str(missing))
    except Exception as error:
        if not foreign(pyfuncitem):
            raise
        not_measured(
            pyfuncitem, f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Prints a line on stderr for each finished row if BENCH_PROGRESS=1 is set."""
    report = yield
    if os.environ.get("BENCH_PROGRESS") == "1" and (call.when == "call" or report.failed):
        item.config.ended += 1
        row = getattr(item.funcargs.get("benchmark"), "extra_info", {}) if hasattr(item, "funcargs") else {}
        took = f"{row['seconds'] * 1e3:.3f} ms" if row.get("seconds") else report.outcome
        what = f"{row['op']}, {row['shape']}, {row['version']}" if row.get("op") else item.name
        print(f"[{item.config.ended}/{item.config.total}] {what}: {took}", file=sys.stderr, flush=True)
    return report


def commit():
    if not CHECKOUT:
        return "an installed package"
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    return result.stdout.strip() or "not a checkout"


def pytest_benchmark_generate_machine_info(config):
    """Replaces pytest-benchmark's machine info.

    Its list of CPU flags takes a second to find, and the host's name says nothing about speed.
    """
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "python_version": platform.python_version(),
        "device": ceilings.device_name(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "version": __version__,
        "quick": shapes.QUICK,
        "threads": torch.get_num_threads(),
        "cache_bytes": ceilings.cache_bytes(DEVICE),
        "command": os.environ.get("BENCH_COMMAND", " ".join(["pytest", *config.invocation_params.args])),
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Adds the ceilings (measured at the start and again here) and what was not measured.

    It drops the list of all rounds.
    """
    if not shapes.QUICK:  # its shapes fit into the caches, so they have no floor
        at_end = ceilings.measure(DEVICE)
        output_json["machine_info"]["ceilings"] = ceilings.better(config.ceilings or at_end, at_end)
    output_json["benchmarks"] = list(fastest_turns(output_json["benchmarks"]))
    output_json["not_measured"] = config.not_measured
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def fastest_turns(entries):
    """Yields one entry for each row: the fastest of its turns; extra_info["turns"] names all of them."""
    rows = {}
    for entry in entries:
        row = entry["extra_info"]
        rows.setdefault(
            (row["op"], row["shape"], row["version"]) if row.get("best") else entry["fullname"], []
        ).append(entry)
    for turns in rows.values():
        best = min(turns, key=lambda entry: entry["extra_info"].get("best", 0))
        if len(turns) > 1:
            best["extra_info"]["turns"] = [entry["fullname"] for entry in turns]
        yield best


class Measure:
    """The fixture: checks a result, times it, and measures its memory. Everything is stored in extra_info."""

    def __init__(self, benchmark, config):
        self.benchmark, self.config, self.error = benchmark, config, None

    def check(self, dtype, *pairs):
        """Raises AssertionError if a (got, expected) pair differs by more than exact.LIMIT of `dtype`."""
        self.error = max(exact.error(got, expected) for got, expected in pairs)
        assert self.error <= exact.LIMIT[dtype], f"wrong: off by {self.error:.1e} of the largest value"

    def __call__(
        self,
        step,
        *,
        op,
        version,
        shape,
        device,
        reads=0,
        writes=0,
        flops=0,
        dtype=torch.float32,
        inputs=(),
        before=None,
        auto=False,
        seconds=2.0,
    ):
        """Times `step()`, which returns its outputs.

        reads, writes: bytes that must move. before: called ahead of each call, outside the timed part.
        seconds: how long to measure; at least 5 rounds, at most 200, and 3 if a round takes over a second.
        """
        assert self.error is not None, "the result is checked before it is timed"
        # On a GPU the figures come from events, not from these rounds.
        seconds = min(seconds, 0.3 if device == "cuda" else 0.15 if shapes.QUICK else seconds)
        ready = clock.preparation(device, reads + writes, before)

        def waited():
            result = step()
            ceilings.synchronize(device)
            return result

        def one_round():
            start = time.perf_counter()
            ready()
            waited()
            return time.perf_counter() - start

        ready()
        start = time.perf_counter()
        peak = memory.above(waited, inputs, device)  # the second call: the check was the first
        took = time.perf_counter() - start
        slow = took > 1
        rounds = 3 if slow else max(5, min(200, int(seconds / min(one_round(), took))))
        self.benchmark.group = f"{op} {shape}"
        self.benchmark.extra_info.update(
            op=op,
            version=version,
            shape=shape,
            device=device,
            auto=auto,
            reads=reads,
            writes=writes,
            flops=flops,
            dtype=str(dtype).removeprefix("torch."),
            error=self.error,
            warm=device == "cpu" and reads + writes < clock.SMALL,
        )
        self.benchmark.pedantic(waited, setup=ready, rounds=rounds, warmup_rounds=int(not slow), iterations=1)
        if self.benchmark.stats is None:
            return
        extra = {"peak": peak}
        if device == "cuda":
            extra |= clock.on_device(step, ready, min(rounds, 30), again=before is None)
        else:
            extra |= {"seconds": self.benchmark.stats.stats.median, "best": self.benchmark.stats.stats.min}
        self.benchmark.extra_info.update(extra)


@pytest.fixture
def measure(benchmark, request):
    if request.config.ceilings is None and benchmark.enabled and not shapes.QUICK:
        request.config.ceilings = ceilings.measure(DEVICE)
    return Measure(benchmark, request.config)
