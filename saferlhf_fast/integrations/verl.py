"""verl 0.9: log-probs, entropies, GAE, whitening, the vanilla policy loss, the value loss and the fused
linear head.

GAE and the vanilla loss are looked up in verl's registries, which keep the old function unless the entry is
replaced too. Ray workers are processes of their own:
VERL_USE_EXTERNAL_MODULES=saferlhf_fast.integrations.verl_worker in the environment of the job patches every
process that imports verl.
"""

import torch

from ..kernels.linear_logprob import linear_logprob
from ..kernels.token_logprob import token_logprob
from . import shared
from .registry import Library, Replace

FUNCTIONAL = "verl.utils.torch_functional"
CORE = "verl.trainer.ppo.core_algos"
FUSED = "verl.utils.experimental.torch_functional"


def logprobs_from_logits(theirs):
    """(logits, labels) -> log-probs in float32.

    In place on a device alone, where verl's own is if flash-attn is there.
    """

    def ours(logits, labels, inplace_backward=True):
        if not shared.one_id_each(logits, labels):
            return theirs(logits, labels, inplace_backward=inplace_backward)
        shared.known_ids("logprobs_from_logits: labels: expected", labels, logits.shape[-1])
        return token_logprob(logits, labels, inplace_backward=inplace_backward and logits.is_cuda)

    return ours


def masked_whiten(theirs):
    """Verl's whitening with half the passes; ValueError for fewer than two values, as theirs."""

    def ours(values, mask, shift_mean=True):
        kept = None if not shared.plain(values, mask) or values.shape != mask.shape else shared.flags(mask)
        return theirs(values, mask, shift_mean) if kept is None else shared.whiten(values, kept, shift_mean)

    return ours


def compute_gae_advantage_return(theirs):
    """Advantages, whitened, and returns; values and running sums go through masked tokens.

    Both are 0 where masked.
    """

    def ours(token_level_rewards, values, response_mask, gamma, lam):
        with torch.no_grad():
            made = shared.advantages(token_level_rewards, values, response_mask, gamma, lam, "carry")
            if made is None:
                return theirs(token_level_rewards, values, response_mask, gamma, lam)
            mask = shared.flags(response_mask)
            return torch.where(mask, shared.whiten(made[0], mask), 0.0), made[1]

    return ours


def _aggregation(
    mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
):
    """Verl's `agg_loss` modes as our (reduction, normalizer): sums over tokens or of token means, over a
    count.
    """
    if loss_agg_mode == "token-mean":
        _needed("batch_num_tokens", batch_num_tokens, dp_size)
        return "token-mean", None if batch_num_tokens is None else batch_num_tokens / dp_size
    if loss_agg_mode == "token-sum":
        return "token-mean", 1.0 / dp_size
    if loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
    _needed("global_batch_size", global_batch_size, dp_size)
    if loss_agg_mode == "seq-mean-token-mean":
        return "sequence-mean", None if global_batch_size is None else global_batch_size / dp_size
    # Rows without a token count for nothing; without any row the sum is 0 whatever it is divided by.
    rows = (mask != 0).any(-1).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        rows = rows * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return "token-mean", rows / dp_size


