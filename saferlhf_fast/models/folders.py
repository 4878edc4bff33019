"""Folders that hold a model: checked before they are read, replaced as one when they are written.

Nothing here depends on the kind of the model.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.paths import is_local, pickle_problem
from ..errors import UserError
from ..runtime import disk
from ..runtime.folder_claims import PROBE
from ..runtime.run_lock import require_held

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "*.bin")


def checked(path: str | Path, needs: Sequence[str] = ("config.json",)) -> Path | None:
    """Checks that a model exists.

    Args:
        path: A model folder or a name on the Hub.
        needs: Files that the folder must have.

    Returns:
        The folder of a local model, or None for a name on the Hub.

    Raises:
        UserError: The folder or the name does not exist, or a file is missing.
    """
    path = str(path)
    if not is_local(path):
        _find_on_hub(path)
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{path} {what}; expected a model folder (config.json, weights, tokenizer)")
    for name in needs:
        if not (folder / name).is_file():
            adapter = name == "config.json" and (folder / "adapter_config.json").is_file()
            hint = (
                "it holds LoRA adapters alone, which must be merged into their model first"
                if adapter
                else "expected a Hugging Face model folder"
            )
            raise UserError(f"{path} has no {name}; {hint}")
    return folder


@functools.cache
def _find_on_hub(name: str) -> None:
    """Refuses a name that is not on the Hub; asks once, because the loaders retry for most of a minute."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=20)
    # Unknown, private, or no network: each has its own exception, of three libraries.
    except Exception as error:
        raise UserError(
            f"{name}: expected a model folder or a model on the Hub; there is no such folder, and the Hub "
            f"says: {_one_line(error)}"
        ) from error


def local_copy(path: str | Path, allow_pickle: bool = False) -> Path:
    """The local folder of a model; a model on the Hub is downloaded.

    Args:
        path: A model folder or a name on the Hub.
        allow_pickle: Whether .bin files may be read where there are no safetensors.

    Returns:
        The folder.

    Raises:
        UserError: The weights are pickles and not allowed, or an index names files outside the folder.
    """
    folder = checked(path)
    if folder is not None:
        refuse_foreign(path, folder, allow_pickle)
        return folder
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    with readable(path, "model"):
        folder = Path(snapshot_download(str(path), allow_patterns=[*small, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            _refuse_pickles_on_hub(path, allow_pickle)
            folder = Path(snapshot_download(str(path), allow_patterns=[*small, "*.bin"]))
    refuse_foreign(path, folder, allow_pickle)
    return folder


def _refuse_pickles_on_hub(path: str | Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise UserError(f"{path} has no weights in .safetensors; allow_pickle=true reads .bin files")


def refuse_foreign(path: str | Path, folder: Path, allow_pickle: bool) -> None:
    """Refuses weights that are pickles and not allowed, and an index that names files outside the folder.

    Args:
        path: The model as the user named it, for the message.
        folder: Its local folder.
        allow_pickle: Whether pickles are allowed.

    Raises:
        UserError: In both cases.
    """
    problem = pickle_problem(folder, allow_pickle)
    if problem:
        raise UserError(f"{path} {problem}")
    for index in sorted(folder.glob("*.index.json")):
        with readable(path, "model"):
            files = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        for name in sorted(set(map(str, files))):
            if Path(name).name != name:
                raise UserError(f"{path}: {index.name} names {name}; expected a file of this folder")


def has_weights(folder: Path) -> bool:
    """True when a folder holds a file of weights."""
    return any(any(folder.glob(pattern)) for pattern in WEIGHTS)


@contextlib.contextmanager
def readable(path: str | Path, what: str) -> Iterator[None]:
    """Context in which a loader's failure becomes one line that names the folder; the cause stays attached.

    Args:
        path: The model as the user named it.
        what: What was to be loaded, for the message.

    Raises:
        UserError: The loader failed.
    """
    try:
        yield
    except UserError:
        raise
    # The loaders' failures have no common type (tokenizers raises bare Exception), and all mean a folder that
    # cannot be read; --debug shows the cause.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path} needs code that is beside it, which was not run; expected a model that "
                "transformers has, or trust_remote_code=true for one whose code you have read"
            ) from error
        raise UserError(f"{path} cannot be loaded as a {what}: {_one_line(error)}") from error


def _one_line(error: BaseException, limit: int = 240) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " …"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without transformers' progress bars and load reports; the callers check what those report."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def refuse_missing(path: str | Path, info: Mapping[str, Any], what: str, ignore: Sequence[str] = ()) -> None:
    """Refuses a model whose weights are incomplete: transformers has drawn the missing ones at random.

    Args:
        path: The model as the user named it.
        info: transformers' loading info.
        what: The kind of model, for the message.
        ignore: Parts of names that may be missing.

    Raises:
        UserError: Weights are missing.
    """
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in ignore))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{path} lacks weights of a {what}: {', '.join(missing[:3])}{more}")


def refuse_large_vocabulary(path: str | Path, tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    """Raises a UserError when the tokenizer makes ids for which the embedding has no row."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise UserError(
            f"{path}: the tokenizer's vocabulary ({needed} tokens) is larger than the model's embedding "
            f"({rows} rows); expected a tokenizer that belongs to the model"
        )


def context_length(config: "PretrainedConfig", first: int | None = 0) -> int | None:
    """The most tokens that a model has positions for; None where its config does not say.

    Args:
        config: The model's config.
        first: Its first position id, where it counts them: RoBERTa and its kin begin at 2.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions - (first or 0) if isinstance(positions, int) and positions > 0 else None


def refuse_short_context(
    path: str | Path, config: "PretrainedConfig", length: int, what: str, first: int | None = 0
) -> None:
    """Refuses texts that are longer than a model's positions.

    Some architectures would crash on them, others give numbers that mean nothing.

    Args:
        path: The model as the user named it.
        config: The model's config.
        length: Tokens of the longest text.
        what: The setting that allows such a length, for the message.
        first: As in `context_length`.

    Raises:
        UserError: The model has fewer positions.
    """
    positions = context_length(config, first)
    if positions is not None and positions < length:
        raise UserError(f"{what}: expected at most {positions} tokens, the context of {path}; got {length}")


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Context that yields an empty folder beside `folder` and puts it in its place at the end.

    Everything is flushed to the disk before the folder gets its name. When the block fails, nothing is left
    of the new folder, and the old one stays. Only a model's folder, or an empty one, is replaced.

    Raises:
        UserError: The folder exists and holds something else, or is in a run folder that this run has lost.
        DiskError: The new folder could not be written.
    """
    folder = Path(folder)
    require_held(folder)
    if folder.exists() and not (
        folder.is_dir()
        and (
            not any(folder.iterdir())
            or any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
        )
    ):
        raise UserError(
            f"{folder} is there and is not a model folder; expected a new or a model's folder to write to"
        )
    # names that nobody else gives: `model.old` is where people keep another model
    new, old = (folder.with_name(f"{PROBE}{folder.name}.{word}") for word in ("tmp", "old"))
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        old.rename(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with disk.writing(folder):
            new.mkdir(parents=True)
            yield new
            disk.sync_all(new)
        require_held(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    with disk.writing(folder):
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        with contextlib.suppress(OSError):  # the folder is whole
            disk.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
