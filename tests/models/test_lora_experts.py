"""Adapters on architectures whose layers are more than linear ones: experts in one tensor, routers.

What is saved is what was trained; before, such a run ended in an AttributeError when it saved its model.
"""

import architectures
import kit
import pytest
import torch

from saferlhf_fast.config.sections import Lora
from saferlhf_fast.errors import UserError
from saferlhf_fast.models import load_score_model, save_score_model
from saferlhf_fast.models.causal_lm import load_causal_lm, save_causal_lm
from saferlhf_fast.models.lora import add_lora, plain_state
from saferlhf_fast.models.packing import pack_sequences, response_rows
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import score_model_from_backbone
from saferlhf_fast.models.shared_base import PolicyOnSharedBase, SharedBase
from saferlhf_fast.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.numeric

SEQUENCES = [[5, 6, 7, 8, 9], [9, 8, 7], [6, 6, 5, 4]]
EXPERTS = ["mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss"]
ROUTERS = ["llama4_text", "phimoe"]  # linear layers that return a pair


def packed():
    return pack_sequences(SEQUENCES, [response_rows(1, len(ids)) for ids in SEQUENCES], "cpu")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    tokenizer, folders = kit.make_tokenizer(), {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            lm = architectures.build(AutoModelForCausalLM, kind, vocab_size=len(tokenizer))
            lm.save_pretrained(folders[kind])
            tokenizer.save_pretrained(folders[kind])
        return folders[kind]

    return folder


def draw(model):
    """Gives every adapter a weight, so that each one matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", EXPERTS + ROUTERS)
def test_the_saved_model_is_the_trained_one(folder_of, tmp_path, kind, bits):
    if bits:
        pytest.importorskip("bitsandbytes", reason="pip install 'saferlhf-fast[qlora]'")
    path = folder_of(kind)
    lm = add_lora(load_causal_lm(path, bits=bits), Lora(rank=2, bits=bits))
    draw(lm)
    logp_N = Policy(lm).eval()(packed())
    logp_N.sum().backward()
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)
    save_causal_lm(tmp_path / "model", lm, load_tokenizer(path))
    saved, base = (load_causal_lm(p) for p in (tmp_path / "model", path))
    torch.testing.assert_close(Policy(saved).eval()(packed()), logp_N, rtol=1e-4, atol=1e-4)
    assert (Policy(base).eval()(packed()) - logp_N).abs().max() > 0.1
    assert plain_state(lm).keys() == base.state_dict().keys()


def test_score_models_and_roles_on_a_shared_base(folder_of, tmp_path):
    path = folder_of("mixtral")
    score = add_lora(score_model_from_backbone(path, kind="cost"), Lora(rank=2))
    draw(score)
    save_score_model(tmp_path / "cost", score, load_tokenizer(path), kind="cost")
    again = load_score_model(tmp_path / "cost")
    torch.testing.assert_close(again.eval()(packed()), score.eval()(packed()), rtol=1e-4, atol=1e-4)

    base = SharedBase(load_causal_lm(path), Lora(rank=2))
    base.add("actor"), base.add("cost_critic")
    reference = PolicyOnSharedBase(base, None).eval()
    before = reference(packed())
    draw(base.lm)
    actor = PolicyOnSharedBase(base, "actor").eval()
    logp_N = actor(packed())
    torch.testing.assert_close(reference(packed()), before)
    save_causal_lm(tmp_path / "actor", actor.lm, load_tokenizer(path))
    saved = Policy(load_causal_lm(tmp_path / "actor")).eval()
    torch.testing.assert_close(saved(packed()), logp_N, rtol=1e-4, atol=1e-4)


def test_dropout_beside_experts_is_refused_by_its_name(folder_of):
    lm = load_causal_lm(folder_of("mixtral"))
    with pytest.raises(UserError, match="lora.dropout: expected 0, .*experts.* got 0.1"):
        add_lora(lm, Lora(rank=2, dropout=0.1))
