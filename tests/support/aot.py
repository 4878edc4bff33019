"""Every Triton kernel of every room, compiled ahead of time for GPUs that are not here, with what ptxas made
of it.

TABLE below holds one entry per kernel that a room launches; tests/kernels/test_compile.py fails when one is
missing. An entry says what a launch decides: the types of the arguments, the constexpr combinations and the
configs (tile sizes, num_warps, num_stages). To add a kernel, add an entry:

    Kernel("ppo_loss.triton_impl.loss_kernel",                           # below saferlhf_fast.kernels
           types=dict(logits_NV="*x", ids_N="*i64", tokens="i32", clip="fp32"),
           constants=dict(ENTROPY=(False, True)),                        # their product is compiled
           configs=lambda room: [dict(BLOCK=room.BLOCK, num_warps=8)])   # read from the room: they cannot
           drift apart

A type that is not given follows from the name: a shape suffix (grad_N, logits_NV) is "*fp32", a name that
ends in "stride" is "i32" (what a launch makes of it as long as it is below 2^31). "x" stands for each of
`dtypes` in turn; "y" is a second one, written "fp32/bf16" (x/y) in `dtypes`, x itself where there is no
slash. A type may also be a descriptor, "tensordesc<x[N, H]>", with the names of constants for its sizes.
`constants` may also name an argument that is not always given: (None, ...) compiles it as None and, by the
ellipsis, as an argument. Where not every combination exists, `constants` is a list of such dicts. A config
may say by `archs` and `dtypes` where it is chosen. Configs of triton.autotune are found by themselves.
`spill` is the written reason why an entry may have a stack or local memory. `below` bounds integers, {name:
bound}, where tests/support/ttir.py could otherwise take a 32-bit product for one that passes 2^31;
tests/kernels/test_addresses.py holds launches to it.

Pointers are compiled as aligned to 16 bytes, as torch allocates them; integers both as multiples of 16 and
not, which are two kernels to Triton, in the full product (--all). Without --all, integers are multiples of 16
and every architecture has one dtype (of "fp32/bf16" the y). --pairs takes of these as few as are needed for
each value of a constant, an option or the dtype to meet each value of the others, and on the architectures
after the first only the entries whose configs depend on the architecture.

By hand:  python tests/support/aot.py 90[,80,100] [--all | --pairs] [part of a kernel's name]
One JSON line per cubin: arch, kernel, dtype, constants, options, registers, stack and local (bytes a thread),
shared (static, bytes), dynamic (shared memory asked for at the launch, bytes), narrow (the lines whose 32
bits an offset outgrows); "error" where it did not compile. Not for a process with TRITON_INTERPRET:
interpreter and compiler exclude each other.
"""

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from ttir import narrow_offsets

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "saferlhf_fast.kernels"
ARCHITECTURES = {80: "fp32", 90: "bf16", 100: "fp16"}  # sm: the dtype that is compiled without --all
TRITON = tuple(map(int, version("triton").split(".")[:2]))
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Kernel(NamedTuple):
    """One launched kernel; see the docstring of the file."""

    path: str
    types: dict = {}
    constants: dict | list = {}
    configs: Callable = lambda room: [{}]
    dtypes: tuple = ("fp32", "bf16", "fp16")
    spill: str = ""
    below: dict = {}


class Variant(NamedTuple):
    """aligned: whether integers are taken as multiples of 16. The rest as triton.compile takes it."""

    dtype: str
    aligned: bool
    signature: dict
    constants: dict
    attributes: dict
    options: dict


def _rows(room):
    """Configs of the kernels on rows of logits."""
    options = import_module(f"{PACKAGE}.tiles_triton").options
    return [
        options(warps, capped, aligned)
        for _, warps in room.WARPS
        for capped in (False, True)
        for aligned in (False, True)
    ]


LOGITS = dict(
    logits_NV="*x", ids_N="*i64", vocabulary="i32", temperature="fp32", per_row="i32", softcap="fp32"
)
D_LOGITS = dict(LOGITS, out_NV="*y")  # may lie over wider logits
OBJECTIVE = dict.fromkeys(("clip_ratio", "clip_high", "dual_clip", "kl_coeff", "entropy_coeff"), "fp32")
NARROWED = ("fp32", "bf16", "fp16", "fp32/bf16")


