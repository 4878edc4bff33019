"""Score heads under ZeRO-3 in two processes: the spread of new heads, and saved heads bit for bit."""

import json

import forked
import kit
import pytest

pytestmark = pytest.mark.numeric

WIDTH, STD = 4096, 0.02


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of matrix_heads_worker.py."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("heads")
    tokenizer = kit.make_tokenizer()
    # One attention head of width 2 and a tiny MLP: wide for the score head, but with few weights.
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=2,
            initializer_range=STD,
        )
    )
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    paths = [folder / name for name in ("base", "reward", "out.json")]
    completed = forked.run([kit.SUPPORT / "matrix_heads_worker.py", *paths], processes=2, timeout=200)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("head", ["in place", "new", "two heads"])
def test_a_new_head_has_the_configured_spread(results, head):
    """In place: the head is sharded when it is made, and without a gather its weight would be empty."""
    assert results["in place: empty"] and results["sharded"]
    assert abs(results[f"{head}: std"] / STD - 1) < 0.05
    assert results[f"{head}: same on all ranks"]


@pytest.mark.parametrize("how", ["gathered", "sharded", "replicated", "trained on"])
def test_a_saved_score_model_gives_the_same_bits(results, how):
    assert results["moved"] and results[f"reloaded, {how}"]
