"""verl 0.9: log-probs, entropies, GAE, whitening, policy loss, value loss and the fused linear head.

The policy loss is the one that verl calls vanilla. It and GAE are looked up in verl's registries, which keep
the old function unless the entry is replaced too. Ray workers are processes of their own:
VERL_USE_EXTERNAL_MODULES=saferlhf_fast.integrations.verl_worker in the environment of the job patches every
process that imports verl.
"""

from typing import Any, NamedTuple

import torch

from ..kernels.linear_logprob import linear_logprob
from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import Library, LibraryFunction, Replace

FUNCTIONAL = "verl.utils.torch_functional"
CORE = "verl.trainer.ppo.core_algos"
FUSED = "verl.utils.experimental.torch_functional"


def logprobs_from_logits(original: LibraryFunction) -> LibraryFunction:
    """(logits, labels) -> log-probs in float32.

    The gradient is written over the logits on a device alone, where verl's own does that with flash-attn.
    """

    def replacement(
        logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
    ) -> torch.Tensor:
        if not shared.one_id_each(logits, labels):
            return original(logits, labels, inplace_backward=inplace_backward)
        shared.known_ids("logprobs_from_logits: labels: expected", labels, logits.shape[-1])
        return token_logprob(logits, labels, inplace_backward=inplace_backward and logits.is_cuda)

    return replacement


