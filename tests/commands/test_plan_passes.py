"""What the plan says of passes, against what torch's allocator hands out when the same pass runs here."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from saferlhf_fast.commands.plan import pass_memory, sizes
from saferlhf_fast.commands.plan.passes import passes_of_step
from saferlhf_fast.commands.plan.phases import Hardware, StageModels
from saferlhf_fast.commands.plan.trace import Tracker, footprint_of
from saferlhf_fast.config import load
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.packing import pack_into_microbatches, pack_sequences
from saferlhf_fast.models.policy import Objective, Policy
from saferlhf_fast.models.score_model import ScoreModel

SHAPE = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {
    **SHAPE,
    "model_type": "llama",
    "intermediate_size": 172,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 1000,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False}
LENGTHS = (96, 96, 96, 40)


def blueprint(values, kind="policy", **more):
    return sizes.Blueprint(json.dumps(values, sort_keys=True), kind, torch.float32, **more)


def real(values, kind="policy", packing=True, checkpointing=False):
    """The module of a blueprint, with weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = (AutoModelForCausalLM if kind == "policy" else AutoModel).from_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return (Policy if kind == "policy" else ScoreModel)(model, packing=packing).train()


def allocated(step):
    """(bytes that step() leaves behind in what it returns, most bytes at once), by the allocator's own
    events.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    events = sorted(
        (e.start_ns(), e.nbytes())
        for e in profiler.profiler.kineto_results.events()
        if e.name() == "[memory]"
    )
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return now, peak, kept


def measured(module, asked):
    """(held between forward and backward, most in forward, most in both) of a pass over LENGTHS."""
    ids = [[7] * n for n in LENGTHS]
    packed = pack_sequences(ids, [pass_memory.predicted_rows(asked, n) for n in LENGTHS], torch.device("cpu"))
    module(packed).sum().backward()  # libraries take what they keep
    for p in module.parameters():
        p.grad = None
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    saved, forward, out = allocated(lambda: module(packed))
    _, above, _ = allocated(lambda: out.sum().backward())
    return saved, forward, saved + above


CASES = {
    "llama": (LLAMA, {}, 1 << 30),
    "tied head, few rows": (LLAMA, {}, 8),
    "checkpointing": (LLAMA, {"checkpointing": True}, 1 << 30),
    "padded": (LLAMA, {"packing": False}, 1 << 30),
    "qwen3": (QWEN, {}, 1 << 30),
    "gpt2": (GPT2, {}, 1 << 30),
    "score": (LLAMA, {"kind": "score"}, "end"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pass_takes_what_the_allocator_hands_out(case):
    values, options, asked = CASES[case]
    plan = pass_memory.footprint_of_pass(blueprint(values, **options), LENGTHS, asked, "cpu")
    saved, forward, both = measured(real(values, **options), asked)
    assert plan.saved == pytest.approx(saved, rel=0.03)
    assert plan.peak == pytest.approx(max(forward, both), rel=0.05)
    assert plan.forward == pytest.approx(forward, rel=0.05)


def test_without_gradient_a_pass_keeps_nothing():
    plan = pass_memory.footprint_of_pass(blueprint(LLAMA), LENGTHS, 1 << 30, "cpu", train=False)
    module = real(LLAMA).eval()
    packed = pack_sequences([[7] * n for n in LENGTHS], [range(n - 1) for n in LENGTHS], torch.device("cpu"))
    with torch.no_grad():
        module(packed)
        _, peak, _ = allocated(lambda: module(packed))
    assert plan.saved == plan.backward == 0
    assert plan.forward == pytest.approx(peak, rel=0.05)


def test_the_head_s_own_loss_holds_its_gradient_from_forward_on():
    plain, objective = (
        pass_memory.footprint_of_pass(blueprint(LLAMA), LENGTHS, 1 << 30, "cpu", objective=known)
        for known in (0, 1)
    )
    vocabulary, width, rows = LLAMA["vocab_size"], LLAMA["hidden_size"], sum(LENGTHS) - len(LENGTHS)
    # d weight and d hidden take the place of the hidden states and of three numbers for each row.
    assert objective.saved - plain.saved == pytest.approx(4 * vocabulary * width, rel=0.05)
    module = real(LLAMA)
    packed = pack_sequences([[7] * n for n in LENGTHS], [range(n - 1) for n in LENGTHS], torch.device("cpu"))
    known_N = torch.zeros(rows)
    terms = Objective(known_N, known_N, {"clip_ratio": 0.2, "normalizer": 1})
    module(packed, None, terms)[0].backward()
    saved, _, kept = allocated(lambda: module(packed, None, terms)[0])
    assert objective.saved == pytest.approx(saved, rel=0.03)


def test_gradients_that_are_kept_are_counted_and_told_apart():
    module = sizes.build(blueprint(LLAMA))
    weights = 4 * sum(p.numel() for p in module.parameters())
    # few tokens: gradients are the most; many: the start of backward is
    for lengths, share in (((2,), 0.6), ((512,), 0.0)):
        packed = pack_sequences(
            [[0] * n for n in lengths], [range(n - 1) for n in lengths], torch.device("meta")
        )
        kept = footprint_of(module, lambda m: m(packed), "cpu", keep_gradients=True)  # noqa: B023
        passing = footprint_of(module, lambda m: m(packed), "cpu")  # noqa: B023
        assert share * weights <= kept.gradients <= weights and passing.gradients == 0
        assert passing.backward <= kept.backward <= passing.backward + weights
        assert all(p.grad is None for p in module.parameters())


def test_layers_beyond_a_few_are_a_straight_line():
    deep = blueprint({**LLAMA, "num_hidden_layers": 26})
    packed = pack_sequences([[0] * n for n in LENGTHS], [range(n - 1) for n in LENGTHS], torch.device("meta"))
    whole = footprint_of(sizes.build(deep), lambda m: m(packed), "cpu")
    assert pass_memory.footprint_of_pass(deep, LENGTHS, 1 << 30, "cpu") == whole


def test_kinds_of_layers_keep_their_cycle():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    values = {
        **SHAPE,
        "model_type": "gemma3_text",
        "intermediate_size": 172,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 24,
        "layer_types": kinds * 4,
        "sliding_window": 32,
    }
    fewer = json.loads(pass_memory.with_layers(blueprint(values), 12).config)
    assert fewer["layer_types"] == kinds * 2 and fewer["num_hidden_layers"] == 12


def test_a_gpu_has_larger_chunks_of_logits_and_float32_sums():
    half = blueprint({**LLAMA, "vocab_size": 50000})._replace(dtype=torch.bfloat16)
    rows = sum(LENGTHS) - len(LENGTHS)
    gpu, cpu = (pass_memory.footprint_of_pass(half, LENGTHS, 1 << 30, device) for device in ("cuda", "cpu"))
    logits, d_weight = 4 * 50000, 4 * 50000 * 64
    assert gpu.head == pytest.approx(rows * logits + d_weight + 4 * rows * 64, rel=0.01)
    chunk = (64 << 20) // logits // 16 * 16
    assert cpu.head == pytest.approx(chunk * logits + 2 * d_weight, rel=0.02)


def test_scoring_a_cut_distribution_takes_more_than_a_plain_one():
    plain, cut = (
        pass_memory.footprint_of_pass(blueprint(LLAMA), LENGTHS, 1 << 30, "cpu", shape=shape)
        for shape in ((), (0.9, 0, 1.1))
    )
    assert cut.peak > plain.peak


def test_the_tracker_frees_what_is_freed():
    with Tracker("cpu") as tracker:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100) + 1
        assert tracker.now == 8000
        del a
        assert tracker.now == 4000 and tracker.peak == 8000
        b.exp_()
        assert tracker.now == 4000
        del b
    assert tracker.now == 0


def test_lengths_fill_a_pass():
    assert pass_memory.lengths_of(1000, 300) == (300, 300, 300, 100)
    assert pass_memory.lengths_of(100, 300) == (300,)
    assert list(pass_memory.predicted_rows(3, 10)) == [6, 7, 8]
    assert list(pass_memory.predicted_rows(1 << 30, 4)) == [0, 1, 2]
    assert list(pass_memory.predicted_rows("end", 4)) == [3] and list(
        pass_memory.predicted_rows("all", 2)
    ) == [0, 1]


def test_an_architecture_that_looks_at_numbers_is_refused_in_words():
    few = blueprint(
        {
            **LLAMA,
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 32,
        }
    )
    with pytest.raises(UserError, match="a qwen3_moe cannot be planned"):
        pass_memory.footprint_of_pass(few, LENGTHS, 8, "cpu")


def test_positions_that_grow_with_the_text_are_planned_as_they_stand():
    grows = blueprint(
        {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    )
    assert pass_memory.footprints_of_generation(
        grows, 2, 32, 64, "cpu"
    ) == pass_memory.footprints_of_generation(blueprint(LLAMA), 2, 32, 64, "cpu")
    assert sizes.cache_bytes(grows, 32) == sizes.cache_bytes(blueprint(LLAMA), 32)


def test_the_last_step_of_a_rollout_takes_what_the_allocator_hands_out():
    rows, length = 8, 256
    _, plan = pass_memory.footprints_of_generation(blueprint(LLAMA), rows, 32, length, "cpu")
    module = real(LLAMA).lm.eval()
    ids = torch.ones(rows, length - 1, dtype=torch.long)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 0] = 0  # a shorter prompt

    def step(cache):
        return module(
            input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )

    with torch.no_grad():
        step(
            module(
                input_ids=ids, attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1
            ).past_key_values
        )
        filled, _, cache = allocated(
            lambda: (
                module(
                    input_ids=ids, attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1
                ).past_key_values
            )
        )
        _, above, _ = allocated(lambda: step(cache))
    assert plan.forward == pytest.approx(filled + above, rel=0.05)


@pytest.mark.parametrize(
    "kind, values",
    [
        ("sft", {"train": {"batch_size": 4, "accumulation": 3, "max_length": 128, "micro_tokens": 256}}),
        ("dpo", {"train": {"batch_size": 4, "accumulation": 2, "max_length": 128}}),
        ("reward", {"train": {"batch_size": 3, "max_length": 128, "micro_tokens": 100}}),
        ("reward", {"train": {"batch_size": 1, "max_length": 128, "micro_tokens": 100}}),
        (
            "ppo",
            {
                "max_length": 128,
                "ppo": {"batch_size": 8, "micro_batch_size": 2, "minibatches": 2},
                "sampling": {"num_return_sequences": 2},
            },
        ),
        ("ppo-lag", {"max_length": 128, "ppo": {"batch_size": 4, "micro_tokens": 100, "epochs": 3}}),
    ],
)
def test_passes_are_those_that_a_stage_cuts_a_step_into(kind, values):
    """Of sequences that are as long as may be. What is longer than a pass may be has one of its own."""
    needed = {
        "model": "m",
        "data": "d",
        "output": "o",
        **({"reward": "r", "cost": "c"} if kind.startswith("ppo") else {}),
    }
    roles = StageModels(kind, kind, load.build(kind, {**needed, **values}), Hardware(1, 1 << 40), {})
    planned, cfg, minibatches = passes_of_step(roles), roles.cfg, 1
    if kind.startswith("ppo"):
        minibatches, examples = cfg.ppo.minibatches, cfg.ppo.batch_size * cfg.sampling.num_return_sequences
        lengths, tokens = [cfg.max_length] * (examples // minibatches), cfg.pass_tokens()
    else:
        examples, tokens = (
            cfg.train.batch_size * cfg.train.accumulation,
            cfg.train.pass_tokens(roles.spec.sequences),
        )
        lengths = [roles.spec.sequences * cfg.train.max_length] * examples
    (real,) = pack_into_microbatches(lengths, tokens)
    assert planned.several == (len(real) > 1)
    assert planned.scoring == minibatches * sum(rows != [] for rows in real)
