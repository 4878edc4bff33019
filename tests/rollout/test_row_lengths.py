"""Rows that padding on the left changes: a probe finds them, prompts of equal length are sampled together."""

import architectures
import generation_kit
import pytest
from tolerance import assert_near_in_another_batch

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.tokenizer import spare_rows
from saferlhf_fast.rollout.engines import open_generator, row_lengths
from saferlhf_fast.rollout.engines.continuous import refusal
from saferlhf_fast.rollout.engines.row_lengths import Batching, batching_of

pytestmark = pytest.mark.numeric


def lm_of(kind, **changes):
    from transformers import AutoModelForCausalLM

    return architectures.build(AutoModelForCausalLM, kind, **changes)


@pytest.mark.parametrize(
    "kind, changes, batching",
    [
        ("llama", {}, Batching()),
        ("recurrent_gemma", {"num_hidden_layers": 3}, Batching("equal", drops=False)),
        ("rwkv", {}, Batching("single")),
    ],
)
def test_samples_do_not_depend_on_the_batch(kind, changes, batching, capsys):
    lm = lm_of(kind, **changes)
    assert batching_of(lm) == batching
    tokenizer = generation_kit.tokenizer()
    generator = open_generator(generation_kit.actor(lm), tokenizer, [2], Sampling(engine="generate"))
    spare = spare_rows(tokenizer, lm)
    said = "".join(capsys.readouterr())
    assert (type(lm).__name__ in said) is (batching != Batching())
    prompts = generation_kit.prompts(4)
    prompts += [prompts[0][::-1]]
    batch = generator.generate(prompts, range(5), [6, 3, 9, 4, 8])
    for response, prompt, seed, limit in zip(batch, prompts, range(5), [6, 3, 9, 4, 8]):
        ids, logp, ended = generation_kit.naive(lm, prompt, seed, limit, [2], Sampling(), spare)
        assert (response.ids, response.ended) == (ids, ended)
        assert_near_in_another_batch(response.logp, logp)


def test_continuous_batches_are_refused_by_name():
    """Where sequences cannot run packed: factors that follow the longest, an index of keys, a state."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    follows = lm_of("llama", max_position_embeddings=32, rope_parameters=dynamic)
    assert refusal(lm_of("llama")) is None
    assert "rotary factors" in refusal(follows)
    assert refusal(lm_of("glm_moe_dsa")) and refusal(lm_of("mamba"))
    with pytest.raises(
        UserError, match=r"continuous cannot run a LlamaForCausalLM \(rotary factors .*expected"
    ):
        open_generator(
            generation_kit.actor(follows), generation_kit.tokenizer(), [2], Sampling(engine="continuous")
        )


@pytest.mark.slow
def test_every_architecture_samples_the_same_in_a_batch_as_alone():
    """Prints a table: model type, what is sampled together, whether samples are those of each alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    wrong, built = [], 0
    for kind in causal:
        try:
            lm = lm_of(kind)
            alone = sampled(lm, Batching("single"))
        except Exception as error:  # cannot be built tiny, or does not generate
            print(f"{kind:28} not built: {type(error).__name__}: {str(error)[:80]!r}", flush=True)
            continue
        batching = batching_of(lm)
        same = row_lengths._same(sampled(lm, batching), alone)
        print(f"{kind:28} {batching.rows:7} drops={batching.drops} same={same}", flush=True)
        built += 1
        if not same:
            wrong.append(kind)
    assert built >= 120 and wrong == []


def sampled(lm, batching):
    prompts = architectures.sequences(lm.get_input_embeddings().weight.shape[0], (23, 7, 40, 7, 12))
    return row_lengths._sampled(lm, prompts, (9, 3, 6, 12, 1), batching)
