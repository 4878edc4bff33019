"""Checks the ops on this device with cases that often fail first.

These are odd vocabularies, one token, one-token rows, holes in masks, two calls, another stream, and a CUDA
graph. Each is compared with the reference in float64 on the same data.
"""

from collections.abc import Callable
from typing import NamedTuple

import ceilings
import exact
import shapes
import torch
from gpu import graphs, rehearsal
from gpu.outcomes import NotRun

import saferlhf_fast as ops
from saferlhf_fast.kernels import dispatch

DEVICE = ceilings.DEVICE
# all except the last one: rows do not begin at multiples of 16 bytes
VOCABULARIES = (67, 516) if shapes.TINY else (128_257, 32_001, 151_936)
WIDTH = 64 if shapes.TINY else 1024
COUNTS = (1, 5) if shapes.TINY else (1, 33)
NARROW = shapes.LOGITS[DEVICE][0][2]  # of logits, hidden states and weights


class Case(NamedTuple):
    """One case.

    call(dtype, impl) returns tensors, with the same numbers for every dtype. op: the op whose implementations
    are tried. A call copies nothing from the host, because it is also captured in a CUDA graph.
    """

    op: str
    name: str
    call: Callable


def _random(*size, seed=0, scale=1.0):
    # on the device: a CPU needs seconds for one weight
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*size, generator=generator, device=DEVICE) * scale).to(NARROW)


def _ids(count, vocabulary):
    ids = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(1))
    ids[0], ids[-1] = 0, vocabulary - 1
    return ids.to(DEVICE)


def _as(tensor, dtype):
    """Returns a new leaf with the same numbers."""
    return tensor.to(dtype or tensor.dtype).detach()


