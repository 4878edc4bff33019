"""Examples that are tokenised once: blocks of a memory-mapped Arrow cache, keyed by content and settings.

The folder of a cache is <folder>/<key>, with one file for each block of rows. The key has the content of the
sources, the tokenizer, the template and the longest length, so that a change of any of them begins another
cache. Blocks are cut by rows and never by ranks: any number of processes may write them, each its share, and
the examples have the same order for any number of processes. A file gets its name when it is complete, so an
interrupted build goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf_fast.config.setting_types import Data
from saferlhf_fast.data.batches import prompt_number
from saferlhf_fast.data.cached_examples import CachedExamples, stable_hash
from saferlhf_fast.data.counted_records import parsed_records
from saferlhf_fast.data.examples import SFTExample, encode_conversations
from saferlhf_fast.data.pair_template import PairTemplate, template_of
from saferlhf_fast.data.pairs import KINDS, PairExample, encode_preferences
from saferlhf_fast.data.records import SAFE, UNSAFE
from saferlhf_fast.data.report import Report, SourceReport
from saferlhf_fast.data.row_blocks import BlockSource, block_sources
from saferlhf_fast.data.templates import Template
from saferlhf_fast.errors import DiskError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Changes whenever the same rows and settings give other tokens, or files of another form."""
BLOCK_ROWS = 16384
"""Rows of a block."""
SFT = "sft"
"""The kind of conversations; preferences have those of pairs.KINDS."""


