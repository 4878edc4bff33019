"""What docs/api.md promises of every public function: an argument that does not fit is a ValueError.

Each argument of each function gets a value of every wrong kind while the others are right; the message has
one line.
"""

import inspect

import numpy
import pytest
import torch

import saferlhf_fast

B, T, V, H = 2, 3, 7, 5


def _table():
    """{name: (function, its right arguments)} of the functions and methods that take tensors or numbers."""
    torch.manual_seed(0)
    mask, cu_seqlens = torch.ones(B, T, dtype=torch.bool), torch.tensor([0, 3, 6], dtype=torch.int32)
    ids = torch.randint(V, (B, T))

    def tokens(*names):
        return {name: -torch.rand(B, T) for name in names}

    def rows(*names):
        return {name: torch.rand(B) for name in names}

    logits, head = (
        {"logits": torch.randn(B, T, V)},
        {"hidden": torch.randn(B, T, H), "weight": torch.randn(V, H)},
    )
    bias = {"bias": torch.randn(V)}
    policy = {**tokens("old_logp", "advantages", "ref_logp"), "clip_ratio": 0.2, "mask": mask}
    gamma = {"gamma": 0.9, "lam": 0.9, "mask": mask}
    signs = {name: torch.tensor([-1.0, 1.0]) for name in ("safer_sign", "unsafer_sign")}
    lag = tokens("logp", "ref_logp", "reward_values", "cost_values") | rows("reward", "cost")
    api = saferlhf_fast
    table = {
        api.token_logprob: {**logits, "ids": ids},
        api.linear_logprob: {**head, **bias, "ids": ids},
        api.gae: {**tokens("rewards", "values"), **gamma},
        api.ppo_lag_advantage: {**lag, "multiplier": 1.0, "kl_coeff": 0.1, "clip_score": 5.0, **gamma},
        api.ppo_loss: {**tokens("logp", "entropy"), **policy},
        api.ppo_loss_from_logits: {**logits, "ids": ids, **policy},
        api.linear_ppo_loss: {**head, **bias, "ids": ids, **policy},
        api.value_loss: {**tokens("values", "old_values", "returns"), "clip_value": 0.2, "mask": mask},
        api.PPOLagLoss: {"clip_ratio": 0.2},
        api.PPOLagLoss().forward: {
            **tokens("logp", "old_logp", "reward_advantages", "cost_advantages"),
            "multiplier": 1.0,
            "mask": mask,
        },
        api.reward_loss: rows("better", "worse"),
        api.cost_loss: {**rows("safer", "unsafer"), **signs},
        api.pack: {**tokens("padded"), "mask": mask},
        api.unpack: {"packed": torch.rand(6), "cu_seqlens": cu_seqlens, "width": 4},
    }
    for multiplier in (api.LagrangeMultiplier, api.PIDMultiplier):
        table |= {
            multiplier: {},
            multiplier().update: rows("costs_B"),
            multiplier().load_state_dict: {"values": multiplier().state_dict()},
        }
    return {function.__qualname__: (function, arguments) for function, arguments in table.items()}


TABLE = _table()
# Which kinds are right for a parameter: what the page's types allow, and values that Python counts as one.
NUMBERS = {"number", "one element", "True", "negative", "infinity", "NaN"}
ANYTHING = {
    **dict.fromkeys(
        ("temperature", "softcap", "normalizer", "clip_ratio", "clip_high", "dual_clip"), NUMBERS
    ),
    **dict.fromkeys(("clip_value", "clip_score", "kl_coeff", "entropy_coeff", "gamma", "lam"), NUMBERS),
    **dict.fromkeys(("multiplier", "advantage_scale", "advantage_shift", "regularization", "fill"), NUMBERS),
    **dict.fromkeys(("init", "lr", "max", "kp", "ki", "kd", "threshold"), NUMBERS),
    **dict.fromkeys(("window", "delay", "width", "chunk_tokens"), {"number"}),
    **dict.fromkeys(("return_entropy", "inplace_backward", "inplace", "whiten"), {"True"}),
    **dict.fromkeys(("mask",), {"booleans"}),
    "ids": {"integers"},
    "padded": {"integers", "booleans", "complex numbers", "eight bits", "tensors", "no tensors"},
    "packed": {"no tensors"},
    "costs_B": {"two", "nothing"},
}
BY_FUNCTION = {
    ("pack", "mask"): {"booleans", "integers"},
    **{
        (name, each): {"two"}
        for name in ("reward_loss", "cost_loss", "ppo_lag_advantage")
        for each in ("better", "worse", "safer", "unsafer", "reward", "cost")
    },
}


