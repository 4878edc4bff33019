"""The matrix of stages, ZeRO, offload, precision, processes and what else may change no loss: its axes, the
combinations that there are, and a small set of them in which every pair of values meets. Run by
matrix_worker.py, checked by test_matrix.py.
"""

from collections import Counter
from itertools import combinations, product
from typing import NamedTuple

SUPERVISED, PPO = ("sft", "reward", "cost", "dpo"), ("ppo", "ppo-lag")
PLAIN, NONE = "plain", "-"


class Cell(NamedTuple):
    """One combination; "-" where a stage does not have the axis."""

    stage: str
    zero: int
    offload: str  # what lies in host memory
    precision: str
    processes: int
    frozen: str  # engine.frozen
    form: str  # of the loss, or one of UPDATES

    @property
    def name(self):
        """Its coordinates, as a test's failure shows them."""
        return (
            f"{self.stage} ZeRO-{self.zero} offload={self.offload} {self.precision} {self.processes}p "
            f"frozen={self.frozen} {self.form}"
        )

    @property
    def reference(self):
        """What it must agree with: one process, nothing sharded or offloaded, fp32."""
        return self._replace(
            zero=0,
            offload="none",
            precision="fp32",
            processes=1,
            frozen=NONE if self.frozen == NONE else "replicated",
        )


UPDATES = {
    "one-pass": {"micro_tokens": 30},
    "two-pass": {"single_pass": False, "importance_cap": 2.0, "micro_tokens": 9},
    "epochs": {"epochs": 2, "minibatches": 2, "reduction": "token-mean", "micro_tokens": 30},
    "whiten": {"whiten": True, "epochs": 2, "micro_batch_size": 2},
    "lora": {"micro_tokens": 30},
}
"""Settings of group `ppo`. Passes of few tokens leave ranks without sequences in some of them, which they
join all the same.
"""
WITH_PTX, WITH_ONE_CRITIC, LORA = ("one-pass", "epochs"), ("whiten",), "lora"
"""Updates with supervised data; those of ppo-lag with one critic of two heads; low-rank adapters.

In policy optimisation the adapters are on one shared base.
"""

AXES = {
    "stage": (*SUPERVISED, *PPO),
    "zero": (0, 1, 2, 3),
    "offload": ("none", "states", "weights", "both"),
    "precision": ("fp32", "bf16"),
    "processes": (1, 2, 4),
    "frozen": (NONE, "sharded", "replicated"),
    "form": (PLAIN, "token", *UPDATES),
}


def exists(cell):
    """True for a combination that a recipe can ask for and that is not another one under a second name."""
    if cell.offload in ("weights", "both") and cell.zero != 3 or cell.offload == "states" and cell.zero == 0:
        return False
    if (cell.frozen != NONE) != (cell.stage in ("dpo", *PPO)):
        return False
    if cell.stage in PPO:
        return cell.form in UPDATES and (cell.form != LORA or cell.zero < 3 and cell.frozen == "replicated")
    return cell.form in (PLAIN, LORA) or cell.form == "token" and cell.stage in ("reward", "cost")


def everything():
    """All combinations, in order."""
    return [cell for cell in map(Cell._make, product(*AXES.values())) if exists(cell)]


def product_cells():
    """Stage × ZeRO × offload × precision × processes, all of them. The other axes take turns, so that within
    a stage each of their values stands beside each of those. (Every update under every one of them would take
    hours and say the same.)
    """
    taken, chosen, seen, used = {}, [], {}, Counter()
    for cell in everything():
        taken.setdefault(cell[:5], []).append(cell)
    for cells in taken.values():
        best = min(
            cells,
            key=lambda cell: (
                -len(pairs(cell) - seen.get(cell.stage, set())),
                used[cell.stage, cell.form, cell.processes],
            ),
        )
        seen.setdefault(best.stage, set()).update(pairs(best))
        used[best.stage, best.form, best.processes] += 1
        chosen.append(best)
    return chosen


def pairs(cell):
    """The pairs of values that a cell has in it."""
    return set(combinations(zip(Cell._fields, cell), 2))


def references(cells):
    """What some cells must agree with, each once."""
    return list(dict.fromkeys(cell.reference for cell in cells))


def cover(cells):
    """The references of some cells, and few others, so that every pair of values occurs that occurs in any of
    them. Greedy: always the cell with the most pairs that are new.
    """
    chosen = references(cells)
    seen = set().union(*map(pairs, chosen))
    missing = {cell: pairs(cell) - seen for cell in cells}
    while missing := {cell: left for cell, left in missing.items() if left}:
        best = max(missing, key=lambda cell: len(missing[cell]))
        chosen.append(best)
        seen = missing[best]
        missing = {cell: left - seen for cell, left in missing.items()}
    return chosen


EXTRA = [Cell("ppo-lag", 2, "states", "bf16", 2, "replicated", LORA)]
"""Beside the cover: one shared base under everything at once that it can stand on."""
