"""Other projects' versions of the ops, found by import.

Each entry has a name, the devices where it runs, and a call. All calls of a kind have one signature (N
tokens, H hidden, V vocabulary; `batch` is shapes.Batch):

    logprob(logits_NV, ids_N)                       returns logp_N
    logprob_entropy(logits_NV, ids_N)               returns logp_N, entropy_N
    ppo_from_logits(logits_NV, batch)               returns loss
    linear_logprob(hidden_NH, weight_VH, ids_N)     returns logp_N
    linear_ppo(hidden_NH, weight_VH, batch)         returns loss
    gae(rewards_BT, values_BT, mask_BT)             returns advantages, returns
    advantage(…)                                    as eager.advantage_loop
    ppo_loss, value_loss                            as in eager.py

A peer without a clipped loss gets eager.clipped after its log-probs, and "+ loss" in its name. Nothing is
imported before it is needed. A peer that does not import, or needs a GPU, raises Missing with the reason.
"""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import eager
import torch

IGNORE = -100


class Missing(Exception):
    """A peer that cannot be measured here; the text is the reason."""


class Peer(NamedTuple):
    """An entry.

    load: returns the call. where: devices on which it runs. means: see exact.derivative. forward_only: it has
    no backward. inplace: it writes into its logits. spare_row: it takes logits [N + 1, V] and ignores the
    last row.
    """

    load: Callable
    wheel: str
    where: tuple[str, ...]
    means: str
    forward_only: bool
    inplace: bool
    spare_row: bool


PEERS: dict[str, dict[str, Peer]] = {}


def peer(
    kind, name, wheel, where=("cuda",), means="same", forward_only=False, inplace=False, spare_row=False
):
    def register(load):
        PEERS.setdefault(kind, {})[name] = Peer(load, wheel, where, means, forward_only, inplace, spare_row)
        return load

    return register


def names(kind):
    return list(PEERS.get(kind, {}))


def load(kind, name, device):
    """Returns the peer's call, or raises Missing."""
    entry = PEERS[kind][name]
    try:
        call = entry.load()
    except ModuleNotFoundError as error:
        try:
            metadata.version(entry.wheel)
        except metadata.PackageNotFoundError:
            raise Missing(f"{entry.wheel} is not installed") from error
        raise Missing(f"{entry.wheel} {metadata.version(entry.wheel)} does not import: {error}") from error
    except Exception as error:  # a foreign import may raise anything
        raise Missing(
            f"{entry.wheel} does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if device not in entry.where:
        raise Missing(
            f"{entry.wheel} {metadata.version(entry.wheel)} imports, but this part needs a GPU (Triton only)"
        )
    return call


BOTH = ("cpu", "cuda")


def _compiled(form):
    torch._dynamo.reset()  # each shape is compiled separately: no recompile limit, no dynamic sizes
    return torch.compile(form, dynamic=False)


for _kind, _form in {
    "logprob": eager.logprob,
    "logprob_entropy": eager.logprob_entropy,
    "ppo_from_logits": eager.ppo_from_logits,
    "linear_logprob": eager.linear_logprob,
    "linear_ppo": eager.linear_ppo,
    "ppo_loss": eager.ppo_loss,
    "value_loss": eager.value_loss,
}.items():
    peer(_kind, "torch.compile", "torch", BOTH)(functools.partial(_compiled, _form))
for _kind, _form in {"gae": eager.gae_chunked, "advantage": eager.advantage_chunked}.items():
    peer(_kind, "chunked product", "torch", BOTH)(lambda form=_form: form)
    peer(_kind, "chunked product, torch.compile", "torch", BOTH)(functools.partial(_compiled, _form))


# TRL
# ----------------------------------------------------------------------------------------------------


@peer("logprob", "TRL selective_log_softmax", "trl", BOTH)
def _():
    if torch.cuda.is_available():
        kernel = importlib.import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
        return lambda logits, ids: kernel(logits, ids)[0]
    return importlib.import_module("trl.trainer.utils").selective_log_softmax


@peer("logprob_entropy", "TRL selective_log_softmax_and_entropy", "trl", BOTH)
def _():
    home = "trl.kernels.logprob_entropy" if torch.cuda.is_available() else "trl.trainer.utils"
    return importlib.import_module(home).selective_log_softmax_and_entropy


@peer("ppo_from_logits", "TRL selective_log_softmax + loss", "trl", BOTH)
def _():
    call = PEERS["logprob"]["TRL selective_log_softmax"].load()
    return lambda logits, batch: eager.clipped(call(logits, batch.ids_N), batch)


@peer("linear_logprob", "TRL ChunkedLogProb", "trl", BOTH)
def _():
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    # Arguments: bias, targets, temperature, columns of a tile (as TRL's trainer sets them), softcap, scale,
    # further outputs.
    return lambda hidden, weight, ids: function.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ())[0]


