"""A causal language model that returns log-probs: the form in which every stage trains or evaluates a policy.

The backbone runs on packed tokens; the head sees the requested positions alone, inside its own module's
forward, where ZeRO-3 has gathered its weight, through a fused op: logits exist in chunks. Whether a head is a
plain linear layer is checked when the model is wrapped; one that is not (adapters on it, an unknown scale)
goes through transformers' own logits.

Shapes: legend in rollout/types.py.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..kernels.linear_logprob import linear_logprob
from ..kernels.linear_ppo_loss import linear_ppo_loss
from ..kernels.ppo_loss import ppo_loss
from ..kernels.token_logprob import token_logprob
from . import backbone, quantized, sampling_distribution
from .lora import plain
from .on_policy_loss import ChunkLoss, loss_of, on_policy_loss
from .packing import Packed, pack_sequences
from .row_form import fixed_inputs, packed_inputs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..config.sections import Sampling
    from ..data.examples import SFTExample

LossAndStatistics = tuple[torch.Tensor, dict[str, torch.Tensor]]


class Objective(NamedTuple):
    """A policy loss that is known before the log-probs are.

    `linear_ppo_loss` computes its gradients in the forward.
    """

    old_logp_N: torch.Tensor  # nats
    advantages_N: torch.Tensor
    settings: dict[str, Any]  # clip_ratio, reduction, normalizer, …

    def loss(self, logp_N: torch.Tensor, packed: Packed) -> LossAndStatistics:
        """(loss, statistics) of log-probs that were computed in another way."""
        return ppo_loss(
            logp_N, self.old_logp_N, self.advantages_N, cu_seqlens=packed.cu_seqlens, **self.settings
        )


class Policy(nn.Module):
    """Wraps any Hugging Face causal LM.

    `forward` gives log-probs, or a loss where an objective or a chunk loss says which.
    """

    spare_U: torch.Tensor | None

    def __init__(
        self,
        lm: "PreTrainedModel | PeftModel",
        packing: bool = True,
        spare_U: torch.Tensor | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            lm: A causal LM, which peft may wrap.
            packing: False runs the backbone on padded rows, whatever the architecture can.
            spare_U: Ids of the head's rows without a token (`tokenizer.spare_rows`): no sampling
                distribution has them.
        """
        super().__init__()
        self.lm = lm
        # no part of a checkpoint: it follows from model and tokenizer
        self.register_buffer("spare_U", None if spare_U is None else spare_U.to(lm.device), persistent=False)
        inner = plain(lm)
        form = backbone.form_of(inner.base_model)
        self.form = form if packing else form.unpacked()
        self.logit_form = logit_form(inner)

    @property
    def packs(self) -> bool:
        """Whether the backbone runs packed, without padding."""
        return self.form.packs

    def base_hash(self) -> str | None:
        """The sha256 of a base in 4 bits, which checkpoints compare; None for another one."""
        return quantized.base_hash(plain(self.lm))

    def forward(
        self,
        packed: Packed,
        sampling: "Sampling | None" = None,
        objective: Objective | None = None,
        chunk_loss: ChunkLoss | None = None,
    ) -> torch.Tensor | LossAndStatistics:
        """The log-prob of each requested token given what precedes it, or a loss of these log-probs.

        Args:
            packed: The tokens of one pass.
            sampling: The settings of the distribution that the log-probs belong to; None: the model's own,
                in which rows without a token have their probability, as in transformers' losses.
            objective: A loss that `linear_ppo_loss` computes: three products of the head instead of four.
            chunk_loss: A loss for `on_policy_loss`, whose advantages depend on these log-probs.

        Returns:
            logp_N (fp32, nats); with an objective (loss, statistics); with a chunk loss the loss.
        """
        inner, form = plain(self.lm), self.logit_form
        if form is None:
            logp_N = self._logp_from_logits(inner, packed, sampling)
            return _result_from_logp(logp_N, packed, objective, chunk_loss)
        hidden_MH = backbone.hidden_states(inner.base_model, packed, self.form)
        hidden_NH = hidden_MH.index_select(0, packed.rows_N)

        def use(
            hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None
        ) -> torch.Tensor | LossAndStatistics:
            head = _Head(hidden_NH, weight_VH, bias_V, form, None if sampling is None else self.spare_U)
            return _fused(head, packed, sampling, objective, chunk_loss)

        return inner.get_output_embeddings()(hidden_NH, use)

    def _logp_from_logits(
        self, lm: "PreTrainedModel", packed: Packed, sampling: "Sampling | None"
    ) -> torch.Tensor:
        """logp_N through the model's own logits, which are computed for all positions where they must be."""
        if self.packs:
            inputs = packed_inputs(packed, self.form)
            logits_NV = lm(**inputs, use_cache=False, logits_to_keep=packed.rows_N).logits[0]
        else:
            logits_MV = backbone.of_each_token(
                packed, self.form, lm, lambda inputs: lm(**inputs, **fixed_inputs(lm)).logits
            )
            logits_NV = logits_MV.index_select(0, packed.rows_N)
        if sampling is None or is_plain(sampling):
            if sampling is not None and self.spare_U is not None:
                logits_NV = logits_NV.index_fill(1, self.spare_U, -torch.inf)
            return token_logprob(
                logits_NV, packed.targets_N, temperature=_temperature(sampling), inplace_backward=True
            )
        context = sampling_distribution.context_of(packed.ids_M, packed.lengths, packed.rows_N)
        seen_NL = context.seen(slice(None))
        scores_NV = sampling_distribution.sampling_logits(
            logits_NV.float(), sampling, seen_NL, packed.targets_N, self.spare_U
        )
        return scores_NV.log_softmax(-1).gather(1, packed.targets_N[:, None]).squeeze(1)