def _counts_fit(mask, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    return (
        shared.numbers(dp_size)
        and dp_size > 0
        and shared.counts_fit(mask, batch_num_tokens, global_batch_size, loss_scale_factor)
    )


def _needed(name, value, dp_size):
    if value is None and dp_size > 1:
        raise ValueError(f"(global) {name} is required when dp_size > 1")


def _may_scale(rollout_is_weights):
    """False for importance weights that are negative somewhere, which a CPU looks at, or that learn."""
    if rollout_is_weights is None:
        return True
    negative = rollout_is_weights.device.type == "cpu" and bool((rollout_is_weights < 0).any())
    return not negative and not shared.learns(rollout_is_weights)


def compute_policy_loss_vanilla(theirs):
    """The clipped loss with verl's asymmetric clip and dual clip, and its three metrics in one read of the
    device.
    """

    def ours(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        def original():
            return theirs(
                old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
            )

        if (
            config is None
            or not shared.given(old_log_prob, log_prob, advantages, response_mask)
            or not shared.plain(rollout_is_weights)
            or not _may_scale(rollout_is_weights)
            or not _counts_fit(response_mask, **config.global_batch_info)
        ):
            return original()
        reduction, normalizer = _aggregation(response_mask, loss_agg_mode, **config.global_batch_info)
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        settings = {
            "reduction": reduction,
            "normalizer": normalizer,
            "clip_ratio": low,
            "clip_high": high,
            "dual_clip": config.get("clip_ratio_c", 3.0),
        }
        # Weights >= 0 may as well scale the advantages. The metrics are those without: a weight of 0 would
        # hide a clip.
        weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        made = shared.policy_loss(log_prob, old_log_prob, weighted, response_mask, **settings)
        if made is None:
            return original()
        loss, stats = made
        if rollout_is_weights is not None:
            stats = shared.policy_loss(
                log_prob.detach(), old_log_prob, advantages, response_mask, **settings
            )[1]
        clipped, log_ratio, lower = torch.stack(
            [stats["clipped"], stats["log_ratio"], stats["dual_clipped"]]
        ).tolist()
        return loss, {
            "actor/pg_clipfrac": clipped,
            "actor/ppo_kl": -log_ratio,
            "actor/pg_clipfrac_lower": lower,
        }

    return ours


def compute_value_loss(theirs):
    """Half the aggregated clipped square, and the share of tokens where the clip is active."""

    def ours(
        vpreds,
        returns,
        values,
        response_mask,
        cliprange_value,
        loss_agg_mode="token-mean",
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ):
        counts = {
            "dp_size": dp_size,
            "batch_num_tokens": batch_num_tokens,
            "global_batch_size": global_batch_size,
            "loss_scale_factor": loss_scale_factor,
        }
        made = None
        if shared.given(response_mask) and _counts_fit(response_mask, **counts):
            reduction, normalizer = _aggregation(response_mask, loss_agg_mode, **counts)
            made = shared.critic_loss(
                vpreds,
                values,
                returns,
                response_mask,
                clip_value=cliprange_value,
                reduction=reduction,
                normalizer=normalizer,
            )
        if made is None:
            return theirs(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, **counts)
        return made[0], made[1]["clipped"]

    return ours


def fused_linear(theirs):
    """FusedLinearForPPO.forward: log-probs and entropies, float32; so are sums of d weight. Liger's backend:

    theirs.
    """

    def ours(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        sharded = hasattr(vocab_weights, "ds_id")
        if (
            self.impl_backend != "torch"
            or sharded
            or not shared.plain(hidden_states, vocab_weights, input_ids)
            or hidden_states.dtype != vocab_weights.dtype
            or not shared.numbers(temperature)
        ):
            return theirs(self, hidden_states, vocab_weights, input_ids, temperature)
        shared.known_ids("FusedLinearForPPO: input_ids: expected", input_ids, len(vocab_weights))
        return linear_logprob(
            hidden_states,
            vocab_weights,
            input_ids.to(torch.int64),
            temperature=temperature,
            return_entropy=True,
        )

    return ours


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
        ),
        Replace(
            f"{FUNCTIONAL}:entropy_from_logits",
            shared.entropy_from_logits,
            "(logits)",
            "keeps no softmax for backward; -inf logits give a finite entropy (theirs: NaN)",
        ),
        Replace(
            f"{FUNCTIONAL}:entropy_from_logits_with_chunking",
            shared.entropy_from_logits,
            "(logits, chunk_size=2048)",
            "keeps no softmax for backward; -inf logits give a finite entropy (theirs: NaN)",
        ),
        Replace(
            f"{FUNCTIONAL}:masked_whiten",
            masked_whiten,
            "(values, mask, shift_mean=True)",
            "half the passes; masked NaN stay out",
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
        ),
        Replace(
            f"{CORE}:compute_policy_loss_vanilla",
            compute_policy_loss_vanilla,
            "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
            "rollout_is_weights=None)",
            "loss, gradient and metrics in one pass; a batch without tokens gives 0 (theirs: NaN)",
            entries=((f"{CORE}:POLICY_LOSS_REGISTRY", "vanilla"),),
        ),
        Replace(
            f"{CORE}:compute_value_loss",
            compute_value_loss,
            "(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', "
            "dp_size=1, "
            "batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)",
            "loss, gradient and clip fraction in one pass; a batch without tokens gives 0 (theirs: NaN)",
        ),
    ),
    leave=(
        (
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
            "a Triton kernel of theirs that runs on a GPU alone: not measured against ours",
        ),
        (f"{CORE}:agg_loss", "elementwise work that other losses call; ours is inside the losses"),
        (f"{CORE}:kl_penalty", "elementwise; k3 is clamped to ±10 there"),
        (f"{FUNCTIONAL}:masked_mean", "a mean; nothing to gain"),
    ),
)
