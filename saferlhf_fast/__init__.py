"""saferlhf-fast: Safe RLHF with fused kernels. The public names, loaded when they are first used.

Importing this package imports neither torch, transformers nor deepspeed. `saferlhf_fast.integrations` is
loaded like the names.
"""

from typing import TYPE_CHECKING

from .version import __version__ as __version__

# for type checkers, which do not see what __getattr__ loads; test_api.py keeps it equal to _HOME
if TYPE_CHECKING:
    from . import integrations as integrations
    from .errors import UserError as UserError
    from .kernels.gae import gae as gae
    from .kernels.linear_logprob import linear_logprob as linear_logprob
    from .kernels.linear_ppo_loss import linear_ppo_loss as linear_ppo_loss
    from .kernels.ppo_lag_advantage import ppo_lag_advantage as ppo_lag_advantage
    from .kernels.ppo_loss import ppo_loss as ppo_loss
    from .kernels.ppo_loss_from_logits import ppo_loss_from_logits as ppo_loss_from_logits
    from .kernels.token_logprob import token_logprob as token_logprob
    from .kernels.value_loss import value_loss as value_loss
    from .models.packing import pack as pack
    from .models.packing import unpack as unpack
    from .models.score_checkpoint import save_score_model as save_score_model
    from .models.score_model import ScoreModel as ScoreModel
    from .models.score_model import load_score_model as load_score_model
    from .models.score_model import score_model_from_backbone as score_model_from_backbone
    from .training.losses import cost_loss as cost_loss
    from .training.losses import reward_loss as reward_loss
    from .training.ppo.loss import PPOLagLoss as PPOLagLoss
    from .training.ppo.multiplier import LagrangeMultiplier as LagrangeMultiplier
    from .training.ppo.multiplier import PIDMultiplier as PIDMultiplier

_HOME = {
    "token_logprob": "kernels.token_logprob",
    "linear_logprob": "kernels.linear_logprob",
    "linear_ppo_loss": "kernels.linear_ppo_loss",
    "ppo_loss_from_logits": "kernels.ppo_loss_from_logits",
    "gae": "kernels.gae",
    "ppo_lag_advantage": "kernels.ppo_lag_advantage",
    "ppo_loss": "kernels.ppo_loss",
    "value_loss": "kernels.value_loss",
    "PPOLagLoss": "training.ppo.loss",
    "pack": "models.packing",
    "unpack": "models.packing",
    "LagrangeMultiplier": "training.ppo.multiplier",
    "PIDMultiplier": "training.ppo.multiplier",
    "reward_loss": "training.losses",
    "cost_loss": "training.losses",
    "ScoreModel": "models.score_model",
    "load_score_model": "models.score_model",
    "save_score_model": "models.score_checkpoint",
    "score_model_from_backbone": "models.score_model",
    "UserError": "errors",
}

__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "integrations":
            return import_module(f"{__name__}.integrations")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, "integrations"])
