"""Data: what a recipe's `data` names -> examples -> batches.

files      one file -> rows with their places (JSON, CSV, Parquet; the errors that name a line)
sources    files, folders, Hub names and mixtures of them -> rows
formats    row -> conversation, preference or prompt (docs/data.md has the list)
records    those three, and checked fields
templates  messages -> token ids, and which of them are learned
examples   records -> examples of a length, with a report of what was dropped and why
batches    split by prompt, the order of an epoch, shares of ranks, padded tensors

Needs neither transformers nor deepspeed; `datasets` is imported only for Hub names and saved data sets.
"""

from saferlhf_fast.data.batches import (collate_left, collate_right, global_batches, share,
                                        split_by_prompt)
from saferlhf_fast.data.examples import (PairExample, PromptExample, SFTExample, preference_examples, prompt_examples,
                                         retokenize, sft_examples)
from saferlhf_fast.data.formats import FORMATS
from saferlhf_fast.data.records import SAFE, UNKNOWN, UNSAFE, Conversation, Preference, Prompt
from saferlhf_fast.data.report import Report
from saferlhf_fast.data.sources import load_rows, load_sources
from saferlhf_fast.data.templates import Template

__all__ = ["FORMATS", "SAFE", "UNKNOWN", "UNSAFE", "Conversation", "PairExample", "Preference", "Prompt", "PromptExample",
           "Report", "SFTExample", "Template", "collate_left", "collate_right", "global_batches", "load_rows",
           "load_sources", "preference_examples", "prompt_examples", "retokenize", "sft_examples",
           "share", "split_by_prompt"]
