"""The matrix of stages, ZeRO, offload, precision, processes and other settings that may change no loss.

It has the axes, the combinations that exist, and a small set of combinations in which every pair of values
occurs. matrix_worker.py runs them, test_matrix.py checks them.
"""

from collections import Counter
from itertools import combinations, product
from typing import NamedTuple

SUPERVISED, PPO = ("sft", "reward", "cost", "dpo"), ("ppo", "ppo-lag")
PLAIN, NONE = "plain", "-"


class Cell(NamedTuple):
    """One combination; "-" if a stage does not have the axis."""

    stage: str
    zero: int
    offload: str  # what is kept in host memory
    precision: str
    processes: int
    frozen: str  # engine.frozen
    form: str  # of the loss, or one of UPDATES

    @property
    def name(self):
        """The values of the cell, as the failure of a test shows them."""
        return (
            f"{self.stage} ZeRO-{self.zero} offload={self.offload} {self.precision} {self.processes}p "
            f"frozen={self.frozen} {self.form}"
        )

    @property
    def reference(self):
        """The cell it must agree with: one process, nothing sharded or offloaded, fp32."""
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
"""Settings of the group `ppo`.

With few tokens per pass some ranks have no sequence in a pass; they must join it all the same.
"""
WITH_PTX, WITH_ONE_CRITIC, LORA = ("one-pass", "epochs"), ("whiten",), "lora"
"""Updates with supervised data; updates of ppo-lag with one critic of two heads; low-rank adapters.

In policy optimisation all adapters are on one shared base.
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
    """True for a combination that a recipe can request and that does not repeat another one."""
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
    """Every combination of stage, ZeRO stage, offload, precision and processes, each once.

    The values of the other axes alternate, so that within a stage each of them occurs with each value of
    these five axes. Every combination of all axes would take hours and show nothing more.
    """
    cells_of, chosen, seen_pairs, uses = {}, [], {}, Counter()
    for cell in everything():
        cells_of.setdefault(cell[:5], []).append(cell)
    for cells in cells_of.values():
        best = min(
            cells,
            key=lambda cell: (
                -len(pairs(cell) - seen_pairs.get(cell.stage, set())),
                uses[cell.stage, cell.form, cell.processes],
            ),
        )
        seen_pairs.setdefault(best.stage, set()).update(pairs(best))
        uses[best.stage, best.form, best.processes] += 1
        chosen.append(best)
    return chosen


def pairs(cell):
    """The pairs of values of a cell."""
    return set(combinations(zip(Cell._fields, cell), 2))


def references(cells):
    """The references of some cells, each once."""
    return list(dict.fromkeys(cell.reference for cell in cells))


def cover(cells):
    """The references of some cells and few others, so that every pair of values of these cells occurs.

    The choice is greedy: the next cell is the one with the most new pairs.
    """
    chosen = references(cells)
    seen = set().union(*map(pairs, chosen))
    missing = {cell: pairs(cell) - seen for cell in cells}
    while missing := {cell: new_pairs for cell, new_pairs in missing.items() if new_pairs}:
        best = max(missing, key=lambda cell: len(missing[cell]))
        chosen.append(best)
        seen = missing[best]
        missing = {cell: new_pairs - seen for cell, new_pairs in missing.items()}
    return chosen


EXTRA = [Cell("ppo-lag", 2, "states", "bf16", 2, "replicated", LORA)]
"""One more cell: a shared base with all settings at once that it supports."""
