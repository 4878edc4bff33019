"""Which versions of an op a bench runs.

These are eager torch, this library's available implementations, and every known peer.
"""

import peers
import pytest
import shapes

from saferlhf_fast.kernels import dispatch


def ours(op, device):
    """Returns the names of this library's implementations of `op` that can run on `device`.

    There are none for an op that the dispatcher does not know.
    """
    return [row.implementation for row in dispatch.table(device) if row.op == op and row.available]


def is_auto(op, version, device):
    """True for the implementation that impl="auto" chooses."""
    return any(
        row.op == op and row.implementation == version and row.chosen for row in dispatch.table(device)
    )


def cases(op, kind, table, others=("eager",), backward=False):
    """Returns parametrize(device, shape, version).

    Each shape runs with this library and eager torch, and the full shapes also with every peer of `kind`.
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
    """Returns the version's function.

    own: {"eager": function, "ours": function of an implementation's name}, and further versions by name.
    """
    if version in own:
        return own[version]
    if version in peers.names(kind):
        return peers.load(kind, version, device)
    return own["ours"](version)


def trait(kind, version, name, default):
    """Returns a field of a peer (means, inplace, spare_row), or `default` for any other version."""
    peer = peers.PEERS.get(kind, {}).get(version)
    return default if peer is None else getattr(peer, name)
