"""What a model costs under DeepSpeed, whatever it reads: weights, gradients, optimiser states, buffers.

All sizes are those of one device. Bytes per parameter were measured on the CPU with DeepSpeed 0.19.8, with
one and two processes (docs/memory.md has the table). How states are sharded, and what exists only for a short
time, was read from DeepSpeed's stage_1_and_2.py, stage3.py and unfused_optimizer.py:

    ZeRO   fp32                                      bf16, fp16
    0      weights 4, gradients 4, Adam 8            2, gradients 2, master 4, Adam 8
    1      4, gradients 4, (master 4, Adam 8)/N      2, 2, (4 + 8)/N
    2      4, (gradients 4, master 4, Adam 8)/N      2, (2 + 4 + 8)/N
    3      (weights 4, gradients 4, 4, 8)/N          (2 + 2 + 4 + 8)/N, and what is gathered

ZeRO 1 to 3 also take a bucket of `reduce_bucket_size` elements, whatever the size of the model.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .sizes import Count

GATHERED = 10**9  # stage3_max_live_parameters: weights that ZeRO-3 leaves gathered
PREFETCHED = 5 * 10**7  # stage3_prefetch_bucket_size: weights that are being gathered
PERSISTENT = 10**5  # stage3_param_persistence_threshold: smaller weights are never sharded
BUCKET = 5 * 10**8  # reduce_bucket_size
FLATTENED = 5 * 10**8  # elements of gradients that ZeRO-0 adds up over ranks at once
# stage3_max_reuse_distance: a module whose next use is further away, in elements, is released
REUSED = 10**9
SUB_GROUP = 10**9  # sub_group_size: weights that ZeRO-3 updates at once
MOMENTS = {"adamw": 8.0, "adamw-8bit": 2.03, "adafactor": 0.02}
"""Bytes per trained parameter that an optimiser keeps (runtime/optimizers.py); Adafactor keeps sums of rows
and columns."""
QUANTIZED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight of 4 bits: NF4, a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales."""


