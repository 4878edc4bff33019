"""What a model costs under DeepSpeed whatever it reads: weights, gradients, optimiser states, buffers; on one
device.

Bytes per parameter as measured on the CPU with DeepSpeed 0.19.8, one and two processes (docs/memory.md has
the table; how it is sharded and what is there for a moment is in DeepSpeed's stage_1_and_2.py, stage3.py and
unfused_optimizer.py):

    ZeRO   fp32                                      bf16, fp16
    0      weights 4, gradients 4, Adam 8            2, gradients 2, master 4, Adam 8
    1      4, gradients 4, (master 4, Adam 8)/N      2, 2, (4 + 8)/N
    2      4, (gradients 4, master 4, Adam 8)/N      2, (2 + 4 + 8)/N
    3      (weights 4, gradients 4, 4, 8)/N          (2 + 2 + 4 + 8)/N, and what is gathered

ZeRO 1 to 3 also take a bucket of `reduce_bucket_size` elements, whatever the size of the model.
"""

from typing import NamedTuple

GATHERED = 10**9  # stage3_max_live_parameters: weights that ZeRO-3 leaves gathered
PREFETCHED = 5 * 10**7  # stage3_prefetch_bucket_size: weights on their way
PERSISTENT = 10**5  # stage3_param_persistence_threshold: smaller weights are never sharded
BUCKET = 5 * 10**8  # reduce_bucket_size
FLATTENED = 5 * 10**8  # elements of gradients that ZeRO-0 adds up over ranks at once
# stage3_max_reuse_distance: weights that pass before a module that comes again is let go of
REUSED = 10**9
SUB_GROUP = 10**9  # sub_group_size: weights that ZeRO-3 updates at once
MOMENTS = {"adamw": 8.0, "adamw-8bit": 2.03, "adafactor": 0.02}
"""Bytes per trained parameter that an optimiser remembers (runtime/optimizers.py); of Adafactor, rows and columns of matrices."""


class States(NamedTuple):
    """Bytes on one device; what is at 0 is not there."""

    weights: int  # and buffers
    gradients: int = 0  # between the passes of a step
    optimizer: int = 0  # float32 master weights and moments
    late: int = 0  # of these, what comes with the first step
    # of ZeRO, for the whole run (3) or from a first backward pass to the step (1)
    bucket: int = 0
    gathered: int = 0  # whole weights of ZeRO-3, from forward to backward
    fetching: int = 0  # weights on their way to a layer, in forward
    backward: int = 0  # for a moment of backward, together with activations
    epilogue: int = 0  # for a moment at the end of backward, when activations are gone
    step: int = 0  # for a moment of the optimiser's step
    load: int = 0  # all of this model while it is handed to DeepSpeed
    host: int = 0  # in host memory instead, of one process
    whole: bool = False  # each weight's gradient stays as it is until the step (ZeRO 0 and 1)

    @property
    def resident(self):
        """There for the whole run, once the first step is done."""
        return self.weights + self.optimizer + (self.gradients + self.bucket if self.sharded else 0)

    @property
    def sharded(self):
        """Told by ZeRO-3's buffers, which are there from the start."""
        return self.fetching > 0

    @property
    def until_step(self):
        """There from the first backward pass of a step to its end."""
        return 0 if self.sharded else self.gradients + self.bucket


def zero_settings(config):
    """DeepSpeed's configuration -> its zero_optimization part, with the defaults of what is used here."""
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


def frozen(count, width, zero, gpus, on_cpu=False):
    """A model that is only asked. count: sizes.Count · width: bytes of a weight · zero: `zero_settings` ·
    on_cpu: a CPU.
    """
    if zero["stage"] < 3:
        return States(width * count.all + count.buffers, load=width * count.all)
    whole, live, fetching = _gathering(count, width, zero, gpus)
    shard = _share(width * count.all, gpus)
    on_host = shard if zero["offload_parameters"] else 0
    load = width * count.all if on_cpu else _arriving(count, width, shard - on_host + whole)
    return States(
        shard - on_host + whole + count.buffers, gathered=live, fetching=fetching, load=load, host=on_host
    )


def _arriving(count, width, kept):
    """Bytes on a GPU while ZeRO-3 takes a model over, one weight at a time. kept: what each GPU keeps of the
    weights. (On a CPU the model that is handed over lies in the same memory.)
    """
    return kept + count.buffers + width * count.largest


