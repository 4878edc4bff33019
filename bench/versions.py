"""Which versions of an op a bench runs: eager torch, each of our implementations that can run here, every
known peer.
"""

import peers
import pytest
import shapes

from saferlhf_fast.kernels import dispatch


def ours(op, device):
    """Names of our implementations of `op` that can run on `device`; none for an op that the dispatcher does
    not know.
    """
    return [row.implementation for row in dispatch.table(device) if row.op == op and row.available]


def is_auto(op, version, device):
    """True for the one that impl="auto" takes."""
    return any(
        row.op == op and row.implementation == version and row.chosen for row in dispatch.table(device)
    )


def cases(op, kind, table, others=("eager",), backward=False):
    """parametrize(device, shape, version): each shape with ours and eager torch, the full shapes with every
    peer of `kind`.
    """
    triples = []
    for device in shapes.devices():
        for shape in table[device]:
            run = [*others, *ours(op, device)]
            if shape in shapes.FULL:
                run += [
                    name
                    for name in peers.names(kind)
                    if not (backward and peers.PEERS[kind][name].forward_only)
                ]
            triples += [(device, shape, version) for version in run]
    return pytest.mark.parametrize(
        "device, shape, version",
        triples,
        ids=[
            "-".join((device, shapes.name(shape), version.replace(" ", "_")))
            for device, shape, version in triples
        ],
    )


def call(own, kind, version, device):
    """The version's function: `own` is a dict of eager and of ours, by name, or a function that makes ours by
    name.
    """
    if version in own:
        return own[version]
    if version in peers.names(kind):
        return peers.load(kind, version, device)
    return own["ours"](version)


def trait(kind, version, name, default):
    """A field of a peer (means, inplace, spare_row), or `default` for what is no peer."""
    peer = peers.PEERS.get(kind, {}).get(version)
    return default if peer is None else getattr(peer, name)
