"""Measures a GPU in one command of at most seven minutes on a bare machine.

    bash bench/gpu.sh OUT                                the first command: everything below, in 420 s
    bash bench/gpu.sh OUT again                          the second one, in 190 s: failures, surprises
    python bench/gpu_window.py --table OUT/rows.jsonl    prints the table of a file of rows

It needs no network and no DeepSpeed, and writes only to OUT and build/. Each section has its own time limit
and its own try: a section that raises, runs out of time or hangs loses only its own rows. A kernel that
breaks the device's context, after which no call in this process can work, loses one row, and a new process
continues. A row is written to OUT/rows.jsonl as soon as it is known, so nothing is lost if the machine is
taken away. A row whose op was wrong is written and marked. The predictions of gpu/predictions.py are printed
next to the figures. The table comes last and is short enough to be read from the end of the output.

Without a GPU, `--rehearse interpreter` runs every section on tiny shapes with Triton's interpreter, and
`--rehearse compiler` (if the interpreter cannot run) compiles each Triton kernel for an H200 and launches
none.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from gpu.outcomes import KEPT, ROOT, Dead, NotRun, OutOfTime, Stop, describe  # noqa: E402

RESERVE = 15  # seconds at the end for the table
GRACE = 10  # seconds that a section may continue after the signal to end
START = 12  # seconds that a new process needs before it can measure


class Window:
    """Where rows are written, and how much time is left.

    clock() returns the seconds since the command began.
    """

    def __init__(self, out, seconds, rehearsal="", clock=None, started=None):
        resumed = started is not None
        started = time.time() if started is None else started
        self.out, self.seconds, self.rehearsal = Path(out), seconds, rehearsal
        self.clock = clock or (lambda: time.time() - started)
        self.started, self.section, self.deadline, self.children = started, "start", float(seconds), []
        # the only rows to measure, or None for all; the process that builds _C
        self.wanted, self.build = None, None
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "rows.jsonl"
        self.again = None  # the command of a process that continues after this one
        self.tried = []  # [section, what] of each finished attempt
        self.before = (
            [tried for row in rows_of(self.path) if row["kind"] == "tried" for tried in row["what"]]
            if resumed
            else []
        )

    def emit(self, kind, **row):
        """Writes one row immediately."""
        line = json.dumps(
            {"kind": kind, "section": self.section, "at": round(self.clock(), 1), **row}, default=str
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def wants(self, what):
        """Whether this row has to be measured."""
        return self.wanted is None or what in self.wanted

    def over(self, what):
        """Whether an earlier process finished this attempt of this section.

        Of several attempts with one name, each counts once.
        """
        if [self.section, what] not in self.before:
            return False
        self.before.remove([self.section, what])
        self.tried.append([self.section, what])
        return True

    @contextlib.contextmanager
    def uninterrupted(self, least=0):
        """Disables the alarm, because an interrupted import cannot be repeated.

        The section then has `least` seconds.
        """
        alarm(0)
        until, self.deadline = self.deadline, float(self.seconds)
        try:
            yield
        finally:
            self.deadline = max(until, min(self.clock() + least, self.seconds - RESERVE))
            alarm(max(self.deadline - self.clock(), 0.05))

    def left(self):
        """Returns the remaining seconds of the section; raises OutOfTime if there are none."""
        left = self.deadline - self.clock()
        if left <= 0:
            raise OutOfTime(f"the section's time was up at {self.deadline:.0f} s")
        return left

    def attempt(self, what, function, *arguments):
        """Calls the function in its own try; an exception, or a lack of time, becomes a row."""
        if self.over(what):
            return None
        try:
            self.left()
            result = function(*arguments)
            self.tried.append([self.section, what])
            return result
        except OutOfTime as late:
            self.emit("not run", what=what, reason=str(late))
            raise
        except Dead:
            self.tried.append([self.section, what])
            raise
        except NotRun as reason:
            self.tried.append([self.section, what])
            self.emit("not run", what=what, reason=str(reason))
        except Exception as error:
            self.tried.append([self.section, what])
            if type(error).__name__ == "Missing":  # an exception of peers.py, which this file does not import
                self.emit("not run", what=what, reason=str(error))
                return None
            self.emit("failure", what=what, error=describe(error), traceback=traceback.format_exc()[-2000:])
            if not answers():
                raise Dead(describe(error)) from error
            if (
                self.clock() >= self.deadline
            ):  # the alarm rang, and a library may have turned it into another exception
                raise OutOfTime(f"the section's time was up at {self.deadline:.0f} s") from error
        return None

    def start(self, command, log, **options):
        """Starts a child process in a new process group; its output goes to a file in OUT.

        It ends with the window at the latest.
        """
        with open(self.out / log, "ab") as file:
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, **options
            )
        self.children.append(child)
        return child

    def wait(self, child):
        """Returns the exit code, or None if the section's time was over first: then the child is killed."""
        while child.poll() is None:
            if self.deadline - self.clock() <= 1:
                end(child)
                return None
            time.sleep(0.1)
        return child.returncode


def end(child):
    """Kills a child and all processes that it started."""
    if child.poll() is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        child.wait()


def answers():
    """Whether this process can still use the device; after an access to an invalid address it cannot."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except OutOfTime:
        raise
    except Exception:
        return False
    return True


def rows_of(path):
    """Returns the written rows."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def ended(path):
    """Returns the finished sections of a file of rows."""
    return {row["section"] for row in rows_of(path) if row["kind"] == "section"}


def take_over(window):
    """Replaces this process, even if it hangs, by one that continues after the finished sections."""
    window.emit("tried", what=[*window.before, *window.tried])
    for child in window.children:
        end(child)
    sys.stdout.flush()
    os.closerange(3, 4096)  # this also frees the device's memory
    os.execv(window.again[0], window.again)


