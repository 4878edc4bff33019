"""Folders that hold a model: checked before they are read, replaced as one when they are written.

They are written with a model card. Nothing here depends on the kind of the model.
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


def refuse_short_context(path: str | Path, config: "PretrainedConfig", length: int, what: str) -> None:
    """Refuses texts that are longer than a model's positions.

    Some architectures would crash on them, others give numbers that mean nothing.

    Args:
        path: The model as the user named it.
        config: The model's config.
        length: Tokens of the longest text.
        what: The setting that allows such a length, for the message.

    Raises:
        UserError: The model has fewer positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise UserError(f"{what}: expected at most {positions} tokens, the context of {path}; got {length}")


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Context that yields an empty folder beside `folder` and puts it in its place at the end.

    When the block fails, nothing is left of the new folder, and the old one stays. Only a model's folder, or
    an empty one, is replaced.

    Raises:
        UserError: The folder exists and holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (
        folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").is_file())
    ):
        raise UserError(
            f"{folder} is there and is not a model folder; expected a new or a model's folder to write to"
        )
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- model cards

_MEANING = {
    "reward": "A reward model: one score for a prompt and its response; higher is more helpful.",
    "cost": "A cost model: one score for a prompt and its response; C > 0 means unsafe, C < 0 safe, and "
    "higher is more harmful.",
    "policy": "A causal language model.",
}


def write_card(
    folder: str | Path,
    kind: str,
    card: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
    is_pair: bool = False,
) -> None:
    """Writes README.md: what the model is, what it was trained from, its figures, how to load it.

    Cards are published: of a local path they show the last name alone.

    Args:
        folder: The model's folder.
        kind: reward, cost or policy.
        card: {name: value}; values may be dicts and lists.
        notes: Further sentences.
        is_pair: Whether the model reads prompt and response as a pair of texts.
    """
    card = dict(card or {})
    tags = ["saferlhf-fast", "rlhf", *([f"{kind}-model"] if kind != "policy" else [])]
    base = card.get("model")
    head = [
        "---",
        *([f"base_model: {base}"] if isinstance(base, str) and not is_local(base) else []),
        "library_name: transformers",
        f"pipeline_tag: text-{'generation' if kind == 'policy' else 'classification'}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {_title(Path(folder).resolve())}",
        "",
        _MEANING.get(kind, "A score model: one score for a prompt and its response."),
    ]
    sections = ["", *notes] if notes else []
    if card:
        sections += ["", "## Training", "", *_lines(card)]
    (Path(folder) / "README.md").write_text(
        "\n".join([*head, *sections, "", *_usage(kind, is_pair)]) + "\n", encoding="utf-8"
    )


def _title(folder: Path) -> str:
    """The folder's name; the run's where the folder is just called model."""
    name = folder.name.removesuffix(".tmp")
    return folder.parent.name if name in ("model", "best") else name


def _lines(card: Mapping[str, Any], depth: int = 0) -> list[str]:
    out: list[str] = []
    for name, value in card.items():
        if value is None:
            continue
        if isinstance(value, dict):
            out += [f"{'  ' * depth}- {name}:", *_lines(value, depth + 1)]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            out.append(f"{'  ' * depth}- {name}:")
            for i, item in enumerate(value):  # two sources may have the same last name
                title = item.get("name", item.get("path", i)) if isinstance(item, dict) else i
                out += _lines({_public(title): item}, depth + 1)
        else:
            value = [_public(item) for item in value] if isinstance(value, list) else _public(value)
            shown = (
                f"{value:.6g}"
                if isinstance(value, float)
                else value
                if isinstance(value, str)
                else json.dumps(value, default=str)
            )
            out.append(f"{'  ' * depth}- {name}: {shown}")
    return out


def _public(value: Any) -> Any:
    """A local path's last name; anything else unchanged."""
    return Path(value).name if isinstance(value, str) and "/" in value and is_local(value) else value


def _usage(kind: str, is_pair: bool) -> list[str]:
    folder = 'folder = "path/to/this/folder"'
    if kind == "policy":
        return [
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            folder,
            "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), "
            "AutoTokenizer.from_pretrained(folder)",
            "```",
        ]
    if is_pair:
        return _usage_of_pairs(folder)
    return [
        "## Use",
        "",
        "The score is read at the last token that is not padding; end the text with the end-of-sequence "
        "token, as in training.",
        "",
        "```python",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        folder,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForSequenceClassification.from_pretrained(folder)",
        'tokens = tokenizer("a prompt and its response" + tokenizer.eos_token, return_tensors="pt")',
        "score = model(**tokens).logits[0, 0]",
        "",
        "from saferlhf_fast.models.score_model import load_score_model",
        "model = load_score_model(folder)",
        'scores_BL = model(tokens["input_ids"], tokens["attention_mask"])      # one score per token',
        'score_B = model.end_scores(scores_BL, tokens["attention_mask"])',
        "```",
    ]


def _usage_of_pairs(folder: str) -> list[str]:
    return [
        "## Use",
        "",
        "Prompt and response are the two texts of a pair.",
        "",
        "```python",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        folder,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()",
        'tokens = tokenizer("a prompt", "its response", return_tensors="pt")',
        "score = model(**tokens).logits[0, 0]",
        "",
        "from saferlhf_fast.models.score_model import load_score_model",
        "model = load_score_model(folder).eval()",
        'types = tokens.get("token_type_ids")',
        'score = model(tokens["input_ids"], tokens["attention_mask"], token_type_ids=types)[0, 0]',
        "```",
    ]
