"""A patched transformers model: the same losses, log-probs and gradients, without logits."""

import copy
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from patch_kit import KINDS, V, close, gradients, make, random_batch  # noqa: E402

from saferlhf_fast.integrations.transformers import patch_model  # noqa: E402

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_transformers_own(kind):
    model = make(kind)
    patched = patch_model(copy.deepcopy(model))
    for seed in range(50):
        ids, mask, labels = random_batch(seed)
        extra = [
            {},
            {"num_items_in_batch": 7},
            {"num_items_in_batch": torch.tensor(5)},
            {"shift_labels": torch.roll(labels, -1, 1)},
            {"output_hidden_states": True},
            {"ignore_index": 3},
        ][seed % 6]
        if "ignore_index" in extra:
            labels = labels.where(labels >= 0, 3)
        expected = model(ids, attention_mask=mask, labels=labels, **extra)
        got = patched(ids, attention_mask=mask, labels=labels, **extra)
        assert got.logits is None and got.loss.dtype == expected.loss.dtype
        close(got.loss, expected.loss, torch.float32)
        assert len(got.hidden_states or ()) == len(expected.hidden_states or ())
        close(gradients(patched, got.loss), gradients(model, expected.loss), torch.float32)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_half_precision_and_autocast(kind):
    model = make(kind, torch.bfloat16)
    exact, patched = copy.deepcopy(model).double(), patch_model(copy.deepcopy(model))
    wide = make(kind)
    narrow = patch_model(copy.deepcopy(wide))
    for seed in range(0, 50, 5):
        ids, mask, labels = random_batch(seed + 1)
        labels[0, -1] = ids[0, -1]
        got, expected = (
            patched(ids, attention_mask=mask, labels=labels).loss,
            model(ids, attention_mask=mask, labels=labels).loss,
        )
        truth = exact(ids, attention_mask=mask, labels=labels).loss
        assert got.dtype == torch.float32
        if not truth.isnan():
            assert (got - truth).abs() <= (expected - truth).abs() + 0.02 * truth.abs()
            close(gradients(patched, got), gradients(model, expected), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            close(
                narrow(ids, attention_mask=mask, labels=labels).loss,
                wide(ids, attention_mask=mask, labels=labels).loss,
                torch.bfloat16,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_token_logprobs(kind):
    model = make(kind)
    patched = patch_model(copy.deepcopy(model))
    for seed in range(50):
        ids, mask, labels = random_batch(seed)
        temperature = [1.0, 0.5, 2.0][seed % 3]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits.float()[:, :-1] / temperature
        every = logits.log_softmax(-1)
        real = (mask[:, 1:] * mask[:, :-1]).bool()
        chosen = ids if seed % 2 else labels
        if chosen is labels:
            real = real & (labels[:, 1:] != -100)
        expected = every.gather(-1, chosen[:, 1:, None].clamp(min=0)).squeeze(-1).where(real, 0.0)
        entropy = -(every.exp() * every).sum(-1).where(real, 0.0)
        given = {"labels": labels} if chosen is labels else {}
        got, spread = patched.token_logprobs(
            ids, mask.bool() if seed % 3 else mask, temperature=temperature, return_entropy=True, **given
        )
        assert got.shape == (len(ids), ids.shape[1] - 1) and got.dtype == torch.float32
        close(got, expected, torch.float32)
        close(spread, entropy, torch.float32)
        assert not got[~real].any()
        close(patched.token_logprobs(ids, mask, temperature=temperature, **given), expected, torch.float32)
        if seed % 10 == 1 and real.any():
            weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed))
            close(
                gradients(patched, ((got + 0.3 * spread) * weight).sum()),
                gradients(model, ((expected + 0.3 * entropy) * weight).sum()),
                torch.float32,
            )


