"""Encoders as score models: which architectures they are, where their score is read, and their heads.

A decoder's score is read at the last token. An encoder's is read where its own sequence-classification class
reads it, at the first token ([CLS]) or from the mean of all, and goes through that class's own head (BERT's
pooler, RoBERTa's dense layer, DeBERTa's ContextPooler …), which is trained with the rest. So the export is
that class, exactly. The class itself computes the head: its base model is replaced by one that hands over
the pooled state, so no architecture's head is written down here. Needs torch alone at import.

Shapes: legend in rollout/types.py; S counts sequences.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from .causal_lm import allowed_files, train_every_row
from .folders import local_copy, quiet, readable, refuse_missing
from .pooling import POOLINGS, pool_rows
from .score_backbone import hidden_size
from .score_checkpoint import ENTRY
from .score_head import ScoreHead

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


ERRORS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError)
"""What an architecture raises that does not take what it is given."""
# What architectures that can pool in several ways call them in `classifier_pooling`.
_OWN_NAMES = {"cls": "cls", "bos": "cls", "mean": "mean"}


def is_encoder(config: "PretrainedConfig") -> bool:
    """Whether an architecture reads in both directions: it has a masked-language model and is no decoder."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING
        and not config.is_encoder_decoder
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "causal", False)  # XLM's and FlauBERT's word for it
    )


def default_pooling(config: "PretrainedConfig") -> str:
    """The pooling of an architecture: last for decoders; for encoders what their config says, else cls."""
    if not is_encoder(config):
        return "last"
    return _OWN_NAMES.get(str(getattr(config, "classifier_pooling", None)), "cls")


class ScoreFiles(NamedTuple):
    """How the files of a score model, or of what will become one, are read."""

    config: "PretrainedConfig"
    pooling: str
    has_own_head: bool  # the head is that of an encoder's classification class, there or to be drawn
    has_head: bool  # the files say that they have a head
    kind: str | None  # reward, cost, critic, or None where they do not say
    pairs: bool  # it reads prompt and response as a pair of texts


def score_files(
    folder: Path, path: str | Path, pooling: str | None = None, trust_remote_code: bool = False
) -> ScoreFiles:
    """Reads from config.json how a score model's files are to be read.

    Args:
        folder: The model's local folder.
        path: The model as the user named it, for messages.
        pooling: Where a new head reads the score; None: as the files or the architecture say. Our score
            models that were saved before there was a choice are read at the last token.
        trust_remote_code: Whether code beside the model may run.

    Raises:
        UserError: The head in the files reads the score elsewhere.
    """
    from transformers import AutoConfig

    with readable(path, "model"), quiet():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    entry = getattr(config, ENTRY, None)
    architectures = getattr(config, "architectures", None) or []
    has_head = entry is not None or any(
        "ForSequenceClassification" in name or name.endswith("ForScore") for name in architectures
    )
    saved = default_pooling(config) if entry is None else str(entry.get("pooling", "last"))
    if has_head and pooling not in (None, saved):
        raise UserError(f"pooling: expected {saved}, as the head of {path} was trained, got {pooling}")
    pooling = pooling or saved
    refuse_pooling(pooling, config)
    stated = getattr(config, "classifier_pooling", "cls")
    if has_head and entry is None and stated not in _OWN_NAMES:
        raise UserError(
            f"{path}: config.json: classifier_pooling: expected {', '.join(_OWN_NAMES)}, got {stated}"
        )
    own = is_encoder(config) and classifier_class(config) is not None and own_pooling(config, pooling)
    pairs = is_encoder(config) and (entry is None or bool(entry.get("pairs")))
    return ScoreFiles(config, pooling, own, has_head, (entry or {}).get("kind"), pairs)


def refuse_pooling(pooling: str, config: "PretrainedConfig") -> None:
    """Raises a UserError for an unknown pooling, and for cls where the first token sees no other."""
    if pooling not in POOLINGS:
        raise UserError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    if pooling == "cls" and not is_encoder(config):
        raise UserError(
            f"pooling: expected last or mean for {config.model_type}, which is no encoder: its first token "
            "does not see the text; got cls"
        )


def reads_pairs(path: str | Path, trust_remote_code: bool = False) -> bool:
    """Whether the score model or backbone at a path reads prompt and response as a pair of texts.

    Encoders do, except score models that were trained here before there was that form.
    """
    from transformers import AutoConfig

    with readable(path, "model"), quiet():
        folder = Path(path).expanduser()
        config = AutoConfig.from_pretrained(
            str(folder if folder.is_dir() else path), trust_remote_code=trust_remote_code
        )
    entry = getattr(config, ENTRY, None)
    return is_encoder(config) and (entry is None or bool(entry.get("pairs")))


