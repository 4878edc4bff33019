"""What each rank reports: versions, GPUs, host, free disk; and what is wrong when reports are compared."""

import ctypes
import json
import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from saferlhf_fast.runtime import provenance
from saferlhf_fast.version import __version__

EQUAL = (
    "python",
    "saferlhf-fast",
    "commit",
    "torch",
    "cuda",
    "nccl",
    "driver",
    "transformers",
    "deepspeed",
    "triton",
    "gpus",
)
"""What must be the same on all ranks."""
LITTLE = 10 << 30  # bytes of free disk below which there is a warning

Report = dict[str, Any]
"""What one rank reports, as values that JSON can hold: EQUAL, host, address, local_rank, free."""


def report(place: str | Path | None = None) -> Report:
    """Returns what this rank runs on.

    Args:
        place: The folder whose disk's free bytes are reported; the working directory when it does not exist.
    """
    import torch

    values: Report = {
        "host": socket.gethostname(),
        "address": _address(),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "python": platform.python_version(),
        "saferlhf-fast": __version__,
        "commit": provenance.git_commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "nccl": None,
        "gpus": [],
    }
    for name in ("transformers", "deepspeed", "triton"):
        try:
            values[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            values[name] = None
    if torch.cuda.is_available():
        values["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        values["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    values["free"] = shutil.disk_usage(place if place and Path(place).is_dir() else ".").free
    return values


def _address() -> str:
    """Returns the address by which this host reaches rank 0's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return probe.getsockname()[0]
        except OSError:
            return "unknown"


def _driver() -> str | None:
    """Returns the version of NVIDIA's driver, None without one."""
    try:
        library, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() != 0:
            return None
        status = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        library.nvmlShutdown()
        return text.value.decode() if status == 0 else None
    except (OSError, AttributeError):
        return None


def compare(reports: Sequence[Report]) -> list[str]:
    """Compares reports with one another.

    Args:
        reports: The reports, in rank order.

    Returns:
        "rank 3 (host): reason" for everything that is wrong, in rank order.
    """
    reasons = []
    for name in EQUAL:
        values = [json.dumps(one.get(name)) for one in reports]
        usual = Counter(values).most_common(1)[0][0]  # of values that are equally common, rank 0's
        reasons += [
            (r, f"{name} is {_show(value)}, most ranks have {_show(usual)}")
            for r, value in enumerate(values)
            if value != usual
        ]
    for r, one in enumerate(reports):
        if one["gpus"] and one["local_rank"] >= len(one["gpus"]):
            reasons.append(
                (r, f"is number {one['local_rank']} of its machine, which shows it {len(one['gpus'])} GPUs")
            )
    return [f"rank {r} ({reports[r]['host']}): {reason}" for r, reason in sorted(reasons)]


def _show(text: str) -> str:
    """Writes a value for people. text: the value as JSON."""
    value = json.loads(text)
    if isinstance(value, list):
        return ", ".join(f"{n} × {name}" for name, n in Counter(value).items()) or "none"
    return "not there" if value is None else value


def warnings(reports: Sequence[Report]) -> list[str]:
    """Returns lines about what is allowed but may cause trouble.

    Args:
        reports: The reports, in rank order.
    """
    return [
        f"warning: rank {r} ({one['host']}): {one['free'] / 1e9:.1f} GB of disk are free"
        for r, one in enumerate(reports)
        if one["free"] < LITTLE and one["local_rank"] == 0
    ]


def table(reports: Sequence[Report]) -> list[str]:
    """Returns lines for people: the versions, and one line for each rank.

    Args:
        reports: The reports, in rank order, which `compare` found equal.
    """
    one = reports[0]
    hosts = dict.fromkeys(report["host"] for report in reports)
    versions = [f"{name} {one[name]}" for name in EQUAL if name not in ("gpus", "commit") and one[name]]
    lines = [
        f"{len(reports)} rank{'s' * (len(reports) > 1)} on {len(hosts)} machine{'s' * (len(hosts) > 1)}, "
        f"all with {', '.join(versions)}"
    ]
    for r, report in enumerate(reports):
        device = report["gpus"][report["local_rank"]] if report["gpus"] else "cpu"
        free = f"{report['free'] / 1e9:.1f} GB free"
        lines.append(f"  rank {r:>3}  {report['host']}  {report['address']}  {device}  {free}")
    return lines
