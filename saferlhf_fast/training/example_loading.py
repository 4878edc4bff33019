"""The examples of a supervised stage: in memory, or from a cache that all processes build together."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..data.cached_examples import CachedExamples
from ..data.examples import preference_examples, sft_examples
from ..data.token_cache import SFT, token_cache
from ..errors import UserError
from ..runtime import console, engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config.sections import Data
    from ..config.stages import DPOConfig, PreferenceConfig, SFTConfig
    from ..data.report import Report

Loader = Callable[["Data"], "tuple[Any, Report]"]
"""Reads data -> (examples, counts)."""


def example_loader(
    cfg: "SFTConfig | PreferenceConfig | DPOConfig",
    kind: str,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
) -> Loader:
    """Returns the function that reads the data of a stage; every rank must call it.

    Args:
        cfg: Settings of the stage.
        kind: token_cache.SFT for conversations, or a key of data.pairs.KINDS.
        tokenizer: The tokenizer of the model.
        template: The template's name.
    """
    length, seed = cfg.train.max_length, cfg.seed

    def in_memory(source: "Data") -> "tuple[Any, Report]":
        if kind == SFT:
            return sft_examples(source, tokenizer, template, length, seed)
        return preference_examples(source, tokenizer, template, length, seed, kind)

    def cached(source: "Data") -> "tuple[Any, Report]":
        assert cfg.train.cache is not None, "the loader of a cache has a folder"
        cache = token_cache(cfg.train.cache, kind, source, tokenizer, template, length, seed)
        have = sum(cache.path(block).exists() for block in range(len(cache.blocks)))
        console.say(f"tokenised data: {cache.folder}, {have} of {len(cache.blocks)} blocks are there")
        failures = engine.gather_objects(cache.build(engine.rank(), engine.world_size()))
        first = min((failure for failure in failures if failure is not None), default=None)
        if first is not None:  # the same line for any number of ranks
            raise UserError(first[1])
        return cache.open()

    return in_memory if cfg.train.cache is None else cached


def longest_of(*groups: Sequence[Any]) -> int:
    """Returns the tokens of the longest sequence in some examples.

    Args:
        groups: Lists of examples, or CachedExamples, which know it without being read.
    """
    return max(
        (
            examples.longest
            if isinstance(examples, CachedExamples)
            else max((_tokens(example) for example in examples), default=0)
            for examples in groups
        ),
        default=0,
    )


def _tokens(example: Any) -> int:
    if hasattr(example, "first_ids"):
        return max(len(example.first_ids), len(example.second_ids))
    return len(example.ids)
