"""The sections of a GPU window, (name, seconds, function), with the most important first."""

import json
import os
import re
import shutil
import subprocess
import sys

from gpu.outcomes import KEPT, ROOT, Dead, NotRun, OutOfTime, Stop, describe

# Only the tests of kernels that run on the device itself: no interpreter, no second process.
TESTS = "(triton-cuda or native-cuda or test_triton_logits) and not interpreter"


def measured(name):
    """Returns a section of measurements.py, which imports torch; the build must start before that import."""

    def section(window):
        with window.uninterrupted():
            from gpu import measurements
        getattr(measurements, name)(window)

    return section


products, linear, logits, tokens, peers = map(measured, ("products", "linear", "logits", "tokens", "peers"))


def first():
    return [
        ("device", 15, device),
        ("build and tests", 80, build_and_tests),
        ("products", 35, products),
        ("linear", 55, linear),
        ("logits", 60, logits),
        ("rows of tokens", 35, tokens),
        ("counters", 55, counters),
        ("peers", 70, peers),
    ]


def again():
    return [
        ("device", 15, device),
        ("failed tests", 45, failed_tests),
        ("memory checker", 60, memory_checker),
        ("once more", 55, once_more),
    ]


# ---- device, build, tests


def device(window):
    """Describes the device and measures its ceilings.

    The build starts first: it needs neither torch nor the GPU.
    """
    window.build = None if window.rehearsal else build(window)
    state = asked_of_the_driver("name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw")
    # reading torch from a cold disk may take longer than the section
    with window.uninterrupted(least=12):
        import ceilings
        import numpy
        import torch
        import triton
    window.emit(
        "device",
        device=ceilings.device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        numpy=numpy.__version__,
        python=sys.version.split()[0],
        cuda=torch.version.cuda,
        state=state or "no nvidia-smi",
    )
    if not torch.cuda.is_available() and not window.rehearsal:
        raise Stop(
            "torch sees no CUDA device: --rehearse interpreter or --rehearse compiler tries the window on a "
            "CPU"
        )
    window.emit("ceilings", **ceilings.measure(ceilings.DEVICE))


def asked_of_the_driver(fields):
    """Returns what nvidia-smi reports, one line per GPU; "" if there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    return subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()


def build(window):
    """Starts the build of _C for this GPU alone; returns None if the driver names no architecture."""
    architecture = asked_of_the_driver("compute_cap").split("\n")[0].replace(".", "")
    if not architecture:
        return None
    return window.start(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        "build.log",
        env=os.environ | {"CUDAARCHS": architecture},
    )


def build_and_tests(window):
    """Runs the tests in other processes, and at the same time the checks.

    The checks also compile the kernels that are timed later.
    """
    if window.build is not None:
        code = window.wait(window.build)
        window.emit(
            "figure",
            what="build of _C",
            value="done" if code == 0 else f"failed (exit {code}), see build.log",
        )
    tests = None if window.over("tests") else start_tests(window)
    try:
        with window.uninterrupted():
            from gpu import checks

            from saferlhf_fast.kernels import dispatch
        module, why = dispatch.native_module()
        cuda = getattr(module, "cuda", False) or getattr(module, "cuda_note", "")
        window.emit("figure", what="_C", value=f"{why}; CUDA: {cuda}")
        checks.everything(window)
    finally:
        if tests is not None:
            report_tests(window, tests, window.wait(tests))
            window.tried.append([window.section, "tests"])


def start_tests(window, ids=()):
    """Starts pytest with the kernels' tests that run on this device. ids: only these tests."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "-p",
        "gpu.workers",
        "-vv",
        "--tb=short",
    ]
    if window.rehearsal:
        command += [file for file in kernel_tests() if "value_loss" in file] + [
            "-k",
            "wrong or refus",
            "-m",
            "not slow",
        ]
    elif ids:
        command += ["--timeout", "60", "-n", "8", *ids]
    else:
        command += ["--timeout", "60", "-n", "12", "-m", "not slow", "-k", TESTS, *kernel_tests()]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH")]))
    return window.start(command, "tests.log", env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": path})


def kernel_tests():
    """Returns the test files of the kernels' rooms."""
    from run import rooms

    names = {str(file.relative_to(ROOT)) for files in rooms().values() for file in files}
    return sorted(
        names | {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_triton_logits.py")}
    )


def report_tests(window, child, code):
    """Writes pytest's last line, and a row for each failed test.

    If pytest was killed, it writes the results so far.
    """
    lines = (window.out / "tests.log").read_text(errors="replace").splitlines()
    ended = outcomes(lines)
    failed = {test: why for test, (outcome, why) in ended.items() if outcome in ("FAILED", "ERROR")}
    summary = next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error).* in ", line)),
        f"{sum(outcome == 'PASSED' for outcome, _ in ended.values())} passed, {len(failed)} failed",
    )
    late = " (ended when the time was up; see tests.log)" if code is None else ""
    window.emit("figure", what="tests on the device", value=summary.strip("= ") + late)
    for test, why in failed.items():
        window.emit("test", test=test, error=(why or "failed")[:200])