class PooledStates(nn.Module):
    """Stands where a classification class has its base model, and hands over states that are pooled already.

    It holds the base model's pooler where that has one, under the same name.
    """

    def __init__(self, base: "PreTrainedModel") -> None:
        """Takes the pooler out of a base model, in place."""
        super().__init__()
        if getattr(base, "pooler", None) is not None:
            self.pooler = base.pooler
            _take_pooler(base)
        # ALBERT's pooler is the linear layer alone
        self.activation = getattr(base, "pooler_activation", None)

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        """A base model's output for pooled states [S, 1, H]."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooler, pooled = getattr(self, "pooler", None), None
        if isinstance(pooler, nn.Linear):
            pooled = pooler(inputs_embeds[:, 0])
        elif pooler is not None:
            pooled = pooler(inputs_embeds)
        if pooled is not None and self.activation is not None:
            pooled = self.activation(pooled)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)


def _take_pooler(base: Any) -> None:
    """Leaves nothing to compute in a pooler's place; not None, which some architectures would call."""
    base.pooler = nn.Identity()


class EncoderHead(nn.Module):
    """The head of an architecture's own sequence-classification class, with one score in fp32."""

    outputs = 1
    bias = None  # what the class has no place for; its own bias is in `classifier`

    def __init__(self, classifier: "PreTrainedModel") -> None:
        """Takes the head out of a model, in place.

        Args:
            classifier: A transformers model of one label. Its base model is the backbone, and loses its
                pooler.
        """
        super().__init__()
        prefix = classifier.base_model_prefix
        setattr(classifier, prefix, PooledStates(getattr(classifier, prefix)))
        last = [name for name, m in classifier.named_modules() if isinstance(m, nn.Linear)][-1]
        linear = classifier.get_submodule(last)
        head = ScoreHead(linear.in_features, linear.bias is not None, linear.weight.dtype)
        head.weight, head.bias = linear.weight, linear.bias
        parent, _, name = last.rpartition(".")
        setattr(classifier.get_submodule(parent), name, head)
        self.classifier = classifier

    def forward(self, pooled_SH: torch.Tensor) -> torch.Tensor:
        """score_S, fp32."""
        ones = torch.ones(len(pooled_SH), 1, dtype=torch.long, device=pooled_SH.device)
        return self.classifier(inputs_embeds=pooled_SH[:, None], attention_mask=ones).logits.view(-1)

    def exported(self) -> dict[str, torch.Tensor]:
        """{name in the class: tensor} of the head's weights."""
        return {name: tensor.detach() for name, tensor in self.classifier.state_dict().items()}


def classifier_class(config: "PretrainedConfig") -> "type[PreTrainedModel] | None":
    """The sequence-classification class of an architecture, or None."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as mapping

    return mapping[type(config)] if type(config) in mapping else None


def own_pooling(config: "PretrainedConfig", pooling: str) -> bool:
    """Whether an encoder's own class can read the score so; where it can choose, its config is set to it."""
    if not hasattr(config, "classifier_pooling"):
        return pooling == "cls"
    if pooling == "last":
        return False
    config.classifier_pooling = "bos" if pooling == "cls" and config.model_type == "eurobert" else pooling
    return True


def load_encoder(
    path: str | Path,
    files: ScoreFiles,
    new_head: bool,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> "tuple[PreTrainedModel, EncoderHead]":
    """Loads an encoder with the head of its own sequence-classification class.

    Args:
        path: A model folder or a name on the Hub.
        files: What `score_files` returned for it.
        new_head: Whether what lacks a head gets a new one.
        dtype: The type of the weights.
        trust_remote_code: Whether code beside the model may run.
        allow_pickle: Whether weights that exist in pickles alone are read.

    Returns:
        The backbone and the head.

    Raises:
        UserError: Weights are missing, or the head has several labels.
    """
    config, folder = copy.deepcopy(files.config), local_copy(path, allow_pickle)
    if files.has_head and config.num_labels != 1:
        raise UserError(f"{path}: expected a head with one score, got one of {config.num_labels} labels")
    if not files.has_head and not new_head:
        raise UserError(
            f"{path}: expected a score model (AutoModelForSequenceClassification), got a plain "
            f"{', '.join(config.architectures or ['model'])} without a head; train one on it with the stages "
            "reward and cost"
        )
    cls = classifier_class(config)
    assert cls is not None, "an encoder without the class has no head of its own"
    config.num_labels = 1
    with readable(path, "score model"), quiet():
        model, info = cls.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **allowed_files(allow_pickle),
        )
    prefix = model.base_model_prefix
    backbone = getattr(model, prefix)
    ignored = () if files.has_head else _head_names(model)
    missing = [name for name in info["missing_keys"] if name not in ignored]
    refuse_missing(path, {"missing_keys": missing}, "score model")
    train_every_row(backbone)
    own_score = _score_of_probe(model)
    head = EncoderHead(model)
    _refuse_other_score(path, own_score, backbone, head, files.pooling)
    return backbone, head


