"""A moderator: a backbone with heads for harm categories, severity, and refusal.

    logits_SX = moderator(packed)           # categories, P(y > 0), P(y > 1), P(y > 2), refusal; fp32

The severity y is 0 to 3. Its head is CORAL's: one weight vector and three biases that fall,
b_k = b_{k-1} − softplus, so P(y > 0) ≥ P(y > 1) ≥ P(y > 2) for any weights. "Unsafe" is P(y > 0) and no head
of its own, so the two cannot contradict each other. Logits are those of the label's share in the training
data, also where its positives had a weight in the loss: log w of the weight w is subtracted here, as the
weighted loss had raised them by it.

Source: Cao, Mirjalili and Raschka (2020), Rank consistent ordinal regression, arXiv 1901.07884.

Shapes: legend in rollout/types.py; S counts sequences (or positions of them), X the outputs of
`ModeratorSpec.outputs`, O = X − 2 the linear outputs (severity has one), K categories, R sources with heads.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from . import quantized
from .backbone import form_of, hidden_states
from .encoders import default_pooling, is_encoder, refuse_pooling
from .lora import plain
from .moderator_spec import LEVELS, ModeratorSpec
from .ngrams import Bags, NgramLayer
from .packing import Packed
from .pooling import pool
from .score_backbone import hidden_size
from .score_head import no_autocast
from .score_inputs import require_backbone

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BOUND = 6.0  # of a bias at the start: log-odds of labels that the data have never or always


class ModeratorHead(nn.Module):
    """The linear heads on a pooled state, for all outputs and sources together; fp32.

    A module of its own: ZeRO-3 gathers a module's own weights.

    Attributes:
        log_weight: log w of the weight that each output's positives have in the loss [X].
    """

    log_weight: torch.Tensor

    def __init__(self, hidden: int, spec: ModeratorSpec, dtype: torch.dtype | None = None) -> None:
        """Draws new heads; biases are 0 until `set_shares`.

        Args:
            hidden: H.
            spec: What is predicted.
            dtype: Of the weights; None for torch's default.
        """
        super().__init__()
        self.categories, self.sources = len(spec.categories), max(1, len(spec.sources))
        self.linear_outputs = len(spec.outputs) - (LEVELS - 2)
        rows = self.sources * self.linear_outputs
        self.weight = nn.Parameter(torch.empty(rows, hidden, dtype=dtype).normal_(0.0, 0.02))
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype))
        # flat, as weight decay spares vectors
        self.gaps = nn.Parameter(torch.zeros(self.sources * (LEVELS - 2), dtype=dtype))
        self.register_buffer("log_weight", torch.zeros(len(spec.outputs)))

    @torch.no_grad()
    def set_shares(self, positive_X: torch.Tensor, negative_X: torch.Tensor, cap: float) -> None:
        """Sets weights of the loss, w = min(cap, negatives / positives), and biases to the labels' shares.

        Call it before ZeRO-3 shards the weights.

        Args:
            positive_X: How often each output is true in the training data.
            negative_X: How often it is false.
            cap: Most that a positive may weigh.
        """
        positive_X, negative_X = positive_X.double(), negative_X.double()
        weight_X = (negative_X / positive_X.clamp(min=1)).clamp(max=cap)
        log_weight_X = weight_X.where((positive_X > 0) & (negative_X > 0), 1.0).log()
        level = slice(self.categories, self.categories + LEVELS - 1)
        # harm above a level is rarer than above the one below, so that its weight must not be smaller
        log_weight_X[level] = log_weight_X[level].cummax(0).values
        self.log_weight.copy_(log_weight_X)
        odds_X = (positive_X.clamp(min=1e-9).log() - negative_X.clamp(min=1e-9).log()).clamp(-_BOUND, _BOUND)
        odds_X = odds_X.where(positive_X + negative_X > 0, 0.0)
        bias_X = odds_X + log_weight_X
        falls = (bias_X[level][:-1] - bias_X[level][1:]).clamp(min=0.05)
        # without severities in the data every harm has the level 1
        falls = falls.where((positive_X + negative_X)[level][1:] > 0, _BOUND)
        self.gaps.copy_(falls.expm1().log().repeat(self.sources))
        linear = [i for i in range(len(bias_X)) if not level.start < i < level.stop]
        self.bias.copy_(bias_X[linear].repeat(self.sources))

    def forward(
        self,
        pooled_SH: torch.Tensor,
        added_SO: torch.Tensor | None = None,
        source_S: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_SX, fp32, under torch.autocast too.

        Args:
            pooled_SH: Pooled states.
            added_SO: What other features add to the linear outputs.
            source_S: int64, the number of each sequence's source; None or -1: the mean of the heads.
        """
        with no_autocast(pooled_SH.device.type):
            scores = F.linear(pooled_SH.float(), self.weight.float(), self.bias.float())
        scores_SRO = scores.view(-1, self.sources, self.linear_outputs)
        falls_RG = F.softplus(self.gaps.float()).view(self.sources, LEVELS - 2)
        falls_SRG = falls_RG.expand(len(scores_SRO), *falls_RG.shape)
        scores_SO, falls_SG = (self._of_source(values, source_S) for values in (scores_SRO, falls_SRG))
        if added_SO is not None:
            scores_SO = scores_SO + added_SO
        categories_SK, severity_S1, rest = scores_SO.split(
            [self.categories, 1, self.linear_outputs - self.categories - 1], 1
        )
        levels = torch.cat([severity_S1, severity_S1 - falls_SG.cumsum(1)], 1)
        return torch.cat([categories_SK, levels, rest], 1) - self.log_weight.float()

    @staticmethod
    def _of_source(values_SRX: torch.Tensor, source_S: torch.Tensor | None) -> torch.Tensor:
        if values_SRX.shape[1] == 1 or source_S is None:
            return values_SRX.mean(1)
        one = values_SRX[torch.arange(len(values_SRX), device=values_SRX.device), source_S.clamp(min=0)]
        return torch.where(source_S[:, None] < 0, values_SRX.mean(1), one)