def outcomes(lines):
    """Returns {test: (outcome, reason)} from pytest's lines, with or without xdist.

    The lines are those at the end of each test and those at the end of the run.
    """
    results = {}
    for line in lines:
        ended = re.match(r"(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR) (\S+\.py::.+?)(?: - (.*))?$", line)
        if ended:
            results[ended[2]] = (ended[1], ended[3])
    return results


# ---- hardware counters


def counters(window):
    """Launches the main kernels once under Nsight Compute, which reads the hardware's counters."""
    if shutil.which("ncu") is None:
        raise NotRun("ncu is not on this machine's PATH")
    kernels = "regex:(forward_kernel|rows_kernel|fused_kernel|advantage_kernel|shape_kernel|gae_kernel)"
    command = [
        "ncu",
        "--clock-control",
        "none",
        "-k",
        kernels,
        "--launch-count",
        "8",
        "--section",
        "SpeedOfLight",
        "--section",
        "MemoryWorkloadAnalysis",
        "--section",
        "Occupancy",
        "--section",
        "WarpStateStats",
        sys.executable,
        str(ROOT / "bench" / "gpu" / "launch_once.py"),
    ]
    code = window.wait(window.start(command, "ncu.txt"))
    log = (window.out / "ncu.txt").read_text(errors="replace")
    for kernel, metrics in counted(log):
        window.emit("counters", kernel=kernel, **metrics)
    if code != 0:
        raise RuntimeError(
            f"ncu ended with {'its time up' if code is None else f'exit {code}'}: "
            f"{log.strip().splitlines()[-1:]}"
        )


def counted(log):
    """Yields (kernel, its main figures) from ncu's output."""
    kernel, metrics = None, {}
    wanted = {
        "Duration",
        "Memory Throughput",
        "Compute (SM) Throughput",
        "DRAM Throughput",
        "Achieved Occupancy",
        "L2 Hit Rate",
        "Theoretical Occupancy",
    }
    for line in log.splitlines():
        started = re.match(r"  .*?(\w+_kernel)\b.*\(\d+, \d+, \d+\)x\(\d+, \d+, \d+\)", line)
        figure = re.match(r"    (\S.*?)\s{2,}(\S+)\s+([\d.,]+)\s*$", line)
        if started:
            if kernel:
                yield kernel, metrics
            kernel, metrics = started[1], {}
        elif figure and figure[1] in wanted:
            metrics.setdefault(f"{figure[1]}, {figure[2]}", figure[3])
    if kernel:
        yield kernel, metrics


# ---- the second command


def kept_rows():
    """Returns the rows of the first command."""
    path = KEPT / "rows.jsonl"
    if not path.is_file():
        raise NotRun(f"the first command left nothing in {path.relative_to(ROOT)}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def failed_tests(window):
    """Repeats the tests that failed in the first command, with the present source."""
    if window.build is not None:
        window.wait(window.build)
    ids = [row["test"] for row in kept_rows() if row["kind"] == "test"]
    if not ids:
        raise NotRun("no test failed in the first command")
    child = start_tests(window, ids[:60])
    report_tests(window, child, window.wait(child))


def memory_checker(window):
    """Runs compute-sanitizer on each kernel with small data: reads and writes out of bounds."""
    if shutil.which("compute-sanitizer") is None:
        raise NotRun("compute-sanitizer is not on this machine's PATH")
    command = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        str(ROOT / "bench" / "gpu" / "launch_once.py"),
        "small",
    ]
    code = window.wait(window.start(command, "memcheck.txt"))
    log = (window.out / "memcheck.txt").read_text(errors="replace").splitlines()
    wrong = sum("= Invalid " in line for line in log)
    summary = next(
        (line for line in reversed(log) if "ERROR SUMMARY" in line),
        f"no summary, {wrong} accesses that were invalid",
    )
    through = ", ".join(line for line in log if re.fullmatch(r"\w+ (triton|native)", line))
    window.emit(
        "figure",
        what="memcheck",
        value=f"{summary.strip('= ')} (exit {code}); through: {through or 'nothing'}",
    )


def once_more(window):
    """Measures again, for the spread, this library's fastest version of each op, and the most surprising row.

    That is the row with the largest deviation from its prediction.
    """
    from gpu import predictions

    rows = [row for row in kept_rows() if row["kind"] == "row" and row["section"] != "products"]
    best = {}
    for row in rows:
        ours = row["version"].startswith(("triton", "native")) and not row["wrong"]
        if ours and row["seconds"] < best.get((row["op"], row["shape"]), row)["seconds"] * 1.0001:
            best[row["op"], row["shape"]] = row

    def far(row):
        return abs(predictions.ratio(row) - 1)

    surprising = max((row for row in rows if predictions.ratio(row)), key=far, default=None)
    window.emit(
        "figure",
        what="furthest from its prediction",
        value="none"
        if surprising is None
        else f"{surprising['op']}, {surprising['version']}: {predictions.ratio(surprising):.2f} x the "
        f"prediction",
    )
    window.wanted = {row["what"] for row in [*best.values(), *filter(None, [surprising])]}
    for name, section in (("tokens", tokens), ("logits", logits), ("linear", linear)):
        try:
            section(window)
        except (OutOfTime, Dead):
            raise
        except Exception as error:
            window.emit("failure", what=name, error=describe(error))
