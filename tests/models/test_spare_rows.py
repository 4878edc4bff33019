"""Rows of the head without a token: not sampled by any engine, not in any log-prob of sampling, and measured.

Embeddings are padded to a multiple of 64 or 128, and tokenizers may leave ids out. Here the spare rows are
likely ones.
"""

import sys
import types
from types import SimpleNamespace

import generation_kit
import kit
import pytest
import torch
from generation_server import serving

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.errors import UserError
from saferlhf_fast.models.packing import pack_sequences, response_rows
from saferlhf_fast.models.policy import Objective, Policy
from saferlhf_fast.models.sampling_distribution import head_of_tokens, sampling_logits
from saferlhf_fast.models.tokenizer import spare_rows
from saferlhf_fast.rollout.engines import open_generator, vllm_tokens

pytestmark = pytest.mark.numeric

ROWS, ENDS = 96, [2, 5]
TOKENS = generation_kit.VOCABULARY
HOLES = [0, 7, 8, 40]
SHAPES = [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3}]
SEQUENCES = [[1, 9, 20, 33, 12, 50], [1, 30, 31, 5], [1, 44, 45, 46, 47, 48, 6]]


def tokenizer_of(holes=()):
    """Words of ids below 61, some of which are left out."""
    words = {t: i for t, i in generation_kit.tokenizer().get_vocab().items() if i not in holes}
    return SimpleNamespace(get_vocab=lambda: words, pad_token_id=3, decode=str)


def lm_of(name, holes=()):
    """A random causal LM of 96 rows whose spare rows have large logits."""
    import transformers

    if name == "Llama":
        lm = generation_kit.llama(vocabulary=ROWS)
    else:
        torch.manual_seed(0)
        sizes = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        if name == "Gemma2":  # a softcap, and a tied head
            sizes |= {
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 48,
                "initializer_range": 0.3,
            }
        config = getattr(transformers, f"{name}Config")(**sizes)
        lm = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    spare = sorted({*range(TOKENS, ROWS), *holes})
    with torch.no_grad():
        head = lm.get_output_embeddings()
        head.weight[spare] *= 4.0
        if name == "Phi":
            head.bias[spare] = 3.0
    return lm, torch.tensor(spare)


def packed_of(sequences=SEQUENCES):
    return pack_sequences(sequences, [response_rows(2, len(ids)) for ids in sequences], torch.device("cpu"))


def by_definition(lm, spare_U, sampling, sequences=SEQUENCES):
    """logp_N, with spare logits of −inf in the model's own logits, one sequence at a time."""
    logp = []
    for ids in sequences:
        for t in range(2, len(ids)):
            logits = lm(input_ids=torch.tensor([ids[:t]])).logits[0, -1:].float()
            logits = logits.index_fill(1, spare_U, -torch.inf)
            scores = sampling_logits(logits, sampling, torch.tensor([ids[:t]]), torch.tensor([ids[t]]))
            logp.append(scores.log_softmax(-1)[0, ids[t]])
    return torch.stack(logp)


@pytest.mark.parametrize("name, packing, holes", [
    ("Llama", True, ()), ("Llama", True, HOLES), ("Gemma2", True, ()), ("Gemma2", True, HOLES),
    ("Phi", True, HOLES), ("Cohere", True, ()), ("Mamba", False, ()),
])  # fmt: skip
def test_log_probs_losses_and_gradients_leave_spare_rows_out(name, packing, holes):
    """Bias, softcap, scale, tied heads, padded rows, transformers' own logits: all against the definition."""
    lm, spare_U = lm_of(name, holes)
    assert torch.equal(spare_rows(tokenizer_of(holes), lm), spare_U)
    policy, full, packed = Policy(lm, packing, spare_U), Policy(lm, packing), packed_of()
    for shape in SHAPES:
        sampling = Sampling(**shape)
        expected_N = by_definition(lm, spare_U, sampling)
        logp_N = policy(packed, sampling)
        torch.testing.assert_close(logp_N, expected_N, rtol=2e-4, atol=2e-4)
        assert (full(packed, sampling) < expected_N - 0.01).any()  # the spare rows did matter
    # the model's own distribution, of SFT and DPO, keeps them
    torch.testing.assert_close(policy(packed), full(packed))

    advantages_N, cool = torch.linspace(-1, 1, len(logp_N)), Sampling(temperature=0.8)
    settings = {"clip_ratio": 0.2, "reduction": "token-mean"}
    old_N = by_definition(lm, spare_U, cool).detach()

    def gradient(loss):
        lm.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}

    expected = gradient(-((by_definition(lm, spare_U, cool) - old_N).exp() * advantages_N).mean())
    by_objective, _ = policy(packed, cool, Objective(old_N, advantages_N, settings))

    def chunk(sequences, tokens, logp_C):
        share = advantages_N[tokens] / len(advantages_N)
        return -share.sum(), -share

    for loss in (by_objective, policy(packed, cool, chunk_loss=chunk)):
        found = gradient(loss)
        for key, value in expected.items():
            bound = 1e-3 * value.abs().max().clamp(min=1e-4).item()
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=bound)
    weight = lm.get_output_embeddings().weight
    if weight is not lm.get_input_embeddings().weight:
        assert (weight.grad[spare_U] == 0).all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_fused_log_probs_of_a_changed_head(impl, softcap):
    """Both forms of the head, also where a whole block of rows is spare; a spare target is impossible."""
    from saferlhf_fast.kernels.linear_logprob import linear_logprob

    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=draw), torch.randn(300, 16, generator=draw)
    targets, spare_U = torch.arange(200, 209), torch.tensor([*range(128), *range(260, 300)])
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.index_fill(1, spare_U, -torch.inf)
    head, bias, ids = head_of_tokens(weight, None, targets, spare_U, softcap)
    try:
        logp = linear_logprob(hidden, head, ids, bias=bias, softcap=softcap, impl=impl)
    except RuntimeError as error:  # no _C here
        pytest.skip(str(error))
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    if softcap is None:
        wrong = linear_logprob(hidden[:1], head, torch.tensor([3]), bias=bias, impl=impl)
        assert not wrong.isfinite().any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine, holes", [("generate", ()), ("generate", HOLES), ("continuous", HOLES)])
