"""The measurements of a GPU window: products, ops and variants, kernels alone, other projects."""

import importlib
from functools import partial

import bench_gae
import bench_linear_logprob
import bench_linear_ppo_loss
import bench_ppo_lag_advantage
import bench_ppo_loss
import bench_ppo_loss_from_logits
import bench_token_logprob
import bench_value_loss
import ceilings
import exact
import shapes
import torch
import triton
from gpu import graphs, variants
from gpu.measure import bench, timed
from gpu.outcomes import NotRun

from saferlhf_fast.kernels import scaling, scaling_triton
from saferlhf_fast.kernels.linear import product
from saferlhf_fast.kernels.ppo_loss_from_logits import triton_impl as policy_rows
from saferlhf_fast.kernels.token_logprob import triton_impl as logprob_rows


def products(window):
    """Times the head's matrix products with several chunks.

    They decide the chunk, the pitch and how the weight's gradient is computed.
    """
    tokens, width, vocabulary, dtype = full("LINEAR")
    hidden_NH, weight_VH = shapes.linear(full("LINEAR"), ceilings.DEVICE)[:2]
    logits_CV = torch.empty(tokens, vocabulary, device=ceilings.DEVICE)
    d_CV = torch.randn(tokens, vocabulary, device=ceilings.DEVICE).to(dtype)
    wide_CV = torch.randn(tokens, 2 * vocabulary, device=ceilings.DEVICE).to(dtype)[:, :vocabulary]
    d_weight = torch.zeros(vocabulary, width, device=ceilings.DEVICE)
    for count in (tokens // 2, tokens) if shapes.TINY else (2048, 2080, 4096, tokens):
        some_CH, d, wide, logits = hidden_NH[:count], d_CV[:count], wide_CV[:count], logits_CV[:count]
        out_CH = torch.empty(count, width, device=ceilings.DEVICE, dtype=dtype)
        for op, step in (
            ("logits, fp32 out", partial(product, some_CH, weight_VH.t(), logits)),
            ("logits, narrow out", partial(torch.mm, some_CH, weight_VH.t())),
            ("d hidden", partial(torch.mm, d, weight_VH, out=out_CH)),
            ("d hidden, rows of 2V", partial(torch.mm, wide, weight_VH, out=out_CH)),
            ("d weight, written", partial(product, d.t(), some_CH, d_weight)),
            ("d weight, added", partial(product, d.t(), some_CH, d_weight, add=True)),
            ("d weight, narrow", partial(torch.mm, d.t(), some_CH)),
        ):
            timed(
                window,
                step,
                op=op,
                version="torch",
                shape=f"{count}x{width}x{vocabulary}",
                dtype=dtype,
                flops=2 * count * width * vocabulary,
            )


# ---- the linear ops


def linear(window):
    """Times linear_ppo_loss with several chunks, and linear_logprob fused and in chunks."""
    variants.register()
    shape = full("LINEAR")
    for version in ("triton", *(f"triton, chunks of {count}" for count in variants.CHUNKS), "bare products"):
        bench(window, bench_linear_ppo_loss.test_forward_and_backward, shape, version)
    for version in ("triton", "triton, chunks"):
        bench(window, bench_linear_logprob.test_forward, shape, version)
    bench(window, bench_linear_logprob.test_forward_and_backward, shape, "triton")
    for version in cpu_versions(window):
        bench(window, bench_linear_ppo_loss.test_forward_and_backward, shape, version)
        bench(window, bench_linear_logprob.test_forward, shape, version)


def full(table):
    """Returns the target's shape of a table of shapes.py on this device."""
    return getattr(shapes, table)[ceilings.DEVICE][0]


def cpu_versions(window):
    """Returns the CPU's version in a rehearsal, which has no GPU; otherwise nothing."""
    return ["native"] if window.rehearsal else []


# ---- logits


def logits(window):
    """Times token_logprob, ppo_loss_from_logits and variants of their kernels on the largest vocabulary."""
    variants.register()
    shape = full("LOGITS")
    for version in (
        "triton",
        "triton, threads first",
        "triton, 16 warps",
        "triton, 4 warps",
        "eager",
        *cpu_versions(window),
    ):
        bench(window, bench_token_logprob.test_forward_with_entropy, shape, version)
    bench(window, bench_token_logprob.test_forward, shape, "triton")
    for name in sorted(name for name in dir(bench_ppo_loss_from_logits) if name.startswith("test_")):
        function = getattr(bench_ppo_loss_from_logits, name)
        for version in ("triton", *cpu_versions(window)):
            bench(window, function, shape, version)
    kernels(window, shape)
    bench(window, bench_token_logprob.test_forward_and_backward, shape, "triton")


def kernels(window, shape):
    """Times the kernels alone, without the other work of the ops.

    These are the rows of the policy's gradient, the backward of token_logprob, and a scale by 1.
    """
    clean, ids, upstream = shapes.logits(shape, ceilings.DEVICE)
    logp, lse = exact.of_logits(shape, ceilings.DEVICE)
    batch = shapes.batch(ids, logp)
    weight = torch.full_like(upstream, 1 / len(ids))
    buffer, some = clean.clone(), exact.rows_of(len(ids), ceilings.DEVICE)
    work = dict(shape=shapes.name(shape), reads=clean.nbytes, writes=clean.nbytes, dtype=clean.dtype)
    right = exact.logits_gradient(clean, ids, lse, exact.derivative(batch, logp), some)

    def policy_row(version, load):
        def go():
            call = variants.policy_rows(load())

            def step():
                return call(buffer, ids, batch.old_logp_N, batch.advantage_N, weight)

            buffer.copy_(clean)
            step()
            pair = (buffer[some].clone(), right)
            timed(
                window,
                step,
                op="ppo_loss_from_logits, the kernel alone",
                version=version,
                ready=lambda: buffer.copy_(clean),
                checked=(clean.dtype, pair),
                **work,
            )

        window.attempt(f"ppo_loss_from_logits, the kernel alone, {version}", go)

    policy_row("triton", lambda: policy_rows)
    policy_row("triton, threads first", lambda: variants.axes()[1])
    policy_row("triton, hints to the cache", variants.eviction)
    out, logp_N, lse_N = torch.empty_like(clean), logp.float(), lse.float()

    def pair():
        return (out[some], exact.logits_gradient(clean, ids, lse, upstream, some))

    for each in (1, 4, 8):

        def step(each=each):
            backward_in_parts(each, clean, ids, logp_N, lse_N, upstream, out)

        window.attempt(
            f"token_logprob, backward alone, {each} tiles a program",
            backward_row,
            window,
            step,
            each,
            pair,
            work,
        )
    one = torch.ones((), device=ceilings.DEVICE)
    if ceilings.DEVICE == "cuda" or window.rehearsal:
        timed(
            window,
            lambda: scaling_triton.scale(buffer, one),
            op="scale by 1",
            version="triton",
            shape=shapes.name(shape),
            dtype=clean.dtype,
        )
    timed(
        window,
        lambda: scaling.scale_in_place(buffer, one),
        op="scale by 1",
        version="as backward calls it",
        shape=shapes.name(shape),
        dtype=clean.dtype,
    )


def backward_row(window, step, each, pair, work):
    step()
    timed(
        window,
        step,
        op="token_logprob, backward alone",
        version=f"triton, {each} tiles a program",
        checked=(work["dtype"], pair()),
        **work,
    )


def backward_in_parts(each, logits_NV, ids_N, logp_N, lse_N, grad_N, out_NV):
    """Launches token_logprob's backward kernel with `each` tiles per program."""
    how, w, tiles = logprob_rows.tiling(logprob_rows.WARPS, False, out_NV, logits_NV)
    parts = triton.cdiv(tiles, each)
    logprob_rows.backward_kernel[(len(ids_N) * parts,)](
        out_NV,
        logits_NV,
        ids_N,
        logp_N,
        logp_N,
        lse_N,
        grad_N,
        logp_N,
        logp_N,
        out_NV.stride(0) // w,
        logits_NV.stride(0) // w,
        logits_NV.shape[1],
        parts,
        each,
        1.0,
        0,
        0.0,
        1,
        0,
        **how,
    )


# ---- rows of tokens


def tokens(window):
    """Times scans and losses of tokens: Triton and CUDA, both shapes, from Python and as a graph."""
    for shape in shapes.ROWS[ceilings.DEVICE]:
        for function in (bench_ppo_lag_advantage.test_forward, bench_gae.test_forward):
            for version in ("triton", "native"):
                bench(window, function, shape, version)
        for function in (
            bench_ppo_loss.test_forward_and_backward,
            bench_value_loss.test_forward_and_backward,
        ):
            for version in ("triton", *cpu_versions(window)):
                bench(window, function, shape, version)
        for version in ("triton", "native"):
            window.attempt(f"ppo_lag_advantage in a graph, {version}", replayed, window, shape, version)


def replayed(window, shape, version):
    """Times ppo_lag_advantage as a replayed CUDA graph: the cost of a call without Python."""
    if not torch.cuda.is_available():
        raise NotRun("there are no CUDA graphs on a CPU")
    mask, random = shapes.rows(shape, "cuda")
    tokens = [random() for _ in range(4)]
    scores = [random()[:, 0].contiguous() for _ in range(2)]
    call = bench_ppo_lag_advantage.ours(version)
    inputs = (*tokens[:2], *scores, *tokens[2:], torch.tensor(1.5, device="cuda"), mask)
    _, graph, _ = graphs.capture(lambda: call(*inputs)[:3])
    timed(
        window,
        graph.replay,
        op="ppo_lag_advantage, replayed graph",
        version=version,
        shape=shapes.name(shape),
    )


# ---- other projects

PEERS = (
    (
        "bench_linear_ppo_loss",
        "test_forward_and_backward",
        "LINEAR",
        (
            "Liger scaled cross entropy + loss",
            "verl linear_cross_entropy + loss",
            "TRL ChunkedLogProb + loss",
            "Liger linear cross entropy (mean), chunks x 16",
            "CCE + loss",
        ),
    ),
    (
        "bench_linear_logprob",
        "test_forward",
        "LINEAR",
        ("verl linear_cross_entropy", "CCE", "TRL ChunkedLogProb"),
    ),
    (
        "bench_token_logprob",
        "test_forward_with_entropy",
        "LOGITS",
        ("TRL selective_log_softmax_and_entropy",),
    ),
    ("bench_ppo_loss_from_logits", "test_forward_and_backward", "LOGITS", ("Liger triton_grpo_loss",)),
    # last, because torch.compile takes long
    ("bench_linear_ppo_loss", "test_forward_and_backward", "LINEAR", ("Liger FusedLinearGRPOLoss",)),
)


def peers(window):
    """Times other projects' versions at the targets' shapes."""
    for file, function, table, versions in PEERS:
        for version in versions:
            bench(window, getattr(importlib.import_module(file), function), full(table), version)
