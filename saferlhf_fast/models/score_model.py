"""One `ScoreModel` (reward, cost, critic) around any backbone.

    score = load_score_model(folder)            # AutoModelForSequenceClassification(num_labels=1), or
    safe-rlhf's layout scores_BL = score(ids_BL, mask_BL)          # one per token, fp32 score_B =
    score.end_scores(scores_BL, mask_BL)

Dropout is left as the config has it; the PPO stages switch it off. Files are read in score_checkpoint.py.

Shapes: B sequences, L tokens with padding, H hidden size.
"""

import contextlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError, require
from ..kernels import checks
from .backbone import hidden_states, packs
from .causal_lm import LOADERS, allowed_files, train_every_row
from .folders import has_weights, local_copy, quiet, readable, refuse_large_vocabulary, refuse_missing
from .lora import plain
from .packing import Packed
from .score_checkpoint import read_head


@dataclass(frozen=True)
class Normalizer:
    """safe-rlhf's score normaliser with fixed statistics.

    Plain numbers, so that no cast to bf16 can round them.
    """

    function: str  # affine: (s − mean)/std · scale: s/std · translate: s − mean · identity
    mean: float = 0.0
    var: float = 1.0
    eps: float = 1e-8

    def __call__(self, scores):
        std = self.var**0.5 + self.eps
        if self.function == "affine":
            return (scores - self.mean) / std
        if self.function == "scale":
            return scores / std
        return scores - self.mean if self.function == "translate" else scores


class ScoreHead(nn.Module):
    """Linear(H, outputs) in fp32, whatever the weights' dtype.

    A module of its own: ZeRO-3 gathers a module's own weights.
    """

    def __init__(self, hidden_size, bias=False, dtype=None, outputs=1):
        super().__init__()
        self.outputs = outputs  # ZeRO-3 may leave the weight no shape
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype)) if bias else None

    def forward(self, hidden_BLH):
        """[…, H] -> […], or […, outputs] where there are several; fp32, under torch.autocast too."""
        bias = None if self.bias is None else self.bias.float()
        with _no_autocast(hidden_BLH.device.type):
            scores = F.linear(hidden_BLH.float(), self.weight.float(), bias)
        return scores.squeeze(-1) if len(self.weight) == 1 else scores


