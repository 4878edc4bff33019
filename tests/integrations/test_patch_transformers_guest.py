"""A patched transformers model is a good guest: generation, copies, files, Trainer, unpatching, and what it
refuses.
"""

import copy
import gc
import inspect
import json
import os
import pickle
import re
import sys
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

import forked  # noqa: E402
from kit import ROOT  # noqa: E402
from patch_kit import KINDS, SMALL, V, close, gradients, make, random_batch  # noqa: E402

from saferlhf_fast import integrations  # noqa: E402
from saferlhf_fast.integrations.report import Refused  # noqa: E402
from saferlhf_fast.integrations.transformers import patch_model, unpatch_model  # noqa: E402


@pytest.fixture(autouse=True)
def environment():
    """As it was before: transformers' Trainer leaves ranks in it, which a later test's child would take."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.numeric
def test_without_labels_it_is_the_model_itself():
    model, ids = make(), torch.tensor([[5, 6, 7]])
    patched = patch_model(copy.deepcopy(model))
    assert torch.equal(model(ids).logits, patched(ids).logits) and torch.equal(
        model(ids, return_dict=False)[0], patched(ids)[0]
    )
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), patched.generate(ids, **options))
    assert str(inspect.signature(patched.forward)) == str(inspect.signature(model.forward))
    assert type(patched(ids, labels=ids)) is type(model(ids, labels=ids))
    got = patched(ids, None, labels=ids, return_dict=False)
    assert (
        isinstance(got, tuple)
        and got[0].shape == ()
        and len(got) == len(model(ids, labels=ids, return_dict=False)) - 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unpatching_leaves_nothing(kind):
    model = make(kind)
    instance, head = set(vars(model)), model.get_output_embeddings()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    forward = type(model).forward
    patch_model(patch_model(model))
    assert (
        set(vars(model)) - instance == {"forward", "token_logprobs", "_saferlhf_fast_patch"}
        and "forward" not in instance
    )
    assert unpatch_model(unpatch_model(model)) is model
    assert set(vars(model)) == instance and type(head) is torch.nn.Linear and type(model).forward is forward
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).logits is not None
    other = make(kind)
    assert not hasattr(other, "token_logprobs")


def test_calls_are_counted():
    calls, ids = [], torch.tensor([[5, 6, 7]])
    patched = patch_model(make(), on_call=lambda: calls.append(1))
    assert not calls  # the check at patch time is nobody's call
    patched(ids), patched(ids, labels=ids), patched.token_logprobs(ids)
    assert len(calls) == 2


def test_each_patched_model_is_counted_by_itself(capsys):
    one, two, ids = make(), make(), torch.tensor([[5, 6, 7]])
    first, second = (integrations.patch("transformers", model) for model in (one, two))
    assert (
        capsys.readouterr().out.count(
            "replaced  forward and token_logprobs of this LlamaForCausalLM alone: no logits"
        )
        == 2
    )
    one(ids, labels=ids), one.token_logprobs(ids), two(ids, labels=ids)
    again = integrations.patch("transformers", one, quiet=True)
    ((mine, calls),) = first.calls.items()
    ((other, of_two),) = second.calls.items()
    # patching again resets nothing
    assert (calls, of_two) == (2, 1) and again.calls == first.calls
    assert re.fullmatch(r"transformers:LlamaForCausalLM( \(\d+\))?", mine) and mine != other
    with again:
        pass
    assert hasattr(one, "token_logprobs")  # the first patch's, which `again` found there
    with first:
        pass
    assert not hasattr(one, "token_logprobs") and integrations.patch(
        "transformers", one, quiet=True
    ).calls == {mine: 0}
    with pytest.raises(ValueError, match="has been undone"):
        first.__enter__()
    calls = []
    both = make()
    patch_model(both, on_call=lambda: calls.append(1))
    report = integrations.patch("transformers", both, quiet=True)
    both(ids, labels=ids)
    assert calls == [1] and list(report.calls.values()) == [1]


def test_a_model_that_is_gone_frees_its_key():
    def key(kind):
        return next(iter(integrations.patch("transformers", make(kind), quiet=True).replaced))

    seen = []
    for _ in range(2):
        seen.append(key("granite"))
        gc.collect()
    assert seen == ["transformers:GraniteForCausalLM"] * 2


def test_evaluation_without_logits_is_told_once():
    patched, ids = patch_model(make()).train(), torch.tensor([[5, 6, 7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched(ids, labels=ids).loss.backward()
        patched.eval()(ids, labels=ids).loss.backward()  # gradients: the loss is what was asked for
        with torch.no_grad():
            patched(ids)
    with torch.no_grad(), pytest.warns(UserWarning, match="logits=None.* unpatch the model before") as told:
        patched(ids, labels=ids), patched(ids, labels=ids)
    assert len(told) == 1
    with torch.inference_mode(), pytest.warns(UserWarning, match="unpatch the model before"):
        patch_model(make()).eval()(ids, labels=ids)  # another model, told by itself


def test_without_transformers_it_says_what_to_install(monkeypatch):
    model = make()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: integrations.patch("transformers", model), lambda: patch_model(model)):
        with pytest.raises(
            ImportError, match=r"transformers is not installed here: pip install 'saferlhf-fast\[train\]'$"
        ):
            call()
    assert not hasattr(model, "token_logprobs")


@pytest.mark.numeric
def test_torch_compile_goes_through_a_patched_model():
    model, ids = make(num_hidden_layers=1), torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]])
    torch._dynamo.reset()
    patched = patch_model(copy.deepcopy(model))
    compiled = torch.compile(patched, backend="eager")
    for ignored in (2, 5):  # how many positions have a label is data
        labels = ids.flatten().index_fill(0, torch.arange(ignored), -100).reshape(ids.shape)
        expected, got = model(ids, labels=labels).loss, compiled(ids, labels=labels)
        assert got.logits is None
        close(got.loss, expected, torch.float32)
        close(gradients(patched, got.loss), gradients(model, expected), torch.float32)


@pytest.mark.numeric
def test_copies_and_files(tmp_path):
    model, ids = make(), torch.tensor([[5, 6, 7]])
    expected = model(ids, labels=ids).loss
    patch_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    torch.testing.assert_close(twin(ids, labels=ids).loss.item(), torch.tensor(float(V)).log().item())
    assert twin.token_logprobs.__self__ is twin and unpatch_model(twin)(ids, labels=ids).logits is not None
    with pytest.raises(TypeError, match="unpatch_model"):
        pickle.dumps(model)
    assert pickle.dumps(twin)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is torch.nn.Linear
    torch.testing.assert_close(again(ids, labels=ids).loss, expected)


@pytest.mark.numeric
def test_checkpointed_activations_and_modes():
    model = make()
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = gradients(model, model(ids, labels=ids).loss)
    patch_model(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    close(gradients(model, model(ids, labels=ids).loss), expected, torch.float32)
    model.eval()
    with torch.no_grad():
        assert not model(ids, labels=ids).loss.requires_grad


@pytest.mark.numeric
def test_adapters_inside():
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[5, 6, 7]])
    made = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    expected = made(input_ids=ids, labels=ids).loss
    assert patch_model(made) is made
    got = made(input_ids=ids, labels=ids)
    assert got.logits is None and made.token_logprobs(ids).shape == (1, 2)
    torch.testing.assert_close(got.loss, expected)
    got.loss.backward()
    assert unpatch_model(made)(input_ids=ids, labels=ids).logits is not None
    on_head = peft.get_peft_model(
        make(), peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    )
    with pytest.raises(Refused, match="as head, got"):
        patch_model(on_head)


# ---------------------------------------------------------------- what it does not do


class OddHead(transformers.LlamaForCausalLM):
    """A model whose logits are not what its config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out


