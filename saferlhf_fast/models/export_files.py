"""What an export needs besides weights: config, tokenizer and head of a trained model, in a checkpoint's
<model>/hf.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from .causal_lm import savable_generation
from .lora import plain

SCORE = "score.json"


def export_metadata_writer(module, tokenizer):
    """-> a function that writes what belongs to a Policy or a ScoreModel (also one on a shared base) into a
    folder.
    """

    def write(folder):
        lm = getattr(module, "lm", None)
        # a critic on a shared base: its base is the actor's
        if lm is None and not hasattr(module, "backbone"):
            return
        inner = plain(module.backbone if lm is None else lm)
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]
        config.save_pretrained(folder)
        if lm is not None:
            savable_generation(inner.generation_config, tokenizer).save_pretrained(folder)
        else:
            (Path(folder) / SCORE).write_text(json.dumps(_head(module)), encoding="utf-8")
        tokenizer.save_pretrained(folder)

    return write


def _head(module):
    return {
        "kind": module.kind,
        "bias": module.score.bias is not None,
        "outputs": module.score.outputs,
        "normalizer": module.normalizer and asdict(module.normalizer),
    }


def build(folder, lora, trust_remote_code=False):
    """A folder of `export_metadata_writer` -> (module without weights that mean anything, tokenizer). lora: a
    Lora config.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from .lora import add_lora
    from .policy import Policy
    from .score_model import Normalizer, ScoreModel

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json; this model stands on another one's base and is no model by itself"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if not (folder / SCORE).is_file():
        lm = AutoModelForCausalLM.from_config(config, **options)
        lm.generation_config = GenerationConfig.from_pretrained(folder)
        return Policy(add_lora(lm, lora) if lora.rank else lm), tokenizer
    said = json.loads((folder / SCORE).read_text(encoding="utf-8"))
    if said["outputs"] != 1:
        raise UserError(
            f"{folder}: a critic of {said['outputs']} heads is no score model; it can only be gone on with"
        )
    model = ScoreModel(
        AutoModel.from_config(config, **options),
        bias=said["bias"],
        kind=said["kind"],
        normalizer=said["normalizer"] and Normalizer(**said["normalizer"]),
    )
    return add_lora(model, lora) if lora.rank else model, tokenizer
