"""What is written beside the files of a stage itself: a run's report, and the traceback of a bug."""

import traceback
from pathlib import Path

from saferlhf_fast.config import redact
from saferlhf_fast.errors import DiskError
from saferlhf_fast.runtime import provenance, run_folder, run_lock


def write_report(folder: Path | None, only_missing: bool = False) -> None:
    """Writes report.html of a run that has metrics, on rank 0.

    Args:
        folder: Folder of the run; None for a stage without an output.
        only_missing: Write it only where there is none: the disk was full when the run ended.
    """
    if not folder or run_folder.rank() != 0 or not (folder / "metrics.jsonl").exists():
        return
    if only_missing and (folder / "report.html").exists():
        return
    from saferlhf_fast.evaluation import report

    report.write_report(folder)


def write_traceback(folder: Path | None) -> Path | None:
    """Writes the traceback into the folder of the run that failed, if it was opened; returns its path."""
    if not folder or not (folder / "started.json").exists() or (folder / "finished.json").exists():
        return None
    if run_folder.rank() == 0 and not run_lock.is_held(folder):  # another process's run
        return None
    path = folder / f"error-rank{run_folder.rank()}.txt"
    try:
        provenance.write_text(path, redact.text(traceback.format_exc()))
    except DiskError:  # the bug is what the user must know
        return None
    return path
