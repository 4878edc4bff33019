"""report.html: what a run did, on one page that needs no other file; and its plots as PNGs in plots/.

`read` reads the run folder, `curves` and `scatter` draw, `page` makes HTML, `run_report` puts the page
together. matplotlib is imported when a report is written, not with this package. Whoever runs a stage writes
its report: commands/run.py and the demo.
"""

from pathlib import Path


def write_report(folder: str | Path) -> Path:
    """Writes report.html and plots/*.png into the folder of a run that has metrics.jsonl, of any stage.

    Returns:
        The path of the page.

    Raises:
        UserError: If metrics.jsonl is missing, or a file of the folder is damaged.
    """
    from .run_report import write_report

    return write_report(folder)
