"""What stands in several places stands there alike: the version; what `make lint`, the hooks before a commit
and CI run.
"""

import re
import tomllib

import kit
import yaml

from saferlhf_fast.version import __version__

PROJECT = tomllib.loads((kit.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def loaded(name):
    return yaml.safe_load((kit.ROOT / name).read_text(encoding="utf-8"))


def test_the_version_and_the_licence_are_the_same_everywhere():
    citation = loaded("CITATION.cff")
    assert (
        citation["version"] == PROJECT["version"] == __version__ and citation["license"] == PROJECT["license"]
    )
    assert citation["title"] == PROJECT["name"]
    (paper,) = citation["references"]
    assert PROJECT["urls"]["Paper"] == paper["url"]


def test_the_python_versions_are_those_that_ci_runs():
    versions = [name.rsplit(" ", 1)[1] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert versions == loaded(".github/workflows/ci.yml")["jobs"]["run"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_hooks_before_a_commit_are_what_make_lint_runs():
    rule = re.search(r"^lint: .*\n((?:\t.*\n)+)", (kit.ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert commands and [hook["entry"] for hook in hooks] == commands
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)


def test_the_workflow_runs_the_one_command():
    steps = [
        step["run"] for step in loaded(".github/workflows/ci.yml")["jobs"]["run"]["steps"] if "run" in step
    ]
    assert steps == [".ci/run"] and (kit.ROOT / ".ci/run").stat().st_mode & 0o100
