"""A causal language model that answers with log-probs: the form in which every stage trains or asks a policy.

The body runs on packed tokens; the head sees the asked-for positions alone, inside its own module's forward,
where ZeRO-3 has gathered its weight, through a fused op: logits exist in chunks. A head that is no plain
linear layer (adapters on it, an unknown scale) is found out when the model is wrapped, and then goes through
transformers' own logits.
"""

from typing import NamedTuple

import torch
from torch import nn

from ..kernels.linear_logprob import linear_logprob
from ..kernels.linear_ppo_loss import linear_ppo_loss
from ..kernels.ppo_loss import ppo_loss
from ..kernels.token_logprob import token_logprob
from . import backbone, sampling_distribution
from .lora import plain
from .on_policy_loss import loss_of, on_policy_loss
from .packing import pack_sequences


class Objective(NamedTuple):
    """A policy loss that is known before the log-probs are: what `linear_ppo_loss` makes gradients from in
    the forward.
    """

    old_logp_N: torch.Tensor
    advantages_N: torch.Tensor
    settings: dict  # clip_ratio, reduction, normalizer, …

    def loss(self, logp_N, packed):
        """(loss, statistics) of log-probs that were made otherwise."""
        return ppo_loss(
            logp_N, self.old_logp_N, self.advantages_N, cu_seqlens=packed.cu_seqlens, **self.settings
        )


class Policy(nn.Module):
    """Wraps any Hugging Face causal LM.

    `forward(packed, sampling)` -> logp_N, the log-prob of each asked-for token given what precedes it, under
    the distribution that such a Sampling config samples from (fp32; nats); None: the model's own.
    `forward(packed, sampling, objective)` -> (loss, statistics) of `linear_ppo_loss`: three products of the
    head instead of four. `forward(packed, sampling, chunk_loss=f)` -> loss of `on_policy_loss`, whose
    advantages f makes from the log-probs. packing: False runs the body on padded rows, whatever the
    architecture can.
    """

    def __init__(self, lm, packing=True):
        super().__init__()
        self.lm = lm
        inner = plain(lm)
        self.packs = backbone.packs(inner.base_model) and packing
        self.logit_form = logit_form(inner)

    def forward(self, packed, sampling=None, objective=None, chunk_loss=None):
        inner = plain(self.lm)
        if self.logit_form is None:
            logp_N = self._of_logits(inner, packed, sampling)
            return _of_logp(logp_N, packed, objective, chunk_loss)
        hidden_MH = backbone.hidden_states(inner.base_model, packed, self.packs)
        hidden_NH = hidden_MH.index_select(0, packed.rows_N)
        return inner.get_output_embeddings()(
            hidden_NH,
            lambda *weights: _fused(*weights, packed, sampling, objective, chunk_loss, self.logit_form),
        )

    def _of_logits(self, lm, packed, sampling):
        """Through the model's own logits, made for every position where it does not let itself be asked for
        some.
        """
        if self.packs:
            inputs = backbone.packed_inputs(packed)
            logits_NV = lm(**inputs, use_cache=False, logits_to_keep=packed.rows_N).logits[0]
        else:
            rows = backbone.padded(packed)
            logits_SLV = lm(**backbone.padded_inputs(lm, rows)).logits
            logits_NV = logits_SLV.flatten(0, 1).index_select(0, rows.flat_M.index_select(0, packed.rows_N))
        if is_plain(sampling):
            return token_logprob(
                logits_NV, packed.targets_N, temperature=_temperature(sampling), inplace_backward=True
            )
        context = sampling_distribution.context_of(packed.ids_M, packed.lengths, packed.rows_N)
        seen_NL = context.seen(slice(None))
        scores_NV = sampling_distribution.sampling_logits(
            logits_NV.float(), sampling, seen_NL, packed.targets_N
        )
        return scores_NV.log_softmax(-1).gather(1, packed.targets_N[:, None]).squeeze(1)


def is_plain(sampling):
    """True when nothing but a temperature shapes the distribution: what the fused ops score."""
    return sampling is None or sampling_distribution.plain(sampling)


def _temperature(sampling):
    return 1.0 if sampling is None else sampling.temperature