def test_engines_sample_tokens_alone_and_measure_what_is_cut(engine, holes, shape):
    """Samples are tokens, their log-probs those of scoring, and the mass is that of the plain softmax."""
    (lm, spare_U), sampling = lm_of("Llama", holes), Sampling(engine=engine, **shape)
    prompts = [[1, 9, 20, 33], [1, 30], [1, 44, 45, 46, 47, 48, 6]]
    generator = open_generator(generation_kit.actor(lm), tokenizer_of(holes), ENDS, sampling)
    responses = generator.generate(prompts, [1, 2, 3], [12, 5, 9])
    assert not set(spare_U.tolist()) & {i for r in responses for i in r.ids}
    policy = Policy(lm, True, spare_U)
    for prompt, response in zip(prompts, responses):
        ids = [*prompt, *response.ids]
        packed = pack_sequences([ids], [response_rows(len(prompt), len(ids))], torch.device("cpu"))
        assert response.logp == pytest.approx(policy(packed, sampling).tolist(), abs=1e-3)
        probs = (lm(torch.tensor([ids])).logits[0] / sampling.temperature).softmax(-1)
        cut = probs[len(prompt) - 1 : -1, spare_U].sum(-1)
        assert response.spare_mass == pytest.approx(cut.tolist(), abs=1e-4) and cut.max() > 0.2
    whole = generation_kit.llama()
    generator = open_generator(generation_kit.actor(whole), generation_kit.tokenizer(), ENDS, sampling)
    assert [r.spare_mass for r in generator.generate(prompts[:1], [1], [3])] == [None]


