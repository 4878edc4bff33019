"""What an export needs besides weights: config, tokenizer and head of a trained model.

They are in a checkpoint's folder <model>/hf.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .causal_lm import load_causal_lm, write_generation_config
from .lora import plain
from .moderator_spec import FILE, Calibration, read_spec, write_spec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..config.sections import Lora
    from .moderator import ModeratorModel
    from .policy import Policy
    from .score_model import ScoreModel

SCORE = "score.json"


def export_metadata_writer(
    module: "nn.Module", tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[str | Path], None]:
    """Prepares to write the export metadata of a Policy, a ScoreModel (also on a shared base) or a moderator.

    Returns:
        A function that writes them into a folder; it writes nothing for a critic on a shared base.
    """

    def write(folder: str | Path) -> None:
        lm: Any = getattr(module, "lm", None)
        # a critic on a shared base: its base is the actor's
        if lm is None and not hasattr(module, "backbone"):
            return
        inner = plain(module.backbone if lm is None else lm)
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]
        config.save_pretrained(folder)
        if lm is not None:
            write_generation_config(folder, inner.generation_config, tokenizer)
        elif hasattr(module, "is_moderator"):
            moderator: Any = module
            write_spec(folder, moderator.spec, Calibration())
        else:
            (Path(folder) / SCORE).write_text(json.dumps(_head(module)), encoding="utf-8")
        tokenizer.save_pretrained(folder)

    return write


def _head(module: Any) -> dict[str, Any]:
    return {
        "kind": module.kind,
        "bias": module.score.bias is not None,
        "outputs": module.score.outputs,
        "pooling": module.pooling,
        "pairs": module.pairs,
        "normalizer": module.normalizer and asdict(module.normalizer),
    }


def build_from_export_metadata(
    folder: Path, lora: "Lora", trust_remote_code: bool = False, base: Mapping[str, Any] | None = None
) -> "tuple[Policy | ScoreModel | ModeratorModel, PreTrainedTokenizerBase]":
    """Builds a module from a folder of export metadata; its weights mean nothing until they are loaded.

    Args:
        folder: Written by the function of `export_metadata_writer`.
        lora: The run's adapters, which the module gets too.
        trust_remote_code: Whether code in the folder may run.
        base: Arguments of `load_causal_lm` and `load_backbone` for a base in 4 bits, which no checkpoint has;
            None builds the base from its config.

    Returns:
        The module and its tokenizer.

    Raises:
        UserError: The folder has no config.json, or belongs to a critic of several heads.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from .lora import add_lora
    from .policy import Policy
    from .score_model import Normalizer, ScoreModel, load_backbone

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json; this model needs another model's base and is no model by itself"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if (folder / FILE).is_file():
        from .moderator import ModeratorModel

        inner = AutoModel.from_config(config, **options) if base is None else load_backbone(**base)
        moderator = ModeratorModel(inner, read_spec(folder)[0])
        return add_lora(moderator, lora) if lora.rank else moderator, tokenizer
    if not (folder / SCORE).is_file():
        lm = AutoModelForCausalLM.from_config(config, **options) if base is None else load_causal_lm(**base)
        lm.generation_config = GenerationConfig.from_pretrained(folder)
        return Policy(add_lora(lm, lora) if lora.rank else lm), tokenizer
    head = json.loads((folder / SCORE).read_text(encoding="utf-8"))
    if head["outputs"] != 1:
        raise UserError(
            f"{folder}: a critic of {head['outputs']} heads is no score model; a run can only be resumed "
            "with it"
        )
    model = ScoreModel(
        AutoModel.from_config(config, **options) if base is None else load_backbone(**base),
        bias=head["bias"],
        kind=head["kind"],
        pooling=head.get("pooling", "last"),
        normalizer=head["normalizer"] and Normalizer(**head["normalizer"]),
    )
    model.pairs = head.get("pairs", False)
    return add_lora(model, lora) if lora.rank else model, tokenizer
