"""docs/experiments.md: every entry is dated and has its three parts, newest first; what it points at is
there.
"""

import re

import kit
import pytest

PAGE = kit.ROOT / "docs" / "experiments.md"
TEXT = PAGE.read_text(encoding="utf-8")
TOPICS = {topic.splitlines()[0]: topic for topic in re.split(r"^## ", TEXT, flags=re.M)[1:]}
DATE = r"(\d{4}-\d\d-\d\d)"
PAGES = [
    path
    for folder in (".", "docs", "bench", "kernels", "examples")
    for path in sorted((kit.ROOT / folder).glob("*.md"))
]


def test_the_contents_are_the_topics():
    assert re.findall(r"^- \[(.+)\]\(#.+\)$", TEXT, re.M) == list(TOPICS)
    assert re.findall(r"^- \[.+\]\(#(.+)\)$", TEXT, re.M) == [
        topic.lower().replace(" ", "-") for topic in TOPICS
    ]


@pytest.mark.parametrize("topic", TOPICS)
def test_entries_are_dated_newest_first_and_have_three_parts(topic):
    body, _, lines = TOPICS[topic].partition("### In one line\n")
    entries = re.split(r"^### ", body, flags=re.M)[1:]
    for dated, pattern in ((entries, rf"{DATE} · \S"), (re.findall(r"^- (.*)", lines, re.M), rf"{DATE}: \S")):
        dates = [re.match(pattern, text) for text in dated]
        assert all(dates), [text.splitlines()[0] for text, date in zip(dated, dates) if not date]
        assert [date[1] for date in dates] == sorted((date[1] for date in dates), reverse=True)
    assert entries
    for entry in entries:
        assert re.findall(r"^\*\*(\w+)\.\*\* \S", entry, re.M) == ["Question", "Measured", "Verdict"], (
            entry.splitlines()[0]
        )


def test_files_that_it_names_exist():
    """As `tests/…`, `kernels/…` and so on from the root, or from the package (`models/attention.py`)."""
    named = set(re.findall(r"`([\w/]+/[\w/]*(?:\.\w+)?)`", TEXT))
    assert len(named) > 20
    assert not [
        name
        for name in named
        if not ((kit.ROOT / name).exists() or (kit.ROOT / "saferlhf_fast" / name).exists())
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(kit.ROOT)))
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]
