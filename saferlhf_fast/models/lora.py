"""Low-rank adapters (peft): added for training, merged into plain weights when a model is saved.

Saving does not touch the model in training: the merged weights are computed beside it, since merging into the
weights and taking the adapters out again would leave rounding errors behind at every save.
"""

import contextlib
import warnings

from ..errors import UserError


def add_lora(model, cfg):
    """Puts adapters into a causal LM or into a ScoreModel's backbone; everything else is frozen but the score
    head.

    cfg: a `config.Lora`. -> the causal LM inside peft's wrapper, or the same ScoreModel.
    """
    import peft

    is_score = is_score_model(model)
    lora = lora_config(cfg, None if is_score else "CAUSAL_LM")
    try:
        with quiet_peft():
            wrapped = peft.get_peft_model(model.backbone if is_score else model, lora)
    except ValueError as error:
        raise UserError(
            f"lora.target_modules: expected names of linear layers of the model, got {cfg.target_modules!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not is_score:
        return wrapped
    model.backbone = wrapped
    return model


@contextlib.contextmanager
def quiet_peft():
    """Without what peft says of its own doings when it puts adapters in."""
    with warnings.catch_warnings():
        # GPT-2's layers keep their weight transposed; peft notices, corrects itself and says so for each.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def lora_config(cfg, task_type):
    """A `config.Lora` -> peft's config."""
    import peft

    targets = cfg.target_modules if isinstance(cfg.target_modules, str) else list(cfg.target_modules)
    return peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=targets,
        task_type=task_type,
    )


def is_score_model(model):
    """True for a ScoreModel, told by what it does: score_model.py imports this file."""
    return hasattr(model, "end_scores")


def has_lora(model):
    """True for a model that peft wraps."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def plain(model):
    """The Hugging Face model under peft's wrapper, or the model itself."""
    return model.get_base_model() if has_lora(model) else model


def plain_state(model):
    """-> {name: tensor} of the plain model, adapters merged; the model itself stays as it is."""
    if not has_lora(model):
        return dict(model.state_dict())
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    state, adapted = base.state_dict(), set()
    out = {}
    for name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        adapted.add(name + ".")
        weight = module.get_base_layer().weight.detach()
        for adapter in module.active_adapters:
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
        for key, value in state.items():
            if key.startswith(name + ".base_layer."):
                out[name + "." + key.removeprefix(name + ".base_layer.")] = value
        out[name + ".weight"] = weight
    inside = tuple(adapted)
    out.update({key: value for key, value in state.items() if not key.startswith(inside)})
    return out
