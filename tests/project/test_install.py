"""What an installed package is: sdist, wheel and their contents; a base install that has torch, triton and
numpy alone; the benches from a wheel. Environments are made offline, with links to the packages of the one
that runs the tests.
"""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from saferlhf_fast import cli

ROOT = Path(__file__).resolve().parents[2]
# Libraries of the extras, none of which a base install or an import may touch.
FOREIGN = (
    "transformers",
    "deepspeed",
    "datasets",
    "peft",
    "pydantic",
    "omegaconf",
    "rich",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "accelerate",
    "pytest",
)
# Uses every public name that needs no extra, then says what was imported and how long that took beside torch.
USE = f"""
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import saferlhf_fast
for name in saferlhf_fast.__all__:
    getattr(saferlhf_fast, name)
from saferlhf_fast import integrations
from saferlhf_fast.models import score_model
from saferlhf_fast.training import preference
end = time.perf_counter()
values = torch.arange(4.0)
assert saferlhf_fast.gae(values, values, gamma=1.0, lam=1.0)[1].tolist() == [6.0, 6.0, 5.0, 3.0]
assert saferlhf_fast.token_logprob(torch.zeros(2, 3), torch.tensor([0, 1])).shape == (2,)
saferlhf_fast.LagrangeMultiplier().update(values)
saferlhf_fast.cost_loss(values, values, -torch.ones(4), torch.ones(4))
print(json.dumps({{"file": saferlhf_fast.__file__, "torch": middle - start, "ours": end - middle,
                  "foreign": [name for name in {FOREIGN!r} if name in sys.modules]}}))
"""


def call(*command, cwd=None, **environment):
    """Runs a command without what the tests' own environment says of Python."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "PYTEST", "BENCH", "SAFERLHF"))
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def build(kind, folder, target, **environment):
    """setuptools' sdist or wheel of `folder` -> its path in `target`."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    result = call(sys.executable, "-c", code, cwd=folder, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return target / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """From a copy of the checkout: building leaves files behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("csrc", "kernels", "bench", "saferlhf_fast", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    return build("sdist", folder, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """The wheel without _C, made of the sdist alone."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), SAFERLHF_PURE="1")


