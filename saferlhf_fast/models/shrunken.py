"""A tiny random model of an architecture, on the CPU: what a probe at loading runs instead of the large one.

Kept is what decides how sequences influence each other: the class, the kinds of layers (one or two of each),
the kind of attention and of rotary factors, heads that share keys. Widths, the vocabulary and the number of
layers are reduced, and so is every length at which an architecture changes what it does (windows, chunks,
tokens that an index chooses, the context that rotary factors were trained with), so that 64 tokens are beyond
all of them. A copy costs less than a second, whatever the size of the model.

Leaves out: the weights. What a probe learns holds for the architecture, not for the checkpoint.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WINDOW = 16
"""Most tokens of a window, chunk or block, in a shrunken configuration."""
CHOSEN = 8
"""Most tokens that an index chooses."""
CONTEXT = 32
"""Longest sequence with the first rotary factors."""
POSITIONS = 256
"""Places of a table of positions: more than a probe's longest sequence, and than all its tokens together."""
VOCABULARY = 128
MOST_PARAMETERS = 256_000_000
"""Larger copies are not built."""

_LENGTH = re.compile(r"(^|_)(window|local|chunk|block|span|stride|conv_size)(_|s?$)|_window")
_CHOSEN = re.compile(r"index_topk|index_top_k|topk_tokens|top_k_tokens|index_topk_blocks")
_NO_LENGTH = re.compile(
    r"layer|head|dim|hidden|factor|freq|pattern|type|use_|norm|dropout|theta|expert|quant|rank|groups"
)
_CONTEXT = ("original_max_position_embeddings", "model_max_length", "rope_original_max_position_embeddings")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
)
_KINDS = ("layer_types", "layers_block_type", "layer_block_types", "block_types")
_INDICES = re.compile(r"layer|idx|indices|_ids$|_blocks$")
_PERIOD = re.compile(r"period|interval|every|pattern|freq|sparse_step|_step$")
_WIDE = re.compile(
    r"(^|_)(intermediate_size|ffn_dim|n_inner|d_ff|ffn_hidden_size|d_inner|hidden_dim|ff_dim|dim_ff)(_|$)"
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "experts_per_token", "moe_k")
_GROUPS = ("n_group", "topk_group")


def shrunken(model_class: "type[PreTrainedModel]", config: "PretrainedConfig") -> "Iterator[PreTrainedModel]":
    """Tiny models of an architecture, the smallest first; the caller takes the first one that runs.

    Args:
        model_class: A class of transformers, with or without a head.
        config: A model's own configuration; not changed.

    Yields:
        Models in evaluation mode, in fp32 on the CPU, with random weights everywhere (also where a new model
        has zeros), and with the attention that the class has by itself.
    """
    for narrow in (True, False):
        with reproducible():
            try:
                small = shrunken_config(config, narrow)
                if _parameters(model_class, small) > MOST_PARAMETERS:
                    continue
                model = model_class._from_config(small, dtype=torch.float32)
                _randomize(model)
            except Exception:  # a configuration that this class cannot have: whatever its constructor raises
                continue
        yield model.eval()


def shrunken_config(config: "PretrainedConfig", narrow: bool) -> "PretrainedConfig":
    """A copy of a configuration with reduced lengths and depth; narrow ones also have reduced widths."""
    small = copy.deepcopy(config)
    small._attn_implementation = _own_attention(config)
    for part in _parts(small):
        _shorten(part)
        _thin(part)
        if narrow:
            _narrow(part)
    return small


def _parts(config: "PretrainedConfig") -> "list[PretrainedConfig]":
    """A configuration and those inside it."""
    from transformers import PretrainedConfig

    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for each in inner for part in _parts(each))]


def changes_with_length(config: "PretrainedConfig") -> dict[str, int]:
    """{name: value} of the lengths that a configuration names; empty for one that names none."""
    found: dict[str, int] = {}
    for part in (config, config.get_text_config()):
        for name, value in _settings(part).items():
            if isinstance(value, int) and not isinstance(value, bool) and value > 1 and _is_length(name):
                found[name] = value
        if any(kind in str(rope_kinds(part)) for kind in ("longrope", "dynamic")):
            original = [p.get("original_max_position_embeddings") for p in rope_tables(part)]
            found["rope_parameters"] = max([n for n in original if n] or [part.max_position_embeddings])
    return found


def rope_tables(config: "PretrainedConfig") -> list[dict[str, Any]]:
    """The rotary parameters of a configuration: one table, or one for each kind of layer."""
    table = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(table, dict):
        return []
    nested = [value for value in table.values() if isinstance(value, dict)]
    return nested or [table]


def rope_kinds(config: "PretrainedConfig") -> set[str]:
    """The kinds of rotary factors: default, linear, yarn, dynamic, longrope and others."""
    return {str(t.get("rope_type", t.get("type", "default"))) for t in rope_tables(config)}


def _own_attention(config: "PretrainedConfig") -> str | None:
    from .attention import NAMES

    own = {packed_form: name for name, packed_form in NAMES.items()}
    current = config._attn_implementation
    return own.get(current, current)


def _is_length(name: str) -> bool:
    return bool(_CHOSEN.search(name) or _LENGTH.search(name) and not _NO_LENGTH.search(name))


def _settings(config: "PretrainedConfig") -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _set(config: "PretrainedConfig", name: str, value: Any) -> None:
    # A property, or a field that is checked: the configuration then keeps its own value.
    with contextlib.suppress(Exception):
        setattr(config, name, value)