class ModeratorModel(nn.Module):
    """A backbone and the heads of a ModeratorSpec.

    Attributes:
        form: How the backbone runs several sequences.
        pooling, pairs: As in the spec; ScoreModel has them too.
    """

    backbone: "PreTrainedModel"  # peft may wrap it
    is_moderator = True

    def __init__(self, backbone: nn.Module, spec: ModeratorSpec, packing: bool = True) -> None:
        """Adds new heads to a backbone.

        Args:
            backbone: A transformers model without a head, an encoder or a decoder.
            spec: What is predicted and how texts are read.
            packing: Whether packed sequences run without padding, where the architecture can do that.

        Raises:
            ValueError: The backbone is no transformers model, or has a head.
            UserError: The pooling is unknown, or cls for a decoder.
        """
        super().__init__()
        require_backbone(backbone)
        refuse_pooling(spec.pooling, backbone.config)
        self.backbone, self.spec, self.config = backbone, spec, backbone.config
        self.pooling, self.pairs = spec.pooling, spec.pairs
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = nn.Identity()  # the heads read the pooled hidden states, and it would not learn
        form = form_of(plain(backbone))
        self.form = form if packing else form.unpacked()
        dtype = next(self.backbone.parameters()).dtype
        self.head = ModeratorHead(hidden_size(self.config), spec, dtype)
        self.ngrams = (
            NgramLayer(spec.buckets, self.head.linear_outputs, spec.rate).to(dtype) if spec.buckets else None
        )

    @property
    def packs(self) -> bool:
        """Whether packed sequences run without padding."""
        return self.form.packs

    def base_hash(self) -> str | None:
        """The sha256 of a backbone in 4 bits, which checkpoints compare; None for another one."""
        return quantized.base_hash(plain(self.backbone))

    def pooled(self, packed: Packed) -> torch.Tensor:
        """The state that the heads read: of each sequence, or with pooling last of each wanted position."""
        hidden_MH = hidden_states(plain(self.backbone), packed, self.form)
        if self.pooling == "last":
            return hidden_MH.index_select(0, packed.rows_N)
        return pool(hidden_MH, packed.layout, self.pooling)

    def forward(
        self,
        packed: Packed | None,
        bags: Bags | None = None,
        source_S: torch.Tensor | None = None,
        pooled_SH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits_SX, fp32.

        Args:
            packed: The texts; with pooling last one position of each for each row of the result.
            bags: Their n-grams, where the moderator has such features.
            source_S: int64, the number of each text's source; None or -1: the mean of the heads.
            pooled_SH: States that `pooled` returned before, instead of `packed`.

        Raises:
            ValueError: Both or neither of packed and pooled_SH are given, or bags are missing.
        """
        if (packed is None) == (pooled_SH is None):
            raise ValueError("ModeratorModel: expected one of packed and pooled_SH, got both or neither")
        if self.ngrams is not None and bags is None:
            raise ValueError("ModeratorModel: bags: expected the n-grams of the texts, got None")
        states_SH = self.pooled(packed) if packed is not None else pooled_SH
        assert states_SH is not None, "one of the two was given"
        added_SO = None if self.ngrams is None or bags is None else self.ngrams(bags)
        return self.head(states_SH, added_SO, source_S)


def pooling_of(config: "PretrainedConfig", pooling: str | None) -> str:
    """A moderator's pooling: the given one, else last for decoders, mean for encoders (cls if they say so).

    Raises:
        UserError: The pooling cannot be used.
    """
    if pooling is not None:
        refuse_pooling(pooling, config)
        return pooling
    if is_encoder(config):
        stated = str(getattr(config, "classifier_pooling", None))
        return default_pooling(config) if stated in ("cls", "bos", "mean") else "mean"
    return "last"


def severity_distribution(above_SG: torch.Tensor) -> torch.Tensor:
    """P(y = 0) … P(y = 3) [S, 4] from P(y > 0), P(y > 1), P(y > 2) [S, 3]."""
    if above_SG.dim() != 2 or above_SG.shape[1] != LEVELS - 1:
        raise UserError(f"severity: expected probabilities [S, {LEVELS - 1}], got {list(above_SG.shape)}")
    ones = torch.ones_like(above_SG[:, :1])
    return torch.cat([ones, above_SG], 1) - torch.cat([above_SG, torch.zeros_like(ones)], 1)