@dataclass(frozen=True)
class TokenCache:
    """A cache to build and to open."""

    folder: Path
    kind: str
    sources: list[BlockSource]
    template: Template | PairTemplate
    max_length: int
    seed: int

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(source, first row, row after the last) of each block."""
        return [
            (i, begin, min(begin + BLOCK_ROWS, len(source.places)))
            for i, source in enumerate(self.sources)
            for begin in range(0, len(source.places), BLOCK_ROWS)
        ]

    def path(self, block: int) -> Path:
        """Returns the file of a block."""
        return self.folder / f"block-{block:06}.arrow"

    def build(self, rank: int = 0, world: int = 1) -> tuple[int, str] | None:
        """Writes the blocks of one process that are not there yet.

        Args:
            rank: The process.
            world: How many processes there are.

        Returns:
            (block, message) of the first mistake in the data, at which it stops; None without one. All
            processes have to end then, by the message of the first block.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return 0, f"train.cache: {self.folder} cannot be made ({error.strerror or error})"
        for block, (i, begin, end) in enumerate(self.blocks):
            if block % world != rank or self.path(block).exists():
                continue
            try:
                self._write(block, self.sources[i], begin, end)
            except UserError as error:
                return block, str(error)
        return None

    def open(self) -> tuple[CachedExamples, Report]:
        """Returns the examples, whose files stay on the disk, and the counts.

        Raises:
            UserError: A block is missing, or no example is left.
        """
        paths = [self.path(block) for block in range(len(self.blocks))]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"train.cache: {missing[0]} is missing; expected a folder that every process can see"
            )
        make = SFTExample if self.kind == SFT else PairExample
        examples = CachedExamples(paths, make, by_sign=KINDS.get(self.kind) == "safer")
        report = Report()
        for i, source in enumerate(self.sources):
            counts = self._counts(source)
            counts.rows = len(source.places)
            for block, (owner, _, _) in enumerate(self.blocks):
                if owner == i:
                    _merge(counts, examples.counts[block])
                    examples.report_contradictions(block, counts)
            report.sources.append(counts)
        report.require("conversation" if self.kind == SFT else "preference")
        return examples, report

    def _counts(self, source: BlockSource) -> SourceReport:
        return SourceReport(source.source.path, source.format, source.available, 0, source.extra.unread)

    def _write(self, block: int, source: BlockSource, begin: int, end: int) -> None:
        import pyarrow  # type: ignore[import-untyped]

        counts = self._counts(source)
        records = parsed_records(source.rows(begin, end), source.form, source.extra, counts)
        found: list[tuple[Any, str]]
        if self.kind == SFT:
            assert isinstance(self.template, Template), "conversations are not encoded as pairs"
            found = list(encode_conversations(counts, records, self.template, self.max_length))
        else:
            found = list(encode_preferences(counts, records, self.template, self.max_length, self.kind))
        table = _table(found, self.kind == SFT, self.seed)
        kept = {name: getattr(counts, name) for name in _MERGED}
        table = table.replace_schema_metadata({"counts": json.dumps(kept)})
        temporary = self.path(block).with_suffix(f".{os.getpid()}.tmp")
        try:
            with pyarrow.OSFile(str(temporary), "wb") as file:
                with pyarrow.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table.combine_chunks(), max_chunksize=BLOCK_ROWS * 64)
            os.replace(temporary, self.path(block))
        except OSError as error:
            raise DiskError(f"{self.path(block)} was not written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def token_cache(
    folder: str | Path,
    kind: str,
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    template_name: str = "auto",
    max_length: int = 512,
    seed: int = 0,
) -> TokenCache:
    """Returns the cache of some data; it reads the files once for their content and the places of lines.

    Args:
        folder: The folder of all caches.
        kind: SFT, or a key of pairs.KINDS.
        data: A recipe's `data`.
        tokenizer: The tokenizer of the model.
        template_name: As in `sft_examples` or `preference_examples`.
        max_length: Longest prompt + response (tokens).
        seed: Seed of the rows that sources with a count draw, and of the split by prompt.

    Raises:
        UserError: A source cannot be read.
        ValueError: kind is unknown.
    """
    if kind != SFT and kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join([SFT, *KINDS])}, got {kind!r}")
    template = Template(tokenizer, template_name) if kind == SFT else template_of(tokenizer, template_name)
    sources = block_sources(data, seed)
    settings = {
        "version": VERSION,
        "kind": kind,
        "block": BLOCK_ROWS,
        "template": template_name,
        "max_length": max_length,
        "seed": seed,
        "tokenizer": tokenizer_identity(tokenizer),
        "sources": [
            # a file that is moved is the same content
            [asdict(replace(source.source, path="")), source.format, [part.digest for part in source.parts]]
            for source in sources
        ],
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return TokenCache(Path(folder).expanduser() / key, kind, sources, template, max_length, seed)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns a hash of all that decides which tokens a text has.

    Args:
        tokenizer: The tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # truncation and padding are what the last call asked for
    model = (
        {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        if backend is not None
        else sorted(tokenizer.get_vocab().items())
    )
    parts = [
        type(tokenizer).__name__,
        model,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")},
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_MERGED = ("kept", "dropped", "flagged", "first")


def _merge(counts: SourceReport, block: dict[str, Any]) -> None:
    """Adds the counts of the next block."""
    counts.kept += block["kept"]
    counts.dropped.update(block["dropped"])
    counts.flagged.update(block["flagged"])
    for reason, where in block["first"].items():
        counts.first.setdefault(reason, where)


def _table(found: Sequence[tuple[Any, str]], is_sft: bool, seed: int) -> Any:
    """Returns a block as an Arrow table: the fields of the examples, and what is asked of all of them."""
    import pyarrow

    make, types = (SFTExample, _SFT_TYPES) if is_sft else (PairExample, _PAIR_TYPES)
    kinds: dict[str, Callable[[], Any]] = {
        "ids": lambda: pyarrow.large_list(pyarrow.int32()),
        "flags": lambda: pyarrow.large_list(pyarrow.bool_()),
        "text": pyarrow.large_string,
        "int": pyarrow.int32,
        "bool": pyarrow.bool_,
    }
    columns = {
        f.name: pyarrow.array([getattr(example, f.name) for example, _ in found], kinds[types[f.name]]())
        for f in fields(make)
        if f.name in types
    }
    columns["where"] = pyarrow.array([where for _, where in found], pyarrow.large_string())
    numbers = [prompt_number(example.prompt_text, seed) for example, _ in found]
    columns["number"] = pyarrow.array(numbers, pyarrow.float64())
    longest = [len(e.ids) if is_sft else max(len(e.first_ids), len(e.second_ids)) for e, _ in found]
    columns["longest"] = pyarrow.array(longest, pyarrow.int32())
    if not is_sft:
        for name, values in _hashes([example for example, _ in found]).items():
            columns[name] = pyarrow.array(values, pyarrow.uint64())
    return pyarrow.table(columns)


_SFT_TYPES = {"ids": "ids", "mask": "flags", "prompt_text": "text"}
_PAIR_TYPES = {
    "first_ids": "ids",
    "second_ids": "ids",
    "prompt_length": "int",
    "prompt_text": "text",
    "sign_first": "int",
    "sign_second": "int",
    "first_text": "text",
    "second_text": "text",
    "flagged": "bool",
    "second_at": "int",
}


def _hashes(pairs: Sequence[PairExample]) -> dict[str, list[int | None]]:
    """Returns what contradictions are found by: the texts in their order, in the other order, and by sign."""
    hashes: dict[str, list[int | None]] = {"order": [], "reversed": []}
    for side in ("first", "second"):
        for label in ("safe", "unsafe"):
            hashes[f"{side}_{label}"] = []
    for pair in pairs:
        hashes["order"].append(stable_hash(pair.prompt_text, pair.first_text, pair.second_text))
        hashes["reversed"].append(stable_hash(pair.prompt_text, pair.second_text, pair.first_text))
        for side in ("first", "second"):
            text = stable_hash(pair.prompt_text, getattr(pair, f"{side}_text"))
            sign = getattr(pair, f"sign_{side}")
            hashes[f"{side}_safe"].append(text if sign == SAFE else None)
            hashes[f"{side}_unsafe"].append(text if sign == UNSAFE else None)
    return hashes
