"""What a path or a model folder is, told by names alone: standard library only, so that the library needs no
extra for it.

A value is a local path when it exists, looks like one (/…, ./…, ~…, a data file's ending, more than one
slash) or lies in a folder that is there; anything else is a name on the Hub, which is left to the loaders.
"""

import re
from pathlib import Path

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".zip", ".txt", ".arrow")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "source.spm",
)


def is_local(value):
    """Tells a local path from a name on the Hub (see the top of this file)."""
    path = Path(value).expanduser()
    if path.exists() or value.startswith(("/", ".", "~")) or value.endswith(DATA_ENDINGS):
        return True
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value)
    return not named or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())


def pickle_problem(folder, allow_pickle):
    """What is wrong with a model folder whose weights are pickles alone; None when they are not, or are
    allowed.
    """
    if allow_pickle or any(folder.glob("*.safetensors")):
        return None
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt"))
    return (
        f"has its weights as a pickle alone ({pickles[0]}); expected .safetensors; allow_pickle=true reads "
        f"it all the same"
        if pickles
        else None
    )