def _no_autocast(device):
    """Context in which F.linear keeps fp32. Not every device has an autocast to switch off (meta has none)."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


class ScoreModel(nn.Module):
    """A backbone and a linear head: one score per token. Reward model, cost model and critic are all this.

    In code of your own::

        model = load_score_model(path)               # a reward model as TRL, OpenRLHF or safe-rlhf save it
        model = score_model_from_backbone(path)      # a new head on the body of a causal LM; or ScoreModel(a transformers body)
        score_B = model.end_scores(model(ids_BL, mask_BL), mask_BL)
        save_score_model(folder, model, tokenizer, kind="reward")        # AutoModelForSequenceClassification(num_labels=1)

    The head has no bias, so that export as AutoModelForSequenceClassification is exact; a checkpoint of
    safe-rlhf may bring a bias and a normaliser, which are applied. `kind` is reward, cost, critic or None
    when the files do not say.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        bias: bool = False,
        normalizer: Normalizer | None = None,
        kind: str | None = None,
        packing: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.packs = packs(plain(backbone)) and packing
        self.config = backbone.config
        self.score = ScoreHead(hidden_size(backbone.config), bias, backbone.dtype)
        self.normalizer = normalizer
        self.kind = kind
        accepted = inspect.signature(backbone.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.fixed_inputs = {"use_cache": False} if "use_cache" in accepted else {}
        self.init_head()

    def init_head(self) -> None:
        """Draws a new head: normal with the config's initializer_range (0.02 where it has none), bias 0.

        That is what safe-rlhf and transformers' own class do, so scores start at about 0.02·√H (the last norm
        leaves entries of size one). Under ZeRO-3 the weight is gathered, drawn on rank 0 and handed out;
        without that each rank would write into an empty tensor and the head would stay uninitialised.
        """
        std = getattr(self.config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad(), written(self.score):
            self.score.weight.normal_(0.0, std)
            if self.score.bias is not None:
                self.score.bias.zero_()

    def add_head(self) -> None:
        """A second head, drawn anew, beside the one there is: a critic of two streams.

        Its scores are [..., 2].
        """
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
    ) -> torch.Tensor:
        """-> scores_BL in fp32; entries at padding are finite and mean nothing.

        Of a `Packed` alone: scores_N of the positions that it asks for.

        attention_mask_BL: 1 at real tokens (bool or numbers 0 and 1), padding on either side; None: all are.
        Position ids are counted from each row's first real token when not given. An empty batch gives an
        empty answer. ValueError for what does not fit; ids and a mask's numbers are looked at on the CPU
        alone: elsewhere the host would wait for the device.
        """
        if isinstance(input_ids_BL, Packed):
            if attention_mask_BL is not None or position_ids is not None:
                raise ValueError(
                    "ScoreModel: expected a Packed alone, got a mask or position ids with it: it has its own"
                )
            return self._packed_scores(input_ids_BL)
        self._refuse_ids(input_ids_BL)
        mask_BL = real_tokens("ScoreModel", attention_mask_BL, input_ids_BL)
        if position_ids is not None:
            refuse_positions(position_ids, input_ids_BL)
        if input_ids_BL.numel():
            return self._padded_scores(checks.wide(input_ids_BL), mask_BL, position_ids)
        # A token runs in the place of none: under ZeRO-3 every rank has to gather the weights, and gradients
        # are to be zeros.
        one = torch.zeros(1, 1, dtype=torch.long, device=input_ids_BL.device)
        made, (rows, columns) = self._padded_scores(one, one + 1, None), input_ids_BL.shape
        return made.expand(max(rows, 1), max(columns, 1), *made.shape[2:])[:rows, :columns]

    def _refuse_ids(self, ids_BL):
        """ValueError for ids that are no integers [B, L], lie outside the vocabulary, or have no values to
        look up.
        """
        if ids_BL.dim() != 2 or not checks.whole(ids_BL):
            raise ValueError(
                f"ScoreModel: ids: expected integers [B, L], got {ids_BL.dtype} {list(ids_BL.shape)}"
            )
        if ids_BL.is_meta and not self.score.weight.is_meta:
            raise ValueError(
                f"ScoreModel: ids: expected a device with values, as the model's {self.score.weight.device}, "
                "got meta"
            )
        words = getattr(plain(self.backbone).get_input_embeddings(), "num_embeddings", None)
        if words is not None and not torch.compiler.is_compiling():
            checks.known_ids("ScoreModel", ids_BL, words)

    def _padded_scores(self, ids_BL, mask_BL, position_ids):
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, **self.fixed_inputs}
        if self.takes_positions:
            inputs["position_ids"] = (
                (mask_BL.cumsum(-1) - 1).clamp(min=0) if position_ids is None else position_ids
            )
        return self._scores(self.backbone(**inputs).last_hidden_state)

    def _packed_scores(self, packed):
        hidden_MH = hidden_states(plain(self.backbone), packed, self.packs)
        return self._scores(hidden_MH.index_select(0, packed.rows_N))

    def _scores(self, hidden):
        scores = self.score(hidden)
        return scores if self.normalizer is None else self.normalizer(scores)

    @staticmethod
    def end_scores(scores_BL: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B]: the score at each row's last real token. The mask decides, never a token id.

        A row without a token has no score: ValueError on the CPU; elsewhere, where nobody looks at values,
        NaN.
        """
        if scores_BL.dim() != 2 or not checks.floating(scores_BL):
            raise ValueError(
                f"end_scores: scores: expected floating point [B, L], got {scores_BL.dtype} "
                f"{list(scores_BL.shape)}"
            )
        if attention_mask_BL is None:
            raise ValueError("end_scores: attention_mask: expected a mask [B, L], got None")
        mask_BL = real_tokens("end_scores", attention_mask_BL, scores_BL)
        if not scores_BL.shape[0]:
            return scores_BL.flatten()
        some_B = mask_BL.any(1)
        if not mask_BL.shape[1] or looks(mask_BL) and not some_B.all():
            raise ValueError(
                f"end_scores: attention_mask: expected a real token in each row, got none in row "
                f"{some_B.tolist().index(False)}"
            )
        last_B = mask_BL.shape[1] - 1 - mask_BL.flip(1).argmax(1)
        return scores_BL.gather(1, last_B[:, None]).squeeze(1).where(some_B, float("nan"))


def looks(tensor):
    """Whether values are looked at: on the CPU; elsewhere, and in torch.compile's graph, it would stop what
    runs.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def real_tokens(op, mask_BL, like_BL):
    """A mask of real tokens as int64 [B, L], shaped as `like_BL` and on its device; None: ones.

    Floats count too when they are 0 and 1 with a 1 in each row: without one it is the other kind of mask,
    which is added to attention's scores and has 0 where this one has 1.
    """
    if mask_BL is None:
        return torch.ones_like(like_BL, dtype=torch.long)
    if mask_BL.shape != like_BL.shape or mask_BL.device != like_BL.device or mask_BL.dtype.is_complex:
        raise ValueError(
            f"{op}: attention_mask: expected booleans or numbers 0 and 1 {list(like_BL.shape)} on "
            f"{like_BL.device}, got {mask_BL.dtype} {list(mask_BL.shape)} on {mask_BL.device}"
        )
    if mask_BL.dtype != torch.bool and looks(mask_BL):
        other = (mask_BL != 0) & (mask_BL != 1)
        if other.any():
            raise ValueError(
                f"{op}: attention_mask: expected booleans or numbers 0 and 1, got {mask_BL[other][0].item()}"
            )
        if mask_BL.dtype.is_floating_point and mask_BL.numel() and not mask_BL.any(1).all():
            raise ValueError(
                f"{op}: attention_mask: expected a 1 at each real token (booleans or integers where a row "
                f"has "
                f"none), got {mask_BL.dtype} and a row of zeros, as in a mask that is added"
            )
    return mask_BL.long()