def masked_whiten(original: LibraryFunction) -> LibraryFunction:
    """Verl's whitening with half the passes; as there, ValueError for fewer than two values."""

    def replacement(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        counted = None if not shared.plain(values, mask) or values.shape != mask.shape else shared.flags(mask)
        if counted is None:
            return original(values, mask, shift_mean)
        return shared.whiten(values, counted, shift_mean)

    return replacement


def compute_gae_advantage_return(original: LibraryFunction) -> LibraryFunction:
    """Advantages, whitened, and returns, both 0 where masked.

    Values and running sums are carried over masked tokens.
    """

    def replacement(
        token_level_rewards: torch.Tensor,
        values: torch.Tensor,
        response_mask: torch.Tensor,
        gamma: float,
        lam: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            result = shared.advantages(token_level_rewards, values, response_mask, gamma, lam, "carry")
            if result is None:
                return original(token_level_rewards, values, response_mask, gamma, lam)
            advantages, returns = result
            mask = shared.flags(response_mask)
            assert mask is not None, "GAE by our op takes no weights as a mask"
            return torch.where(mask, shared.whiten(advantages, mask), 0.0), returns

    return replacement


class Counts(NamedTuple):
    """By what `agg_loss` divides: verl's names and defaults; None: it counts the batch itself."""

    dp_size: int = 1
    batch_num_tokens: float | torch.Tensor | None = None
    global_batch_size: float | torch.Tensor | None = None
    loss_scale_factor: float | None = None


def _counts_fit(mask: torch.Tensor, counts: Counts) -> bool:
    """Whether our losses treat these counts as verl does."""
    dp_size, *others = counts
    return shared.numbers(dp_size) and dp_size > 0 and shared.counts_fit(mask, *others)


def _aggregation(
    mask: torch.Tensor, loss_agg_mode: str, counts: Counts
) -> tuple[str, float | torch.Tensor | None]:
    """Verl's `agg_loss` modes as our (reduction, normalizer): sums over tokens or of token means."""
    tokens, rows = counts.batch_num_tokens, counts.global_batch_size
    if loss_agg_mode == "token-mean":
        _require_count("batch_num_tokens", tokens, counts.dp_size)
        return "token-mean", None if tokens is None else tokens / counts.dp_size
    if loss_agg_mode == "token-sum":
        return "token-mean", 1.0 / counts.dp_size
    if loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
    _require_count("global_batch_size", rows, counts.dp_size)
    if loss_agg_mode == "seq-mean-token-mean":
        return "sequence-mean", None if rows is None else rows / counts.dp_size
    # Rows without a token do not count; without any row the sum is 0 whatever it is divided by.
    if rows is None:
        rows = (mask != 0).any(-1).sum().clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        rows = rows * (mask.shape[-1] if counts.loss_scale_factor is None else counts.loss_scale_factor)
    return "token-mean", rows / counts.dp_size


def _require_count(name: str, value: float | torch.Tensor | None, dp_size: int) -> None:
    if value is None and dp_size > 1:
        raise ValueError(f"(global) {name} is required when dp_size > 1")


def _may_scale(rollout_is_weights: torch.Tensor | None) -> bool:
    """False for importance weights that learn, or that are negative somewhere.

    Their values are read on a CPU alone.
    """
    if rollout_is_weights is None:
        return True
    negative = rollout_is_weights.device.type == "cpu" and bool((rollout_is_weights < 0).any())
    return not negative and not shared.any_needs_gradient(rollout_is_weights)


def compute_policy_loss_vanilla(original: LibraryFunction) -> LibraryFunction:
    """The clipped loss with verl's asymmetric clip and dual clip.

    The host waits for the device once, for all three metrics.
    """

    def replacement(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        result = None
        if (
            config is not None
            and shared.given(old_log_prob, log_prob, advantages, response_mask)
            and shared.plain(rollout_is_weights)
            and _may_scale(rollout_is_weights)
            and _counts_fit(response_mask, Counts(**config.global_batch_info))
        ):
            settings = _policy_settings(config, response_mask, loss_agg_mode)
            # Weights >= 0 may scale the advantages instead of the loss.
            weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
            result = shared.policy_loss(log_prob, old_log_prob, weighted, response_mask, **settings)
        if result is None:
            return original(
                old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
            )
        loss, stats = result
        if rollout_is_weights is not None:
            # The metrics are those without weights: a weight of 0 would hide a clip.
            unweighted = log_prob.detach(), old_log_prob, advantages, response_mask
            result = shared.policy_loss(*unweighted, **settings)
            assert result is not None, "with weights our op took these tensors"
            stats = result[1]
        clipped, log_ratio, lower = torch.stack(
            [stats["clipped"], stats["log_ratio"], stats["dual_clipped"]]
        ).tolist()
        return loss, {
            "actor/pg_clipfrac": clipped,
            "actor/ppo_kl": -log_ratio,
            "actor/pg_clipfrac_lower": lower,
        }

    return replacement


def _policy_settings(config: Any, mask: torch.Tensor, loss_agg_mode: str) -> dict[str, Any]:
    """The settings of `shared.policy_loss` that verl's actor config means."""
    reduction, normalizer = _aggregation(mask, loss_agg_mode, Counts(**config.global_batch_info))
    return {
        "reduction": reduction,
        "normalizer": normalizer,
        "clip_ratio": config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        "clip_high": config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        "dual_clip": config.get("clip_ratio_c", 3.0),
    }


def compute_value_loss(original: LibraryFunction) -> LibraryFunction:
    """Half the aggregated clipped square, and the share of tokens where the clip is active."""

    def replacement(
        vpreds: torch.Tensor,
        returns: torch.Tensor,
        values: torch.Tensor,
        response_mask: torch.Tensor,
        cliprange_value: float,
        loss_agg_mode: str = "token-mean",
        dp_size: int = 1,
        batch_num_tokens: float | torch.Tensor | None = None,
        global_batch_size: float | torch.Tensor | None = None,
        loss_scale_factor: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = Counts(dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        result = None
        if shared.given(response_mask) and _counts_fit(response_mask, counts):
            reduction, normalizer = _aggregation(response_mask, loss_agg_mode, counts)
            result = shared.critic_loss(
                vpreds,
                values,
                returns,
                response_mask,
                clip_value=cliprange_value,
                reduction=reduction,
                normalizer=normalizer,
            )
        if result is None:
            return original(
                vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, **counts._asdict()
            )
        loss, stats = result
        return loss, stats["clipped"]

    return replacement


def fused_linear(original: LibraryFunction) -> LibraryFunction:
    """FusedLinearForPPO.forward: log-probs and entropies in float32, and sums of d weight too.

    Liger's backend stays verl's.
    """

    def replacement(
        self: Any,
        hidden_states: torch.Tensor,
        vocab_weights: torch.Tensor,
        input_ids: torch.Tensor,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sharded = hasattr(vocab_weights, "ds_id")
        if shared.without_values(hidden_states, vocab_weights, input_ids) and not sharded:
            logits = shared.logits_of_head(hidden_states, vocab_weights) / temperature
            return shared.logp_and_entropy_by_torch(logits, input_ids)
        if (
            self.impl_backend != "torch"
            or sharded
            or not shared.plain(hidden_states, vocab_weights, input_ids)
            or hidden_states.dtype != vocab_weights.dtype
            or not shared.numbers(temperature)
        ):
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        shared.known_ids("FusedLinearForPPO: input_ids: expected", input_ids, len(vocab_weights))
        return linear_logprob(
            hidden_states,
            vocab_weights,
            input_ids.to(torch.int64),
            temperature=temperature,
            return_entropy=True,
        )

    return replacement


LIBRARY = Library(
    name="verl",
    distribution="verl",
    versions=("0.9.1",),
    replace=(
        Replace(
            f"{FUNCTIONAL}:logprobs_from_logits",
            logprobs_from_logits,
            "(logits, labels, inplace_backward=True)",
            "one read of the logits, float32 results, empty batches",
            dtype_of=("logits",),
        ),
        Replace(
            f"{FUNCTIONAL}:entropy_from_logits",
            shared.entropy_from_logits,
            "(logits)",
            "keeps no softmax for backward; -inf logits give a finite entropy (its own: NaN)",
            dtype_of=("logits",),
        ),
        Replace(
            f"{FUNCTIONAL}:entropy_from_logits_with_chunking",
            shared.entropy_from_logits,
            "(logits, chunk_size=2048)",
            "keeps no softmax for backward; -inf logits give a finite entropy (its own: NaN)",
        ),
        Replace(
            f"{FUNCTIONAL}:masked_whiten",
            masked_whiten,
            "(values, mask, shift_mean=True)",
            "half the passes; masked NaN stay out",
            dtype_of=("values",),
        ),
        Replace(
            f"{FUSED}:FusedLinearForPPO.forward",
            fused_linear,
            "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
            "less memory; logits and d weight in float32; -inf logits give a finite entropy",
        ),
        Replace(
            f"{CORE}:compute_gae_advantage_return",
            compute_gae_advantage_return,
            "(token_level_rewards, values, response_mask, gamma, lam)",
            "one launch instead of a Python loop over tokens; masked entries are never read",
            entries=((f"{CORE}:ADV_ESTIMATOR_REGISTRY", "gae"),),
            dtype_of=("token_level_rewards", "values", "response_mask"),
        ),
        Replace(
            f"{CORE}:compute_policy_loss_vanilla",
            compute_policy_loss_vanilla,
            "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
            "rollout_is_weights=None)",
            "loss, gradient and metrics in one pass; a batch without tokens gives 0 (its own: NaN)",
            entries=((f"{CORE}:POLICY_LOSS_REGISTRY", "vanilla"),),
            dtype_of=("old_log_prob", "log_prob", "advantages", "response_mask", "rollout_is_weights"),
        ),
        Replace(
            f"{CORE}:compute_value_loss",
            compute_value_loss,
            "(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', "
            "dp_size=1, "
            "batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)",
            "loss, gradient and clip fraction in one pass; a batch without tokens gives 0 (its own: NaN)",
            dtype_of=("vpreds", "returns", "values", "response_mask"),
            metrics=(1,),
        ),
    ),
    leave=(
        (
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
            "a Triton kernel of verl that runs on a GPU alone: not measured against our op",
        ),
        (f"{CORE}:agg_loss", "elementwise work that other losses call; our losses do it themselves"),
        (f"{CORE}:kl_penalty", "elementwise; k3 is clamped to ±10 there"),
        (f"{FUNCTIONAL}:masked_mean", "a mean; nothing to gain"),
    ),
)