def trained(count, width, zero, gpus, kind="adamw", on_cpu=False):
    """A model under an optimiser. kind: as in optim.kind · on_cpu: DeepSpeed's bucket takes only as much
    memory as is written to, and 8-bit moments are spread out for a step.
    """
    build = {0: _zero_0, 1: _zero_1_2, 2: _zero_1_2, 3: _zero_3}[zero["stage"]]
    bucket = min(zero["bucket"], count.trained) if on_cpu else zero["bucket"]
    states = build(count, width, {**zero, "bucket": bucket * width, "lazy": on_cpu}, gpus, MOMENTS[kind])
    piece = count.largest if zero["stage"] == 0 else _share(min(count.trained, zero["sub_group"]), gpus)
    working = {"adamw": 0, "adamw-8bit": 8 * piece if on_cpu else 0, "adafactor": 12 * piece}[kind]
    # gradients in float32, which the step works on
    in_turn = 4 * count.trained if zero["stage"] == 0 and width < 4 else 0
    return states._replace(step=max(states.step, in_turn + working))


def _share(size, gpus):
    return -(-int(size) // gpus)


def _zero_0(count, width, zero, gpus, moments):
    weights, trained_ = width * count.all + count.buffers, count.trained
    if width == 4:
        remembered = int(moments * trained_)
        return States(
            weights,
            4 * trained_,
            remembered,
            remembered,
            step=4 * min(trained_, FLATTENED),
            load=4 * count.all,
            whole=True,
        )
    master = int((4 + moments) * trained_)
    return States(
        weights,
        width * trained_,
        master,
        int(moments * trained_),
        step=4 * trained_,
        load=max(4 * count.all, weights + master + (4 + width) * trained_),
        whole=True,
    )


def _zero_1_2(count, width, zero, gpus, moments):
    weights, all_gradients = width * count.all + count.buffers, width * count.trained
    mine, flattened = _share(all_gradients, gpus), min(zero["bucket"], all_gradients)
    master, remembered = _share(4 * count.trained, gpus), _share(moments * count.trained, gpus)
    first = zero["stage"] == 1
    # ZeRO-1 moves its gradients into the bucket in the step; until then a CPU has not given it memory.
    bucket, moved = (0, 0) if zero["lazy"] or not first else (zero["bucket"], flattened)
    filling = 0 if zero["lazy"] else zero["bucket"]  # a CPU gives the bucket memory as activations go
    passing = max(flattened, mine)  # at the end of backward, or in the step of ZeRO-1
    copies = master + (mine if width < 4 else 0)  # gradients as the optimiser takes them
    load = max(4 * count.all, 2 * weights + master, weights + 2 * master)
    if zero["offload_optimizer"]:
        host = 2 * master + mine + remembered + (0 if first else mine)
        gathering = all_gradients if zero["lazy"] and gpus > 1 else 0  # gloo gathers weights into a copy
        return States(
            weights,
            all_gradients if first else 0,
            bucket=bucket,
            backward=0 if first else filling,
            epilogue=0 if first else zero["bucket"] + flattened,
            step=max(gathering, width * count.largest),
            load=max(4 * count.all, 2 * weights),
            host=host,
            whole=first,
        )
    if first:
        return States(
            weights,
            all_gradients,
            master + remembered,
            remembered,
            bucket,
            step=max(0, max(flattened, copies - (all_gradients - mine)) - moved),
            load=load,
            whole=True,
        )
    crowded = passing if all_gradients > zero["bucket"] else 0
    return States(
        weights,
        mine,
        master + remembered,
        remembered,
        backward=filling + crowded,
        epilogue=zero["bucket"] + passing,
        step=copies,
        load=load,
    )


def _zero_3(count, width, zero, gpus, moments):
    all_gradients = width * count.trained
    mine, weights = _share(all_gradients, gpus), _share(width * count.all, gpus)
    master, remembered = _share(4 * count.trained, gpus), _share(moments * count.trained, gpus)
    whole, live, fetching = _gathering(count, width, zero, gpus)
    reducing = min(zero["bucket"], all_gradients)
    reducing += _share(reducing, gpus)
    at_once = min(1.0, zero["sub_group"] / max(1, _share(count.trained, gpus)))
    states = States(
        weights + whole + count.buffers,
        mine,
        master + remembered,
        remembered,
        zero["bucket"],
        live,
        fetching,
        backward=reducing if all_gradients > zero["bucket"] else 0,
        epilogue=reducing,
        step=int(at_once * (master + (mine if width < 4 else 0))),
        load=4 * count.all if zero["lazy"] else _arriving(count, width, weights + whole),
    )
    if not zero["offload_optimizer"]:
        return states
    offloaded = states._replace(gradients=0, optimizer=0, late=0, step=0, host=2 * master + mine + remembered)
    if not zero["offload_parameters"]:
        return offloaded
    return offloaded._replace(weights=whole + count.buffers, host=offloaded.host + weights)


def _gathering(count, width, zero, gpus):
    """(small weights that are whole everywhere, weights that stay gathered, weights on their way) of ZeRO-3,
    in bytes.
    """
    if gpus == 1:
        return 0, 0, 1  # a single process has its weights already
    live = min(count.all, max(zero["gathered"], count.largest)) * width
    return count.small * width, live, max(1, min(count.all, zero["prefetched"] + count.largest)) * width