def _fused(described):
    """Configs of the head's product with the softmax in it, for tiles that come by descriptors or by
    pointers.
    """

    def configs(room):
        kinds = [
            (dtypes, aligned, arch)
            for dtypes in (("fp32",), ("bf16", "fp16"))
            for aligned in (False, True)
            for arch in ARCHITECTURES
        ]
        found = [
            dict(
                room.config(torch.float32 if dtypes == ("fp32",) else torch.bfloat16, aligned, arch // 10),
                dtypes=dtypes,
                archs=(arch,),
                SPLIT=room.SPLIT,
                GROUP=room.GROUP,
            )
            for dtypes, aligned, arch in kinds
        ]
        return [config for config in found if config["DESCRIBED"] == described]

    return configs


HEAD = dict(
    bias_V="*x",
    ids_N="*i64",
    count="i32",
    vocabulary="i32",
    width="i32",
    splits="i32",
    temperature="fp32",
    per_row="i32",
    softcap="fp32",
)
SPLITS = dict(splits=2**21)  # of 1024 columns each


def _losses(room):
    return list(import_module(f"{PACKAGE}.losses_triton").CONFIGS)


TOKENS = dict(
    positions="i32",
    rows="i32",
    width="i32",
    token_mean="i32",
    counter="*i32",
    cu_seqlens="*i32",
    mask_N="*i1",
    normalizer="*fp32",
    inverse="*fp32",
)
POLICY = [
    dict(ref_logp_N=(None,), entropy_N=(None, ...), K1=(False,)),
    dict(entropy_N=(None, ...), K1=(False, True)),
]
PACKED, PADDED = dict(mask_N=(None,)), dict(cu_seqlens=(None,))
INPUTS = dict.fromkeys(("logp_N", "old_logp_N", "advantages_N", "ref_logp_N", "entropy_N"), "*x")


def _scans(room):
    """Configs of the segmented scans."""
    gae = import_module(f"{PACKAGE}.gae.triton_impl")
    return [dict(GROUPS=block // gae.PER, num_warps=warps) for block, warps in gae.CONFIGS.items()]


SCAN = dict(
    cu_seqlens="*i32", mask_N="*i1", rows="i32", width="i32", tokens="i32", decay="fp32", share="fp32"
)
SCAN_ROWS = [dict(PACKED, CARRY=(False,)), dict(PADDED, CARRY=(False, True))]
NO_COST = dict.fromkeys(("cost_returns_N", "cost_B", "cost_values_N", "multiplier"), (None,))


TABLE = [
    Kernel(
        "token_logprob.triton_impl.forward_kernel",
        types=LOGITS,
        constants=dict(ENTROPY=(False, True)),
        configs=_rows,
    ),
    Kernel(
        "token_logprob.triton_impl.backward_kernel",
        types=dict(D_LOGITS, parts="i32", tiles="i32", has_logp="i32", has_entropy="i32"),
        configs=_rows,
        dtypes=NARROWED,
        below=dict(parts=512, tiles=512),
    ),  # parts * tiles tiles cover a row
    Kernel(
        "ppo_loss_from_logits.triton_impl.rows_kernel",
        types=dict(D_LOGITS, upwards="i32", has_ref="i32", k1="i32", **OBJECTIVE),
        configs=_rows,
        dtypes=NARROWED,
    ),
    Kernel(
        "linear_logprob.triton_impl.fused_kernel",
        types=dict(HEAD, hidden="*x", weight="*x"),
        constants=dict(bias_V=(None, ...), CAPPED=(False, True)),
        configs=_fused(False),
        below=SPLITS,
    ),
    Kernel(
        "linear_logprob.triton_impl.fused_kernel",
        types=dict(HEAD, hidden="tensordesc<x[N, H]>", weight="tensordesc<x[V, H]>"),
        constants=dict(bias_V=(None, ...), CAPPED=(False, True)),
        configs=_fused(True),
        below=SPLITS,
    ),
    Kernel(
        "linear_logprob.triton_impl.merge_kernel",
        types=dict(ids_N="*i64", vocabulary="i32", splits="i32"),
        configs=lambda room: [dict(SPLIT=room.SPLIT, S=s, num_warps=1) for s in (1, 32, 256)],
        dtypes=("fp32",),
    ),
    Kernel(
        "ppo_loss.triton_impl.loss_kernel",
        types=dict(
            TOKENS, **INPUTS, loss="*fp32", statistics="*fp32", scale="*fp32", shift="*fp32", **OBJECTIVE
        ),
        constants=[
            {**terms, **rows}
            for terms in POLICY
            for rows in (PACKED, dict(PADDED, normalizer=(None,), scale=(None,), shift=(None,)))
        ],
        configs=_losses,
        spill="8 bytes on sm_100 by the assembler of Triton 3.6, nothing by 3.7's" if TRITON < (3, 7) else "",
    ),
    Kernel(
        "value_loss.triton_impl.loss_kernel",
        types=dict(
            TOKENS,
            **dict.fromkeys(("values_CN", "old_values_CN", "returns_CN"), "*x"),
            critics="i32",
            clip_value="fp32",
        ),
        constants=[PACKED, dict(PADDED, normalizer=(None,))],
        configs=_losses,
    ),
    Kernel(
        "gae.triton_impl.gae_kernel",
        types=dict(SCAN, rewards_N="*x", values_N="*x"),
        constants=SCAN_ROWS,
        configs=_scans,
    ),
    Kernel(
        "ppo_lag_advantage.triton_impl.advantage_kernel",
        types=dict(
            SCAN,
            done="*i32",
            multiplier="*fp32",
            kl_coeff="fp32",
            clip_score="fp32",
            **dict.fromkeys(
                ("logp_N", "ref_logp_N", "reward_B", "cost_B", "reward_values_N", "cost_values_N"), "*x"
            ),
        ),
        constants=[{**rows, **cost} for rows in SCAN_ROWS for cost in ({}, NO_COST)],
        configs=lambda room: [dict(config, maxnreg=room.REGISTERS) for config in _scans(room)],
    ),
    Kernel(
        "scaling_triton.scale_kernel",
        types=dict(tensor_N="*x", factor="*fp32", count="i32"),
        configs=lambda room: [dict(BLOCK_N=room.BLOCK)],
    ),
]


def resolve(path):
    """(module, name) of an entry's path."""
    module, _, name = path.rpartition(".")
    return import_module(f"{PACKAGE}.{module}"), name


def jitted(kernel):
    """The triton.jit function below autotune and heuristics."""
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
        kernel = kernel.fn
    return kernel


def _type(entry, name, constants, x, y=None):
    """The type of an argument where the entry's letters stand for the dtypes x and y."""
    if name in entry.types:
        if entry.types[name].startswith("tensordesc"):
            return re.sub(
                r"\b([A-Z]+|x)\b", lambda found: str({**constants, "x": x}[found[0]]), entry.types[name]
            )
        pointer, kind = re.match(r"(\**)(.*)", entry.types[name]).groups()
        return pointer + {"x": x, "y": y or x}.get(kind, kind)
    if name.endswith("stride"):
        return "i32"
    if re.search(r"_[A-Z0-9]+$", name):
        return "*fp32"
    raise ValueError(f"{entry.path}: the type of {name} does not follow from its name: add it to `types`")


def variants(entry, arch, everything=False):
    """The Variants that an entry is compiled in for sm_`arch`."""
    module, name = resolve(entry.path)
    kernel = getattr(module, name)
    configs = entry.configs(module)
    if hasattr(kernel, "configs"):
        configs = [{**c.kwargs, "num_warps": c.num_warps, "num_stages": c.num_stages} for c in kernel.configs]
    dtypes = [
        d
        for d in entry.dtypes
        if everything or d.split("/")[-1] == ARCHITECTURES[arch] or len(entry.dtypes) == 1
    ]
    for dtype, config, aligned in itertools.product(
        dtypes, configs, (True, False) if everything else (True,)
    ):
        config = dict(config)
        if arch not in config.pop("archs", ARCHITECTURES) or dtype not in config.pop("dtypes", entry.dtypes):
            continue
        for values in combinations(entry):
            constants = {**values, **{k: v for k, v in config.items() if k not in OPTIONS}}
            signature, attributes = {}, {}
            for at, param in enumerate(jitted(kernel).params):
                if param.name in constants:
                    signature[param.name] = "constexpr"
                    continue
                kind = signature[param.name] = _type(entry, param.name, constants, *dtype.split("/"))
                if kind.startswith("*") or (aligned and kind.startswith("i") and not param.do_not_specialize):
                    attributes[at,] = [["tt.divisibility", 16]]
            options = {k: v for k, v in config.items() if k in OPTIONS}
            yield Variant(dtype, aligned, signature, constants, attributes, options)


def paired(found):
    """As few of the Variants as it takes for each pair of values that one of them has."""
    names = {name for variant in found for name in variant.constants}
    groups = []
    for variant in found:
        constants = {name: str(variant.constants.get(name, "an argument")) for name in names}
        values = {**constants, **variant.options, "dtype": variant.dtype}
        groups.append(set(itertools.combinations(sorted(values.items()), 2)))
    missing, kept = set().union(*groups), []
    while missing:
        best = max(range(len(found)), key=lambda at: len(groups[at] & missing))
        kept.append(found[best])
        missing -= groups[best]
    return kept


def by_architecture(entry):
    """True where a config of the entry is chosen on some architectures only."""
    return any("archs" in config for config in entry.configs(resolve(entry.path)[0]))


def combinations(entry):
    """The {name: value} of an entry's `constants`; a name that stands for an argument at that launch is left
    out.
    """
    for alternative in entry.constants if isinstance(entry.constants, list) else [entry.constants]:
        for values in itertools.product(*alternative.values()):
            yield {name: value for name, value in zip(alternative, values) if value is not ...}


def build(entry, arch, everything=False, pairs=False):
    """(Variant, compiled kernel or the exception) for each variant of an entry; (None, exception) for a room
    that fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        module, name = resolve(entry.path)
        todo = list(variants(entry, arch, everything))
        todo = paired(todo) if pairs else todo
    except Exception as error:
        yield None, error
        return
    for variant in todo:
        source = ASTSource(
            jitted(getattr(module, name)), variant.signature, variant.constants, variant.attributes
        )
        try:
            yield variant, triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
        except Exception as error:
            yield variant, error


def usage(cubin):
    """{"registers", "stack", "local", "shared"} of a cubin, by the cuobjdump that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert len(found) == 1, f"expected the usage of one kernel from cuobjdump, got: {text}"
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found[0])))


