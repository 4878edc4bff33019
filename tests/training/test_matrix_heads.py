"""Score heads under ZeRO-3 in two processes: drawn as configured, saved and loaded to the bit, never drawn in
silence.
"""

import json

import forked
import kit
import pytest

pytestmark = pytest.mark.numeric

WIDTH, STD = 4096, 0.02


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What matrix_heads_worker.py has written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("heads")
    tokenizer = kit.make_tokenizer()
    # One head of width 2 and a tiny middle: wide where the score head reads, few weights.
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
    done = forked.run([kit.SUPPORT / "matrix_heads_worker.py", *paths], processes=2, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("head", ["in place", "new", "two heads"])
def test_a_new_head_has_the_configured_spread(found, head):
    """In place: sharded as it is made, so that without the gather each rank would draw into nothing."""
    assert found["in place: empty"] and found["sharded"]
    assert abs(found[f"{head}: std"] / STD - 1) < 0.05
    assert found[f"{head}: same on all ranks"]


@pytest.mark.parametrize("how", ["gathered", "sharded", "replicated", "trained on"])
def test_a_saved_score_model_gives_the_same_bits(found, how):
    assert found["moved"] and found[f"reloaded, {how}"]
