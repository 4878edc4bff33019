"""Prints which wheels of a folder this Python lacks.

    python bench/gpu/wheels.py FOLDER              those whose package is absent, and what these need
    python bench/gpu/wheels.py FOLDER --trainer    also what the trainer needs; it fails, with one line, if
                                                   nothing installed and no wheel meets a requirement

A wheel is also needed if the installed version is not one that pyproject.toml or a chosen wheel asks for.
"""

import argparse
import re
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("train", "eval", "models")
"""The extras of pyproject.toml that a run of a recipe on fetched models needs."""


def installed():
    """{name: version} of the packages of this Python; the first on the path counts, as for imports."""
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and distribution.version:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def wheels_of(folder):
    """{name: (version, path)} of the wheels of a folder, and those that are for another Python only."""
    supported, usable, foreign = set(sys_tags()), {}, {}
    for path in sorted(Path(folder).glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(path.name)
        (usable if tags & supported else foreign)[name] = (str(version), path)
    return usable, {name: entry for name, entry in foreign.items() if name not in usable}


def requirements_of(path):
    """The requirements of a wheel, without those of its extras."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return applicable(lines)


def applicable(lines):
    requirements = [Requirement(line) for line in lines]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def requirements_of_the_trainer():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    return applicable([*project["dependencies"], *extras])


def choose(have, wheels, roots):
    """Returns (wheels to install, requirements that neither what is installed nor a wheel meets).

    What an installed package needs is its own affair: only the roots and the chosen wheels are followed.
    """
    chosen = {name: entry for name, entry in wheels.items() if name not in have}
    unmet, pending = [], list(roots) + [r for _, path in chosen.values() for r in requirements_of(path)]
    while pending:
        requirement = pending.pop(0)
        name = canonicalize_name(requirement.name)
        version = chosen[name][0] if name in chosen else have.get(name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            continue
        if name in wheels and name not in chosen:
            if requirement.specifier.contains(wheels[name][0], prereleases=True):
                chosen[name] = wheels[name]
                pending += requirements_of(wheels[name][1])
                continue
        unmet.append((str(requirement), version))
    return chosen, unmet


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--trainer", action="store_true", help="with what the trainer needs, all of it")
    given = parser.parse_args(arguments)
    if not Path(given.folder).is_dir():
        sys.exit(f"WHEELS: expected a folder of wheels, got {given.folder}")
    have = installed()
    usable, foreign = wheels_of(given.folder)
    chosen, unmet = choose(have, usable, requirements_of_the_trainer() if given.trainer else [])
    if not given.trainer:  # pip says of each of the others why it cannot install it
        chosen |= {name: entry for name, entry in foreign.items() if name not in have}
    elif unmet:
        lines = [f"expected {requirement}, got {version or 'none'}" for requirement, version in unmet]
        sys.exit(
            f"packages: {'; '.join(dict.fromkeys(lines))}; send wheels of them for Python "
            f"{sys.version_info[0]}.{sys.version_info[1]} ({given.folder})"
        )
    print("\n".join(str(path) for _, path in chosen.values()))


if __name__ == "__main__":
    main()
