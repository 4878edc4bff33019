"""Model cards: README.md of a folder that holds a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.paths import is_local
from ..runtime.folder_claims import PROBE

if TYPE_CHECKING:
    from .score_head import Normalizer

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
    name = folder.name  # while it is written, that of folders.replacing
    if name.startswith(PROBE):
        name = name.removeprefix(PROBE).removesuffix(".tmp")
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


def say_dropped(bias: float | None, normalizer: "Normalizer | None") -> str:
    """Prints what the written files leave out, and returns it as a sentence.

    Args:
        bias: The bias that is left out; None where there is none.
        normalizer: The normaliser that is left out; None where there is none.
    """
    from ..runtime import console

    changes = (
        [f"scores shift by {-bias:+.6f} (the bias, {bias:+.6f}, is left out)"] if bias is not None else []
    )
    if normalizer is not None:
        changes.append(f"scores are no longer normalised ({normalizer})")
    line = "drop_bias: " + "; ".join(changes)
    console.say(line)
    return line[0].upper() + line[1:] + "."
