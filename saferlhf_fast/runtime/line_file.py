"""A file of lines that a full disk interrupts and does not damage: metrics.jsonl. Standard library only."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path


class LineFile:
    """Appends whole lines; those that could not be written wait, and are written before the next ones.

    Attributes:
        size: Bytes of the file, which ends with a whole line of this object, or where it was opened.
        waiting: Lines that could not be written yet, in order.
        error: Why the last attempt failed; None after one that did not.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens or creates the file.

        Args:
            path: The file, in a folder that exists.
        """
        # unbuffered: what a buffer could not write would be written again later, behind half of itself
        self.file = open(path, "ab", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self.waiting: list[str] = []
        self.error: OSError | None = None

    def append(self, line: str) -> None:
        """Writes a line, or keeps it for later.

        Args:
            line: The line without its end.
        """
        self.waiting.append(line)
        self.write_waiting()

    def write_waiting(self) -> None:
        """Tries to write the lines that wait."""
        try:
            while self.waiting:
                line = memoryview(self.waiting[0].encode() + b"\n")
                written = 0
                while written < len(line):  # a file without a buffer may take a part of it
                    written += self.file.write(line[written:])
                self.size += len(line)
                del self.waiting[0]
            self.error = None
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):  # no half line stays; a full disk can still shorten a file
                self.file.truncate(self.size)

    def cut(self, size: int, waiting: Sequence[str] = ()) -> None:
        """Goes back to an earlier state of the file.

        Args:
            size: Its size then; a file that is shorter stays as it is.
            waiting: The lines that waited then.
        """
        if self.size > size:
            self.file.truncate(size)
            self.size = size
        self.waiting = list(waiting)
        self.write_waiting()

    def close(self) -> None:
        """Closes the file; lines that still wait are tried once more."""
        self.write_waiting()
        self.file.close()