def alarm(seconds):
    """Raises OutOfTime in the main thread after so many seconds; 0 cancels the alarm."""

    def ring(*_):
        raise OutOfTime("the section was interrupted when its time was up")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.05) if seconds else 0)


def watch(window):
    """Starts a thread that ends a section which ignores the alarm, for example a kernel that never returns.

    A new process then continues.
    """

    def look():
        while True:
            time.sleep(0.2)
            if time.time() - window.started > window.seconds + GRACE:
                window.emit("failure", what=window.section, error="the whole time was up")
                for child in window.children:
                    end(child)
                print(table_of(window.path), flush=True)
                os._exit(1)
            if window.clock() > window.deadline + GRACE:
                window.emit(
                    "failure",
                    what=window.section,
                    error=f"hung: it did not end {GRACE} s after its time was up",
                )
                window.emit("section", seconds=None, ended="hung")
                take_over(window)

    threading.Thread(target=look, daemon=True).start()


def run(window, sections, only=()):
    """Runs sections, a list of (name, seconds, function(window)), each until the sum of the seconds so far.

    Returns whether all sections were started: a section that raises Stop is the last one.
    """
    done, until = ended(window.path), 0.0
    for name, seconds, function in sections:
        until += seconds
        if name in done or only and name not in only:
            continue
        window.section, begun, dead, resumes = name, window.clock(), False, False
        window.deadline = min(max(until, begun + seconds if only else 0), window.seconds - RESERVE)
        print(f"[{begun:5.0f} s] {name}, until {window.deadline:.0f} s", flush=True)
        how = "done"
        try:
            if window.deadline <= begun:
                raise OutOfTime(f"the time was up at {window.deadline:.0f} s")
            alarm(window.deadline - begun)
            function(window)
        except OutOfTime as late:
            how = f"out of time: {late}"
        except Stop as reason:
            how = f"stopped: {reason}"
            window.emit("failure", what=name, error=str(reason))
            return False
        except NotRun as reason:
            how = f"not run: {reason}"
            window.emit("not run", what=name, reason=str(reason))
        except Dead as error:
            how, dead = f"the device's context was broken: {error}", True
            resumes = window.again is not None and window.deadline - window.clock() > START
        except Exception as error:
            how = describe(error)
            window.emit("failure", what=name, error=how, traceback=traceback.format_exc()[-2000:])
            dead = not answers()
        finally:
            alarm(0)
            if not resumes:
                window.emit("section", seconds=round(window.clock() - begun, 2), ended=how)
            window.deadline = float(window.seconds)
        if dead and window.again:
            take_over(window)
    return True


def options(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", help="folder for rows.jsonl, table.md and the logs")
    parser.add_argument("--again", action="store_true", help="the second, shorter command")
    parser.add_argument("--seconds", type=float, help="the total time (default: 420, with --again 190)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="only these sections")
    parser.add_argument(
        "--commit",
        default=os.environ.get("BENCH_COMMIT"),
        help="the commit to note with the figures if there is no git",
    )
    parser.add_argument(
        "--rehearse", choices=("interpreter", "compiler"), default="", help="without a GPU, on tiny shapes"
    )
    parser.add_argument(
        "--table", metavar="ROWS", help="prints the table of a file of rows, and runs nothing"
    )
    # when the run began that this process continues
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.table and not given.out:
        parser.error("expected a folder for the results: bash bench/gpu.sh OUT")
    if given.table and not Path(given.table).is_file():
        parser.error(f"--table: expected a file of rows, got {given.table}")
    given.seconds = given.seconds or (190 if given.again else 420)
    return given


def heading(window, given):
    """Writes the first row, which describes the run."""
    commit = given.commit
    if not commit:
        try:
            described = subprocess.run(
                ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
            ).stdout
        except OSError:  # a bare machine
            described = ""
        commit = described.strip() or "not known: give --commit"
    command = os.environ.get("BENCH_COMMAND") or " ".join(["python", "bench/gpu_window.py", *sys.argv[1:]])
    window.emit(
        "run",
        commit=commit,
        date=datetime.date.today().isoformat(),
        command=command,
        rehearsal=window.rehearsal,
        again=given.again,
    )


def main(arguments=None, sections=None):
    given = options(arguments)
    if given.rehearse:  # before anything reads these environment variables
        from gpu import rehearsal

        rehearsal.prepare(given.rehearse)
    if given.table:
        print(table_of(given.table))
        return 0
    window = Window(given.out, given.seconds, given.rehearse, started=given.started)
    if given.started is None:
        window.path.unlink(missing_ok=True)
        heading(window, given)
    window.again = [sys.executable, *sys.argv, *([] if given.started else ["--started", str(window.started)])]
    watch(window)
    if sections is None:
        from gpu import sections as all_sections

        sections = all_sections.again() if given.again else all_sections.first()
    try:
        all_begun = run(window, sections, given.only)
    except OutOfTime:  # the alarm rang while the end of a section was written
        all_begun = False
    finally:
        for child in window.children:
            end(child)
    text = table_of(window.path)
    (window.out / "table.md").write_text(text + "\n", encoding="utf-8")
    keep(window)
    print(text)
    return 0 if all_begun else 1


def table_of(path):
    """Returns the table of a file of rows.

    The import comes last, because the build must start before torch is imported.
    """
    from gpu import table

    return table.text(table.read(path))


def keep(window):
    """Stores the rows for the second command; a failure to write them does not matter."""
    try:
        KEPT.mkdir(parents=True, exist_ok=True)
        (KEPT / "rows.jsonl").write_bytes(window.path.read_bytes())
    except OSError as error:
        print(f"the rows are not kept for a second command: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