def refuse_positions(position_ids, ids_BL):
    """ValueError for position ids that would be broadcast over columns, or are no integers."""
    expected = (list(ids_BL.shape), [1, ids_BL.shape[1]])
    if (
        list(position_ids.shape) not in expected
        or not checks.whole(position_ids)
        or position_ids.device != ids_BL.device
    ):
        raise ValueError(
            f"ScoreModel: position_ids: expected integers {expected[0]} on {ids_BL.device}, got "
            f"{position_ids.dtype} {list(position_ids.shape)} on {position_ids.device}"
        )


@contextlib.contextmanager
def written(module):
    """Context in which weights may be written even where ZeRO-3 has sharded them: whole on every rank, rank
    0's count.
    """
    sharded = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    from ..runtime import engine

    with engine.written(sharded):
        yield


def hidden_size(config):
    """H of what a backbone returns; multimodal configs keep it in their text part, OPT may project its
    output.
    """
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def load_backbone(path, *, dtype=torch.float32, trust_remote_code=False, allow_pickle=False):
    """-> the architecture's base model, without any head; of a multimodal one the text part.

    UserError when weights are missing.
    """
    require("loading a score model", "train", *LOADERS)
    folder = local_copy(path, allow_pickle)
    if not has_weights(folder):
        raise UserError(f"{path} has no weights; expected a file that ends in .safetensors or .bin")
    from transformers import AutoModel

    with readable(path, "backbone"), quiet():
        backbone, info = AutoModel.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **allowed_files(allow_pickle),
        )
    # Encoders' poolers are not used: the head reads the hidden states.
    refuse_missing(path, info, "backbone", ignore=("pooler",))
    if backbone.config.is_encoder_decoder:
        raise UserError(
            f"{path}: expected a decoder or an encoder as backbone of a score model, got the "
            f"encoder-decoder {type(backbone).__name__}"
        )
    if backbone.config.get_text_config() is not backbone.config:
        backbone = getattr(backbone, "language_model", backbone)
    train_every_row(backbone)
    return backbone


def score_model_from_backbone(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ScoreModel:
    """-> a ScoreModel with a new head on the backbone of a folder or Hub name (a causal LM's, usually)."""
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    return ScoreModel(load_backbone(path, **options), kind=kind)


def load_score_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    new_head: bool = False,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ScoreModel:
    """-> a ScoreModel from a folder or Hub name, head included.

    Read: AutoModelForSequenceClassification(num_labels=1), which is what we write, and safe-rlhf's layout
    with its bias and normaliser. A plain language model is a UserError, unless new_head: then it gets a new
    head (one that has a head keeps it). A folder that says it is a score model and has no head is always one:
    no head is ever drawn in silence. tokenizer: when given, its vocabulary must fit the embedding.
    """
    require("load_score_model", "train", *LOADERS)
    folder = local_copy(path, allow_pickle)
    head = read_head(folder, path, may_lack=new_head)
    backbone = load_backbone(
        path, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    if tokenizer is not None:
        refuse_large_vocabulary(path, tokenizer, backbone.get_input_embeddings().weight.shape[0])
    if head is None:
        return ScoreModel(backbone)
    normalizer = None if head.normalizer is None else Normalizer(**head.normalizer)
    model = ScoreModel(backbone, bias=head.bias is not None, normalizer=normalizer, kind=head.kind)
    expected = hidden_size(backbone.config)
    if head.weight.shape != (1, expected):
        raise UserError(
            f"{path}: expected a score head of shape [1, {expected}], got {list(head.weight.shape)}"
        )
    with torch.no_grad(), written(model.score):
        model.score.weight.copy_(head.weight)
        if head.bias is not None:
            model.score.bias.fill_(head.bias)
    return model
