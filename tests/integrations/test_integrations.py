"""patch and unpatch themselves, on a library made up here: bindings, registries, classes, refusals, contexts,
counting.
"""

import re
import subprocess
import sys
import textwrap
import threading
import types
import typing
from importlib import import_module
from pathlib import Path

import pytest
import torch

from saferlhf_fast import integrations
from saferlhf_fast.integrations import registry, replacing, sites

SOURCE = """
REGISTRY = {}

def double(x, times=2):
    return x * times

REGISTRY["double"] = double

class Loss:
    def forward(self, x):
        return x + 1
"""


@pytest.fixture
def fake(monkeypatch):
    """A package `fakelib` with a defining module and one that imports from it by name, and its table."""

    def module(name, source):
        made = types.ModuleType(name)
        exec(compile(textwrap.dedent(source), f"{name}.py", "exec"), made.__dict__)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    package = module("fakelib", "__version__ = '3.1.4'")
    package.__path__ = []
    core, user = module("fakelib.core", SOURCE), types.ModuleType("fakelib.user")
    user.double = user.alias = core.double
    monkeypatch.setitem(sys.modules, "fakelib.user", user)
    entries = (
        registry.Replace(
            "fakelib.core:double",
            lambda theirs: lambda x, times=2: theirs(x, times) + 0,
            "(x, times=2)",
            "better",
            entries=(("fakelib.core:REGISTRY", "double"),),
        ),
        registry.Replace(
            "fakelib.core:Loss.forward", lambda theirs: lambda self, x: x + 1, "(self, x)", "better too"
        ),
    )

    def table(replace=entries, versions=("3.1",)):
        return registry.Library(
            "fakelib", "fakelib", versions, replace, (("fakelib.core:other", "nothing to gain"),)
        )

    yield types.SimpleNamespace(core=core, user=user, table=table, entries=entries)
    replacing.unpatch("fakelib")


def test_every_binding_goes_and_comes_back(fake):
    held, method = fake.core.double, fake.core.Loss.forward
    # made before: a method is looked up at each call
    loss = fake.core.Loss()
    report = replacing.patch(fake.table(), force=False)
    for bound in (fake.core.double, fake.user.double, fake.user.alias, fake.core.REGISTRY["double"]):
        assert bound is not held and bound(3) == 6 and bound.__name__ == "double"
    assert loss.forward(1) == 2
    assert report.calls == {"fakelib.core:double": 4, "fakelib.core:Loss.forward": 1}
    assert set(report.replaced["fakelib.core:double"]) == {
        "fakelib.core.double",
        "fakelib.core.REGISTRY['double']",
        "fakelib.user.double",
        "fakelib.user.alias",
    }
    text = str(report)
    assert (
        "fakelib 3.1.4: 2 replaced, 1 left" in text
        and "left      fakelib.core.other: nothing to gain" in text
    )
    assert (
        "replaced  fakelib.core.double, also at fakelib.core.REGISTRY['double']" in text
        and ": better" in text
    )
    late = types.ModuleType("fakelib.late")  # imported while ours is in place
    late.double = fake.core.double
    sys.modules["fakelib.late"] = late
    try:
        places = replacing.unpatch("fakelib")
    finally:
        del sys.modules["fakelib.late"]
    assert len(places) == 6 and "fakelib.late.double" in places
    for bound in (
        fake.core.double,
        fake.user.double,
        fake.user.alias,
        late.double,
        fake.core.REGISTRY["double"],
    ):
        assert bound is held
    assert fake.core.Loss.forward is method and replacing.unpatch("fakelib") == []


def test_twice_is_harmless_and_finds_what_came_later(fake):
    held = fake.core.double
    first = replacing.patch(fake.table(), force=False)
    ours = fake.core.double
    fake.user.again = held  # somebody kept the old one
    second = replacing.patch(fake.table(), force=False)
    assert fake.core.double is ours is fake.user.again
    assert "fakelib.user.again" in second.replaced["fakelib.core:double"]
    with second:
        pass
    # the first call's work is not the second's to undo
    assert fake.core.double is ours
    with first:
        pass
    assert fake.core.double is fake.user.again is held


