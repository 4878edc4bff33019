"""saferlhf-fast: Safe RLHF with fused kernels. The public names, loaded when they are first used.

Importing this package imports neither torch, transformers nor deepspeed.
"""

__version__ = "0.1.0"

_HOME = {
    "token_logprob": "kernels.token_logprob",
    "linear_logprob": "kernels.linear_logprob",
    "linear_ppo_loss": "kernels.linear_ppo_loss",
    "ppo_loss_from_logits": "kernels.ppo_loss_from_logits",
    "gae": "kernels.gae",
    "ppo_lag_advantage": "kernels.ppo_lag_advantage",
    "ppo_loss": "kernels.ppo_loss",
    "value_loss": "kernels.value_loss",
    "PPOLagLoss": "ppo_lag_loss",
    "pack": "padding",
    "unpack": "padding",
    "LagrangeMultiplier": "lagrange",
    "PIDMultiplier": "lagrange",
    "reward_loss": "preference",
    "cost_loss": "preference",
    "ScoreModel": "models",
    "load_score_model": "models",
    "save_score_model": "models",
    "score_model_from_backbone": "models",
    "UserError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
