"""report.html: what a run did, on one page that needs nothing else; and its plots as PNGs in plots/.

`read` has what is expected in the folders, `curves` and `scatter` draw, `page` makes HTML. matplotlib is
imported when a report is written, not by importing this. Who runs a stage writes its report: commands/run.py
and the demo.
"""


def write_report(folder):
    """Any stage that writes metrics.jsonl: curves, final numbers, samples, settings, versions -> path of the
    page.
    """
    from .run_report import write_report

    return write_report(folder)
