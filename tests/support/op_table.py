"""One table of the ops: arguments, settings and what the gradient goes to; inputs for them, and calls."""

import naive
import torch
from losses_kit import laid_out

import saferlhf_fast
from saferlhf_fast.kernels import dispatch

INTERPRETED = dispatch.interpreted()
B, T, H, V = 2, 5, 4, 7
LOSS = dict(clip_ratio=0.2, clip_high=0.3, dual_clip=1.5, kl_coeff=0.1)
# op: arguments that are tokens [B, T], others by shape, settings, what the gradient goes to.
TABLE = {
    "token_logprob": ((), dict(logits=(B, T, V), ids=(B, T)), dict(return_entropy=True), ("logits",)),
    "linear_logprob": (
        (),
        dict(hidden=(B, T, H), weight=(V, H), ids=(B, T), bias=(V,)),
        dict(return_entropy=True),
        ("hidden", "weight", "bias"),
    ),
    "gae": (("rewards", "values"), {}, dict(gamma=0.9, lam=0.8), ()),
    "ppo_lag_advantage": (
        ("logp", "ref_logp", "reward_values", "cost_values"),
        dict(reward=(B,), cost=(B,), multiplier=()),
        dict(kl_coeff=0.1, gamma=0.9, lam=0.8, clip_score=5.0),
        (),
    ),
    "ppo_loss": (
        ("logp", "old_logp", "advantages", "ref_logp", "entropy"),
        {},
        dict(LOSS, entropy_coeff=0.1),
        ("logp", "entropy"),
    ),
    "ppo_loss_from_logits": (
        ("old_logp", "advantages", "ref_logp"),
        dict(logits=(B, T, V), ids=(B, T)),
        dict(LOSS, entropy_coeff=0.1),
        ("logits",),
    ),
    "linear_ppo_loss": (
        ("old_logp", "advantages", "ref_logp"),
        dict(hidden=(B, T, H), weight=(V, H), ids=(B, T), bias=(V,)),
        dict(LOSS, entropy_coeff=0.1),
        ("hidden", "weight", "bias"),
    ),
    "value_loss": (("values", "old_values", "returns"), {}, dict(clip_value=0.3), ("values",)),
}
WITH_IDS = [op for op in TABLE if "ids" in TABLE[op][1]]
PLACES = [place for place in naive.PLACES if place.values[1] == "cpu"]
LAYOUTS = ("offset", "every second", "reversed axes", "expanded")[2 if INTERPRETED else 0 :]


def inputs_of(op, empty=None):
    """{name: tensor} of an op, padded. empty: None, or the axis (0 or 1) of the tokens that has no length."""
    tokens, others, _, _ = TABLE[op]
    random = torch.Generator().manual_seed(len(op))
    made = {}
    for name, shape in {**others, **dict.fromkeys(tokens, (B, T)), "mask": (B, T)}.items():
        if empty is not None and shape[:2] == (B, T):
            shape = [0 if at == empty else size for at, size in enumerate(shape)]
        elif empty == 0 and shape == (B,):
            shape = (0,)
        made[name] = torch.randn(shape, generator=random)
        if name == "ids":
            made[name] = torch.randint(V, shape, generator=random)
    if "_logprob" in op:
        del made["mask"]
    else:
        made["mask"] = made["mask"] > -0.5
    return made


class Through(torch.autograd.Function):
    """The same memory as an intermediate result: neither a leaf nor a view of one, so that the in-place paths
    are taken.
    """

    @staticmethod
    def forward(ctx, leaf):
        return leaf.data

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def call(op, given, impl="auto", **more):
    """(outputs, gradients): every tensor that comes out, and what the sum of the outputs gives the leaves.
    May write over `given`.
    """
    leaves = {
        name: given[name].detach().requires_grad_(given[name].dtype.is_floating_point)
        for name in TABLE[op][3]
    }
    through = {name: Through.apply(leaf) if leaf.requires_grad else leaf for name, leaf in leaves.items()}
    result = getattr(saferlhf_fast, op)(**{**given, **through}, **TABLE[op][2], **more, impl=impl)
    outputs = []
    for part in result if isinstance(result, tuple) else (result,):
        outputs += part.values() if isinstance(part, dict) else [part]
    losses = [output.sum() for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(sum(losses), list(leaves.values())) if losses else ()
    return [output.detach() for output in outputs], gradients


def spread(tensor, layout):
    """The tensor in a layout; expanded: each row is the first one, by a stride of 0."""
    if tensor.dim() == 0:
        return tensor
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if tensor.is_floating_point():
        return laid_out(tensor, layout)
    return (
        laid_out(tensor.double(), layout).to(tensor.dtype)
        if layout == "offset"
        else tensor.repeat_interleave(2, -1)[..., ::2]
        if layout == "every second"
        else tensor.t().contiguous().t()
        if tensor.dim() == 2
        else tensor
    )
