"""lora.bits=4: a base in 4 bits is the same function wherever it is used, and no checkpoint needs it."""

import json
from pathlib import Path

import kit
import pytest
import torch

from saferlhf_fast.config import fingerprint
from saferlhf_fast.config.sections import Lora
from saferlhf_fast.errors import UserError
from saferlhf_fast.models import quantized
from saferlhf_fast.models.causal_lm import load_causal_lm, without_dropout
from saferlhf_fast.models.lora import add_lora, plain_state
from saferlhf_fast.models.packing import pack_sequences, response_rows
from saferlhf_fast.models.policy import Policy
from saferlhf_fast.models.score_model import load_backbone

pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'saferlhf-fast[qlora]'"
)
pytestmark = pytest.mark.numeric

SEQUENCES = [[5, 6, 7, 8, 9], [9, 8, 7], [6, 6, 5, 4]]
# 64, the size of a block, divides all widths of the first and some of the second, whose layers are transposed
MODELS = [("llama", 64), ("gpt2", 48)]
STAGE = {"lora__rank": 4, "lora__bits": 4, "train__max_length": 32, "optim__learning_rate": 1e-2}


def packed():
    return pack_sequences(SEQUENCES, [response_rows(1, len(ids)) for ids in SEQUENCES], "cpu")


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model[0])
def path(request, tmp_path_factory):
    architecture, hidden = request.param
    return kit.make_model(tmp_path_factory.mktemp("base"), hidden=hidden, architecture=architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantised_weights_are_the_function_that_is_trained(path, dtype):
    """Before and after evaluation, in which bitsandbytes would repack weights; with adapters and without."""
    whole, lm = load_causal_lm(path), load_causal_lm(path, bits=4, dtype=dtype)
    assert quantized.layers(lm) and "lm_head" not in quantized.layers(lm)
    assert quantized.base_hash(lm) == quantized.base_hash(load_backbone(path, bits=4, dtype=dtype))
    assert "quantization_config" not in lm.config.to_dict()
    for name, expected in whole.state_dict().items():
        error = (plain_state(lm)[name] - expected).abs().max()
        # half of NF4's widest gap is 0.152 of a block's largest weight, and the scale is rounded too
        assert error <= 0.18 * expected.abs().max(), name
    adapted = add_lora(lm, Lora(rank=2, target_modules=["down_proj", "c_proj"], bits=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    whole.load_state_dict(plain_state(adapted))
    expected = Policy(whole.to(dtype).eval())(packed()).detach()
    policy = Policy(without_dropout(adapted.to(dtype)))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for training in (False, True):
        logp_N = policy.train(training)(packed())
        torch.testing.assert_close(logp_N.detach(), expected, rtol=0, atol=tolerance)
    logp_N.sum().backward()
    first = next(p for name, p in adapted.named_parameters() if "lora_B" in name)
    assert first.grad is not None and first.grad.abs().max() > 0


def test_a_state_dict_leaves_the_base_out_and_loads_without_it(path):
    lm = load_causal_lm(path, bits=4)
    before = quantized.base_hash(lm)
    state = lm.state_dict()
    assert all(tensor.is_floating_point() for tensor in state.values())
    assert not any(key.removesuffix(".weight") in quantized.layers(lm) for key in state)
    other = load_causal_lm(path, bits=4)
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.get_input_embeddings().weight, lm.get_input_embeddings().weight)
    assert quantized.base_hash(other) == before
    layer = next(iter(quantized.layers(other).values()))
    layer.weight.data[0] ^= 1
    assert quantized.base_hash(load_causal_lm(path, bits=4)) == before
    object.__delattr__(other, "_base_hash")
    assert quantized.base_hash(other) != before


def test_files_that_are_quantised_already_are_refused(path, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(path, quantization_config=config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="expected a model whose files are not quantised.*got files quantised"
    ):
        load_causal_lm(tmp_path, bits=4)


def test_a_run_that_is_older_than_the_setting_has_the_same_hash():
    old, new = {"model": "m", "lora": {"rank": 2}}, {"model": "m", "lora": {"rank": 2, "bits": None}}
    assert fingerprint.recipe_hash("sft", old, []) == fingerprint.recipe_hash("sft", new, [])
    new["lora"]["bits"] = 4
    assert fingerprint.recipe_hash("sft", old, []) != fingerprint.recipe_hash("sft", new, [])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The stages sft, reward, cost and ppo-lag on one base in 4 bits, and sft on the base as it is."""
    folder = tmp_path_factory.mktemp("stages")
    base, data = kit.make_model(folder / "base", hidden=80), kit.make_data(folder / "data")
    settings = {**STAGE, "model": base, "train__max_steps": 2}
    kit.run("sft", folder / "plain", data=data["sft"], **{**settings, "lora__bits": "null"})
    kit.run("sft", folder / "sft", data=data["sft"], checkpoint__interval=1, **settings)
    for kind in ("reward", "cost"):
        kit.run(kind, folder / kind, data=data["pairs"], train__gradient_checkpointing=True, **settings)
    kit.run(
        "ppo-lag",
        folder / "ppo",
        model=base,
        data=data["prompts"],
        reward=folder / "reward" / "model",
        cost=folder / "cost" / "model",
        lora__rank=4,
        lora__bits=4,
        max_length=48,
        sampling__max_new_tokens=8,
        ppo__batch_size=4,
        ppo__max_steps=2,
        checkpoint__interval=2,
    )
    return folder, base, data


def test_the_loss_is_close_to_that_on_the_base_as_it_is(stages):
    folder, _, _ = stages
    plain_run, run = kit.losses(folder / "plain"), kit.losses(folder / "sft")
    assert run != plain_run and run == pytest.approx(plain_run, abs=0.05)


@pytest.mark.parametrize("run", ["sft", "ppo"])
def test_the_saved_adapter_is_the_trained_policy_and_the_merged_model_is_near(stages, run):
    """peft loads the adapter on the base in 4 bits; the merged weights are those of the checkpoint too."""
    import peft

    folder, base, _ = stages
    saved = folder / run / "model"
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    with_adapter = peft.PeftModel.from_pretrained(load_causal_lm(base, bits=4), saved / "adapter")
    merged = load_causal_lm(saved)
    expected = Policy(with_adapter)(packed()).detach()
    torch.testing.assert_close(Policy(merged)(packed()).detach(), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(Policy(load_causal_lm(base, bits=4))(packed()).detach(), expected, atol=1e-4)
    exported = folder / f"{run}-exported"
    assert (
        kit.main("checkpoint", "export", folder / run / "checkpoints" / "step-00000002", "--output", exported)
        == 0
    )
    assert_same(load_causal_lm(exported).state_dict(), merged.state_dict())


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)


def test_score_models_are_adapters_of_the_base(stages, capsys):
    from saferlhf_fast.models import multi_adapter

    folder, base, _ = stages
    for kind in ("reward", "cost"):
        assert multi_adapter.load_score_adapter(folder / kind / "model", base) is not None


def test_a_resumed_run_has_the_same_steps_and_refuses_another_base(stages, monkeypatch, capsys):
    folder, base, data = stages
    settings = {**STAGE, "model": base, "data": data["sft"], "train__max_steps": 2}
    start = folder / "sft" / "checkpoints" / "step-00000001"
    kit.run("sft", folder / "again", resume=start, **settings)
    assert kit.losses(folder / "again")[-1] == kit.losses(folder / "sft")[-1]
    size = sum(f.stat().st_size for f in start.rglob("*.pt"))
    assert size < sum(f.stat().st_size for f in Path(base).glob("*.safetensors"))
    monkeypatch.setattr(quantized, "base_hash", lambda model: "another")
    words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    assert kit.main("sft", f"output={folder / 'third'}", f"resume={start}", *words) == 2
    assert "another" in capsys.readouterr().err


def test_without_bitsandbytes_one_line_names_the_extra(stages, monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest),
    )
    words = [f"{key.replace('__', '.')}={value}" for key, value in STAGE.items()]
    assert kit.main("sft", "model=m", "data=d", f"output={stages[0] / 'none'}", *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith("pip install 'saferlhf-fast[qlora]'"), lines
