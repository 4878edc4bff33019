"""Exports a trained model of a checkpoint as a Hugging Face folder (safetensors).

This needs none of the run's GPUs and processes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...config.stages import Lora
from ...errors import UserError
from ...models.export_files import build_from_export_metadata
from ...runtime import console, run_folder, run_lock
from ...runtime.checkpoint import safe_pickle
from .convert import quiet
from .verify import whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@run_lock.session()
def export(folder: str | Path, output: str | Path, name: str | None = None, dtype: str | None = None) -> Path:
    """Writes a model of a checkpoint.

    Args:
        folder: The checkpoint's folder.
        output: A new folder for the model.
        name: actor, reward_critic, cost_critic, or model (sft, dpo, reward, cost, moderation); None: the
            first of those that the checkpoint has.
        dtype: fp32, bf16 or fp16; None: that of the run's model, so that the weights are equal.

    Returns:
        The model's folder.

    Raises:
        UserError: The checkpoint is damaged, converted, or has no such model, `output` is not empty, or
            another process writes there.
    """
    from ...models.causal_lm import save_causal_lm
    from ...models.moderator_files import save_moderator
    from ...models.score_checkpoint import save_score_model

    folder, output = Path(folder), Path(output).expanduser()
    values = whole(folder)
    if values["universal"]:
        raise UserError(f"{folder} is a converted checkpoint; expected the one that it was converted from")
    name = name or next(iter(values["models"]))
    if name not in values["models"]:
        raise UserError(f"--model: expected one of {', '.join(values['models'])}, got {name}")
    run_folder.hold_output(output, "checkpoint export")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is not empty; expected a new folder")
    kind, settings = values["models"][name], values["config"]
    target = DTYPES[dtype] if dtype else getattr(torch, kind["precision"])
    state = weights(folder, name, kind["zero_stage"])
    module, tokenizer = _module(folder, name, state, settings, getattr(torch, kind["precision"]))
    if module.base_hash() != kind.get("base"):
        console.warn(
            f"{name}: the base in 4 bits is not exactly the run's, which was quantised on another kind of "
            "device or by another bitsandbytes; the weights may differ in their last bits"
        )
    module.to(next(module.parameters()).device, target)
    card = {"stage": values["stage"], "step": values["step"], "model": settings.get("model")}
    if hasattr(module, "lm"):
        save_causal_lm(output, module.lm, tokenizer, card=card)
    elif hasattr(module, "is_moderator"):
        save_moderator(output, module, tokenizer, card=card)
    else:
        save_score_model(output, module, tokenizer, kind=module.kind or "reward", card=card, keep_bias=True)
    return output


def weights(folder: Path, name: str, zero_stage: int) -> dict[str, torch.Tensor]:
    """Reads a model's weights; where ZeRO shards them, those that the optimiser keeps in fp32.

    Weights that are not trained (under adapters) are in no optimiser; ZeRO 0 to 2 store them unsharded.

    Args:
        folder: The checkpoint's folder.
        name: The model, as in `export`.
        zero_stage: ZeRO stage of the run.

    Returns:
        {name: tensor}, on the CPU.
    """
    unsharded = (
        {} if zero_stage == 3 else safe_pickle.load(folder / name / "mp_rank_00_model_states.pt")["module"]
    )
    if zero_stage == 0:
        return unsharded
    from ...runtime.deepspeed_library import imported_deepspeed

    imported_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with quiet(), safe_pickle.guarded():
        return {**unsharded, **get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=name)}


def _module(
    folder: Path,
    name: str,
    state: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    precision: torch.dtype,
) -> tuple[Any, Any]:
    """Returns a Policy or ScoreModel with these weights, and its tokenizer. precision: that of the run."""
    lora = Lora(**settings.get("lora", {}))
    trust = settings.get("trust_remote_code", False)
    base = {
        "path": settings.get("model"),
        "trust_remote_code": trust,
        "allow_pickle": settings.get("allow_pickle", False),
        **({} if lora.bits is None else {"bits": lora.bits, "dtype": precision}),
    }
    if any(key.startswith("adapter.") for key in state):
        return _on_shared_base(name, state, base, lora)
    module, tokenizer = build_from_export_metadata(
        folder / name / "hf", lora, trust, None if lora.bits is None else base
    )
    missing, unexpected = module.load_state_dict(state, strict=False)
    tied = set(getattr(getattr(module, "lm", module), "all_tied_weights_keys", None) or ())
    missing = [key for key in missing if key.removeprefix("lm.") not in tied]
    if missing or unexpected:
        raise UserError(
            f"{folder}/{name}: weights do not fit its config: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}"
        )
    return module, tokenizer


def _on_shared_base(
    name: str, state: Mapping[str, torch.Tensor], base: Mapping[str, Any], lora: Lora
) -> tuple[Any, Any]:
    """Returns an actor that is an adapter, on the base that the run started from, and its tokenizer.

    The base, of which `base` has the arguments of `load_causal_lm`, must still be where the run's settings
    say.
    """
    from ...models.causal_lm import load_causal_lm
    from ...models.shared_base import PolicyOnSharedBase, SharedBase
    from ...models.tokenizer import load_tokenizer

    if name != "actor":
        raise UserError(
            f"--model: {name} is an adapter on the actor's base, no model by itself; expected actor"
        )
    tokenizer = load_tokenizer(base["path"], trust_remote_code=base["trust_remote_code"])
    shared_base = SharedBase(load_causal_lm(tokenizer=tokenizer, **base), lora)
    shared_base.add("actor")
    module = PolicyOnSharedBase(shared_base, "actor")
    module.load_state_dict(state)
    shared_base.lm.to(shared_base.lm.device, next(iter(state.values())).dtype)
    return module, tokenizer


def describe_output(output: str | Path) -> str:
    """Returns one line about an exported model."""
    config = json.loads((Path(output) / "config.json").read_text(encoding="utf-8"))
    return f"{output}: {', '.join(config.get('architectures') or [])}, {config.get('dtype')}"
