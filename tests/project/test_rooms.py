"""The guard guards: every import that a room must not make is planted in a copy of the tree, and `make
lint`'s checks name it.
"""

import re
import shutil
import subprocess
import sys

import kit
import pytest

ORDER = [
    ["errors", "version"],
    ["config"],
    ["data", "runtime"],
    ["models"],
    ["rollout"],
    ["training"],
    ["moderation"],
    ["evaluation"],
    ["demo", "commands"],
    ["cli"],
]
"""The rooms, lowest first; those of one step do not know each other."""
ALLOWED = {"models", "kernels"}  # what integrations may import
UNREAD = shutil.ignore_patterns("__pycache__", "*.so", "results")


def arrows():
    """Yields (room, what it must not import)."""
    rooms = [(room, step) for step, together in enumerate(ORDER) for room in together]
    for room, step in rooms:
        for other, height in rooms:
            if room != other and height >= step:
                yield room, other
        if room != "cli":
            yield room, "integrations"
        if room not in ALLOWED:
            yield "integrations", room


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the checks read."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("saferlhf_fast", "kernels", "bench"):
        shutil.copytree(kit.ROOT / name, copy / name, symlinks=True, ignore=UNREAD)
    shutil.copytree(kit.SUPPORT, copy / "tests" / "support", ignore=UNREAD)
    shutil.copy(kit.ROOT / "pyproject.toml", copy)
    return copy


def contracts(tree):
    """What import-linter says of a tree -> (exit code, text)."""
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=tree,
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(map(str, [tree, *sys.path])), "COLUMNS": "300"},
    )
    return done.returncode, done.stdout + done.stderr


def of_kernels(tree):
    done = subprocess.run(
        [sys.executable, str(tree / "tests/support/imports_of_kernels.py")], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_tree_as_it_is_keeps_the_contracts(tree):
    code, text = contracts(tree)
    assert code == 0 and "2 kept, 0 broken" in text, text
    assert of_kernels(tree)[0] == 0, of_kernels(tree)[1]


def test_every_planted_import_is_named(tree):
    planted = {}
    for room, other in arrows():
        folder = tree / "saferlhf_fast" / room
        if folder.is_dir():
            (folder / f"planted_{other}.py").write_text(f"import saferlhf_fast.{other}\n")
            planted[room, other] = f"saferlhf_fast.{room}.planted_{other} -> saferlhf_fast.{other}"
        else:
            with open(f"{folder}.py", "a") as file:
                file.write(f"import saferlhf_fast.{other}\n")
            planted[room, other] = f"saferlhf_fast.{room} -> saferlhf_fast.{other}"
    assert len(planted) > 60 and ("integrations", "training") in planted
    code, text = contracts(tree)
    assert code == 1, text
    said = re.sub(r"\s+", " ", text)
    unnamed = [arrow for arrow, chain in planted.items() if not re.search(re.escape(chain) + r"\b", said)]
    assert not unnamed, f"{unnamed} in {text}"


@pytest.mark.parametrize(
    "line",
    [
        "from saferlhf_fast import models",
        "from ..models import packing",
        "import saferlhf_fast.errors",
        "from .. import training",
    ],
)
def test_kernels_import_nothing_else_of_ours(tree, line):
    place = tree / "kernels" / "planted.py"
    place.write_text(f"def late():\n    {line}\n")
    code, text = of_kernels(tree)
    place.unlink()
    assert code == 1 and text.startswith("kernels/planted.py:2: kernels imports saferlhf_fast."), text


@pytest.mark.parametrize(
    "line", ["import kit", "from tests.support import kit", "from integration_kit import near"]
)
def test_bench_imports_nothing_of_tests(tree, line):
    place = tree / "bench" / "planted.py"
    place.write_text(f"{line}\n")
    code, text = of_kernels(tree)
    place.unlink()
    assert code == 1 and "bench/planted.py:1: bench imports" in text, text


def test_make_lint_runs_all_of_it():
    recipe = re.search(
        r"^lint: setup .*\n((?:\t.*\n)+)", (kit.ROOT / "Makefile").read_text(encoding="utf-8"), re.M
    )[1]
    assert (
        "ruff check" in recipe
        and "lint-imports" in recipe
        and "tests/support/imports_of_kernels.py" in recipe
    )
