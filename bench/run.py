"""Runs the benches (`make bench`); writes bench/results/<device>-<date>.json and a Markdown table.

python bench/run.py [--out FOLDER] [--rooms] [files of pytest] [options of pytest]
    --out FOLDER   where the two files are written (default: bench/results)
    --rooms        prints each op and its test files, one op per line, and measures nothing
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# if false, ROOT is saferlhf_fast/ of an installed wheel and must not be on sys.path
CHECKOUT = (ROOT / "setup.py").is_file()


def slug(device):
    """Returns a device's name in the form of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def measure(path, arguments, log=None):
    """Runs pytest over the benches, and returns its exit code.

    If anything was measured, `path` has the results. pytest runs in a folder and with a configuration of its
    own: files around the user's folder must not change it, and nothing may put saferlhf_fast/ itself on
    sys.path, because its version.py would replace other modules of that name.

    arguments: bench files, by name or by pytest's names of tests, and options. log: a file for pytest's
    output.
    """
    wanted = [argument for argument in arguments if "bench_" in argument and not argument.startswith("-")]
    options = [argument for argument in arguments if argument not in wanted]
    files = [str(HERE / re.sub(r"^[^:]*/", "", argument)) for argument in wanted]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    if CHECKOUT:
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "pytest.ini"
        empty.write_text("[pytest]\n")
        command = [
            sys.executable,
            "-m",
            "pytest",
            *(files or [str(HERE)]),
            "-c",
            str(empty),
            f"--rootdir={HERE}",
            f"--confcutdir={HERE}",
            "-q",
            "--import-mode=importlib",
            "-W",
            "ignore::FutureWarning",
            "-W",
            "ignore::DeprecationWarning",
            "--benchmark-only",
            "-p",
            "no:cacheprovider",
            "-rs",
            "--benchmark-columns=median,iqr,rounds",
            "--benchmark-quiet",
            f"--benchmark-storage=file://{scratch}/stored",
            f"--benchmark-json={path}",
            *options,
        ]
        if find_spec("pytest_timeout"):
            command.append("--timeout=900")
        return subprocess.run(command, cwd=scratch, stdout=log, env=environment).returncode


def rooms():
    """Returns {op: its test files}: tests/kernels/test_<op>.py and tests/kernels/test_<op>_*.py.

    A file that fits several ops belongs to the op with the longest name.
    """
    from saferlhf_fast.kernels import dispatch

    ops = sorted(dispatch.ROOMS)

    def owner(name):
        return max((op for op in ops if name == op or name.startswith(op + "_")), key=len, default=None)

    files = sorted(ROOT.glob("tests/kernels/test_*.py"))
    return {op: [file for file in files if owner(file.stem.removeprefix("test_")) == op] for op in ops}


def write(results, folder):
    """Writes the JSON and the table of loaded results, and returns the JSON's path.

    The files are named after device and date.
    """
    import table

    machine = results["machine_info"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(machine['device'])}-{machine['date']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(table.table(results)) + "\n")
    return path


def main(arguments):
    sys.path[:0] = [*([str(ROOT)] if CHECKOUT else []), str(HERE)]
    if "--rooms" in arguments:
        for op, files in rooms().items():
            print(op, *(file.relative_to(ROOT) for file in files))
        return 0
    folder = HERE / "results"
    if "--out" in arguments:
        at = arguments.index("--out")
        folder = Path(arguments[at + 1]).resolve()
        del arguments[at : at + 2]
    os.environ.setdefault("BENCH_COMMAND", " ".join(["python bench/run.py", *arguments]))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "results.json"
        code = measure(path, arguments)
        if not path.exists() or not path.stat().st_size:
            print("nothing was measured", file=sys.stderr)
            return code or 1
        written = write(json.loads(path.read_text()), folder)
    print(written.with_suffix(".md").read_text())
    print(f"wrote {written} and {written.with_suffix('.md').name}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