def closure(names):
    """The installed distributions that `names` stand for and need, without extras."""
    found, rest = {}, list(names)
    while rest:
        name = re.sub(r"[-_.]+", "-", rest.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        needs = [Requirement(line) for line in found[name].requires or ()]
        rest += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def environment(folder, wheel, *packages):
    """A virtual environment with the wheel and links to `packages` and what they need; returns its bin
    folder.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    site = next(folder.glob("lib/python*/site-packages"))
    for found in closure(packages).values():
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    result = call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "-q",
        wheel,
    )
    assert result.returncode == 0, result.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("base") / "venv", wheel, "torch", "triton", "numpy")


def test_the_sdist_has_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    rooms = {
        f"saferlhf_fast/kernels/{path.relative_to(ROOT / 'kernels')}"
        for path in (ROOT / "kernels").rglob("*.py")
    }
    benches = {f"saferlhf_fast/bench/{path.name}" for path in (ROOT / "bench").glob("bench_*.py")} - {
        "saferlhf_fast/bench/bench_step.py",
        "saferlhf_fast/bench/bench_ppo_lag_step.py",
    }
    recipes = {
        f"saferlhf_fast/recipes/{path.name}" for path in (ROOT / "saferlhf_fast" / "recipes").glob("*.yaml")
    }
    assert (
        sources
        | rooms
        | benches
        | recipes
        | {"setup.py", "CMakeLists.txt", "saferlhf_fast/py.typed", "LICENSE"}
        <= names
    )
    assert not [
        name for name in names if name.endswith((".so", ".pyc")) or "results" in name or "__pycache__" in name
    ]


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    assert wheel.name == f"saferlhf_fast-{importlib.metadata.version('saferlhf-fast')}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(
            archive.read(next(name for name in names if name.endswith("/METADATA")))
        )
    release = wheel.name.removesuffix("-py3-none-any.whl")
    assert {name.split("/")[0] for name in names} == {"saferlhf_fast", f"{release}.dist-info"}
    skipped = {"saferlhf_fast", "kernels", "bench"}
    modules = {
        f"saferlhf_fast/{path.relative_to(ROOT / 'saferlhf_fast')}"
        for path in (ROOT / "saferlhf_fast").rglob("*.py")
        if path.relative_to(ROOT / "saferlhf_fast").parts[0] not in skipped
    }
    modules |= {
        f"saferlhf_fast/kernels/{path.relative_to(ROOT / 'kernels')}"
        for path in (ROOT / "kernels").rglob("*.py")
    }
    benches = {name for name in names if name.startswith("saferlhf_fast/bench/")}
    assert {name for name in names if name.endswith(".py")} == modules | {
        name for name in benches if name.endswith(".py")
    }
    assert {
        "saferlhf_fast/py.typed",
        "saferlhf_fast/recipes/quickstart.yaml",
        "saferlhf_fast/bench/bench_gae.py",
    } <= names
    assert not [
        name
        for name in names
        if re.search(r"(^|/)(tests?|results|runs|__pycache__)/|test_|\.so$|\.json$", name)
    ]
    assert not [name for name in benches if re.search(r"/(step_|bench_step|scaling|soak|integrations)", name)]
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert sorted(need.name for need in needs if "extra" not in str(need.marker or "")) == [
        "numpy",
        "torch",
        "triton",
    ]


def test_a_base_install_has_every_public_name_but_no_library_of_the_extras(base, tmp_path):
    result = call(base / "python", "-c", USE, cwd=tmp_path, PATH=str(base))  # no compiler on this PATH
    assert result.returncode == 0, result.stderr[-3000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["foreign"] == [] and Path(said["file"]).is_relative_to(base.parent)


def test_importing_costs_less_than_half_of_torch_and_touches_no_library_of_the_extras():
    """In the environment that has them all. The best of three: other processes may be at work."""
    ratios = []
    for _ in range(3):
        result = call(sys.executable, "-c", USE, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        said = json.loads(result.stdout.splitlines()[-1])
        assert said["foreign"] == []
        ratios.append(said["ours"] / said["torch"])
        if ratios[-1] < 0.5:
            break
    assert min(ratios) < 0.5, ratios


# Every command with and without --help, and what loads a model, in one process of the base environment.
ASKED = """
import contextlib, io, json
from saferlhf_fast import cli
from saferlhf_fast.models import causal_lm, score_model, tokenizer
said, loading = {}, []
for command in cli.COMMANDS:
    for words in ([command], [command, "--help"]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
        said[" ".join(words)] = [code, out.getvalue(), err.getvalue()]
for load in (causal_lm.load_causal_lm, score_model.load_score_model, score_model.score_model_from_backbone,
             tokenizer.load_tokenizer):
    try:
        load("m")
        loading.append(None)
    except ImportError as error:
        loading.append(str(error))
print(json.dumps([said, loading]))
"""


@pytest.fixture(scope="module")
def told(base, tmp_path_factory):
    """({command: [exit code, stdout, stderr]}, [what each loader of models said]) of a base install."""
    result = call(base / "python", "-c", ASKED, cwd=tmp_path_factory.mktemp("asked"), PATH=str(base))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_commands_of_a_base_install_answer_in_one_line(told):
    said = dict(told[0])
    assert said.pop("info")[0] == said.pop("info --help")[0] == 0
    assert len(said) == 2 * (len(cli.COMMANDS) - 1)
    for words, (code, out, err) in said.items():
        extra = "bench" if words.startswith("bench") else "train"
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert err.startswith(f"error: {words.removesuffix(' --help')} needs "), err
        assert err.endswith(f": pip install 'saferlhf-fast[{extra}]'\n"), err


def test_info_of_a_base_install_says_which_wheel_it_is_and_how_to_get_the_compiled_module(told):
    lines = told[0]["info"][1].splitlines()
    install, compiled = (
        next(line for line in lines if line.startswith(name)) for name in ("install: ", "_C: ")
    )
    assert "py3-none-any" in install and "without _C" in install
    assert compiled.startswith("_C: not built; ")
    assert "pip install --force-reinstall --no-deps --no-binary saferlhf-fast" in compiled
    why = r"first that can run \(triton: .*; native: saferlhf_fast._C: not built\)"
    assert any(re.fullmatch(rf"  gae +reference +{why}", line) for line in lines)


def test_the_installed_script_answers(base, tmp_path):
    version = call(base / "saferlhf-fast", "--version", cwd=tmp_path)
    assert version.stdout == f"saferlhf-fast {importlib.metadata.version('saferlhf-fast')}\n"
    assert "bench" in call(base / "saferlhf-fast", "--help", cwd=tmp_path).stdout


def test_loading_models_names_the_extra(told):
    assert len(told[1]) == 4
    assert all(said and said.endswith("pip install 'saferlhf-fast[train]'") for said in told[1]), told[1]


def test_the_compiled_module_works_in_an_installed_package(base, tmp_path):
    """The checkout's module, put where a wheel for this platform has it (make dist builds that one)."""
    built = list((ROOT / "saferlhf_fast").glob("_C.*.so"))
    if not built:
        pytest.skip("this checkout has no _C")
    package = next(base.parent.glob("lib/python*/site-packages/saferlhf_fast"))
    shutil.copy(built[0], package)
    try:
        code = (
            "import torch; from saferlhf_fast import gae; from saferlhf_fast.commands import info; v = "
            "torch.ones(3)\n"
            "print(gae(v, v, gamma=1.0, lam=1.0, impl='native')[1].tolist()); print(info.compiled())"
        )
        result = call(base / "python", "-c", code, cwd=tmp_path, PATH=str(base))
    finally:
        (package / built[0].name).unlink()
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("[3.0, 2.0, 1.0]\npresent, ")


def test_the_benches_run_from_an_installed_wheel(wheel, tmp_path):
    """With [bench] alone, inside a project whose pytest settings and conftest.py are of no concern."""
    scripts = environment(tmp_path / "venv", wheel, "torch", "triton", "numpy", "pytest", "pytest-benchmark")
    folder = tmp_path / "work"
    folder.mkdir()
    # above the environment, and where the command is called
    for place in (tmp_path, folder):
        (place / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
        (place / "conftest.py").write_text("raise SystemExit('not this one')\n")
    result = call(
        scripts / "saferlhf-fast",
        "bench",
        "--quick",
        "--ops",
        "gae",
        "--save",
        "base.json",
        cwd=folder,
        BENCH_TINY="1",
        PYTEST_ADDOPTS="--no-such-option",
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "**ours: reference** (auto)" in result.stdout and "wrote base.json" in result.stdout
    found = json.loads((folder / "base.json").read_text())
    assert found["machine_info"]["commit"] == "an installed package"
    assert sorted(path.name for path in folder.iterdir()) == ["base.json", "conftest.py", "pytest.ini"]


@pytest.mark.slow
def test_a_wheel_for_this_platform_installs_from_the_package_index(unpacked, tmp_path):
    """The real thing: the wheel with _C, built here, and torch from the index."""
    made = build("wheel", unpacked, tmp_path)
    assert "-linux_" in made.name
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    scripts = tmp_path / "venv" / "bin"
    subprocess.run(
        [str(scripts / "python"), "-m", "pip", "install", "-q", str(made)], check=True, timeout=3000
    )
    result = call(scripts / "python", "-c", USE, cwd=tmp_path, PATH=str(scripts))
    assert result.returncode == 0 and json.loads(result.stdout.splitlines()[-1])["foreign"] == [], (
        result.stderr
    )
    said = call(scripts / "saferlhf-fast", "info", cwd=tmp_path, PATH=str(scripts)).stdout
    assert (
        re.search(r"install: wheel cp3\d+-cp3\d+-linux_\w+, for this platform", said)
        and "\n_C: present" in said
    )
