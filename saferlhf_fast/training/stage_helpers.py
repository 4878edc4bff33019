"""What the stages share around their loops: context limit, held-out examples, saving a policy."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..data.batches import split_by_prompt
from ..data.cached_examples import CachedExamples
from ..errors import DiskError
from ..models import multi_adapter, quantized
from ..models.causal_lm import save_causal_lm
from ..models.folders import refuse_short_context
from ..models.lora import has_lora, plain
from ..runtime import console, engine

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..config.sections import Data
    from ..config.stages import DPOConfig, ModerationConfig, PreferenceConfig, SFTConfig
    from ..data.examples import PairExample, SFTExample
    from ..data.moderation_examples import ModerationExample

Example = TypeVar("Example", "SFTExample", "PairExample", "ModerationExample")


def refuse_long(
    cfg: "SFTConfig | PreferenceConfig | DPOConfig | ModerationConfig",
    config: "PretrainedConfig",
    longest: int,
    first: int | None = 0,
) -> None:
    """Raises UserError when the longest example does not fit into the model's context.

    Args:
        cfg: Settings of the stage, which name the model.
        config: The loaded model's own configuration.
        longest: Length of the longest example, in tokens.
        first: The model's first position id.
    """
    refuse_short_context(cfg.model, config, longest, "train.max_length: the longest example", first)


def held_out_split(
    cfg: "SFTConfig | PreferenceConfig | DPOConfig | ModerationConfig",
    examples: list[Example],
    load: "Callable[[Data], tuple[list[Example], Any]]",
) -> tuple[list[Example], list[Example]]:
    """Divides examples into those to train on and those to evaluate on.

    Args:
        cfg: Settings of the stage: `train.eval_data` names data of its own for evaluation,
            `train.eval_fraction` holds out a share of the prompts; without both nothing is held out.
        examples: All training examples.
        load: Reads data -> (examples, report).

    Returns:
        (training examples, evaluation examples); the two share no prompt when they are split.
    """
    if cfg.train.eval_data is not None:
        return examples, load(cfg.train.eval_data)[0]
    if not cfg.train.eval_fraction:
        return examples, []
    if isinstance(examples, CachedExamples):
        return examples.split_by_prompt(cfg.train.eval_fraction)
    return split_by_prompt(examples, cfg.train.eval_fraction, cfg.seed)


def save_policy(
    policy: engine.Engine, folder: str | Path, tokenizer: "PreTrainedTokenizerBase", card: dict[str, Any]
) -> None:
    """Writes the causal language model of an engine to a folder; every rank must call it.

    LoRA weights are merged, for which each device gathers the full model. Where the base has 4 bits, the
    adapter is saved too, in <folder>/adapter.

    Args:
        policy: The engine of a Policy.
        folder: Where config, weights, tokenizer and model card go.
        tokenizer: The policy's tokenizer.
        card: What the model card says: stage, starting model, step.
    """
    lm = policy.module.lm
    state = policy.state_dict() if policy.sharded and not has_lora(lm) else None

    def write() -> None:
        weights = state and {name.removeprefix("lm."): tensor for name, tensor in state.items()}
        save_causal_lm(folder, lm, tokenizer, weights, card)
        if quantized.layers(lm):
            base = card.get("model") or plain(lm).name_or_path
            multi_adapter.save_policy(Path(folder) / "adapter", lm, base)

    with policy.gathered() if has_lora(lm) else contextlib.nullcontext():
        error = written_by_rank_0(write)
    raise_together(error)


def written_by_rank_0(write: Callable[[], None]) -> DiskError | None:
    """Writes on rank 0, and returns why that failed, for `raise_together`; None on the other ranks.

    Args:
        write: Writes the files.
    """
    if engine.rank() == 0:
        try:
            write()
        except DiskError as error:
            return error
    return None


def raise_together(error: DiskError | None) -> None:
    """Waits for all ranks, and raises rank 0's error on each: they all go on together, or end together.

    Args:
        error: What `written_by_rank_0` returned.

    Raises:
        DiskError: Rank 0 has one.
    """
    line = engine.gather_objects(error and str(error))[0]
    if line is not None:
        raise error or DiskError(line)


def go_on_without(save: Callable[[], object], required: bool) -> None:
    """Saves something that a run can do without; a warning says when a disk does not take it.

    Every rank must call it.

    Args:
        save: Saves it; raises the same DiskError on every rank.
        required: End the run instead (`checkpoint.required`).

    Raises:
        DiskError: It could not be saved, and it is required.
    """
    try:
        save()
    except DiskError as error:
        if required:
            raise
        console.warn(f"{error}; the run continues without it")