@torch.no_grad()
def _score_of_probe(model: "PreTrainedModel") -> torch.Tensor | None:
    """A classification model's score of a few tokens; None where it cannot run on tokens alone."""
    ids, training = _probe(model), model.training
    try:
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.view(-1)
    except ERRORS:
        return None
    finally:
        model.train(training)


@torch.no_grad()
def _refuse_other_score(
    path: str | Path,
    expected: torch.Tensor | None,
    backbone: "PreTrainedModel",
    head: EncoderHead,
    pooling: str,
) -> None:
    """Raises a UserError where backbone and head do not give the class's own score.

    Some classes give their base model more than tokens (Longformer's global attention), or have another one
    than the architecture's (Funnel).
    """
    ids, modes = _probe(backbone), (backbone.training, head.training)
    try:
        hidden_BLH = backbone.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        got = head.eval()(pool_rows(hidden_BLH, torch.ones_like(ids), pooling))
        tolerance = 1e-4 if got.dtype == backbone.dtype else 5e-2
        same = expected is not None and torch.allclose(got, expected.float(), rtol=tolerance, atol=tolerance)
        same = same and hidden_BLH.shape[1] == ids.shape[1]  # Funnel's class has fewer states than tokens
    except ERRORS:
        same = False
    finally:
        backbone.train(modes[0]), head.train(modes[1])
    if not same:
        raise UserError(f"{path}: {_other_score(head, pooling)}")


def _other_score(head: EncoderHead, pooling: str) -> str:
    """The sentence about a classification class that reads more than the pooled state."""
    return (
        f"expected an encoder whose classification class computes its score from the state of {pooling} "
        f"alone, got {type(head.classifier).__name__}, which does not; pooling=mean trains a linear head on "
        "its backbone"
    )


def _probe(model: "PreTrainedModel") -> torch.Tensor:
    """A few token ids [1, 8] that are no padding."""
    embedding = model.get_input_embeddings()
    rows, pad = embedding.weight.shape[0], getattr(model.config, "pad_token_id", None)
    usable = [i for i in range(rows) if i != pad]
    return torch.tensor(
        [[usable[(7 * i + 3) % len(usable)] for i in range(8)]], device=embedding.weight.device
    )


def _head_names(model: "PreTrainedModel") -> list[str]:
    """Names of the weights of a classification model that belong to its head; a base's pooler does."""
    prefix = model.base_model_prefix
    return [
        name
        for name in model.state_dict()
        if not name.startswith(f"{prefix}.") or name.startswith(f"{prefix}.pooler.")
    ]


def new_encoder_head(backbone: "PreTrainedModel", pooling: str) -> EncoderHead | None:
    """A new head of the class that an encoder's architecture has for sequence classification.

    Args:
        backbone: The encoder; its pooler, where it has one, moves into the head.
        pooling: Where the score is read.

    Returns:
        The head; None where the model is no encoder, or its class cannot read the score there.

    Raises:
        UserError: The class reads more than the pooled state.
    """
    cls = classifier_class(backbone.config) if is_encoder(backbone.config) else None
    if cls is None or not own_pooling(backbone.config, pooling):
        return None
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    with torch.device("meta"):
        model: Any = cls(config).to(backbone.dtype)
    drawn = getattr(model, cls.base_model_prefix)
    if getattr(backbone, "pooler", None) is not None:
        if getattr(drawn, "pooler", None) is not None:
            drawn.pooler = backbone.pooler
        _take_pooler(backbone)  # RoBERTa's class, for one, has a dense layer of its own and no pooler
    head = EncoderHead(model)
    for module in head.modules():
        if any(weight.is_meta for weight in module.parameters(recurse=False)):
            module.to_empty(device=backbone.device, recurse=False)
            _draw(module, config)
    try:
        with torch.no_grad():
            head(torch.zeros(1, hidden_size(config), dtype=backbone.dtype, device=backbone.device))
    except (TypeError, AttributeError) as error:  # Longformer's wants tokens, LUKE's entities
        raise UserError(_other_score(head, pooling)) from error
    return head


def _draw(module: nn.Module, config: "PretrainedConfig") -> None:
    """Draws the weights of a layer of a head as transformers does: normal, biases 0, norms 1."""
    std = getattr(config, "initializer_range", None) or 0.02
    for name, weight in module.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(weight)
        elif weight.dim() == 1:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, 0.0, std)
