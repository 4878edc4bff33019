"""What a room is: its five places, no package that shadows Hugging Face's, lazy imports, the dispatcher's
answers.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import interpret
import op_table
import pytest
import torch

from saferlhf_fast import gae, token_logprob
from saferlhf_fast.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
ROOMS = sorted(dispatch.ROOMS)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_kernels_is_no_regular_package():
    """A kernels/__init__.py would shadow Hugging Face's `kernels` for everyone who runs from the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "saferlhf_fast" / "kernels").is_symlink()
    assert os.readlink(ROOT / "saferlhf_fast" / "kernels") == "../kernels"
    assert not list((ROOT / "kernels").rglob("triton.py"))


@pytest.mark.parametrize("op", ROOMS)
def test_a_room_has_its_five_places(op):
    files = {"reference": "reference.py", "triton": "triton_impl.py", "native": "native.py"}
    folder = ROOT / "kernels" / op
    for name, file in files.items():
        assert (folder / file).exists() == (name in dispatch.OPS[op].order), (
            f"{op}: {file} against the dispatcher"
        )
    assert (folder / "__init__.py").exists()
    if "native" in dispatch.OPS[op].order:  # the linear ops' C++ is that of the rows they are made of
        sources = re.findall(r"csrc/(\w+)\.", (folder / "native.py").read_text())
        assert sources and all((ROOT / "csrc" / f"{source}.cpp").exists() for source in sources)
        assert op in sources or op.startswith("linear_")
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists()
    assert (ROOT / "bench" / f"bench_{op}.py").exists()
    assert re.search(rf"^\| `{op}` \|", (ROOT / "kernels" / "README.md").read_text(), re.MULTILINE)


def test_every_op_is_in_the_table_of_inputs():
    """Else nobody would try its memory layouts, bad inputs and derivatives."""
    assert sorted(op_table.TABLE) == ROOMS


def test_every_folder_with_an_init_is_a_room():
    found = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
    assert found == ROOMS


def test_rooms_import_neither_the_trainer_nor_triton():
    result = run(
        "import sys; from saferlhf_fast import " + ", ".join(ROOMS) + "; import torch\n"
        "token_logprob(torch.zeros(2, 3), torch.tensor([0, 1]))\n"
        "print([name for name in ('transformers', 'deepspeed', 'triton', 'datasets') if name in sys.modules])"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_files_and_functions_are_short():
    for path in [
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "csrc").iterdir(),
        *(ROOT / "bench").glob("*.py"),
    ]:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in (ROOT / "csrc").iterdir():
        if path.name != "bindings.cpp":
            assert "pybind" not in path.read_text() and "Python.h" not in path.read_text(), path
        assert "torch/" not in path.read_text(), path


def test_native_is_built_where_there_is_a_compiler():
    module, reason = dispatch.native_module()
    if module is None and shutil.which("c++"):
        pytest.fail(f"there is a C++ compiler, but {reason}")


def test_auto_prefers_the_fast_version_and_says_why():
    tensors = (torch.zeros(2),)
    module, _ = dispatch.native_module()
    function, reason = dispatch.choose("gae", tensors)
    assert function.__module__.endswith("gae.native" if module else "gae.reference")
    assert reason.startswith("native" if module else "reference")
    function, reason = dispatch.choose("token_logprob", tensors)
    assert function.__module__.endswith("token_logprob.native" if module else "token_logprob.reference")
    assert "needs a GPU" in reason
    function, reason = dispatch.choose("token_logprob", (torch.zeros(2, dtype=torch.float64),))
    assert function.__module__.endswith("token_logprob.reference") and "not torch.float64" in reason


def test_an_implementation_asked_for_by_name_and_missing_raises(monkeypatch):
    with pytest.raises(NotImplementedError, match="Triton needs a GPU"):
        token_logprob(torch.zeros(2, 3), torch.tensor([0, 1]), impl="triton")
    with pytest.raises(NotImplementedError, match="gae: implementation 'triton' cannot run here"):
        gae(torch.zeros(2), torch.zeros(2), gamma=1.0, lam=1.0, impl="triton")
    monkeypatch.setitem(dispatch.OPS, "without_triton", dispatch.Op("gae", ("native", "reference")))
    with pytest.raises(
        NotImplementedError, match="there is no triton implementation; there is native, reference"
    ):
        dispatch.choose("without_triton", (torch.zeros(2),), "triton")
    with pytest.raises(
        ValueError,
        match="expected one of auto, reference, triton, native|is not one of auto, reference, triton, native",
    ):
        gae(torch.zeros(2), torch.zeros(2), gamma=1.0, lam=1.0, impl="fast")


