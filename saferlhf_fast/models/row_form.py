"""Whether the sequences of a pass are independent of each other in an architecture, and how they run if not.

    form = form_of(backbone)          # probes once for each architecture and configuration of a process

Packed, padded and one at a time must give the same hidden states. A probe finds out: it runs a tiny copy of
the architecture (shrunken.py) on sequences that are beyond every window, chunk, index and original context of
the copy, in each of these ways. The form is the fastest way that agrees with one at a time: packed with our
attention; rows padded on the right; rows of one length at a time. An architecture without a copy runs packed
only if a few tokens of the model itself agree and its configuration names no length at which it changes.

Leaves out: padding on the left (rollout/engines/row_lengths.py), and what differs by dtype or device.
"""

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from . import attention, rotary
from .packing import Packed, pack_sequences, padded
from .shrunken import changes_with_length, reproducible, shrunken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (7, 9, 24, 41, 64)
"""Tokens of the probe's sequences. They ascend: rotary factors that grow remember the longest so far."""
ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    IndexError,
    KeyError,
    AttributeError,
    NotImplementedError,
    AssertionError,
)
"""What an architecture raises that does not take an input."""


@dataclass(frozen=True)
class RowForm:
    """How a backbone runs several sequences in a pass."""

    packs: bool = False  # one behind the other, with our attention
    pads: bool = True  # in rows padded on the right; else rows of one length at a time
    first: int | None = 0  # the first position id; None: the backbone counts by itself
    skipped: int | None = None  # a token id that the backbone's own positions leave out
    exchanges: bool = False  # our attention in place of its own changes nothing
    why: str = ""  # why it does not run packed, in words

    def unpacked(self) -> "RowForm":
        """This form without packing, as the recipe may ask for (`engine.packing=false`)."""
        return replace(self, packs=False)

    def positions(self, packed: Packed) -> torch.Tensor:
        """position_ids [M] of packed tokens, as the backbone counts them in each sequence."""
        return self.counted(packed.positions_M, packed.ids_M, packed.positions_M == 0)

    def counted(
        self, positions: torch.Tensor, ids: torch.Tensor, begins: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Position ids as the backbone counts them.

        Args:
            positions: Places in each sequence, from 0.
            ids: Its tokens, of the same shape: [M], or rows [B, L] with `begins` None.
            begins: [M], True at each sequence's first token.

        Returns:
            Position ids of that shape.
        """
        first = self.first or 0
        if self.skipped is None:
            return positions + first
        read = (ids != self.skipped).long()
        count = read.cumsum(-1)
        if begins is not None:
            before = (count - read)[begins]  # tokens counted in the sequences before
            count = count - before[begins.long().cumsum(-1) - 1]
        return torch.where(read.bool(), first + count - 1, self.skipped)


FORMS: dict[tuple[type, str], RowForm] = {}
"""{(class, configuration): form}; a run loads the same architecture up to six times."""


@torch.no_grad()
def form_of(backbone: torch.nn.Module) -> RowForm:
    """How a backbone runs several sequences, and our attention in it where it runs packed.

    Args:
        backbone: A model whose weights are complete, not yet sharded, or on the meta device.

    Returns:
        The form. One that is not of transformers takes padded rows.
    """
    transformers = sys.modules.get("transformers")  # without its import no model of it can exist
    if transformers is None or not isinstance(backbone, transformers.PreTrainedModel):
        return RowForm(why="not a model of transformers")
    rotary.separate(backbone)
    _attend_fully(backbone)
    form = architecture_form(backbone)
    if form.packs and not attention.exchange(backbone):
        return replace(form, packs=False, why="its attention cannot be exchanged")
    return form


def _attend_fully(backbone: Any) -> None:
    """Gives BigBird full attention, in place and in its configuration, so that an export has it too.

    Its block-sparse attention switches itself off for good at the first pass of short sequences, chooses
    blocks by the width of a pass, and draws some at random: a score would depend on what was scored before.
    """
    if getattr(backbone, "attention_type", None) == "block_sparse":
        backbone.set_attention_type("original_full")
        backbone.config.attention_type = "original_full"


@torch.no_grad()
def architecture_form(backbone: "PreTrainedModel") -> RowForm:
    """The form of a backbone's class and configuration; the backbone itself is as before."""
    key = (type(backbone), str(backbone.config.to_dict()))
    if key not in FORMS:
        FORMS[key] = _probed(backbone)
    return FORMS[key]


def _probed(backbone: "PreTrainedModel") -> RowForm:
    on_meta = any(p.is_meta for p in backbone.parameters())
    for copy in shrunken(type(backbone), backbone.config):
        with reproducible():
            form = _compare(copy, LENGTHS)
        if form is None:
            continue
        if form.packs and not on_meta:
            own = _compare(backbone, (4, 5))
            if own is None or not own.packs:
                return replace(form, packs=False, why="its sequences see each other when packed")
        return form
    if on_meta:
        return RowForm(packs=True, exchanges=True)
    form = _compare(backbone, (4, 5)) or RowForm(why="it does not run by itself")
    lengths = changes_with_length(backbone.config)
    if form.exchanges and _asks_for_the_name(backbone):
        form = replace(form, packs=False, exchanges=False, why="it asks for the name of its attention")
    if form.packs and lengths:
        name, length = next(iter(lengths.items()))
        form = replace(form, packs=False, why=f"{name}={length} is beyond what a probe can run")
    return form


def _compare(model: "PreTrainedModel", lengths: Sequence[int]) -> RowForm | None:
    """The form of one model, by its hidden states; None where a sequence alone does not run."""
    training, current = model.training, model.config._attn_implementation
    model.eval()
    try:
        attention.uninstall(model)
        return _form(_Trial(model, lengths))
    except ERRORS:
        return None
    finally:
        if model.config._attn_implementation != current:
            model.set_attn_implementation(current)
        model.train(training)


class _Trial:
    """A model and what it answers for each sequence alone."""

    def __init__(self, model: "PreTrainedModel", lengths: Sequence[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        pad = getattr(model.config, "pad_token_id", None)
        usable = [i for i in range(3, vocabulary) if i != pad] or [0]
        self.rows = [
            [usable[(7 * i * i + 11 * i + 5 * n) % len(usable)] for i in range(n)] for n in sorted(lengths)
        ]
        self.alone = [self.run(input_ids=self.ids([row]))[0] for row in self.rows]
        rotary.separate(model)

    def ids(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.device)

    def run(self, **inputs: Any) -> torch.Tensor:
        output = self.model(**inputs, **fixed_inputs(self.model))
        # A causal LM whose backbone transformers does not tell apart is its own base model.
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits

    def same(self, got: torch.Tensor, expected: torch.Tensor) -> bool:
        if got.shape != expected.shape or not torch.isfinite(expected).all():
            return False
        scale = expected.float().abs().max().clamp(min=1e-6)
        tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
        return bool(((got - expected).float().abs().max() <= tolerance * scale).item())

    def agrees(self, answer: Any, expected: torch.Tensor) -> bool:
        """Whether a way to run gives what is expected; an input that the model does not take does not."""
        try:
            return self.same(answer(), expected)
        except ERRORS:
            return False


def _positions(trial: _Trial) -> RowForm:
    """A form with the position ids that give what the model gives without any; None where none do."""
    row, expected = trial.ids([trial.rows[-1]]), trial.alone[-1]
    pad = getattr(trial.model.config, "pad_token_id", None)

    def starts_at(first: int) -> bool:
        positions = torch.arange(row.shape[1], device=trial.device)[None] + first
        return trial.agrees(lambda: trial.run(input_ids=row, position_ids=positions)[0], expected)

    if "position_ids" in inspect.signature(trial.model.forward).parameters:
        for first in dict.fromkeys([0, 0 if pad is None else pad + 1, 2]):
            if starts_at(first):
                skipped = pad if first and pad is not None and first == pad + 1 else None
                return RowForm(first=first, skipped=skipped)
    return RowForm(first=None)


def _form(trial: _Trial) -> RowForm:
    model, alone = trial.model, torch.cat(trial.alone)
    packed = pack_sequences(trial.rows, [range(0)] * len(trial.rows), trial.device)
    form = _positions(trial)
    last = len(trial.rows) - 1
    form = replace(form, pads=trial.agrees(lambda: _padded_rows(trial, form, packed), alone))
    if form.first is None:
        return replace(form, why="it counts positions by itself")
    if not attention.exchange(model):
        return replace(form, why="its attention cannot be exchanged")
    try:
        ids = trial.ids([trial.rows[last]])
        form = replace(form, exchanges=trial.agrees(lambda: trial.run(input_ids=ids)[0], trial.alone[last]))
        if not form.exchanges:
            return replace(form, why="it asks for the name of its attention")
        packs = trial.agrees(lambda: trial.run(**packed_inputs(packed, form))[0], alone)
        return replace(form, packs=packs, why="" if packs else "its sequences see each other when packed")
    finally:
        attention.uninstall(model)


def _padded_rows(trial: _Trial, form: RowForm, packed: Packed) -> torch.Tensor:
    rows = padded(packed)
    inputs = row_inputs(trial.model, form, rows.ids_SL, rows.mask_SL, rows.positions_SL)
    return trial.run(**inputs).flatten(0, 1).index_select(0, rows.flat_M)


def row_inputs(
    model: "PreTrainedModel",
    form: RowForm,
    ids_SL: torch.Tensor,
    mask_SL: torch.Tensor | None,
    positions_SL: torch.Tensor,
) -> dict[str, Any]:
    """Arguments of a transformers model for rows.

    Args:
        model: With or without a head.
        form: Of its backbone.
        ids_SL: Token ids.
        mask_SL: 1 at real tokens; None: all tokens are real.
        positions_SL: Places in each row, from 0 at its first real token.

    Returns:
        The arguments that the model takes.
    """
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids_SL}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if mask_SL is not None and ("attention_mask" in taken or takes_any):
        inputs["attention_mask"] = mask_SL
    if form.first is not None and "position_ids" in taken:
        if form.skipped is not None and mask_SL is not None:
            ids_SL = ids_SL.masked_fill(mask_SL == 0, form.skipped)  # padding is never counted
        inputs["position_ids"] = form.counted(positions_SL, ids_SL)
    return inputs


def packed_inputs(packed: Packed, form: RowForm) -> dict[str, Any]:
    """Arguments of a transformers model for packed tokens."""
    return {
        "input_ids": packed.ids_M[None],
        "position_ids": form.positions(packed)[None],
        "packed": packed.layout,
        "attention_mask": attention.dummy_mask(packed.ids_M.device),
    }


def fixed_inputs(model: "PreTrainedModel") -> dict[str, Any]:
    """Arguments that every pass has: no cache, where the model knows one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _asks_for_the_name(model: "PreTrainedModel") -> bool:
    """Whether an architecture's source compares the name of its attention with others."""
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (OSError, TypeError, KeyError):
        return True
    return bool(re.search(r"_attn_implementation (in|==|!=|not in) ", source))