class States(NamedTuple):
    """Bytes on one device; a size of 0 means that there is none.

    Attributes:
        weights: Weights and buffers.
        gradients: Gradients between the passes of a step.
        optimizer: Float32 master weights and moments.
        late: Of `optimizer`, what the first step allocates.
        bucket: ZeRO's bucket: for the whole run (3), or from a first backward pass to the step (1).
        gathered: Whole weights under ZeRO-3, from forward to backward.
        fetching: Weights that are being gathered for a layer, in the forward pass.
        backward: Only during the backward pass, together with activations.
        epilogue: Only at the end of the backward pass, when activations are freed.
        step: Only during the optimiser's step.
        load: The complete model while DeepSpeed takes it over.
        host: Host memory of one process that replaces device memory.
        unpacking: Only while a layer runs: its weight of 4 bits, dequantised.
        unpartitioned_gradients: Whether each weight's gradient stays as it is until the step (ZeRO 0 and 1).
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    late: int = 0
    bucket: int = 0
    gathered: int = 0
    fetching: int = 0
    backward: int = 0
    epilogue: int = 0
    step: int = 0
    load: int = 0
    host: int = 0
    unpacking: int = 0
    unpartitioned_gradients: bool = False

    @property
    def resident(self) -> int:
        """Bytes that stay for the whole run, once the first step is done."""
        return self.weights + self.optimizer + (self.gradients + self.bucket if self.sharded else 0)

    @property
    def sharded(self) -> bool:
        """Whether ZeRO-3 shards the weights: its buffers exist from the start."""
        return self.fetching > 0


def zero_settings(config: Mapping[str, Any]) -> dict[str, int]:
    """Reads the ZeRO settings that a plan needs from DeepSpeed's configuration.

    Args:
        config: DeepSpeed's own configuration, as for `deepspeed.initialize`.

    Returns:
        {name: value}, with DeepSpeed's defaults for what `config` leaves out: `stage`, sizes in elements, and
        whether optimiser states or weights are offloaded.
    """
    zero = config.get("zero_optimization", {})
    names = {
        "bucket": ("reduce_bucket_size", BUCKET),
        "gathered": ("stage3_max_live_parameters", GATHERED),
        "prefetched": ("stage3_prefetch_bucket_size", PREFETCHED),
        "persistent": ("stage3_param_persistence_threshold", PERSISTENT),
        "reuse": ("stage3_max_reuse_distance", REUSED),
        "sub_group": ("sub_group_size", SUB_GROUP),
    }
    return {name: int(float(zero.get(key, default))) for name, (key, default) in names.items()} | {
        "stage": int(zero.get("stage", 0)),
        "offload_optimizer": "offload_optimizer" in zero,
        "offload_parameters": "offload_param" in zero,
    }


def frozen(count: "Count", width: int, zero: Mapping[str, int], gpus: int, on_cpu: bool = False) -> States:
    """Returns the states of a model that is not trained.

    Args:
        count: Parameters of the model.
        width: Bytes of a weight.
        zero: What `zero_settings` returns.
        gpus: Devices over which ZeRO shards.
        on_cpu: Whether the device is a CPU.
    """
    if zero["stage"] < 3:
        weights = _weights(count, width)
        return States(weights + count.buffers, load=weights, unpacking=width * count.unpacked)
    small, live, fetching = _gathering(count, width, zero, gpus)
    shard = _share(width * count.all, gpus)
    on_host = shard if zero["offload_parameters"] else 0
    load = width * count.all if on_cpu else _sharding(count, width, shard - on_host + small)
    return States(
        shard - on_host + small + count.buffers, gathered=live, fetching=fetching, load=load, host=on_host
    )


def _sharding(count: "Count", width: int, resident: int) -> int:
    """Returns the bytes on a GPU while ZeRO-3 shards a model, one weight at a time.

    On a CPU the model that DeepSpeed takes over is in the same memory, so this does not apply.
    resident: bytes of weights that each GPU keeps.
    """
    return resident + count.buffers + width * count.largest


def trained(
    count: "Count",
    width: int,
    zero: Mapping[str, int],
    gpus: int,
    kind: str = "adamw",
    on_cpu: bool = False,
) -> States:
    """Returns the states of a model that an optimiser trains.

    Args:
        count: Parameters of the model.
        width: Bytes of a weight.
        zero: What `zero_settings` returns.
        gpus: Devices over which ZeRO shards.
        kind: The optimiser, as in optim.kind.
        on_cpu: Whether the device is a CPU: there DeepSpeed's bucket takes only as much memory as is written
            to, and a step unpacks 8-bit moments.
    """
    build = {0: _zero_0, 1: _zero_1_2, 2: _zero_1_2, 3: _zero_3}[zero["stage"]]
    bucket = min(zero["bucket"], count.trained) if on_cpu else zero["bucket"]
    states = build(count, width, {**zero, "bucket": bucket * width, "lazy": on_cpu}, gpus, MOMENTS[kind])
    piece = count.largest if zero["stage"] == 0 else _share(min(count.trained, zero["sub_group"]), gpus)
    working = {"adamw": 0, "adamw-8bit": 8 * piece if on_cpu else 0, "adafactor": 12 * piece}[kind]
    # gradients in float32, which the step works on
    in_turn = 4 * count.trained if zero["stage"] == 0 and width < 4 else 0
    return states._replace(step=max(states.step, in_turn + working), unpacking=width * count.unpacked)


def _weights(count: "Count", width: int) -> int:
    """Returns the bytes of a model's weights. width: bytes of a weight that is not quantised."""
    return width * (count.all - count.quantized) + int(QUANTIZED * count.quantized)


def _loaded(count: "Count", width: int) -> int:
    """Returns the bytes of a model before DeepSpeed takes it: float32, but for a quantised base."""
    return _weights(count, width) if count.quantized else 4 * count.all