def test_a_native_module_that_is_missing_or_of_other_sources_is_not_used():
    """A _C that was built before an op's arguments changed would be given what it does not expect. Without it
    auto runs the reference, the table says why, by name it raises with the build command.
    """
    result = run(
        "import sys, types; sys.modules['saferlhf_fast._C'] = types.ModuleType('_C')\n"
        "import torch; from saferlhf_fast import gae; from saferlhf_fast.kernels import dispatch\n"
        "print(dispatch.native_module())\n"
        "sys.modules['saferlhf_fast._C'] = None; dispatch.native_module.cache_clear()\n"
        "print(gae(torch.ones(2), torch.zeros(2), gamma=1.0, lam=1.0)[0].tolist())\n"
        "print([row.why for row in dispatch.table('cpu') if (row.op, row.implementation) == ('gae', "
        "'native')][0])\n"
        "try: gae(torch.ones(2), torch.zeros(2), gamma=1.0, lam=1.0, impl='native')\n"
        "except NotImplementedError as error: print(error)"
    )
    assert result.returncode == 0, result.stderr
    stale, *lines = result.stdout.splitlines()
    assert stale.startswith("(None, 'built from other sources") and "pip install" in stale
    assert lines[0] == "[2.0, 1.0]" and lines[1].startswith("saferlhf_fast._C:")
    assert dispatch.BUILD_COMMAND in lines[2]


def test_the_environment_variable(monkeypatch):
    tensors = (torch.zeros(2),)
    monkeypatch.setenv("SAFERLHF_IMPL", "reference")
    function, reason = dispatch.choose("gae", tensors)
    assert function.__module__.endswith("gae.reference") and "SAFERLHF_IMPL" in reason
    monkeypatch.setenv("SAFERLHF_IMPL", "triton")  # an op that has none goes on as with auto
    monkeypatch.setitem(dispatch.OPS, "without_triton", dispatch.Op("gae", ("reference",)))
    # else its cache keeps the next line's names
    monkeypatch.setattr(dispatch, "_choose", dispatch._choose.__wrapped__)
    monkeypatch.setattr(dispatch, "_load", lambda op, name: name)
    assert dispatch.choose("without_triton", tensors) == ("reference", "reference: first that can run")
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        dispatch.choose("token_logprob", tensors)
    assert dispatch.choose("token_logprob", tensors, "reference")[1] == "requested in the call"
    monkeypatch.setenv("SAFERLHF_IMPL", "quick")
    with pytest.raises(ValueError, match="SAFERLHF_IMPL=quick"):
        dispatch.choose("gae", tensors)
    readers = [path for path in (ROOT / "kernels").rglob("*.py") if "environ" in path.read_text()]
    assert readers == [ROOT / "kernels" / "dispatch.py"]


def test_the_table_has_every_op_and_one_choice_each():
    rows = dispatch.table("cpu")
    assert {row.op for row in rows} == set(ROOMS)
    for op in ROOMS:
        mine = [row for row in rows if row.op == op]
        assert [row.implementation for row in mine] == ["reference", "triton", "native"]
        assert sum(row.chosen for row in mine) == 1 and all(row.why for row in mine)


@pytest.mark.parametrize("pins", ["constraints.txt", "constraints-oldest.txt"])
def test_the_interpreter_runs_on_both_pinned_sets(pins):
    """No GPU is at hand where these are installed: Triton kernels would be tested nowhere."""
    versions = dict(line.split("==") for line in (ROOT / pins).read_text().split() if "==" in line)
    assert interpret.refusal(False, versions["triton"], versions["numpy"]) is None


def test_the_interpreter_is_not_tried_where_it_cannot_run(monkeypatch):
    """Skipped with the reason, and no process is started."""
    for gpu, triton, numpy, reason in (
        (True, "3.7.1", "2.4.6", "there is a GPU"),
        (False, "3.6.0", "2.4.0", "breaks with numpy 2.4.0"),
        (False, "3.6.0+git1234", "2.10.0", "breaks with numpy 2.10.0"),
        (False, None, "2.4.6", "triton is not installed"),
        (False, "3.7.0", "2.4.0", None),
        (False, "3.10.0", "2.5.2", None),
        (False, "3.6.0", "2.3.5", None),
    ):
        found = interpret.refusal(gpu, triton, numpy)
        assert (found is None) == (reason is None) and (reason or "") in (found or "")
    monkeypatch.setattr(interpret, "subprocess", None)
    monkeypatch.setattr(interpret, "installed", {"triton": "3.6.0", "numpy": "2.5.2"}.get)
    with pytest.raises(pytest.skip.Exception, match="triton >= 3.7 or numpy < 2.4|there is a GPU"):
        interpret.run([__file__])


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path):
    """setup.py's build step with no compiler on PATH: the reason is kept, nothing is raised."""
    pytest.importorskip("pybind11")
    scripts = sysconfig.get_path("scripts")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "saferlhf_fast").mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        text=True,
        timeout=120,
        capture_output=True,
        env={**os.environ, "PATH": f"{scripts}:{empty}", "CXX": "", "CC": ""},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "was not built" in result.stderr
    # "missing" is cmake where it does not lie beside Python.
    assert re.search("error|missing", (tmp_path / "saferlhf_fast" / "_C_failed.txt").read_text().lower())


def test_packages_and_data_of_a_regular_build():
    """The rooms come in through the symlink, and the recipes are package data."""
    result = run(
        "from setuptools import find_namespace_packages as find\n"
        "print(sorted(find(include=['saferlhf_fast*'], exclude=['*__pycache__*'])))"
    )
    packages = result.stdout
    for op in ROOMS:
        assert f"'saferlhf_fast.kernels.{op}'" in packages
    assert "'kernels" not in packages
