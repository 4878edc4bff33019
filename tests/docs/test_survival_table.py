"""docs/survival.md names tests that exist, in the right make target; every one of the 28 rows is there."""

import ast
import re

import kit
import pytest

DOCUMENT = (kit.ROOT / "docs" / "survival.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.splitlines()
    if re.match(r"\| \d+ \|", line)
]
PLACES = ("test", "faults", "matrix", "integrations")
MARKER = r"mark\.(slow|matrix|faults)\b"


def functions(file):
    """{test function: the places where it runs, or some of its cases do}."""
    (path,) = (kit.ROOT / "tests").rglob(file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_file = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(getattr(target, "id", "") == "pytestmark" for target in node.targets)
    ]
    found = {
        node.name: places([*of_file, *map(ast.unparse, node.decorator_list)])
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    if not file.startswith("test_integration_"):
        return found
    skipped = any(
        "importorskip" in ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef)
    )
    return {name: {"integrations"} if skipped else {*where, "integrations"} for name, where in found.items()}


def places(marks):
    """A marker of the whole function takes it out of make test; one of single cases (pytest.param) leaves the
    others there.
    """
    whole = {name for mark in marks if "parametrize" not in mark for name in re.findall(MARKER, mark)}
    some = {name for mark in marks if "parametrize" in mark for name in re.findall(MARKER, mark)}
    return whole or {"test", *some}


def test_there_are_28_rows():
    assert [int(row[0]) for row in ROWS] == list(range(1, 29)) and all(len(row) == 5 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_tests_that_exist_where_it_says(row):
    _, what, passes, tests, where = row
    assert what and passes and where
    named = [name.strip() for name in tests.split(",") if name.strip()]
    assert named or where == "not yet", "a row without tests is not yet held"
    reached = set()
    for name in named:
        file, _, function = name.partition("::")
        found = functions(file)
        assert function in found, f"{name} does not exist"
        reached |= found[function]
    for place in PLACES:
        if re.search(rf"\b{place}\b", where):
            assert place in reached, (
                f"no test of this row runs in make {'test' if place == 'test' else 'test-' + place}"
            )


def test_a_name_that_is_none_is_noticed():
    with pytest.raises(AssertionError, match="does not exist"):
        test_a_row_names_tests_that_exist_where_it_says(["1", "a", "b", "test_cli.py::test_no_such", "test"])
    with pytest.raises(AssertionError, match="not yet held"):
        test_a_row_names_tests_that_exist_where_it_says(["1", "a", "b", "", "test"])
    with pytest.raises(AssertionError, match="no test of this row runs in make test-faults"):
        test_a_row_names_tests_that_exist_where_it_says(
            ["1", "a", "b", "test_cli.py::test_interrupting_is_quiet", "faults"]
        )
    with pytest.raises(AssertionError, match="no test of this row runs in make test-integrations"):
        test_a_row_names_tests_that_exist_where_it_says(
            ["1", "a", "b", "test_cli.py::test_interrupting_is_quiet", "integrations"]
        )


def test_what_has_tests_is_not_called_open_and_the_legend_knows_every_place():
    """Row 27 said "not yet" when its test files had long been there."""
    assert [row[0] for row in ROWS if row[4] == "not yet"] == []
    for name in PLACES:
        assert f"**{name}**" in DOCUMENT.split("| # |")[0]
    makefile = (kit.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", DOCUMENT):
        assert re.search(rf"^{target}:", makefile, re.M), target
    of_libraries = {
        *map(lambda path: path.name, (kit.ROOT / "tests").rglob("test_integration*.py")),
        *map(lambda path: path.name, (kit.ROOT / "tests").rglob("test_patch_transformers*.py")),
    }
    assert of_libraries == set(re.findall(r"(test_\w+\.py)::", ROWS[26][3]))
