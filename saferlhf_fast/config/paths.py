"""Recognises local paths and model folders by names alone.

Standard library only, so that the library needs no extra for it. A value is a local path when it exists,
looks like one (/…, ./…, ~…, a data file's ending, more than one slash) or is in a folder that exists;
anything else is a name on the Hub, which is left to the loaders.
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


def is_local(value: str) -> bool:
    """Tells a local path from a name on the Hub (see the top of this file)."""
    path = Path(value).expanduser()
    if path.exists() or value.startswith(("/", ".", "~")) or value.endswith(DATA_ENDINGS):
        return True
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value, re.ASCII)
    return not hub_name or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())


def pickle_problem(folder: Path, allow_pickle: bool) -> str | None:
    """Returns what is wrong with a model folder that has its weights as pickles only.

    Args:
        folder: The model folder.
        allow_pickle: Whether pickles may be read.

    Returns:
        The end of a sentence that begins with the folder's name; None when there is nothing wrong.
    """
    if allow_pickle or any(folder.glob("*.safetensors")):
        return None
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt"))
    if not pickles:
        return None
    return (
        f"has its weights as a pickle alone ({pickles[0]}); expected .safetensors; "
        "allow_pickle=true reads it all the same"
    )