def test_a_report_undoes_its_own_patch_alone(fake):
    held = fake.core.double
    old = replacing.patch(fake.table(), force=False)
    replacing.unpatch("fakelib")
    with pytest.raises(ValueError, match="has been undone: call patch again"):
        with old:
            pass
    with pytest.raises(KeyError):
        with replacing.patch(fake.table(), force=False):
            raise KeyError
    assert fake.core.double is held  # an error inside restores as well
    first = replacing.patch(fake.table(), force=False)
    with first:
        replacing.unpatch("fakelib")
        replacing.patch(fake.table(), force=False)
    with pytest.raises(ValueError, match="has been undone: call patch again"):
        # another patch stands there, not this one
        with first:
            pass
    # the later patch is not the first one's to undo
    assert fake.core.double is not held


def test_threads_that_patch_at_once(fake):
    held, interval = fake.core.double, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=replacing.patch, args=(fake.table(), False)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert fake.core.double(3) == 6 and sites.CALLS["fakelib.core:double"] == 1
    replacing.unpatch("fakelib")
    assert fake.core.double is held is fake.user.double


def test_what_another_put_there_since_is_left(fake):
    replacing.patch(fake.table(), force=False)
    fake.user.double = other = lambda x: x
    with pytest.warns(UserWarning, match=r"fakelib\.user\.double holds something else by now"):
        assert "fakelib.user.double" not in replacing.unpatch("fakelib")
    assert fake.user.double is other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda fake: setattr(fake.core, "double", lambda x, times=3: x),
            r"expected parameters \(x, times=2\), got \(x, times=3\)",
        ),
        (lambda fake: delattr(fake.core, "double"), r"expected fakelib\.core\.double, got none"),
        (
            lambda fake: setattr(fake.core.Loss, "forward", staticmethod(lambda self, x: x)),
            "expected a plain function, got staticmethod",
        ),
    ],
)
def test_a_changed_function_is_refused_by_name_and_nothing_replaced(fake, change, message):
    method = vars(fake.core.Loss)["forward"]
    change(fake)
    changed = vars(fake.core.Loss)["forward"] is not method
    with pytest.raises(integrations.Refused, match=message):
        replacing.patch(fake.table(), force=False)
    assert vars(fake.core.Loss)["forward"] is method or changed
    assert "fakelib" not in integrations.patched()


def test_an_unknown_version_is_refused_unless_forced(fake):
    with pytest.raises(
        integrations.Refused,
        match=r"fakelib: expected version 2\.0 or 3\.2, got 3\.1\.4; nothing was replaced",
    ):
        replacing.patch(fake.table(versions=("2.0", "3.2")), force=False)
    fake.core.Loss.forward = lambda self, x, more=0: x
    with replacing.patch(fake.table(versions=("2.0",)), force=True) as report:
        assert set(report.replaced) == {"fakelib.core:double", "fakelib.core:Loss.forward"}
    del fake.core.Loss.forward
    with replacing.patch(fake.table(), force=True) as report:
        assert report.left["fakelib.core:Loss.forward"] == "it is not there in this version"


def test_a_source_of_another_digest_is_refused(fake, tmp_path, monkeypatch):
    path = tmp_path / "digested.py"
    path.write_text("def double(x, times=2):\n    return x * times\n")
    monkeypatch.syspath_prepend(tmp_path)
    import digested

    known = sites.digest(digested.double)
    entry = registry.Replace("digested:double", lambda theirs: theirs, "(x, times=2)", "", digests=(known,))
    library = registry.Library("fakelib", None, (), (entry,))
    with replacing.patch(library, force=False) as report:
        assert report.version == "3.1.4"
    other = registry.Library(
        "fakelib", None, (), (registry.Replace(**{**vars(entry), "digests": ("0" * 12,)}),)
    )
    with pytest.raises(integrations.Refused, match=f"digest {known}, expected {'0' * 12}"):
        replacing.patch(other, force=False)


