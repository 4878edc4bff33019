"""Packed, padded and one at a time agree: every causal LM and encoder of transformers that can be built tiny.

    python -m pytest -m slow -s tests/models/test_architecture_sweep.py      # prints the table

A few architectures that stand for a kind are in test_row_form.py, which `make test` runs.
"""

import gc

import architectures
import pytest
import torch

from saferlhf_fast.errors import UserError
from saferlhf_fast.models.packing import pack_sequences
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import ScoreModel

pytestmark = [pytest.mark.slow, pytest.mark.numeric, pytest.mark.timeout(3600)]

AGREE = 1e-3
"""Largest difference, in nats or relative to the largest score."""


DYNAMIC = {
    "max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "dynamic",
        "rope_theta": 1e4,
        "factor": 2.0,
        "partial_rotary_factor": 1.0,
    },
}


def dynamic_row(kind):
    """`causal_row` with rotary factors that follow the length beyond 32 tokens."""
    return causal_row(kind, **DYNAMIC)


def causal_row(kind, **changes):
    """(class, form, largest difference of the packed and of the padded form) of a causal LM."""
    from transformers import AutoModelForCausalLM

    lm = architectures.build(AutoModelForCausalLM, kind, **changes)
    rows = architectures.sequences(lm.get_input_embeddings().weight.shape[0])
    expected = architectures.logp_alone(lm, rows)
    policy = Policy(lm).eval()
    packed = pack_sequences(rows, [range(len(r) - 1) for r in rows], torch.device("cpu"))
    gaps = []
    with torch.no_grad():
        for form in (policy.form, policy.form.unpacked()):
            policy.form = form
            gaps.append((policy(packed) - expected).abs().max().item())
            form_is = architectures.form_name(form)
        name = architectures.form_name(Policy(lm).form)
    return type(lm).__name__, name if name == form_is else f"{name}, {form_is}", max(gaps)


def encoder_row(kind):
    """The same of an encoder, by its scores: packed, and padded on either side."""
    from transformers import AutoModel

    backbone = architectures.build(AutoModel, kind)
    rows = architectures.sequences(backbone.get_input_embeddings().weight.shape[0])
    hidden = architectures.hidden_alone(backbone, rows)
    model = ScoreModel(backbone).eval()
    gaps = []
    with torch.no_grad():
        expected = model.score(hidden)
        packed = pack_sequences(rows, [range(len(r)) for r in rows], torch.device("cpu"))
        gaps.append((model(packed) - expected).abs().max())
        ids, mask = torch.zeros(len(rows), 64, dtype=torch.long), torch.zeros(len(rows), 64, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        gaps.append((model(ids, mask)[mask.bool()] - expected).abs().max())
    scale = expected.abs().max().clamp(min=1e-6)
    return type(backbone).__name__, architectures.form_name(model.form), (max(gaps) / scale).item()


def table(kinds, row):
    """Rows (kind, class, form or why not, difference), printed."""
    rows = []
    for kind in kinds:
        try:
            name, form, gap = row(kind)
        except UserError as error:
            name, form, gap = "refused", str(error), 0.0
        except Exception as error:  # cannot be built tiny, or does not run by itself
            name, form, gap = "not built", f"{type(error).__name__}: {str(error)[:70]!r}", 0.0
        rows.append((kind, name, form, gap))
        print(f"{kind:28} {name:34} {form:70.70} {gap:.1e}", flush=True)
        gc.collect()
    return rows


def causal_kinds():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    return list(causal)


def rotary_kinds():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    flat = []
    for kind in causal_kinds():
        try:
            table = getattr(CONFIG_MAPPING[kind]().get_text_config(), "rope_parameters", None) or {}
        except Exception:  # a configuration without defaults
            continue
        if table and not any(isinstance(value, dict) for value in table.values()):
            flat.append(kind)
    return flat


def encoder_kinds():
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as scored,
    )

    decoders = set(causal_kinds()) - {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
    return sorted((set(masked) | set(scored)) - decoders | {"bert", "roberta", "xlm-roberta", "camembert"})


@pytest.mark.parametrize(
    "kinds, row, least",
    [(causal_kinds, causal_row, 160), (rotary_kinds, dynamic_row, 60), (encoder_kinds, encoder_row, 28)],
    ids=["causal", "dynamic", "encoders"],
)
def test_every_architecture_gives_the_same_in_every_form(kinds, row, least):
    rows = table(kinds(), row)
    assert sum(name != "not built" for _, name, _, _ in rows) >= least
    assert [r for r in rows if not r[3] < AGREE] == []
