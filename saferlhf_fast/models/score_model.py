"""One `ScoreModel` (reward, cost, critic) around any backbone.

    score = load_score_model(folder)              # transformers' layout of one label, or safe-rlhf's
    scores_BL = score(ids_BL, mask_BL)            # one per token, fp32
    score_B = score.end_scores(scores_BL, mask_BL)

Dropout stays as the config has it; the PPO stages switch it off. The head is in score_head.py, the
reading of files in score_checkpoint.py, the checks of masks in score_inputs.py, encoders in encoders.py.

Shapes: legend in rollout/types.py.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError, require
from ..kernels import checks
from . import quantized
from .backbone import form_of, hidden_states, token_types
from .causal_lm import LOADERS
from .encoders import (
    EncoderHead,
    default_pooling,
    is_encoder,
    load_encoder,
    new_encoder_head,
    refuse_pooling,
    score_files,
)
from .folders import local_copy, refuse_large_vocabulary
from .lora import plain
from .packing import Packed, pack_sequences
from .pooling import pool, pool_rows
from .row_form import fixed_inputs, row_inputs
from .score_backbone import hidden_size as hidden_size
from .score_backbone import load_backbone as load_backbone
from .score_backbone import written
from .score_checkpoint import Head, read_head
from .score_head import Normalizer as Normalizer
from .score_head import ScoreHead as ScoreHead
from .score_inputs import (
    KINDS,
    last_scores,
    real_tokens,
    refuse_positions,
    require_backbone,
    require_kind,
    require_parts,
    require_source,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ScoreModel(nn.Module):
    """A backbone and a head: one score per token. Reward model, cost model and critic are all this.

    In code of your own::

        model = load_score_model(path)               # a reward model as TRL, OpenRLHF or safe-rlhf save it
        model = score_model_from_backbone(path)      # a new head on the backbone of a causal LM
        model = ScoreModel(backbone)                 # a new head on a transformers model
        score_B = model.end_scores(model(ids_BL, mask_BL), mask_BL)
        save_score_model(folder, model, tokenizer, kind="reward")        # as transformers reads it

    The head has no bias, so that export as AutoModelForSequenceClassification is exact; a checkpoint of
    safe-rlhf may bring a bias and a normaliser, which are applied. `kind` is reward, cost, critic or None
    when the files do not say. With `pooling` cls or mean each token has the score of its whole sequence; an
    encoder then has the head of its architecture's own classification class (encoders.py).
    """

    backbone: "PreTrainedModel"  # peft may wrap it

    def __init__(
        self,
        backbone: nn.Module,
        *,
        bias: bool = False,
        normalizer: Normalizer | None = None,
        kind: str | None = None,
        packing: bool = True,
        pooling: str = "last",
        head: EncoderHead | None = None,
    ) -> None:
        """Adds a new head to a backbone.

        Args:
            backbone: A transformers model without a head; peft may wrap it.
            bias: Whether the head has a bias.
            normalizer: What is applied to the scores; None for nothing.
            kind: reward, cost, critic, or None where it is not known.
            packing: Whether packed sequences run without padding, where the architecture can do that.
            pooling: Where the score is read: last (every token has its own), cls, or mean.
            head: An encoder's head; None: a new one.

        Raises:
            ValueError: The backbone is no transformers model or has a head, or another argument is wrong.
            UserError: The pooling is unknown, or cls for a decoder, whose first token sees no other.
        """
        super().__init__()
        require_backbone(backbone)
        require_parts(bias=bias, packing=packing, normalizer=normalizer, head=head)
        require_kind("ScoreModel", kind, *KINDS, None)
        refuse_pooling(pooling, backbone.config)
        self.pooling = pooling
        self.backbone = backbone
        form = form_of(plain(self.backbone))
        self.form = form if packing else form.unpacked()
        self.config = self.backbone.config
        if head is None and pooling != "last":
            head = new_encoder_head(plain(self.backbone), pooling)
        self.score: ScoreHead | EncoderHead
        self.score = head or ScoreHead(hidden_size(self.config), bias, self.backbone.dtype)
        self.normalizer = normalizer
        self.kind = kind
        # whether it is trained on prompt and response as a pair of texts; the loaders know better
        self.pairs = pooling != "last" and is_encoder(self.config)
        if head is None:
            self.init_head()

    @property
    def packs(self) -> bool:
        """Whether packed sequences run without padding."""
        return self.form.packs

    def base_hash(self) -> str | None:
        """The sha256 of a backbone in 4 bits, which checkpoints compare; None for another one."""
        return quantized.base_hash(plain(self.backbone))

    def init_head(self) -> None:
        """Draws a new head: normal with the config's initializer_range (0.02 where it has none), bias 0.

        safe-rlhf and transformers' own class do the same, so scores start at about 0.02·√H (the last norm
        leaves entries of size one). Under ZeRO-3 the weight is gathered, drawn on rank 0 and broadcast;
        without that each rank would write into an empty tensor and the head would stay uninitialised.
        """
        std = getattr(self.config.get_text_config(), "initializer_range", None) or 0.02
        assert isinstance(self.score, ScoreHead), "an encoder's own head is drawn when it is made"
        with torch.no_grad(), written(self.score):
            self.score.weight.normal_(0.0, std)
            if self.score.bias is not None:
                self.score.bias.zero_()

    def add_head(self) -> None:
        """Adds a second head, newly drawn, for a critic of two streams; scores are then [..., 2].

        Raises:
            UserError: The model has one score for each sequence, and a critic needs one before each token.
        """
        if self.pooling != "last" or not isinstance(self.score, ScoreHead):
            raise UserError(f"pooling: expected last, as a critic needs, got {self.pooling}")
        first = self.score.weight.detach().clone()
        self.score = ScoreHead(first.shape[1], outputs=2, dtype=first.dtype)
        self.init_head()
        with torch.no_grad():
            self.score.weight[:1].copy_(first)
        self.normalizer = None

    def forward(
        self,
        input_ids_BL: torch.Tensor | Packed,
        attention_mask_BL: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One score for each token.

        Args:
            input_ids_BL: Integers, or a `Packed` alone; an empty batch gives an empty answer.
            attention_mask_BL: 1 at real tokens (bool or numbers 0 and 1), padding on either side; None: all
                tokens are real.
            position_ids: Integers [B, L] or [1, L]; None: counted from each row's first real token.
            token_type_ids: Integers [B, L], as the tokenizer gives them for pairs; None: all 0. A model
                without token types ignores them.

        Returns:
            scores_BL, fp32; entries at padding are finite and mean nothing. Of a `Packed` scores_N of the
            positions that it asks for.

        Raises:
            ValueError: Shapes, types or devices do not agree, or (on the CPU) ids are outside the vocabulary
                or a mask holds other numbers.
        """
        if isinstance(input_ids_BL, Packed):
            if any(given is not None for given in (attention_mask_BL, position_ids, token_type_ids)):
                raise ValueError(
                    "ScoreModel: expected a Packed alone, got a mask or position ids with it: it has its own"
                )
            return self._packed_scores(input_ids_BL)
        self._refuse_ids(input_ids_BL)
        mask_BL = real_tokens("ScoreModel", attention_mask_BL, input_ids_BL)
        if position_ids is not None:
            refuse_positions(position_ids, input_ids_BL)
        if input_ids_BL.numel():
            ids_BL = checks.as_int32_or_int64(input_ids_BL)
            return self._padded_scores(ids_BL, mask_BL, position_ids, token_type_ids)
        # An empty batch runs one token: under ZeRO-3 every rank has to gather the weights, and gradients
        # must be zeros.
        one = torch.zeros(1, 1, dtype=torch.long, device=input_ids_BL.device)
        scores, (rows, columns) = self._padded_scores(one, one + 1), input_ids_BL.shape
        return scores.expand(max(rows, 1), max(columns, 1), *scores.shape[2:])[:rows, :columns]

    def _refuse_ids(self, ids_BL: torch.Tensor) -> None:
        """Raises a ValueError for ids that are no integers [B, L], without values or out of vocabulary."""
        checks.tensor_argument("ScoreModel", "ids", ids_BL)
        if ids_BL.dim() != 2 or not checks.is_integer(ids_BL):
            raise ValueError(
                f"ScoreModel: ids: expected integers [B, L], got {ids_BL.dtype} {list(ids_BL.shape)}"
            )
        if ids_BL.is_meta and not self.score.weight.is_meta:
            raise ValueError(
                f"ScoreModel: ids: expected a device with values, as the model's {self.score.weight.device}, "
                "got meta"
            )
        vocabulary = getattr(plain(self.backbone).get_input_embeddings(), "num_embeddings", None)
        if vocabulary is not None and not torch.compiler.is_compiling():
            checks.known_ids("ScoreModel", ids_BL, vocabulary)

    def _padded_scores(
        self,
        ids_BL: torch.Tensor,
        mask_BL: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inner = plain(self.backbone)
        if not self.form.pads:
            return self._scores_of_each_row(ids_BL, mask_BL, position_ids, token_type_ids)
        counted_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        inputs = row_inputs(inner, self.form, ids_BL, mask_BL, counted_BL)
        if position_ids is not None and "position_ids" in inputs:
            inputs["position_ids"] = position_ids
        inputs |= token_types(inner, token_type_ids) | fixed_inputs(inner)
        hidden_BLH = self.backbone(**inputs).last_hidden_state
        if self.pooling == "last":
            return self._scores(hidden_BLH)
        return self._scores(pool_rows(hidden_BLH, mask_BL, self.pooling))[:, None].expand(ids_BL.shape)

    def _scores_of_each_row(
        self,
        ids_BL: torch.Tensor,
        mask_BL: torch.Tensor,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Scores of an architecture whose rows see their padding: each row's tokens by themselves."""
        if position_ids is not None:
            raise ValueError(
                f"ScoreModel: position_ids: expected None for a {type(plain(self.backbone)).__name__}, whose "
                "rows run without their padding, got a tensor"
            )
        real_BL = mask_BL.bool()
        rows = [ids[real].tolist() for ids, real in zip(ids_BL, real_BL)]
        packed = pack_sequences(rows, [range(len(row)) for row in rows], ids_BL.device)
        if token_type_ids is not None:
            packed = dataclasses.replace(packed, types_M=token_type_ids[real_BL])
        scores_M = self._packed_scores(packed)
        scores_BL = scores_M.new_zeros(*ids_BL.shape, *scores_M.shape[1:])
        return scores_BL.index_put((real_BL,), scores_M)

    def _packed_scores(self, packed: Packed) -> torch.Tensor:
        hidden_MH = hidden_states(plain(self.backbone), packed, self.form)
        if self.pooling == "last":
            return self._scores(hidden_MH.index_select(0, packed.rows_N))
        score_S = self._scores(pool(hidden_MH, packed.layout, self.pooling))
        return score_S.index_select(0, packed.sequence_N)

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.score(hidden)
        return scores if self.normalizer is None else self.normalizer(scores)

    @staticmethod
    def end_scores(scores_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
        """The score at each row's last real token. The mask decides which that is, never a token id.

        Args:
            scores_BL: Floating point.
            attention_mask_BL: 1 at real tokens.

        Returns:
            [B]; NaN for a row without a token on a device where values are not checked.

        Raises:
            ValueError: Shapes, types or devices do not agree, or (on the CPU) a row has no token.
        """
        return last_scores(scores_BL, attention_mask_BL)


def score_model_from_backbone(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
    pooling: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ScoreModel:
    """A ScoreModel with a new head on the backbone of another model, a causal LM or an encoder.

    Args:
        path: A model folder or a name on the Hub.
        dtype: The type of the weights.
        kind: reward, cost, critic or None.
        pooling: Where the score is read; None: the architecture's own (last; cls or mean of an encoder).
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read.

    Returns:
        The model.

    Raises:
        UserError: As `load_backbone`.
    """
    require_source("score_model_from_backbone", path, dtype)
    require_kind("score_model_from_backbone", kind, *KINDS, None)
    backbone = load_backbone(
        path, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    model = ScoreModel(backbone, kind=kind, pooling=pooling or default_pooling(backbone.config))
    model.pairs = is_encoder(backbone.config)
    return model


def load_score_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    new_head: bool = False,
    pooling: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bits: int | None = None,
) -> ScoreModel:
    """Loads a ScoreModel with its head.

    Read are AutoModelForSequenceClassification(num_labels=1), of decoders and of encoders, which we write
    too, and safe-rlhf's layout with its bias and normaliser.

    Args:
        path: A model folder or a name on the Hub.
        dtype: The type of the weights.
        new_head: Whether a plain language model gets a new head; a model that has a head keeps it.
        pooling: Where a new head reads the score; None: as the files or the architecture say.
        tokenizer: When given, its vocabulary must fit the embedding.
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read.
        bits: 4 quantises the backbone's linear layers, as in `load_causal_lm`.

    Returns:
        The model.

    Raises:
        UserError: As `load_backbone`; for a plain language model without `new_head`; and for a pooling that
            is not the one of the head in the files. A folder that says that it is a score model and has no
            head is refused in any case: no head is ever drawn silently.
    """
    require_source("load_score_model", path, dtype)
    require("load_score_model", "train", *LOADERS)
    files: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    folder = local_copy(path, allow_pickle)
    found = score_files(folder, path, pooling, trust_remote_code)
    if found.has_own_head:
        if bits is not None:
            raise UserError(f"lora.bits: expected a decoder to quantise, got the encoder {path}")
        backbone, own_head = load_encoder(path, found, new_head, dtype=dtype, **files)
        model = ScoreModel(backbone, kind=found.kind, pooling=found.pooling, head=own_head)
    else:
        head = read_head(folder, path, may_lack=new_head)
        model = _with_head(path, load_backbone(path, dtype=dtype, bits=bits, **files), head, found.pooling)
    model.pairs = found.pairs
    if tokenizer is not None:
        refuse_large_vocabulary(path, tokenizer, model.backbone.get_input_embeddings().weight.shape[0])
    return model


def _with_head(path: str | Path, backbone: "PreTrainedModel", head: Head | None, pooling: str) -> ScoreModel:
    """A backbone with a linear head, as it was read or (None) newly drawn."""
    if head is None:
        return ScoreModel(backbone, pooling=pooling)
    normalizer = None if head.normalizer is None else Normalizer(**head.normalizer)
    model = ScoreModel(
        backbone, bias=head.bias is not None, normalizer=normalizer, kind=head.kind, pooling=pooling
    )
    expected = hidden_size(backbone.config)
    if head.weight.shape != (1, expected):
        raise UserError(
            f"{path}: expected a score head of shape [1, {expected}], got {list(head.weight.shape)}"
        )
    assert isinstance(model.score, ScoreHead), "an encoder's own head is read with its classification class"
    with torch.no_grad(), written(model.score):
        model.score.weight.copy_(head.weight)
        if model.score.bias is not None and head.bias is not None:
            model.score.bias.fill_(head.bias)
    return model
