"""Data: what a recipe's `data` names -> examples -> batches.

files            one file -> rows with their places (JSON, CSV, Parquet; the errors that name a line)
sources          files, folders, Hub names and mixtures of them -> rows
formats          row -> conversation, preference or prompt (docs/data.md has the list)
records          those three, harm labels of responses, and checked fields
harm_taxonomy    the categories and severities of harm, and their names in other taxonomies
labelled         rows of the public safety data sets with all their labels; labelled_writers: in another form
moderation_records  one answer and its labels, for a moderator
row_stream       rows of large files one by one, with the bad ones apart
inspection       counts, duplicates and contradictions in one pass; hash_columns: hashes on disk
split            parts by prompt; near_duplicates: prompts that are nearly equal
tool_calls       calls and results of tools in messages
chat_template    messages -> a chat template's text, and where its answers begin and end
token_places     text -> token ids, and which of its characters each one has
templates        messages -> token ids, and which of them are learned
counted_records  the records of all sources, with counts of those that are not used
report           these counts
examples         records -> dialogues and prompts of limited length
pairs            records -> pairs of responses to one prompt
token_cache      examples tokenised once, in memory-mapped blocks; row_blocks: rows of large files by place
batches          split by prompt, the order of an epoch, shares of ranks, padded tensors, harm labels

Needs neither transformers nor deepspeed; `datasets` is imported only for Hub names and saved data sets.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Template": "templates",
    "load_sources": "sources",
    "preference_examples": "examples",
    "prompt_examples": "examples",
    "retokenize": "examples",
    "sft_examples": "examples",
}
"""What callers outside the package need, and the file that has it."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that one file of this room stays quick to import."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
