"""kernels/ imports nothing of saferlhf_fast but kernels, and bench/ nothing of tests/: python
tests/support/imports_of_kernels.py

import-linter sees neither: kernels/ has no __init__.py and comes in through a symlink, bench/ is no package.
`make lint` runs this.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
OURS = "saferlhf_fast.kernels"


def imported(path, package):
    """Yields (line, module) of every import of a file, `from x import y` as x.y."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield from (
                (node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name]))
                for alias in node.names
            )


def wrong():
    """Yields a line for each import that must not be."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        package = ".".join(["saferlhf_fast", *path.relative_to(ROOT).parent.parts])
        for line, module in imported(path, package):
            if (
                module.split(".")[0] == "saferlhf_fast"
                and f"{module}.".removeprefix(f"{OURS}.") == f"{module}."
            ):
                yield f"{path.relative_to(ROOT)}:{line}: kernels imports {module}"
    helpers, own = (
        {path.stem for path in (ROOT / folder).rglob("*.py")} for folder in ("tests/support", "bench")
    )
    for path in sorted((ROOT / "bench").rglob("*.py")):
        for line, module in imported(path, ""):
            if module.split(".")[0] in helpers - own | {"tests"}:
                yield f"{path.relative_to(ROOT)}:{line}: bench imports {module} of tests"


if __name__ == "__main__":
    found = list(wrong())
    print("\n".join(found) or "kernels imports kernels alone, bench nothing of tests")
    sys.exit(bool(found))