class OddLoss(transformers.LlamaForCausalLM):
    """A model whose loss is twice what it should be."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.loss = None if out.loss is None else out.loss * 2
        return out


def other(cls):
    torch.manual_seed(0)
    return cls(make().config)


def changed(change):
    model = make()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: other(OddHead), "OddHead: expected logits = softcap"),
        (lambda: other(OddLoss), "OddLoss: its loss is not the mean"),
        (lambda: torch.nn.Linear(2, 2), "expected a Hugging Face causal language model, got Linear"),
        (lambda: make().model, "expected a model with a backbone and a head"),
        (lambda: changed(lambda m: m.lm_head.register_forward_hook(lambda *_: None)), "hooks"),
        (lambda: changed(lambda m: setattr(m, "forward", m.forward)), "forward has been replaced already"),
        (lambda: changed(lambda m: setattr(m, "loss_function", max)), "its loss is max"),
        (lambda: changed(lambda m: setattr(m.config, "output_router_logits", True)), "output_router_logits"),
        (lambda: changed(lambda m: setattr(m.lm_head.weight, "ds_id", 0)), "sharded"),
        (lambda: make().to("meta"), "meta device"),
    ],
)
def test_what_is_not_like_that_is_refused_and_left_alone(model, message):
    made = model()
    before = set(vars(made))
    with pytest.raises(Refused, match=message):
        patch_model(made)
    assert set(vars(made)) == before and type(getattr(made, "lm_head", None)).__name__ in (
        "NoneType",
        "Linear",
    )


def test_an_unknown_version_is_refused_unless_forced(monkeypatch):
    # loading a model may put another module of that name in its place
    model = make()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.0.0")
    with pytest.raises(Refused, match="transformers 6.0.0: expected 5.x"):
        patch_model(model)
    assert hasattr(patch_model(model, force=True), "token_logprobs")


def test_calls_that_need_logits_go_to_the_model_and_say_so():
    model, ids = patch_model(make()), torch.tensor([[5, 6, 7]])
    with pytest.warns(UserWarning, match="own forward makes this loss: logits_to_keep"):
        assert model(ids, labels=ids[:, :2], logits_to_keep=2).logits.shape == (1, 2, V)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.warns(UserWarning, match="not transformers' ForCausalLMLoss"):
        assert model(ids, labels=ids).logits is not None


@pytest.mark.numeric
def test_a_mixture_of_experts():
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    model, ids = transformers.MixtralForCausalLM(config).eval(), torch.tensor([[5, 6, 7, 8]])
    patched = patch_model(copy.deepcopy(model))
    expected, got = model(ids, labels=ids), patched(ids, labels=ids)
    assert type(got) is type(expected) and got.logits is None
    close(gradients(patched, got.loss), gradients(model, expected.loss), torch.float32)
    with pytest.warns(UserWarning, match="own forward makes this loss: output_router_logits"):
        again = patched(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(again.loss, model(ids, labels=ids, output_router_logits=True).loss)
    assert again.aux_loss is not None


def test_a_wrapper_around_the_patched_forward_stays_when_it_is_taken_off():
    model, ids, seen = patch_model(make()), torch.tensor([[5, 6, 7]]), []
    inner = model.forward
    model.forward = lambda *args, **kwargs: seen.append(1) or inner(*args, **kwargs)
    assert model(ids, labels=ids).logits is None
    unpatch_model(model)
    assert model(ids, labels=ids).logits is not None and len(seen) == 2
    assert type(model.lm_head) is torch.nn.Linear and not hasattr(model, "token_logprobs")
    with pytest.raises(Refused, match="forward has been replaced already"):
        patch_model(model)


@pytest.mark.numeric
def test_transformers_trainer_sees_the_same_losses(tmp_path):
    pytest.importorskip("accelerate")
    rows = [
        dict(zip(("input_ids", "attention_mask", "labels"), (t[0] for t in random_batch(seed))))
        for seed in range(40)
    ]
    rows = [
        {name: value[:4].tolist() for name, value in row.items()}
        for row in rows
        if len(row["input_ids"]) >= 4
    ]
    rows = [row for row in rows if any(label != -100 for label in row["labels"][1:])]

    def losses(model, **more):
        settings = transformers.TrainingArguments(
            str(tmp_path),
            **more,
            max_steps=4,
            per_device_train_batch_size=2,
            logging_steps=1,
            gradient_accumulation_steps=2,
            report_to=[],
            save_strategy="no",
            seed=0,
            use_cpu=True,
            learning_rate=0.01,
            disable_tqdm=True,
            weight_decay=0.0,
        )
        trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.evaluate()[
            "eval_loss"
        ]

    expected, after = losses(make())
    calls = []
    got, mine = losses(patch_model(make(), on_call=lambda: calls.append(1)))
    assert len(expected) == 4 and len(calls) >= 8
    assert got == pytest.approx(expected, rel=2e-4) and mine == pytest.approx(after, rel=2e-4)
    narrow = patch_model(make())
    got, mine = losses(narrow, bf16=True)  # accelerate wraps the patched forward in autocast
    assert got == pytest.approx(expected, rel=0.05) and mine == pytest.approx(after, rel=0.05)
    assert not hasattr(unpatch_model(narrow), "token_logprobs")


@pytest.mark.numeric
@pytest.mark.slow
def test_two_processes_under_ddp_and_zero_3():
    done = forked.run([ROOT / "tests/support/patch_worker.py"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"gap"')))
    assert (
        said["gap"] < 1e-5
        and said["ours"] == pytest.approx(said["theirs"], rel=1e-4)
        and said["ours"][2] < said["ours"][0]
    )
