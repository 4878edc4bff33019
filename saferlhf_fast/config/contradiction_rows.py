"""What a contradiction between settings is: a row of (setting, condition, message), and tables of rows.

A row is refused when its condition is true of the stage's config. Where a message has words that are not
settings, the condition returns them as a dict. No torch.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Condition = Callable[[Any], object]
"""Config -> true when the row is refused, or a dict of words for its key and message."""


class Row(NamedTuple):
    """One contradiction.

    key and message are templates: {cfg.…} is the value of a setting, other names are the condition's words.
    """

    key: str
    condition: Condition
    message: str
    only: str = ""  # the one stage for which the row is checked; "" for all stages of the table


class Table(NamedTuple):
    """The rows of one group of settings, in the order of the checks, and the stages with these settings."""

    title: str
    stages: tuple[str, ...]
    rows: tuple[Row, ...]


def first_of(rows: Iterable[Row], cfg: Any, **words: str) -> str | None:
    """Returns the sentence of the first row that is refused; None when there is none.

    Args:
        rows: The rows, in order.
        cfg: The config that their conditions take.
        words: More words for keys and messages.
    """
    for row in rows:
        refused = row.condition(cfg)
        if refused:
            own_words = refused if isinstance(refused, dict) else {}
            return f"{row.key}: {row.message}".format(cfg=cfg, **words, **own_words)
    return None
