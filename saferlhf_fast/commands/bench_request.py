"""The command line of `saferlhf-fast bench`: its help, and what its words ask for. Standard library only."""

import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saferlhf_fast.errors import UserError

HELP = """usage: saferlhf-fast bench [--ops OP …] [--quick] [--save FILE] [--compare FILE] [--worse P]
                           [--times] [--force]

Measures every op on this machine's device: our implementations and eager torch, on random data. Each result
is checked against float64 before it is timed. Prints a table. It needs pytest and pytest-benchmark:
pip install 'saferlhf-fast[bench]'

  --ops OP …      measures only these ops: {ops}
  --quick         small shapes, seconds for an op; noisier, so take a larger --worse
  --save FILE     also writes the results (JSON); an existing file is kept unless --force is given
  --compare FILE  measures again what FILE contains and compares; exit code 1 when something became slower
  --worse P       how many per cent count as slower; default: 10
  --times         compares the times themselves too: only on a machine that does nothing else
  --force         overwrites an existing file; compares with the file of another device

What is compared is a version's time over that of eager torch in the same run (and over the floor of the
machine's memory bandwidth, where it is near). A machine that is busy or slower today slows both and leaves
this ratio as it is. A slower kernel raises it, and so does a faster eager torch, as an update of torch may
bring: the head of the table says how long eager torch took. The fastest round counts. What seems slower is
measured up to twice more, and the best measurement counts. A version that is in FILE and does not run any
more fails too. Keep one file for each machine and number of threads. The table names other versions of torch
and of saferlhf-fast.

exit codes: 0 nothing became slower, 1 something did (or gave wrong results), 2 bad input

examples:
  saferlhf-fast bench --quick --ops gae token_logprob    a first look, in seconds
  saferlhf-fast bench --save base.json                   before an update of torch, a driver or saferlhf-fast
  saferlhf-fast bench --compare base.json                after it
  saferlhf-fast bench --compare base.json --worse 5 --ops ppo_lag_advantage"""

PACKAGE = Path(__file__).resolve().parents[1]
BENCH = (PACKAGE / "bench").resolve()


class Request(NamedTuple):
    """What the command line asks for.

    Attributes:
        ops: Names of ops; None: all, or those of the stored file.
        quick: Whether to use small shapes.
        save: Where to write the results.
        compare: The stored file to compare with.
        worse: How many per cent count as slower.
        times: Whether to compare the times themselves too.
        force: Whether to overwrite a file, and to compare with another device's.
    """

    ops: list[str] | None = None
    quick: bool = False
    save: Path | None = None
    compare: Path | None = None
    worse: float = 10.0
    times: bool = False
    force: bool = False


def known_ops() -> list[str]:
    """Returns the names of the ops that have a bench."""
    return sorted(
        room.parent.name
        for room in (PACKAGE / "kernels").glob("*/__init__.py")
        if (BENCH / f"bench_{room.parent.name}.py").is_file()
    )


def help_text() -> str:
    """Returns `saferlhf-fast bench --help`."""
    return HELP.format(ops=", ".join(known_ops()).replace(", ppo_lag", ",\n                  ppo_lag", 1))


def request(words: Sequence[str]) -> Request:
    """Reads the words of the command line.

    Raises:
        UserError: A word is not an option of bench, is given twice, or has a wrong value.
    """
    fields: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        name, equals, value = remaining.pop(0).partition("=")
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in Request._fields:
            raise UserError(
                f"bench: expected one of {', '.join(f'--{field}' for field in Request._fields)}, got {name}"
            )
        if key in fields:
            raise UserError(f"bench: --{key} is given twice")
        if key in ("quick", "times", "force"):
            if equals:
                raise UserError(f"bench: --{key} takes no value, got {value}")
            fields[key] = True
            continue
        values = [value] if equals else []
        while not equals and remaining and not remaining[0].startswith("--") and (key == "ops" or not values):
            values.append(remaining.pop(0))
        if not any(values):
            raise UserError(f"bench: --{key}: expected {_EXPECTED[key]} after it")
        fields[key] = _READ[key](values)
    return Request(**fields)


def _ops(values: Sequence[str]) -> list[str]:
    ops, known = [op for value in values for op in value.split(",") if op], known_ops()
    for op in ops:
        if op not in known:
            close = difflib.get_close_matches(op, known, n=1)
            raise UserError(
                f"bench: --ops: unknown op {op!r}{f'; did you mean {close[0]}?' if close else ''}; "
                f"there is {', '.join(known)}"
            )
    return sorted(set(ops))


def _percent(values: Sequence[str]) -> float:
    try:
        worse = float(values[0].removesuffix("%"))
    except ValueError:
        worse = math.nan
    if not 0 <= worse < math.inf:
        raise UserError(f"bench: --worse: expected per cent, 0 or more, got {values[0]}")
    return worse


def _path(values: Sequence[str]) -> Path:
    return Path(values[0]).expanduser()


_READ: dict[str, Callable[[Sequence[str]], Any]] = {
    "ops": _ops,
    "worse": _percent,
    "save": _path,
    "compare": _path,
}
_EXPECTED = {"ops": "names of ops", "worse": "per cent", "save": "a file", "compare": "a file"}