def _share(size: float, gpus: int) -> int:
    """Returns one device's share of a size, rounded up."""
    return -(-int(size) // gpus)


def _zero_0(count: "Count", width: int, zero: Mapping[str, int], gpus: int, moments: float) -> States:
    """States without sharding. moments: bytes per trained parameter that the optimiser keeps."""
    weights, parameters = _weights(count, width) + count.buffers, count.trained
    if width == 4:
        moment_bytes = int(moments * parameters)
        return States(
            weights,
            4 * parameters,
            moment_bytes,
            moment_bytes,
            step=4 * min(parameters, FLATTENED),
            load=_loaded(count, width),
            unpartitioned_gradients=True,
        )
    master = int((4 + moments) * parameters)
    return States(
        weights,
        width * parameters,
        master,
        int(moments * parameters),
        step=4 * parameters,
        load=max(_loaded(count, width), weights + master + (4 + width) * parameters),
        unpartitioned_gradients=True,
    )


def _zero_1_2(count: "Count", width: int, zero: Mapping[str, int], gpus: int, moments: float) -> States:
    """States under ZeRO 1 and 2."""
    weights, all_gradients = _weights(count, width) + count.buffers, width * count.trained
    gradient_shard, flattened = _share(all_gradients, gpus), min(zero["bucket"], all_gradients)
    master, moment_shard = _share(4 * count.trained, gpus), _share(moments * count.trained, gpus)
    first = zero["stage"] == 1
    # ZeRO-1 moves its gradients into the bucket in the step; until then a CPU has not given it memory.
    bucket, moved = (0, 0) if zero["lazy"] or not first else (zero["bucket"], flattened)
    filling = 0 if zero["lazy"] else zero["bucket"]  # a CPU gives the bucket memory as activations are freed
    reducing = max(flattened, gradient_shard)  # at the end of backward, or in the step of ZeRO-1
    copies = master + (gradient_shard if width < 4 else 0)  # gradients as the optimiser takes them
    load = max(_loaded(count, width), 2 * weights + master, weights + 2 * master)
    if zero["offload_optimizer"]:
        host = 2 * master + gradient_shard + moment_shard + (0 if first else gradient_shard)
        gathering = all_gradients if zero["lazy"] and gpus > 1 else 0  # gloo gathers weights into a copy
        return States(
            weights,
            all_gradients if first else 0,
            bucket=bucket,
            backward=0 if first else filling,
            epilogue=0 if first else zero["bucket"] + flattened,
            step=max(gathering, width * count.largest),
            load=max(_loaded(count, width), 2 * weights),
            host=host,
            unpartitioned_gradients=first,
        )
    if first:
        return States(
            weights,
            all_gradients,
            master + moment_shard,
            moment_shard,
            bucket,
            step=max(0, max(flattened, copies - (all_gradients - gradient_shard)) - moved),
            load=load,
            unpartitioned_gradients=True,
        )
    overflow = reducing if all_gradients > zero["bucket"] else 0
    return States(
        weights,
        gradient_shard,
        master + moment_shard,
        moment_shard,
        backward=filling + overflow,
        epilogue=zero["bucket"] + reducing,
        step=copies,
        load=load,
    )


def _zero_3(count: "Count", width: int, zero: Mapping[str, int], gpus: int, moments: float) -> States:
    """States under ZeRO-3."""
    all_gradients = width * count.trained
    gradient_shard, weights = _share(all_gradients, gpus), _share(width * count.all, gpus)
    master, moment_shard = _share(4 * count.trained, gpus), _share(moments * count.trained, gpus)
    small, live, fetching = _gathering(count, width, zero, gpus)
    reducing = min(zero["bucket"], all_gradients)
    reducing += _share(reducing, gpus)
    at_once = min(1.0, zero["sub_group"] / max(1, _share(count.trained, gpus)))
    states = States(
        weights + small + count.buffers,
        gradient_shard,
        master + moment_shard,
        moment_shard,
        zero["bucket"],
        live,
        fetching,
        backward=reducing if all_gradients > zero["bucket"] else 0,
        epilogue=reducing,
        step=int(at_once * (master + (gradient_shard if width < 4 else 0))),
        load=4 * count.all if zero["lazy"] else _sharding(count, width, weights + small),
    )
    if not zero["offload_optimizer"]:
        return states
    host = 2 * master + gradient_shard + moment_shard
    offloaded = states._replace(gradients=0, optimizer=0, late=0, step=0, host=host)
    if not zero["offload_parameters"]:
        return offloaded
    return offloaded._replace(weights=small + count.buffers, host=offloaded.host + weights)


def _gathering(count: "Count", width: int, zero: Mapping[str, int], gpus: int) -> tuple[int, int, int]:
    """Returns what ZeRO-3 holds besides shards, in bytes.

    These are the small weights that every device has whole, the weights that stay gathered, and those that
    are being gathered.
    """
    if gpus == 1:
        return 0, 0, 1  # a single process has its weights already
    live = min(count.all, max(zero["gathered"], count.largest)) * width
    return count.small * width, live, max(1, min(count.all, zero["prefetched"] + count.largest)) * width