def test_token_logprobs_edges():
    patched = patch_model(make())
    ids = torch.tensor([[5, 6, 7]])
    assert patched.token_logprobs(ids[:0]).shape == (0, 2) and patched.token_logprobs(ids[:, :1]).shape == (
        1,
        0,
    )
    assert patched.token_logprobs(ids, torch.zeros_like(ids)).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(
        patched.token_logprobs(ids.int()), patched.token_logprobs(ids, torch.ones_like(ids).bool())
    )
    per_token = patched.token_logprobs(ids, temperature=torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(per_token[0, 1], patched.token_logprobs(ids, temperature=2.0)[0, 1])
    assert patch_model(make(dtype=torch.float64)).token_logprobs(ids).dtype == torch.float64
    for bad, message in [
        (dict(mask=torch.ones(1, 3)), "float32"),
        (dict(mask=torch.ones(1, 2).long()), r"expected \[1, 3\]"),
        (dict(labels=torch.full((1, 3), V)), f"id < {V}, got {V}"),
        (dict(temperature=0.0), "> 0"),
        (dict(labels=torch.full((1, 3), -1)), "got -1"),
        (dict(labels=torch.ones(1, 3)), "integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            patched.token_logprobs(ids, **bad)


@pytest.mark.parametrize("label", [V, 10**9, -1, -101])
def test_labels_outside_the_vocabulary_are_refused(label):
    patched, ids = patch_model(make()), torch.tensor([[5, 6, 7]])
    wrong = torch.tensor([[5, label, 7]])
    for name, more in (("labels", {}), ("shift_labels", {"shift_labels": wrong})):  # in the caller's words
        with pytest.raises(ValueError, match=rf"^{name}: expected -100 or 0 <= id < {V}, got {label}$"):
            patched(input_ids=ids, labels=ids if more else wrong, **more)
    with pytest.raises(ValueError, match=rf"^token_logprobs: labels: expected 0 <= id < {V}, got {label}$"):
        patched.token_logprobs(ids, labels=wrong)
    with pytest.raises(ValueError, match="labels: expected 3 integers"):
        patched(ids, labels=torch.tensor([[5, 7]]))
    with pytest.raises(ValueError, match="labels: expected 3 integers"):
        patched(ids, labels=ids.float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64, torch.float8_e4m3fn])
def test_labels_that_are_no_integers_are_refused(dtype):
    patched, ids = patch_model(make()), torch.tensor([[5, 6, 7]])
    for given in ({"labels": ids.to(dtype)}, {"labels": ids, "shift_labels": ids.to(dtype)}):
        with pytest.raises(
            ValueError, match=rf"^{list(given)[-1]}: expected 3 integers of shape \[1, 3\], got 3 of {dtype}"
        ):
            patched(input_ids=ids, **given)
    with pytest.raises(ValueError, match=f"labels: expected integers .*, got {dtype}"):
        patched.token_logprobs(ids, labels=ids.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    patched, ids = patch_model(make(vocab_size=200)), torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(patched(ids, labels=ids.to(dtype)).loss, patched(ids, labels=ids).loss)
    torch.testing.assert_close(patched.token_logprobs(ids, labels=ids.to(dtype)), patched.token_logprobs(ids))


def test_no_label_at_all_is_nan_with_gradients_of_zero_as_theirs():
    model, ids = make(), torch.tensor([[5, 6, 7]])
    patched = patch_model(copy.deepcopy(model))
    for each in (model, patched):
        loss = each(ids, labels=torch.full_like(ids, -100)).loss
        assert loss.isnan() and all(not g.any() for g in gradients(each, loss))


# ---------------------------------------------------------------- no logits


class Widest(TorchDispatchMode):
    """The largest tensor with V columns that any operation outside our ops returns, in elements."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.most = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.columns:
                self.most = max(self.most, tensor.numel())
        return made


def peak_bytes(call):
    """Most bytes that torch has allocated at once during call(), beyond what was there before."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("learn", [False, True])
def test_logits_are_never_built(learn, monkeypatch):
    """1,024 tokens, 32,000 words: chunks of 16 MiB, transformers' own logits 128 MiB and more than once."""
    from saferlhf_fast.kernels import linear

    monkeypatch.setitem(linear.WORKSPACE, "cpu", 16 << 20)
    columns, tokens = 32_000, 1_024
    model = make(vocab_size=columns, max_position_embeddings=tokens, hidden_size=8, num_attention_heads=1)
    ids = torch.randint(0, columns, (2, tokens // 2), generator=torch.Generator().manual_seed(0))

    def loss(model):
        with torch.set_grad_enabled(learn):
            made = model(ids, labels=ids).loss
            if learn:
                made.backward()
                model.zero_grad()

    def seen(call):
        with Widest(columns) as widest:
            call()
        return widest.most

    every, weights = tokens * columns, 4 * columns * 8
    plain_widest, plain_peak = seen(lambda: loss(model)), peak_bytes(lambda: loss(model))
    patch_model(model)
    assert plain_widest >= every and plain_peak >= 4 * every
    for call in (
        lambda: loss(model),
        *([] if learn else [lambda: model.token_logprobs(ids, torch.ones_like(ids))]),
    ):
        with torch.set_grad_enabled(learn):
            assert seen(call) <= (16 << 20) // 4
            assert peak_bytes(call) < (16 << 20) + 6 * weights + (8 << 20)