def _kinds():
    return {
        "None": None,
        "text": "x",
        "no tensors": [],
        "list": [0.1, 0.2],
        "dict": {},
        "object": object(),
        "complex": 1j,
        "True": True,
        "number": 3,
        "negative": -1.0,
        "NaN": float("nan"),
        "infinity": float("inf"),
        "one element": torch.tensor(0.5),
        "two": torch.tensor([0.2, 0.3]),
        "shape": torch.rand(4, 9),
        "nothing": torch.zeros(0),
        "integers": torch.ones(B, T, dtype=torch.int64),
        "booleans": torch.ones(B, T, dtype=torch.bool),
        "complex numbers": torch.zeros(B, T, dtype=torch.complex64),
        "eight bits": torch.zeros(B, T).to(torch.float8_e4m3fn),
        "meta": torch.zeros(B, T, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "tensors": [torch.rand(B, T)],
        "array": numpy.ones((B, T)),
    }


@pytest.mark.parametrize("name", TABLE)
def test_every_argument_of_a_wrong_kind_is_a_value_error_in_one_line(name):
    function, arguments = TABLE[name]
    function(**arguments)
    tried = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        allowed = ANYTHING.get(parameter.name, set()) | BY_FUNCTION.get((name, parameter.name), set())
        for kind, value in _kinds().items():
            if value is None and (parameter.default is None or parameter.name == "clip_score"):
                continue
            given = {**arguments, parameter.name: value}
            if parameter.name == "cu_seqlens":
                given.pop("mask", None)
            place = f"{name}: {parameter.name}: {kind}"
            tried += 1
            try:
                function(**given)
            except ValueError as error:
                message = str(error)
                assert "expected" in message and "\n" not in message and len(message) < 300, (
                    f"{place}: {message}"
                )
            except Exception as error:
                pytest.fail(f"{place}: {type(error).__name__}: {error}")
            else:
                assert kind in allowed, f"{place}: accepted"
    assert tried > 20


def test_the_table_has_every_public_function():
    files = {"load_score_model", "score_model_from_backbone", "save_score_model", "ScoreModel"}
    rest = set(saferlhf_fast.__all__) - {name.split(".")[0] for name in TABLE} - files
    assert rest <= {"UserError", "integrations", "__version__"}


@pytest.mark.parametrize("op", ["ppo_loss", "ppo_loss_from_logits", "linear_ppo_loss"])
def test_a_clip_of_two_numbers_is_named(op):
    function, arguments = TABLE[op]
    for name in ("clip_ratio", "clip_high"):
        with pytest.raises(
            ValueError, match=rf"^{op}: {name}: expected a number >= 0, got a tensor of torch.float32 \[2\]$"
        ):
            function(**{**arguments, name: torch.tensor([0.2, 0.3])})


def test_what_a_score_model_is_not_made_from(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**settings, vocab_size=16)
    t5 = transformers.T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    ok = saferlhf_fast.ScoreModel(transformers.LlamaModel(config))
    causal_lm = transformers.LlamaForCausalLM(config)
    classifier = transformers.LlamaForSequenceClassification(config)
    wrong = {
        "got None": None,
        "got 'gpt2'": "gpt2",
        "got Linear without a config": torch.nn.Linear(2, 2),
        r"got LlamaForCausalLM, .* its backbone is LlamaForCausalLM\.base_model": causal_lm,
        "got LlamaForSequenceClassification, which has a head": classifier,
        "got ScoreModel$": ok,
        "got a compiled model": torch.compile(ok.backbone),
        "got T5Model, which is an encoder and a decoder": transformers.T5Model(t5),
        "got T5ForConditionalGeneration, which is": transformers.T5ForConditionalGeneration(t5),
    }
    for message, backbone in wrong.items():
        with pytest.raises(
            ValueError, match=f"ScoreModel: backbone: expected a transformers model without a head.*{message}"
        ):
            saferlhf_fast.ScoreModel(backbone)
    with pytest.raises(
        ValueError, match="ScoreModel: kind: expected reward or cost or critic or None, got 'x'"
    ):
        saferlhf_fast.ScoreModel(ok.backbone, kind="x")
    for name in ("bias", "packing", "normalizer", "head"):
        for value in (3, "x", [1]):
            with pytest.raises(ValueError, match=f"ScoreModel: {name}: expected .*, got "):
                saferlhf_fast.ScoreModel(ok.backbone, **{name: value})
    ids, mask = torch.tensor([[1, 2]]), torch.ones(1, 2)
    for value in (None, "x", [1, 2], object(), torch.rand(1, 2), torch.zeros(2, 2, 2)):
        for call in (
            lambda value=value: ok(value, mask),
            lambda value=value: ok(ids, value if value is not None else "x"),
            lambda value=value: ok(ids, None, value if value is not None else "x"),
            lambda value=value: ok.end_scores(value if not isinstance(value, torch.Tensor) else ids, mask),
            lambda value=value: saferlhf_fast.save_score_model(value, ok, None, kind="reward"),
            lambda value=value: saferlhf_fast.save_score_model(tmp_path / "new", value, None, kind="reward"),
            lambda value=value: saferlhf_fast.load_score_model(value if not isinstance(value, str) else ""),
            lambda value=value: saferlhf_fast.load_score_model(tmp_path, dtype=value),
            lambda value=value: saferlhf_fast.score_model_from_backbone(
                value if not isinstance(value, str) else ""
            ),
        ):
            with pytest.raises(ValueError, match="expected") as caught:
                call()
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
