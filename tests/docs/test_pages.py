"""What the pages name is there: paths, links with their anchors, make targets, commands, settings, functions;
and the picture of the rooms in docs/architecture.md is the contract of pyproject.toml.
"""

import re
import tomllib
from importlib import import_module, util

import kit
import pytest

from saferlhf_fast import cli
from saferlhf_fast.config import schema
from saferlhf_fast.config.stages import STAGES

FOLDERS = ("", "docs", "bench", "kernels", "examples")
PAGES = [
    page
    for folder in FOLDERS
    for page in sorted((kit.ROOT / folder).glob("*.md"))
    if page.name not in ("CHANGELOG.md", "experiments.md")
]  # those speak of what was
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(kit.ROOT)))
ARCHITECTURE = (kit.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PLACES = (kit.ROOT, kit.ROOT / "saferlhf_fast", kit.ROOT / "saferlhf_fast" / "kernels")
KEYS = {key for config in STAGES.values() for key in schema.leaves(config)}
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
FREE = ("engine.config.",)  # DeepSpeed's own keys
PROGRAM = "(?:saferlhf-fast|(?:-m|--module) saferlhf_fast)"
FILE = r"[\w-]+\.(?:py|md|sh|cu|cuh|cpp|h|toml|txt|yaml)"


def spans(text):
    """What a page sets in code: lines of blocks, and words between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(
        r"(?:^    \S.*\n)+", text, re.M
    )
    return [line for block in blocks for line in block.splitlines()] + re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )


def folders():
    return {
        path.name
        for place in PLACES
        for path in place.iterdir()
        if path.is_dir() and not path.name.startswith(("__", "."))
    }


def missing_paths(text, page):
    """Words like `rooms/file.py`, `kernels/<op>/`, `file.py` that no file or folder of the tree has for a
    name.
    """
    known = folders() - {"results", "build", "runs", "dist"}  # what commands make
    for span in spans(text):
        for word in re.findall(rf"(?<![\w/.<>=-])(?:[\w.<>*-]+/[\w./<>*-]*|{FILE})(?![\w/*<])", span):
            tried = re.sub(r"<op>|\bfoo\b|(?<=_)foo(?=\.)", "gae", word)  # foo: the op that a page adds
            if "/" not in tried:
                found = not re.fullmatch(r".*\.py", tried) or any(
                    path
                    for name in ("kernels", "saferlhf_fast", "bench", "tests", "examples", "setup.py")
                    for path in ([kit.ROOT / name] if name == tried else (kit.ROOT / name).rglob(tried))
                )
            elif tried.split("/")[0] not in known:
                continue
            else:
                found = any(any(place.glob(tried.rstrip("/"))) for place in (*PLACES, page.parent))
            if not found:
                yield word


@EVERY_PAGE
def test_paths_exist(page):
    assert not list(missing_paths(page.read_text(encoding="utf-8"), page))


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower().replace("`", "")).replace(" ", "-")


@EVERY_PAGE
def test_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in map(slug, headings), target


@EVERY_PAGE
def test_commands_exist(page):
    makefile = (kit.ROOT / "Makefile").read_text(encoding="utf-8")
    for span in spans(page.read_text(encoding="utf-8")):
        for target in re.findall(r"(?:^|[;&] )\s*make ([a-z-]+)", span):
            assert re.search(rf"^{target}:", makefile, re.M), span
        for command in re.findall(rf"{PROGRAM} ([a-z][a-z-]*)", span):
            assert command in cli.COMMANDS, span
        for recipe in re.findall(rf"{PROGRAM} run ([a-z_-]+)(?=\s|$)", span):
            assert (kit.ROOT / "saferlhf_fast" / "recipes" / f"{recipe}.yaml").is_file(), span


@EVERY_PAGE
def test_settings_exist(page):
    """Not in Python, where a multiplier has a value."""
    for span in spans(
        re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    ):
        for name in re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)(?![\w/(])", span):
            assert name in KEYS or name.startswith(FREE) or re.fullmatch(FILE, name), (
                f"{name}: no such setting"
            )


def exists(name):
    """Whether a dotted name is a module, which is not imported (it may patch a library), or something in a
    module.
    """
    room, _, last = name.rpartition(".")
    try:
        return util.find_spec(name) is not None or hasattr(import_module(room), last)
    except ModuleNotFoundError:  # its room is no package
        return hasattr(import_module(room), last) if util.find_spec(room) else False


@EVERY_PAGE
def test_functions_exist(page):
    """saferlhf_fast.room.function, and what is imported from saferlhf_fast; other libraries' names are theirs
    to keep.
    """
    text = "\n".join(spans(page.read_text(encoding="utf-8")))
    names = set(re.findall(r"(?<![\w.-])saferlhf_fast(?:\.\w+)+", text))
    names |= {
        f"saferlhf_fast.{name}"
        for line in re.findall(r"from saferlhf_fast import ([\w ,]+)", text)
        for name in re.findall(r"\w+", line)
    }
    assert not [name for name in sorted(names) if not exists(name)]


def test_a_name_that_is_none_is_found():
    page = kit.ROOT / "docs" / "step.md"
    text = (
        "see `training/ppo/nothing.py`, `kernels/<op>/reference.py`, `nowhere.py`, `train/loss` and "
        "`models/policy.py`"
    )
    assert list(missing_paths(text, page)) == ["training/ppo/nothing.py", "nowhere.py"]


def test_the_tree_names_what_is_there_and_every_room():
    tree = ARCHITECTURE.split("## The tree")[1].split("```")[1].strip("\n").splitlines()
    inside = {
        line.split()[0]: kit.ROOT / "saferlhf_fast" / line.split()[0]
        for line in tree
        if line.startswith("  ")
    }
    outside = {line.split()[0]: kit.ROOT / line.split()[0] for line in tree if not line.startswith(" ")}
    assert all(path.exists() for path in (*inside.values(), *outside.values())), tree
    rooms = {
        path.name
        for path in (kit.ROOT / "saferlhf_fast").iterdir()
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__"
    }
    assert rooms <= {name.strip("/") for name in inside}


def layers():
    """[[room, …], …] of pyproject.toml, highest first; rooms in brackets may be missing, and __main__ is the
    command line.
    """
    contract, *_ = tomllib.loads((kit.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
    found = [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
    return [[room for room in layer if not room.startswith("(")] for layer in found]


def test_the_picture_of_the_rooms_is_the_contract():
    """Every room is in it, and arrows point to the next rooms of the contract; integrations have a contract
    of their own.
    """
    arrows = set()
    for line in ARCHITECTURE.split("```mermaid")[1].split("```")[0].splitlines()[2:]:
        left, right = line.split("-->")
        arrows |= {(one.strip(), other.strip()) for one in left.split("&") for other in right.split("&")}
    order = [layer for layer in layers() if layer and layer != ["__main__"]]
    expected = {(one, other) for upper, lower in zip(order, order[1:]) for one in upper for other in lower}
    assert arrows == expected - {("integrations", "evaluation")} | {
        ("integrations", "models"),
        ("models", "kernels"),
    }


def test_the_changelog_keeps_its_form():
    """Days, newest first, and under each of them Keep a Changelog's sections in its order."""
    text = (kit.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for version in re.split(r"^## ", text, flags=re.M)[1:]:
        assert re.match(r"\[Unreleased\]\n|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d\n", version)
        days = re.split(r"^### ", version, flags=re.M)[1:]
        dates = [day.splitlines()[0] for day in days]
        assert days and all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates), dates
        assert dates == sorted(set(dates), reverse=True)
        for day in days:
            before, *sections = re.split(r"^#### ", day, flags=re.M)
            kinds = [section.splitlines()[0] for section in sections]
            assert kinds and kinds == [
                kind
                for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
                if kind in kinds
            ]
            assert not re.search(r"^- ", before, re.M), before
            assert all(re.search(r"^- ", section, re.M) for section in sections), day
