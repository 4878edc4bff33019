"""The CMake step and the package list; everything else is in pyproject.toml.

The native module is optional. If it cannot be built (for example without a compiler), the installation
continues with a warning and writes the reason to saferlhf_fast/_C_failed.txt, which `saferlhf-fast info`
shows. SAFERLHF_PURE=1 builds a wheel without it for every platform (py3-none-any); `make dist` builds this
wheel and one for the present platform.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BENCH_PARTS = {
    "ceilings",
    "clock",
    "compare",
    "conftest",
    "eager",
    "exact",
    "memory",
    "peers",
    "run",
    "shapes",
    "table",
    "targets",
    "versions",
}
NOTE = "_C_failed.txt"  # the reason why there is no native module; kernels/dispatch.py reads it


def tool(name):
    """Returns the path of cmake or ninja, preferably next to this Python, which may not be on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def build_native(target: Path):
    """Builds _C and copies it to `target`. Raises RuntimeError with the reason in one line."""
    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError(f"pybind11 is missing: {error}") from error
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise RuntimeError("cmake is missing")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    settings = [
        *generator,
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    try:
        run_cmake(cmake, settings, target)
    except RuntimeError as error:
        # Perhaps only nvcc fails. The module then has the reason (`_C.cuda_note`).
        reason = re.sub(r"[^\w .,:/()=-]", " ", str(error))[:200]
        run_cmake(cmake, [*settings, f"-DSAFERLHF_WITHOUT_CUDA=the build with it failed: {reason}"], target)


def run_cmake(cmake, settings, target):
    """Configures, builds and copies the module to `target`; RuntimeError when a step fails."""
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            [cmake, "-S", str(ROOT), "-B", folder, *settings],
            [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)],
        ):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(first_error(result.stdout + result.stderr))
        built = sorted(Path(folder).glob("_C*"))
        built = [path for path in built if path.suffix in (".so", ".pyd")]
        if len(built) != 1:
            raise RuntimeError(f"expected one built module, got {[path.name for path in built]}")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Write a new file instead of overwriting the old one, which a process may have mapped.
        partial = target.with_name(target.name + ".new")
        shutil.copyfile(built[0], partial)
        os.replace(partial, target)


def first_error(output):
    """Returns the first lines of a build's output that contain the error, as one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for at, line in enumerate(lines):
        if "error" in line.lower():
            return " ".join(lines[at : at + 4])[:500]
    return " ".join(lines[-3:])[:500]


class CMakeBuild(build_ext):
    """setuptools' hook for building extensions; it has no other interface than inheritance."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            build_native(target)
        except (RuntimeError, OSError) as error:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(NOTE).write_text(f"{error}\n")
            print(
                f"warning: saferlhf_fast._C was not built; the reference versions run instead. Reason: "
                f"{error}",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self):
        """Copies the module, or the note with the reason, to the source folder for editable installs.

        The results of an earlier build are deleted first: new Python files would call an old module with
        wrong arguments.
        """
        home = ROOT / "saferlhf_fast"
        for path in [*home.glob("_C.*"), home / NOTE]:
            path.unlink(missing_ok=True)
        note = Path(self.build_lib) / "saferlhf_fast" / NOTE
        if note.exists():
            shutil.copyfile(note, home / NOTE)
            note.unlink()
        else:
            super().copy_extensions_to_source()


class ShippedModules(build_py):
    """Wheels contain the benches of the ops and what they import; the rest of bench/ needs a checkout."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package != "saferlhf_fast.bench":
            return modules
        ops = {
            f"bench_{path.parent.name}" for path in (ROOT / "saferlhf_fast" / "kernels").glob("*/__init__.py")
        }
        return [module for module in modules if module[1] in ops | BENCH_PARTS]


pure = os.environ.get("SAFERLHF_PURE", "0") == "1"

setup(
    # Namespace packages: kernels/ has no __init__.py, so that no package of that name shadows Hugging Face's.
    # It is included through the symlink saferlhf_fast/kernels, and bench/ through saferlhf_fast/bench for
    # `saferlhf-fast bench`.
    packages=find_namespace_packages(
        include=["saferlhf_fast*"], exclude=["*__pycache__*", "saferlhf_fast.bench.*"]
    ),
    package_data={
        "saferlhf_fast": ["recipes/*.yaml", "py.typed"],
        "": ["*.md", "*.json", "*.html", "*.jinja"],
    },
    ext_modules=[] if pure else [Extension("saferlhf_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": ShippedModules},
)