def test_modules_that_are_missing_or_not_imported_yet(fake):
    optional = registry.Replace("fakelib.gone:f", lambda theirs: theirs, "()", "", optional=True)
    later = registry.Replace("fakelib.later:f", lambda theirs: theirs, "()", "", loaded=True)
    with replacing.patch(fake.table(replace=(optional, later)), force=False) as report:
        assert "cannot be imported here" in report.left["fakelib.gone:f"]
        assert "import it, then call patch('fakelib') again" in report.left["fakelib.later:f"]


def test_wrong_names_and_missing_libraries():
    with pytest.raises(ValueError, match="expected a library out of trl, verl"):
        integrations.patch("tlr")
    with pytest.raises(ValueError, match="expected a causal language model, got None"):
        integrations.patch("transformers")
    with pytest.raises(ValueError, match="takes no model"):
        integrations.patch("trl", torch.nn.Linear(1, 1))
    missing = registry.Library("no_such_library", None, (), ())
    with pytest.raises(ImportError, match="no_such_library is not installed here"):
        replacing.patch(missing, force=False)
    assert integrations.unpatch() == []


def test_compiled_code_enters_ours_and_is_counted_once(fake):
    entry = registry.Replace(
        "fakelib.core:double", lambda theirs: lambda x, times=2: x * times, "(x, times=2)", ""
    )
    with replacing.patch(fake.table(replace=(entry,)), force=False) as report:
        compiled = torch.compile(fake.user.double, backend="eager", fullgraph=True)
        for _ in range(3):
            assert compiled(torch.ones(2)).sum() == 4
        assert report.calls["fakelib.core:double"] == 1


def test_compiled_code_enters_ours_where_theirs_is_compiled(fake):
    fake.core.double = torch.compile(fake.core.double, backend="eager")
    entry = registry.Replace(
        "fakelib.core:double", lambda theirs: lambda x, times=2: x * times + 1, "(x, times=2)", ""
    )
    with replacing.patch(fake.table(replace=(entry,)), force=False) as report:
        for function in (fake.core.double, lambda x: fake.core.double(x)):
            assert torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2)).sum() == 6
        assert (
            report.calls["fakelib.core:double"] == 2 and sites.parameters(fake.core.double) == "(x, times=2)"
        )
    assert not [
        name
        for name in vars(sites.counted("fakelib.core:double", print, fake.core.double))
        if "dynamo" in name
    ]


def test_what_a_caller_gets_has_a_type():
    report = integrations.Report
    for function in (
        integrations.patch,
        integrations.unpatch,
        integrations.patched,
        report.__enter__,
        report.__exit__,
        report.show,
        report.calls.fget,
    ):
        assert "return" in typing.get_type_hints(function), function
    assert typing.get_type_hints(report.__enter__)["return"] is typing.Self


def test_importing_it_needs_torch_alone():
    code = """
        import sys
        from saferlhf_fast import integrations
        from saferlhf_fast.integrations import trl, verl, openrlhf, safe_rlhf, align_anything
        wrong = [name for name in ("transformers", "deepspeed", "trl", "verl") if name in sys.modules]
        assert not wrong, wrong
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def _named(rows, way):
    """Names in backticks in the second column."""
    return {name for row in rows if row[3].strip() == way for name in re.findall("`([^`]+)`", row[2])}


def _names(target):
    """ "package.trainer.module:Class.name" -> what a page may call it: with the module's last parts, or
    without any.
    """
    module, _, function = target.partition(":")
    parts = module.split(".")
    return {".".join([*parts[at:], function]) for at in range(len(parts) + 1)}


@pytest.mark.parametrize("name", [name for name in integrations.LIBRARIES if name != "transformers"])
def test_the_page_names_every_function_and_says_which_way(name):
    library = import_module(f"saferlhf_fast.integrations.{name}").LIBRARY
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]
    said = {way: _named(rows, way) for way in ("replaced", "left")}
    for way, targets in (
        ("replaced", [entry.target for entry in library.replace]),
        ("left", [one for one, _ in library.leave]),
    ):
        for target in targets:
            assert _names(target) & said[way], f"docs/integrations.md: {way}: {target}"
    for version in library.versions:
        assert version in PAGE.read_text()