def is_plain(sampling: "Sampling | None") -> bool:
    """True when nothing but a temperature shapes the distribution, which is what the fused ops score."""
    return sampling is None or sampling_distribution.plain(sampling)


def _temperature(sampling: "Sampling | None") -> float:
    return 1.0 if sampling is None else sampling.temperature


class LogitForm(NamedTuple):
    """logits = softcap(scale · (hidden @ weight.T + bias))."""

    scale: float = 1.0
    softcap: float | None = None


class _Head(NamedTuple):
    """What the head's ops read, for as long as its module's forward lasts."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    form: LogitForm
    spare_U: torch.Tensor | None  # ids of the rows without a token, where the distribution has none of them


def _fused(
    head: _Head,
    packed: Packed,
    sampling: "Sampling | None",
    objective: Objective | None,
    chunk_loss: ChunkLoss | None,
) -> torch.Tensor | LossAndStatistics:
    """What `Policy.forward` returns, through the ops that never hold all logits."""
    hidden_NH, weight_VH, bias_V, form, spare_U = head
    if sampling is not None and not is_plain(sampling):
        context = sampling_distribution.context_of(packed.ids_M, packed.lengths, packed.rows_N)
        logp_N = sampling_distribution.sampling_logprob(
            hidden_NH,
            weight_VH,
            bias_V,
            form.softcap,
            form.scale,
            packed.targets_N,
            sampling,
            context,
            spare_U=spare_U,
        )
        return _result_from_logp(logp_N, packed, objective, chunk_loss)
    temperature, targets_N = _temperature(sampling) / form.scale, packed.targets_N
    if spare_U is not None:
        weight_VH, bias_V, targets_N = sampling_distribution.head_of_tokens(
            weight_VH, bias_V, targets_N, spare_U, form.softcap
        )
    if objective is not None:
        return linear_ppo_loss(
            hidden_NH,
            weight_VH,
            targets_N,
            objective.old_logp_N,
            objective.advantages_N,
            cu_seqlens=packed.cu_seqlens,
            **objective.settings,
            bias=bias_V,
            temperature=temperature,
            softcap=form.softcap,
        )
    if chunk_loss is not None:
        return on_policy_loss(
            hidden_NH,
            weight_VH,
            bias_V,
            targets_N,
            packed.counts,
            chunk_loss,
            temperature,
            form.softcap,
        )
    return linear_logprob(
        hidden_NH, weight_VH, targets_N, bias=bias_V, temperature=temperature, softcap=form.softcap
    )


def _result_from_logp(
    logp_N: torch.Tensor, packed: Packed, objective: Objective | None, chunk_loss: ChunkLoss | None
) -> torch.Tensor | LossAndStatistics:
    """What `Policy.forward` returns, from log-probs with a graph."""
    if chunk_loss is not None:
        return loss_of(logp_N, packed.counts, chunk_loss)
    return logp_N if objective is None else objective.loss(logp_N, packed)


class OpenHead(nn.Linear):
    """A model's head that lends its weights to another function for as long as its forward lasts."""

    def forward(self, hidden: torch.Tensor, use: Callable[..., Any] | None = None) -> Any:
        """The logits, or what `use(hidden, weight, bias)` returns."""
        return super().forward(hidden) if use is None else use(hidden, self.weight, self.bias)


@torch.no_grad()
def logit_form(lm: "PreTrainedModel") -> LogitForm | None:
    """How a causal LM computes logits from hidden states; its head becomes an `OpenHead`.

    The form comes from the config entries that architectures use, and is checked on three tokens.

    Returns:
        The form, or None (with the head unchanged) where the logits have another one.
    """
    head = lm.get_output_embeddings()
    if type(head) not in (nn.Linear, OpenHead):
        return None
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    form = LogitForm(float(scale), getattr(config, "final_logit_softcapping", None))
    if form.softcap and form.scale != 1.0:
        return None  # the op takes no scale under its softcap
    if not _gives_the_logits(form, lm, head):
        return None
    # nothing but its forward changes: names, copies and saves stay
    head.__class__ = OpenHead
    return form


def _gives_the_logits(form: LogitForm, lm: "PreTrainedModel", head: nn.Linear) -> bool:
    """True when a form gives the model's own logits, up to rounding."""
    training = lm.training
    lm.eval()
    try:
        ids = torch.arange(1, 4, device=head.weight.device)[None] % head.weight.shape[0]
        hidden = lm.base_model(input_ids=ids).last_hidden_state
        expected = lm(input_ids=ids).logits.float()
        logits = nn.functional.linear(hidden, head.weight, head.bias).float() * form.scale
    except (TypeError, AttributeError, RuntimeError):
        return False  # no backbone of its own, or one that returns something else
    finally:
        lm.train(training)
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    if logits.shape != expected.shape:
        return False
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    return bool(((logits - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)).item())


def sequence_sums(values_N: torch.Tensor, packed: Packed) -> torch.Tensor:
    """[N] -> [S]: sums over each sequence's requested tokens."""
    counts_S = torch.tensor(packed.counts, device=values_N.device)
    sequence_N = torch.repeat_interleave(
        torch.arange(len(packed.counts), device=values_N.device), counts_S, output_size=sum(packed.counts)
    )
    return values_N.new_zeros(len(packed.counts)).index_add(0, sequence_N, values_N)


def trained_rows(mask: Sequence[bool]) -> list[int]:
    """Positions that predict the tokens a mask marks; the first token is predicted by none."""
    return [i - 1 for i, wanted in enumerate(mask) if wanted and i]


def pack_trained(examples: "Sequence[SFTExample]", device: torch.device) -> Packed:
    """Packs SFT examples and asks for their trained tokens."""
    return pack_sequences([e.ids for e in examples], [trained_rows(e.mask) for e in examples], device)
