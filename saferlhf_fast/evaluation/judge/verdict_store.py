"""The verdicts of a judge and what they cost, in one SQLite file that survives kill -9.

A verdict's key is a hash of the judge, the question and the very messages that were sent, so the same pair is
asked once and a changed answer is asked again. Spending is written before a call and corrected after it: what
a killed process had reserved stays spent, since nobody knows whether the endpoint answered.
"""

import hashlib
import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from saferlhf_fast.errors import UserError

from ...runtime import disk
from .protocol import VERSION, Chat, Verdict

SCHEMA = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, judge TEXT, chat TEXT, answer TEXT, verdict TEXT, reason TEXT, final INTEGER);
CREATE TABLE IF NOT EXISTS spent (
    one INTEGER PRIMARY KEY, requests INTEGER, tokens_in INTEGER, tokens_out INTEGER);
INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0);
"""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge said to one question in one order."""

    verdict: Verdict | None
    """None: missing."""
    answer: str = ""
    """The judge's words."""
    reason: str = ""
    """Why the verdict is missing."""
    final: bool = True
    """False: the endpoint failed, so a later start asks again."""


class VerdictStore:
    """The SQLite file of the verdicts. Threads may share it, and processes too."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Args:
            path: The file; its folder must exist.

        Raises:
            UserError: The file is of another program or of another version of this one.
            DiskError: The file cannot be written.
        """
        self.path, self._lock = path, threading.Lock()
        try:
            with disk.writing(path):
                self._db = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, SCHEMA):
                    raise UserError(
                        f"{path}: expected verdicts of version {SCHEMA}, got version {version}; move the "
                        "file away, or judge with the version of this package that wrote it"
                    )
                self._db.executescript(_TABLES)
                self._db.execute(f"PRAGMA user_version={SCHEMA}")
        except sqlite3.DatabaseError as e:
            raise UserError(f"{path}: expected a file of verdicts, got {e}") from None

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> "VerdictStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _execute(self, command: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        with self._lock, disk.writing(self.path):
            return self._db.execute(command, values)

    def get(self, key: str) -> Judged | None:
        """Returns the verdict of a key; None where it was not asked, or where the endpoint failed."""
        row = self._execute(
            "SELECT verdict, answer, reason FROM verdicts WHERE key=? AND final", (key,)
        ).fetchone()
        return None if row is None else Judged(cast("Verdict | None", row[0]), row[1], row[2])

    def put(self, key: str, judge: str, chat: Chat, judged: Judged) -> None:
        """Writes a verdict with question and answer; it then survives the end of the process."""
        self._execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, judge, json.dumps(chat), judged.answer, judged.verdict, judged.reason, int(judged.final)),
        )

    def spend(self, tokens_in: int, tokens_out: int, requests: int = 0) -> None:
        """Adds to what was spent; negative numbers take a reservation back."""
        self._execute(
            "UPDATE spent SET requests=requests+?, tokens_in=tokens_in+?, tokens_out=tokens_out+?",
            (requests, tokens_in, tokens_out),
        )

    def spent(self) -> tuple[int, int, int]:
        """Returns (requests, tokens sent, tokens answered); calls under way count with their worst case."""
        row = self._execute("SELECT requests, tokens_in, tokens_out FROM spent").fetchone()
        return row[0], row[1], row[2]


def key_of(judge: str, chat: Chat) -> str:
    """Returns the key of a question: what is asked, of whom, in these very words.

    Args:
        judge: The judge's address and name.
        chat: The messages.
    """
    return hashlib.sha256(json.dumps([VERSION, judge, chat]).encode()).hexdigest()