def launched():
    """The paths of the kernels that rooms launch: triton.jit functions that are subscripted with a grid
    somewhere below kernels/, or that no other triton.jit function calls or hands on.
    """
    defined, used, started = {}, set(), set()
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        tree = ast.parse(file.read_text())
        path = ".".join(file.relative_to(ROOT / "kernels").with_suffix("").parts)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Subscript)
                and isinstance(node.func.value, ast.Name)
            ):
                started.add(node.func.value.id)
            if isinstance(node, ast.FunctionDef) and any(
                _is_jit(decorator) for decorator in node.decorator_list
            ):
                defined.setdefault(node.name, []).append(f"{path}.{node.name}")
                used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                used |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return {path for name, paths in defined.items() if name in started or name not in used for path in paths}


def _is_jit(decorator):
    text = ast.unparse(decorator)
    return text.split("(")[0] in ("triton.jit", "jit")


def compile_all(architectures, cache, *options, timeout=580):
    """The rows that `main` prints, from one process without TRITON_INTERPRET and with a cache folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(TRITON_CACHE_DIR=str(cache), OMP_NUM_THREADS="1")
    result = subprocess.run(
        [sys.executable, __file__, ",".join(map(str, architectures)), *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def main(arguments):
    everything, pairs = "--all" in arguments, "--pairs" in arguments
    architectures, *parts = [a for a in arguments if not a.startswith("--")]
    first, *others = map(int, architectures.split(","))
    todo = [(first, entry) for entry in TABLE]
    todo += [(arch, entry) for arch in others for entry in TABLE if not pairs or by_architecture(entry)]
    for arch, entry in todo:
        if parts and not any(part in entry.path for part in parts):
            continue
        for variant, compiled in build(entry, arch, everything, pairs):
            row = {"arch": arch, "kernel": entry.path}
            if variant is not None:
                row.update(
                    dtype=variant.dtype,
                    aligned=variant.aligned,
                    **variant.options,
                    constants={k: str(v) for k, v in variant.constants.items()},
                )
            if isinstance(compiled, Exception):
                row["error"] = f"{type(compiled).__name__}: {compiled}"
            else:
                row.update(
                    usage(compiled.asm["cubin"]),
                    dynamic=compiled.metadata.shared,
                    narrow=narrow_offsets(compiled.asm["ttir"], entry.below),
                )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