@pytest.mark.parametrize("most", [1024, 50])
def test_vllm_s_requests_exclude_spare_rows(monkeypatch, most):
    """By allowed_token_ids where tokens are few, else by logit_bias; a server must follow them."""
    monkeypatch.setattr(vllm_tokens, "MOST_IDS", most)
    lm, spare_U = lm_of("Llama")
    words = generation_kit.tokenizer()
    prompts, spare = [[1, 9, 20, 33], [1, 30]], set(spare_U.tolist())
    with serving(lm) as server:
        sampling = Sampling(engine="vllm-server", server=server.address)
        generator = open_generator(generation_kit.actor(lm), words, ENDS, sampling)
        responses = generator.generate(prompts, [1, 2], [12, 5])
        body = server.bodies("/v1/completions")[0]
        generator.close()
        assert not spare & {i for r in responses for i in r.ids}
        assert ("allowed_token_ids" in body) is (most == 1024) and ("logit_bias" in body) is (most == 50)
        server.follows_requests = False
        generator = open_generator(generation_kit.actor(lm), words, ENDS, sampling)
        with pytest.raises(UserError, match="vllm-server sampled id [0-9]+, for which the tokenizer has no"):
            generator.generate(prompts, [1, 2], [12, 12])
        generator.close()
        server.mode = "raw_logprobs"  # log-probs without what the request excludes
        with pytest.raises(UserError, match="processed_logprobs, got raw_logprobs"):
            open_generator(generation_kit.actor(lm), words, ENDS, sampling)

    class LLM:
        def __init__(self, **settings):
            self.seen = []

        def generate(self, prompts, parameters, use_tqdm):
            self.seen += parameters
            outputs = [SimpleNamespace(token_ids=(9,), logprobs=[{9: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")]  # fmt: skip  # noqa: E501
            return [SimpleNamespace(outputs=outputs) for _ in prompts]

        sleep = wake_up = collective_rpc = reset_prefix_cache = lambda *args, **kwargs: None

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    local = open_generator(generation_kit.actor(lm), words, ENDS, Sampling(engine="vllm"))
    assert local.generate([[1, 9]], [1], [4])[0].spare_mass is None
    fields = vars(local.llm.seen[0])
    if most == 1024:
        assert fields["allowed_token_ids"] == list(range(TOKENS))
    else:
        assert fields["logit_bias"] == dict.fromkeys(spare, -100.0)
    local.close()
    monkeypatch.setattr(vllm_tokens, "MOST_IDS", 9)
    with pytest.raises(UserError, match=r"at most 9 rows without a token, got 35 \(96 rows, 61 tokens\)"):
        open_generator(generation_kit.actor(lm), words, ENDS, Sampling(engine="vllm"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy with likely spare rows and large weights, and score models without a spare row."""
    from saferlhf_fast.models.causal_lm import load_causal_lm, save_causal_lm
    from saferlhf_fast.models.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("spare")
    scores = kit.make_scores(folder, kit.make_model(folder / "small"))
    path = kit.make_model(folder / "model", vocab=64)
    lm, tokenizer = load_causal_lm(path), load_tokenizer(path)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" not in name:
                parameter *= 8.0
    save_causal_lm(path, lm, tokenizer)
    return {"model": path, "data": kit.make_data(folder / "data", n=12)["prompts"], **scores}


def alarms(folder):
    """The section of a run's report, without drawing the rest of it."""
    from saferlhf_fast.evaluation.report.alarms import section_of_alarms
    from saferlhf_fast.evaluation.report.read import read_run

    return section_of_alarms(read_run(folder))


def run(world, folder, **settings):
    common = {"max_length": 24, "ppo__batch_size": 4, "ppo__max_steps": 2, "checkpoint__minutes": "null"}
    return kit.run("ppo-lag", folder, **{**world, **common, **settings})


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"ppo__minibatches": 2}, marks=SLOW), pytest.param({"lora__rank": 4}, marks=SLOW)],
)
def test_a_run_scores_what_it_samples_and_says_what_is_cut(world, tmp_path, capsys, changes):
    out = run(world, tmp_path / "run", **changes)
    assert all(gap < 1e-3 for gap in kit.losses(out, "train/engine_gap_max"))
    assert kit.losses(out, "train/engine_gap_alarm") == [0.0, 0.0]
    masses = kit.losses(out, "train/spare_mass")
    assert all(0.01 < mass < 1 for mass in masses) and kit.losses(out, "train/spare_mass_alarm") == [1.0, 1.0]
    assert 0.01 < kit.losses(out, "eval/spare_mass")[0] < 1
    text = "".join(capsys.readouterr())
    assert text.count("of the policy's probability is on rows of its head without a token") == 1
    assert "In 2 of the logged steps, first in step 1: " in alarms(out) and "without a token" in alarms(out)
    if not changes:
        shown = kit.run(
            "evaluate", tmp_path / "e", model=world["model"], prompts=world["data"], max_length=24
        )
        assert 0.01 < kit.summary(shown)["spare_mass"] < 1
        assert "expected a model whose embedding has as many rows" in "".join(capsys.readouterr())


@pytest.mark.parametrize("old_logp", ["trainer", pytest.param("engine", marks=SLOW)])
def test_an_engine_whose_left_padded_batches_are_wrong_is_reported(
    world, tmp_path, capsys, monkeypatch, old_logp
):
    """The engine reads padding as text. The run warns once, in its metrics and in its report."""
    from saferlhf_fast.rollout.engines import hf_generate, row_lengths

    right = hf_generate.collate_left

    def without_mask(prompts, pad):
        ids_BL, mask_BL = right(prompts, pad)
        return ids_BL, torch.ones_like(mask_BL)

    monkeypatch.setattr(hf_generate, "collate_left", without_mask)
    # the probe at loading would find it, and sample prompts of equal length together
    monkeypatch.setattr(hf_generate, "batching_of", lambda lm: row_lengths.Batching())
    out = run(world, tmp_path / "run", ppo__old_logp=old_logp)
    assert kit.losses(out, "train/engine_gap_alarm") == [1.0, 1.0]
    text = " ".join("".join(capsys.readouterr()).split())
    assert text.count("the log-probs of the rollout engine differ from the trainer's by") == 1
    assert "sampling.engine=generate with sampling.batch_size=1" in text
    assert "rollout engine differ from the trainer" in alarms(out)


def test_a_stale_batch_and_rounding_raise_no_alarm(capsys):
    from saferlhf_fast.training.anomalies import EngineGapAlarm

    exact = EngineGapAlarm(Sampling(), torch.float32)
    assert exact.look(1, {"engine_gap_mean": 1.0, "staleness": 1}) == {}
    assert exact.look(2, {"engine_gap_mean": 0.02}) == {"engine_gap_alarm": 1.0}
    assert exact.look(3, {"engine_gap_mean": 1e-4}) == {"engine_gap_alarm": 0.0}
    assert "".join(capsys.readouterr()).count("warning: step 2") == 1
    for rounded in (
        EngineGapAlarm(Sampling(), torch.bfloat16),
        EngineGapAlarm(Sampling(engine="vllm-server"), torch.float32),
        EngineGapAlarm(Sampling(temperature=0.1), torch.float32),
    ):
        assert rounded.look(1, {"engine_gap_mean": 0.05}) == {"engine_gap_alarm": 0.0}
    assert exact.look(4, {"approx_kl": 9.0}) == {}  # learning, where the gap is not measured
