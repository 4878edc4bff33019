"""Tokenizers: loading with clear refusals, the padding token, and whether two of them are the same."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.paths import TOKENIZER_FILES
from ..errors import UserError, require
from .folders import checked, quiet, readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text that no vocabulary covers: it shows whether a text can give `unk`.
_STRANGE = "\u2603 \ua728 \U00013080 zqxj \u0416"
_PROBES = (
    "The quick brown fox: 12,345.67!",
    "  two  spaces\n\nand\ttabs",
    "na\u00efve \u00fcber \u4f60\u597d \U0001f600",
    "BEGINNING OF CONVERSATION: USER: hi ASSISTANT: hello",
)


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False, pairs: bool = False
) -> "PreTrainedTokenizerBase":
    """Loads a tokenizer that has an end-of-sequence and a padding token.

    Without a padding token it gets another special token's id (see `spare_special`), or the end token's:
    masks are never computed from token ids, so a model still learns to stop.

    Args:
        path: A folder or a name on the Hub.
        trust_remote_code: Whether code beside the tokenizer may run.
        pairs: Whether it is for a model that reads pairs of texts: then it needs no end-of-sequence token.

    Returns:
        The tokenizer.

    Raises:
        UserError: There is no folder, no tokenizer or no end token.
    """
    require("load_tokenizer", "train", "transformers", "tokenizers")
    folder = checked(path, needs=())
    if folder is not None and not _has_tokenizer(folder):
        raise UserError(f"{path} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES[:4])} …")
    from transformers import AutoTokenizer

    with readable(path, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder or path), trust_remote_code=trust_remote_code)
    # Some classes load without their files: they have special tokens then, and no vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"{path}: expected a tokenizer with a vocabulary, got one with {len(tokenizer)} special tokens "
            "alone"
        )
    if tokenizer.eos_token_id is None and not pairs:
        raise UserError(f"{path}: expected a tokenizer with an end-of-sequence token (eos_token), got none")
    if tokenizer.pad_token_id is None:
        spare = spare_special(tokenizer) or tokenizer.unk_token or tokenizer.eos_token
        tokenizer.pad_token = spare or tokenizer.sep_token
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    # A tokenizer without a vocabulary file (bytes, or code of its own) still has its config.
    return any((folder / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer_config.json")) or any(
        folder.glob("*.tiktoken")
    )


def spare_special(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A special token that can be the padding token: not the end token, and never the last one of a text.

    Returns:
        In this order: a token that is named for padding, one that is reserved or unused, `unk` where no text
        gives it, `bos`; None where there is none of these.
    """
    ids = tokenizer.get_vocab()
    special = [t for t in tokenizer.all_special_tokens if t in ids]
    special += [
        str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and str(t) not in special
    ]
    end, unk, bos = tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token
    free = [t for t in special if t not in (end, unk, bos) and ids[t] != tokenizer.eos_token_id]
    for sign in ("pad", "reserved", "unused"):
        for token in free:
            if sign in token.lower():
                return token
    if (
        unk not in (None, end)
        and ids.get(unk) not in tokenizer(_STRANGE, add_special_tokens=False)["input_ids"]
    ):
        return unk
    return bos if bos not in (None, end) else None


def with_distinct_pad(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, or a copy whose padding token differs from the end token.

    AutoModelForSequenceClassification reads the score at the last token that is not padding: with pad == eos
    it would skip the end token.

    Raises:
        UserError: The tokenizer has no other special token.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer
    token = spare_special(tokenizer)
    if token is None:
        raise UserError(
            f"a score model cannot be exported with the end token {tokenizer.eos_token!r} as padding: "
            "AutoModelForSequenceClassification would not read the score at the end token; expected a "
            "tokenizer with another special token that can be its pad_token, got none"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = token
    return tokenizer


def same_tokenizer(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> bool:
    """True when both give the same ids for the same text and conversation.

    A model can then read ids of the other tokenizer. Compared are the vocabulary (without the padding token,
    which masks hide), begin, end and unknown token, chat template, and some texts.
    """
    if a is b:
        return True
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    differing = {token for token, _ in vocab_a.items() ^ vocab_b.items()}
    pads = {t.pad_token for t in (a, b)} - {
        t for x in (a, b) for t in (x.eos_token, x.bos_token, x.unk_token)
    }
    if differing - pads or getattr(a, "chat_template", None) != getattr(b, "chat_template", None):
        return False
    if any(getattr(a, name) != getattr(b, name) for name in ("bos_token_id", "eos_token_id", "unk_token_id")):
        return False
    return all(
        a(text, add_special_tokens=special)["input_ids"] == b(text, add_special_tokens=special)["input_ids"]
        for text in _PROBES
        for special in (True, False)
    )