def _offsets(count):
    """Returns the offsets of a few rows, among them one with one token and an empty one."""
    inside = [0, 1, 1, max(1, count // 2), count]
    return torch.tensor(inside, dtype=torch.int32, device=DEVICE)


def logprob(count, vocabulary, inplace):
    logits_NV, ids_N, up_N = (
        _random(count, vocabulary, scale=2),
        _ids(count, vocabulary),
        _random(count, seed=2).float(),
    )

    def call(dtype, impl):
        leaf = _as(logits_NV, dtype).requires_grad_()
        logp, entropy = ops.token_logprob(
            leaf * 1, ids_N, return_entropy=True, inplace_backward=inplace, impl=impl
        )
        return logp, entropy, torch.autograd.grad((logp * up_N).sum() + 0.3 * entropy.sum(), leaf)[0]

    return Case("token_logprob", f"{count}x{vocabulary}{' in place' if inplace else ''}", call)


def policy(count, vocabulary):
    logits_NV, ids_N = _random(count, vocabulary, scale=2), _ids(count, vocabulary)
    old_N = torch.log_softmax(logits_NV.double(), -1).gather(1, ids_N[:, None])[:, 0].float() + 0.05
    advantage_N, cu_seqlens = _random(count, seed=3).float(), _offsets(count)

    def call(dtype, impl):
        leaf = _as(logits_NV, dtype).requires_grad_()
        loss, _ = ops.ppo_loss_from_logits(
            leaf * 1, ids_N, _as(old_N, dtype), advantage_N, clip_ratio=0.2, cu_seqlens=cu_seqlens, impl=impl
        )
        return loss, torch.autograd.grad(loss * 0.7, leaf)[0]

    return Case("ppo_loss_from_logits", f"{count}x{vocabulary}", call)


def head(count, vocabulary, op):
    hidden_NH, ids_N = _random(count, WIDTH), _ids(count, vocabulary)
    weight_VH = _random(vocabulary, WIDTH, seed=4, scale=2 / WIDTH**0.5)
    old_N, advantage_N = _random(count, seed=5).float() - 10, _random(count, seed=3).float()
    cu_seqlens = _offsets(count)

    def call(dtype, impl):
        leaves = [_as(tensor, dtype).requires_grad_() for tensor in (hidden_NH, weight_VH)]
        if op == "linear_logprob":
            with torch.no_grad():
                alone = ops.linear_logprob(*leaves, ids_N, impl=impl)
            result = ops.linear_logprob(*leaves, ids_N, impl=impl)
            return alone, result, *torch.autograd.grad((result * advantage_N).sum(), leaves)
        loss, _ = ops.linear_ppo_loss(
            *leaves, ids_N, _as(old_N, dtype), advantage_N, clip_ratio=0.2, cu_seqlens=cu_seqlens, impl=impl
        )
        return loss, *torch.autograd.grad(loss, leaves)

    return Case(op, f"{count}x{WIDTH}x{vocabulary}", call)


def rows(count, width, packed, op):
    """Returns a case of an op on tokens: gae, ppo_lag_advantage, ppo_loss, value_loss."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(1, width + 1, (count,), generator=generator)
    lengths[0] = 1
    mask = (torch.arange(width)[None] < lengths[:, None]).to(DEVICE)
    where = (
        {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(DEVICE)}
        if packed
        else {"mask": mask}
    )
    shape = (int(lengths.sum()),) if packed else (count, width)
    token = [torch.randn(*shape, generator=generator).to(DEVICE) for _ in range(4)]
    score = [torch.randn(count, generator=generator).to(DEVICE) for _ in range(2)]
    multiplier = torch.tensor(1.5, device=DEVICE)

    def call(dtype, impl):
        a, b, c, d = (_as(tensor, dtype) for tensor in token)
        r, s = (_as(tensor, dtype) for tensor in score)
        if op == "gae":
            return ops.gae(a, b, gamma=0.99, lam=0.95, impl=impl, **where)
        if op == "ppo_lag_advantage":
            return ops.ppo_lag_advantage(
                a,
                b,
                r,
                s,
                c,
                d,
                multiplier,
                kl_coeff=0.02,
                gamma=1.0,
                lam=0.95,
                clip_score=50.0,
                impl=impl,
                **where,
            )[:3]
        leaf = a.requires_grad_()
        if op == "ppo_loss":
            loss = ops.ppo_loss(leaf, b, c, clip_ratio=0.2, impl=impl, **where)[0]
        else:
            loss = ops.value_loss(leaf, b, c, clip_value=0.2, impl=impl, **where)[0]
        return loss, torch.autograd.grad(loss, leaf)[0]

    return Case(op, f"{count}x{width}{' packed' if packed else ''}", call)


def cases():
    """Yields all cases, as functions and arguments."""
    for vocabulary in VOCABULARIES:
        for count in COUNTS:
            yield logprob, (count, vocabulary, False)
            yield logprob, (count, vocabulary, True)
            yield policy, (count, vocabulary)
    for vocabulary in VOCABULARIES[:2]:
        for count in COUNTS:
            yield head, (count, vocabulary, "linear_logprob")
            yield head, (count, vocabulary, "linear_ppo_loss")
    for op in ("gae", "ppo_lag_advantage", "ppo_loss", "value_loss"):
        for count, width in ((1, 1), (3, 40)) if shapes.TINY else ((1, 1), (7, 63), (300, 507), (3, 5000)):
            yield rows, (count, width, False, op)
            yield rows, (count, width, True, op)


def implementations(op):
    """Returns the implementations that can run here, without the reference."""
    return [
        row.implementation
        for row in dispatch.table(DEVICE)
        if row.op == op and row.available and row.implementation != "reference"
    ]


def compare(window, case, impl):
    """Writes one row: the largest error of any result, against the reference in float64."""
    before = rehearsal.launches()
    outputs = case.call(None, impl)
    if rehearsal.launches() > before:
        raise NotRun("compiled for sm_90, and not launched")
    right = case.call(torch.float64, "reference")
    errors = [
        exact.error(output, expected) / exact.LIMIT[output.dtype] for output, expected in zip(outputs, right)
    ]
    result = "right" if max(errors) <= 1 else f"wrong: {max(errors):.1f} x the limit"
    window.emit("check", op=case.op, what=case.name, impl=impl, result=result)


def everything(window):
    """Checks every case with every implementation, then what only a device can do."""
    for build, arguments in cases():
        case = window.attempt(f"the data of {build.__name__}{arguments}", build, *arguments)
        for impl in implementations(case.op) if case else ():
            window.attempt(f"{case.op} {case.name}, {impl}", compare, window, case, impl)
    for build, arguments in device_cases():
        case = build(*arguments)
        for impl in implementations(case.op):
            for trial in (twice, other_stream, graph):
                window.attempt(
                    f"{case.op} {case.name}, {impl}: {trial.__name__}", one_trial, window, trial, case, impl
                )


def device_cases():
    """Yields one case of each op, large enough for more than one program."""
    count, vocabulary = COUNTS[-1], VOCABULARIES[-1]
    yield logprob, (count, vocabulary, False)
    yield policy, (count, vocabulary)
    yield head, (count, VOCABULARIES[0], "linear_logprob")
    yield head, (count, VOCABULARIES[0], "linear_ppo_loss")
    for op in ("gae", "ppo_lag_advantage", "ppo_loss", "value_loss"):
        yield rows, ((3, 40) if shapes.TINY else (300, 507)) + (False, op)


def one_trial(window, trial, case, impl):
    before = rehearsal.launches()
    first, second = trial(lambda: case.call(None, impl))
    if rehearsal.launches() > before:
        raise NotRun("compiled for sm_90, and not launched")
    same = all(torch.equal(a, b) for a, b in zip(first, second))
    window.emit(
        "check",
        op=case.op,
        what=f"{case.name}, {trial.__name__.replace('_', ' ')}",
        impl=impl,
        result="right" if same else "wrong: other bits",
    )


def twice(call):
    return call(), call()


def other_stream(call):
    """Calls on the usual stream, and on another one."""
    if DEVICE != "cuda":
        raise NotRun("there are no streams on a CPU")
    first, stream = call(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return first, second


def graph(call):
    """Calls once, and captures the call in a CUDA graph that is replayed twice."""
    if DEVICE != "cuda":
        raise NotRun("there are no CUDA graphs on a CPU")
    first, captured, second = graphs.capture(call)
    for _ in range(2):
        captured.replay()
    torch.cuda.synchronize()
    return first, second
