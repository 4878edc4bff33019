"""Tokenizers: loading with clear refusals, the padding token, and whether two of them are the same."""

import copy

from ..config.paths import TOKENIZER_FILES
from ..errors import UserError, require
from .folders import checked, quiet, readable

# Text that no vocabulary has whole: shows whether `unk` can come out of text.
_STRANGE = "\u2603 \ua728 \U00013080 zqxj \u0416"
_PROBES = (
    "The quick brown fox: 12,345.67!",
    "  two  spaces\n\nand\ttabs",
    "na\u00efve \u00fcber \u4f60\u597d \U0001f600",
    "BEGINNING OF CONVERSATION: USER: hi ASSISTANT: hello",
)


def load_tokenizer(path, trust_remote_code=False):
    """-> a tokenizer with an end-of-sequence and a padding token.

    Without a padding token it gets another special token's id (see `spare_special`), or the end token's:
    masks are never made from token ids, so stopping is learned all the same. UserError: no folder, no
    tokenizer, no end token.
    """
    require("load_tokenizer", "train", "transformers", "tokenizers")
    folder = checked(path, needs=())
    if folder is not None and not _has_tokenizer(folder):
        raise UserError(f"{path} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES[:4])} …")
    from transformers import AutoTokenizer

    with readable(path, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder or path), trust_remote_code=trust_remote_code)
    # Some classes make themselves from nothing when their files are missing: special tokens, and no words.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"{path}: expected a tokenizer with a vocabulary, got one with {len(tokenizer)} special tokens "
            "alone"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: expected a tokenizer with an end-of-sequence token (eos_token), got none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = spare_special(tokenizer) or tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _has_tokenizer(folder):
    # A tokenizer without a vocabulary file (bytes, or code of its own) still has its config.
    return any((folder / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer_config.json")) or any(
        folder.glob("*.tiktoken")
    )


def spare_special(tokenizer):
    """-> a special token that can stand for padding: not the end token, and never the last one of a text; or
    None.

    In this order: one that is named for padding, one that is reserved or unused, `unk` where no text gives
    it, `bos`.
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


def with_distinct_pad(tokenizer):
    """-> the tokenizer, or a copy whose padding token differs from the end token.

    UserError when it has no other.

    AutoModelForSequenceClassification reads the score at the last token that is not padding: with pad == eos
    it would pass over the end token.
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


def same_tokenizer(a, b):
    """True when both give the same ids for the same text and conversation, so that ids of one can be read by
    the other.

    Compared: vocabulary (the padding token aside, which masks hide), begin, end and unknown token, chat
    template, and some texts.
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