def _least(value: Any, most: int) -> Any:
    """A number, or each number of a list, reduced to `most`; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_least(v, most) for v in value)
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        return most
    return value


def _shorten(config: "PretrainedConfig") -> None:
    """Reduces lengths; a window as wide as the model's context is none, and stays wider than the probe."""
    context = _read(config, "max_position_embeddings")
    dynamic = any("dynamic" in kind for kind in rope_kinds(config))
    for name, value in _settings(config).items():
        if _CHOSEN.search(name):
            _set(config, name, _least(value, CHOSEN))
        elif name in _CONTEXT:
            _set(config, name, _least(value, CONTEXT))
        elif name in _POSITIONS:
            _set(config, name, _least(value, CONTEXT if dynamic else POSITIONS))
        elif _is_length(name):
            beyond = context and isinstance(value, int) and value >= context
            _set(config, name, _least(value, POSITIONS if beyond else WINDOW))
    for table in rope_tables(config):
        if "original_max_position_embeddings" in table:
            table["original_max_position_embeddings"] = CONTEXT


def _thin(config: "PretrainedConfig") -> None:
    """Reduces the vocabulary, the experts, and the layers to one or two of each kind."""
    for name, value in _settings(config).items():
        if name in ("vocab_size", "vocab_size_per_layer_input"):
            _set(config, name, _least(value, VOCABULARY))
        elif name in _EXPERTS:
            _set(config, name, _least(value, 8))
        elif name in _ROUTED:
            _set(config, name, _least(value, 2))
        elif name in _GROUPS:
            _set(config, name, _least(value, 1))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= VOCABULARY:
            _set(config, name, 0)
    count = next((n for n in (_read(config, name) for name in _LAYERS) if n), None)
    if count is None:
        return
    kept = _kept_layers(config, count)
    for name, value in _settings(config).items():
        if not isinstance(value, (list, tuple)):
            continue
        if len(value) == count:
            _set(config, name, type(value)(value[i] for i in kept))
        elif _has_indices(name, value, count):
            _set(config, name, type(value)(kept.index(i) for i in value if i in kept))
    for name in _LAYERS:
        if _read(config, name) == count:
            _set(config, name, len(kept))


def _has_indices(name: str, values: Any, count: int) -> bool:
    """Whether a setting lists some of `count` layers by their index."""
    return bool(_INDICES.search(name) and values) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < count for v in values
    )


def _kept_layers(config: "PretrainedConfig", count: int) -> list[int]:
    """Indices of the first two layers and of the first of each other kind.

    Where a rule gives the kinds they are the first layers, as many as its pattern takes.
    """
    settings = {n: v for n, v in _settings(config).items() if isinstance(v, (list, tuple))}
    lists = [v for v in settings.values() if len(v) == count]
    lists += [[i in v for i in range(count)] for n, v in settings.items() if _has_indices(n, v, count)]
    ruled = (getattr(config, n, None) for n in _KINDS if n not in settings)
    by_rule = [v for v in ruled if isinstance(v, (list, tuple)) and len(v) == count]
    seen, kept = set(), []
    for i in range(count):
        kind = str([values[i] for values in lists + by_rule])
        if kind not in seen or i < 2:
            kept.append(i)
        seen.add(kind)
    if by_rule:
        kept = list(range(max(kept) + 1))
    elif not lists:
        periods = [v for n, v in _settings(config).items() if _PERIOD.search(n) and isinstance(v, int)]
        kept = list(range(min(count, max([4, *(n for n in periods if n <= 12)]))))
    return kept[:12]


def _narrow(config: "PretrainedConfig") -> None:
    """Reduces widths: four heads of the model's own size, or of 16 where the width gives it."""
    names = _settings(config)
    for name, value in names.items():
        if _WIDE.search(name):
            _set(config, name, _least(value, 32))
    heads, shared, width, size = (
        _read(config, n) for n in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    )
    if width is None:
        return
    if heads is None:
        if "expand" not in names:  # whose inner width has heads of its own
            for name in ("hidden_size", "attention_hidden_size"):
                _set(config, name, _least(_read(config, name), 64))
        return
    _set(config, "num_attention_heads", 4)
    for name in ("decoder_attention_heads", "encoder_attention_heads"):
        if name in names:
            _set(config, name, 4)
    if shared is not None:
        _set(config, "num_key_value_heads", max(1, 4 * shared // heads))
    _set(config, "hidden_size", 4 * (size or width // heads))


def _read(config: "PretrainedConfig", name: str) -> int | None:
    """A positive number of a configuration; None where it has none, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except Exception:  # configurations whose layers differ refuse to tell the one number
        return None
    return value if isinstance(value, int) and value > 0 else None


def _parameters(model_class: "type[PreTrainedModel]", config: "PretrainedConfig") -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())


@torch.no_grad()
def _randomize(model: "PreTrainedModel") -> None:
    """Draws weights so large that attention is far from uniform and no part is left out."""
    for parameter in model.parameters():
        if not parameter.dtype.is_floating_point:
            continue
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, min(0.2, 2.0 * parameter.shape[-1] ** -0.5))
        elif parameter.numel() and parameter.abs().max() == 0:
            parameter.normal_(0.0, 0.1)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Context with a random generator of its own, on the CPU in fp32, whatever a caller has set."""
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
