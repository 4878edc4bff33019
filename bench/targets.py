"""The targets of the kernels as data, and which of them a results file meets.

Each target is a ratio or a limit within one run. It applies to the version that impl="auto" chooses. If a row
is missing, or lacks a figure, the target is "not measured".
"""

from typing import NamedTuple

TRIANGLE = ("chunked product", "chunked product, torch.compile")


class Target(NamedTuple):
    """One target.

    what: a name in _VALUES. against: the versions to compare with; the fastest of them counts. at_least: the
    limit is a lower one. where: a part of the device's name, or "cpu". threads: threads of the CPU for which
    the target is meant.
    """

    where: str
    op: str
    shape: str
    what: str
    limit: float
    at_least: bool = False
    against: tuple[str, ...] = ()
    threads: int = 2


TARGETS = (
    Target("cpu", "token_logprob forward", "1024x32000xfloat32", "times faster", 3, True, ("eager",)),
    Target(
        "cpu", "token_logprob forward", "1024x32000xfloat32", "times faster", 1.5, True, ("torch.compile",)
    ),
    Target("cpu", "token_logprob forward", "1024x32000xfloat32", "times the floor", 1.5),
    Target(
        "cpu", "token_logprob forward + backward", "1024x32000xfloat32", "times faster", 2.5, True, ("eager",)
    ),
    Target("cpu", "ppo_lag_advantage", "16x768", "times faster", 300, True, ("eager",)),
    Target("cpu", "ppo_lag_advantage", "16x768", "times faster", 5, True, TRIANGLE),
    Target(
        "cpu",
        "linear_ppo_loss forward + backward",
        "4096x512x32000xfloat32",
        "times the time",
        1.1,
        False,
        ("bare products",),
    ),
    Target(
        "cpu",
        "linear_ppo_loss forward + backward",
        "4096x512x32000xfloat32",
        "of the memory",
        1 / 8,
        False,
        ("eager",),
    ),
    Target(
        "H200", "token_logprob + entropy forward", "8192x151936xbfloat16", "of the copy bandwidth", 0.9, True
    ),
    Target("H200", "token_logprob + entropy forward", "8192x151936xbfloat16", "ms", 0.64),
    Target("H200", "ppo_loss_from_logits forward + backward", "8192x151936xbfloat16", "ms", 1.45),
    Target("H200", "linear_logprob forward", "8192x4096x128256xbfloat16", "TFLOP/s", 640, True),
    Target("H200", "linear_ppo_loss forward + backward", "8192x4096x128256xbfloat16", "ms", 37),
    Target(
        "H200",
        "linear_ppo_loss forward + backward",
        "8192x4096x128256xbfloat16",
        "times faster",
        1.3,
        True,
        ("Liger scaled cross entropy + loss",),
    ),
    Target(
        "H200",
        "linear_ppo_loss forward + backward",
        "8192x4096x128256xbfloat16",
        "times faster",
        1.3,
        True,
        ("verl linear_cross_entropy + loss",),
    ),
    # 1.1 GB and the weight's gradient in fp32
    Target(
        "H200",
        "linear_ppo_loss forward + backward",
        "8192x4096x128256xbfloat16",
        "GB above inputs and outputs",
        1.1 + 128_256 * 4096 * 4 / 1e9,
    ),
    Target("H200", "ppo_lag_advantage", "4096x2048", "ms", 0.072),
    Target("H200", "ppo_lag_advantage", "256x1024", "launches", 1),
    Target("H200", "ppo_lag_advantage", "256x1024", "ms a call from Python", 0.025),
)


def _moved(row):
    return row["reads"] + row["writes"]


# name: function of this library's row, the row to compare with (or None), the floor in seconds, and the
# ceilings. None: not measured.
_VALUES = {
    "times faster": lambda row, other, floor, top: other["seconds"] / row["seconds"],
    "times the time": lambda row, other, floor, top: row["seconds"] / other["seconds"],
    "of the memory": lambda row, other, floor, top: row["peak"] / other["peak"],
    "times the floor": lambda row, other, floor, top: row["seconds"] / floor,
    "of the copy bandwidth": lambda row, other, floor, top: (
        _moved(row) / row["seconds"] / 1e9 / top["copy_gb_s"]
    ),
    "TFLOP/s": lambda row, other, floor, top: row["flops"] / row["seconds"] / 1e12,
    "ms": lambda row, other, floor, top: row["seconds"] * 1e3,
    "ms a call from Python": lambda row, other, floor, top: row["call"] * 1e3,
    "launches": lambda row, other, floor, top: row["launches"],
    "GB above inputs and outputs": lambda row, other, floor, top: row["peak"] / 1e9,
}


def applies_to(target, machine):
    """Returns whether the target is meant for the machine of a results file."""
    if target.where == "cpu":
        return "thread" in machine.get("device", "") and machine.get("threads") == target.threads
    return target.where in machine.get("device", "")


def value(target, rows, ceilings, floor):
    """Returns the measured figure, or None.

    rows: every row's extra_info. floor(row, ceilings): seconds or None.
    """
    here = [
        row for row in rows if (row["op"], row["shape"]) == (target.op, target.shape) and row.get("seconds")
    ]
    ours = next((row for row in here if row.get("auto")), None)
    others = [row for row in here if row["version"] in target.against]
    if ours is None or (target.against and not others):
        return None
    try:
        return _VALUES[target.what](
            ours, min(others, key=lambda row: row["seconds"], default=None), floor(ours, ceilings), ceilings
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def text(target):
    """Returns the target in words."""
    against = (
        f" than {' or '.join(target.against)}"
        if "faster" in target.what
        else (f" of {target.against[0]}" if target.against else "")
    )
    return f"{'at least' if target.at_least else 'at most'} {target.limit:.3g} {target.what}{against}"


def outcome(target, measured):
    """Returns "met", "missed" or "not measured"."""
    if measured is None:
        return "not measured"
    return "met" if (measured >= target.limit if target.at_least else measured <= target.limit) else "missed"