def _fused(hidden_NH, weight_VH, bias_V, packed, sampling, objective, chunk_loss, form):
    settings = {"bias": bias_V, "temperature": _temperature(sampling) / form.scale, "softcap": form.softcap}
    if is_plain(sampling) and objective is not None:
        return linear_ppo_loss(
            hidden_NH,
            weight_VH,
            packed.targets_N,
            objective.old_logp_N,
            objective.advantages_N,
            cu_seqlens=packed.cu_seqlens,
            **objective.settings,
            **settings,
        )
    if is_plain(sampling) and chunk_loss is not None:
        return on_policy_loss(
            hidden_NH,
            weight_VH,
            bias_V,
            packed.targets_N,
            packed.counts,
            chunk_loss,
            settings["temperature"],
            form.softcap,
        )
    if is_plain(sampling):
        return linear_logprob(hidden_NH, weight_VH, packed.targets_N, **settings)
    context = sampling_distribution.context_of(packed.ids_M, packed.lengths, packed.rows_N)
    logp_N = sampling_distribution.sampling_logprob(
        hidden_NH, weight_VH, bias_V, form.softcap, form.scale, packed.targets_N, sampling, context
    )
    return _of_logp(logp_N, packed, objective, chunk_loss)


def _of_logp(logp_N, packed, objective, chunk_loss):
    """What was asked for, from log-probs with graph."""
    if chunk_loss is not None:
        return loss_of(logp_N, packed.counts, chunk_loss)
    return logp_N if objective is None else objective.loss(logp_N, packed)


class OpenHead(nn.Linear):
    """A model's head that lends its weights, for as long as its forward lasts, to what is made from them."""

    def forward(self, hidden, use=None):
        return super().forward(hidden) if use is None else use(hidden, self.weight, self.bias)


class LogitForm(NamedTuple):
    """logits = softcap(scale · (hidden @ weight.T + bias))."""

    scale: float = 1.0
    softcap: float | None = None


@torch.no_grad()
def logit_form(lm):
    """How a causal LM makes logits from hidden states, with its head opened; None where it is not
    `LogitForm`.

    Told by the names that architectures use and checked on three tokens.
    """
    head = lm.get_output_embeddings()
    if type(head) not in (nn.Linear, OpenHead):
        return None
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    form = LogitForm(float(scale), getattr(config, "final_logit_softcapping", None))
    if form.softcap and form.scale != 1.0:
        return None  # the op takes no scale under its softcap
    if not _holds(lm, head, form):
        return None
    # nothing but its forward changes: names, copies and saves stay
    head.__class__ = OpenHead
    return form


def _holds(lm, head, form):
    training = lm.training
    lm.eval()
    try:
        ids = torch.arange(1, 4, device=head.weight.device)[None] % head.weight.shape[0]
        hidden = lm.base_model(input_ids=ids).last_hidden_state
        expected = lm(input_ids=ids).logits.float()
        made = nn.functional.linear(hidden, head.weight, head.bias).float() * form.scale
    except (TypeError, AttributeError, RuntimeError):
        return False  # no body of its own, or one that returns something else
    finally:
        lm.train(training)
    if form.softcap:
        made = form.softcap * torch.tanh(made / form.softcap)
    if made.shape != expected.shape:
        return False
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    return bool(((made - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)).item())


def sequence_sums(values_N, packed):
    """[N] -> [S]: sums over each sequence's asked-for tokens."""
    counts_S = torch.tensor(packed.counts, device=values_N.device)
    at_N = torch.repeat_interleave(
        torch.arange(len(packed.counts), device=values_N.device), counts_S, output_size=sum(packed.counts)
    )
    return values_N.new_zeros(len(packed.counts)).index_add(0, at_N, values_N)


def trained_rows(mask):
    """Positions that predict the tokens a mask marks; the first token is predicted by none."""
    return [i - 1 for i, wanted in enumerate(mask) if wanted and i]


def pack_trained(examples, device):
    """SFT examples -> Packed, asking for their trained tokens."""
    return pack_sequences([e.ids for e in examples], [trained_rows(e.mask) for e in examples], device)