@peer("linear_ppo", "TRL ChunkedLogProb + loss", "trl", BOTH)
def _():
    call = PEERS["linear_logprob"]["TRL ChunkedLogProb"].load()
    return lambda hidden, weight, batch: eager.clipped(call(hidden, weight, batch.ids_N), batch)


# Liger
# ----------------------------------------------------------------------------------------------------


@peer("logprob", "Liger fused_selective_log_softmax", "liger-kernel", forward_only=True, spare_row=True)
def _():
    call = importlib.import_module("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    return lambda logits, ids: call(logits[None], ids[None], temperature=1.0)[0]


@peer("logprob", "Liger cross_entropy (none)", "liger-kernel", inplace=True)
def _():
    function = importlib.import_module("liger_kernel.ops").LigerCrossEntropyFunction
    return lambda logits, ids: -function.apply(logits, ids, None, IGNORE, 0.0, 0.0, "none")[0]


@peer("ppo_from_logits", "Liger triton_grpo_loss", "liger-kernel", means="grpo", inplace=True, spare_row=True)
def _():
    call = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss

    def run(logits, batch):
        return call(
            logits[None],
            batch.old_logp_N[None],
            None,
            batch.ids_N[None],
            batch.advantage_N[:1],
            temperature=1.0,
            beta=0.0,
            eps_low=eager.CLIP,
            eps_high=eager.CLIP,
            inplace=True,
            loss_type="grpo",
            reduce=True,
        )[0]

    return run


@peer("linear_logprob", "Liger scaled cross entropy", "liger-kernel", BOTH)
def _():
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, ids: -function.apply(hidden, weight, ids, 1.0, IGNORE)


@peer("linear_ppo", "Liger scaled cross entropy + loss", "liger-kernel", BOTH)
def _():
    call = PEERS["linear_logprob"]["Liger scaled cross entropy"].load()
    return lambda hidden, weight, batch: eager.clipped(call(hidden, weight, batch.ids_N), batch)


@peer("linear_ppo", "Liger FusedLinearGRPOLoss", "liger-kernel", BOTH, means="grpo")
def _():
    kind = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    loss = kind(
        beta=0.0,
        compiled=torch.cuda.is_available(),
        use_ref_model=False,
        chunk_size=1,
        epsilon_low=eager.CLIP,
        epsilon_high=eager.CLIP,
        loss_type="bnpo",
    )

    def run(hidden, weight, batch):
        def in_rows(tensor):
            return tensor.view(batch.rows, -1, *tensor.shape[1:])

        mask = torch.ones_like(in_rows(batch.ids_N))
        return loss(
            in_rows(hidden),
            weight,
            in_rows(batch.ids_N),
            mask,
            batch.advantage_N[:1].expand(batch.rows),
            old_per_token_logps=in_rows(batch.old_logp_N),
        )[0]

    return run


def _liger_mean(rows_in_chunk):
    call = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, batch: call(
        hidden, weight, batch.ids_N, accum_dtype=torch.float32, chunk_mem_const=rows_in_chunk
    )


# Liger's chunk has about N * H / V tokens by default; 16 times as many is the fastest that its maintainers
# publish.
peer("linear_ppo", "Liger linear cross entropy (mean)", "liger-kernel", means="cross-entropy")(
    lambda: _liger_mean(1)
)
peer("linear_ppo", "Liger linear cross entropy (mean), chunks x 16", "liger-kernel", means="cross-entropy")(
    lambda: _liger_mean(16)
)


# torch's own, cut-cross-entropy, verl, fla
# ---------------------------------------------------------------------------


def _torch_mean(chunked):
    call = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if call is None:
        raise ModuleNotFoundError("torch.nn.functional.linear_cross_entropy: only in torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda hidden, weight, batch: call(hidden, weight, batch.ids_N, options=options)


peer("linear_ppo", "torch linear_cross_entropy (mean)", "torch", BOTH, means="cross-entropy")(
    lambda: _torch_mean(False)
)
peer("linear_ppo", "torch linear_cross_entropy (mean), chunked", "torch", BOTH, means="cross-entropy")(
    lambda: _torch_mean(True)
)


@peer("linear_logprob", "CCE", "cut-cross-entropy")
def _():
    call = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    # No filter: with random data it would drop every entry except the target's, and the gradient would be
    # wrong.
    return lambda hidden, weight, ids: -call(hidden, weight, ids, reduction="none", filter_eps=None)


@peer("linear_ppo", "CCE + loss", "cut-cross-entropy")
def _():
    call = PEERS["linear_logprob"]["CCE"].load()
    return lambda hidden, weight, batch: eager.clipped(call(hidden, weight, batch.ids_N), batch)


def _without_init(package):
    """Puts a package into sys.modules without running its __init__.

    verl's __init__ imports packages that are not needed here, such as Ray.
    """
    path = []
    for part in package.split("."):
        path.append(part)
        name = ".".join(path)
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        module = types.ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = module


@peer("linear_logprob", "verl linear_cross_entropy", "verl")
def _():
    for package in ("verl.utils.kernel", "verl.plugin"):
        _without_init(package)
    call = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    importlib.import_module("verl.utils.kernel.kernels")
    return lambda hidden, weight, ids: call(hidden, weight, ids, 1.0, "none", None)[0]


@peer("linear_ppo", "verl linear_cross_entropy + loss", "verl")
def _():
    call = PEERS["linear_logprob"]["verl linear_cross_entropy"].load()
    return lambda hidden, weight, batch: eager.clipped(call(hidden, weight, batch.ids_N), batch)


@peer("logprob", "fla cross_entropy (none)", "fla-core")
def _():
    loss = importlib.import_module("fla.modules.fused_cross_entropy").FusedCrossEntropyLoss(reduction="none")
    return lambda logits, ids: -loss(logits, ids)


@peer("ppo_from_logits", "fla fused_grpo_loss", "fla-core", means="first step", inplace=True, spare_row=True)
def _():
    call = importlib.import_module("fla.modules.grpo").fused_grpo_loss
    return lambda logits, batch: call(
        logits[None], batch.old_logp_N[None], batch.ids_N[None], batch.advantage_N[:1], beta=0.0, inplace=True
    ).mean()


@peer("linear_ppo", "fla linear cross entropy (mean)", "fla-core", means="cross-entropy")
def _():
    call = importlib.import_module("fla.modules.fused_linear_cross_entropy").FusedLinearCrossEntropyLoss()
    return lambda hidden, weight, batch: call(hidden, batch.ids_N, weight)


# torchrl
# ----------------------------------------------------------------------------------------------------


@peer("gae", "torchrl vec GAE", "torchrl", BOTH)
def _():
    call = importlib.import_module("torchrl.objectives.value.functional").vec_generalized_advantage_estimate

    def run(rewards, values, mask):
        rewards, values = torch.where(mask, rewards, 0)[..., None], torch.where(mask, values, 0)[..., None]
        following = torch.nn.functional.pad(values[:, 1:], (0, 0, 0, 1))
        done = torch.zeros_like(values, dtype=torch.bool)
        done[:, -1] = True
        advantages, returns = call(eager.GAMMA, eager.LAM, values, following, rewards, done)
        return torch.where(mask, advantages[..., 0], 0), torch.where(mask, returns[..., 0], 0)

    return run
