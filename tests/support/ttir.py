"""Which offsets of a compiled Triton kernel are 32 bits wide where they would have to be 64: read from its
ttir text.
"""

import re

# what a 32-bit number that only the launch knows may be: program_id(0), a stride, a count
RUNTIME = 2**31 - 2**20
_NAME = r"%[\w.$-]+"


def narrow_offsets(ttir, below=None):
    """The lines of a kernel's ttir where a 32-bit number may pass 2^31 and then becomes part of an address.

    Upper bounds are carried from line to line: program_id(0), arguments and loaded numbers may be almost
    2^31, program_id(1) and (2) 65,535, a loop's variable is below its end. So row * stride in 32 bits is
    found, and program_id(0) * BLOCK too. below: {argument: bound} for arguments that stay below another
    number.
    """
    high, origin, found = {}, {}, []
    for line in ttir.splitlines():
        line = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line).strip()
        if line.startswith("tt.func"):
            high.update(
                {name: (below or {}).get(name[1:], RUNTIME) for name in re.findall(rf"({_NAME}): i32", line)}
            )
        loop = re.search(rf"scf\.for ({_NAME}) = \S+ to (\S+) step", line)
        if loop:
            high[loop[1]] = high.get(loop[2], RUNTIME)
        assigned = re.match(rf'({_NAME})(?::\d+)? = "?([\w.]+)"?(.*)', line)
        if assigned is None:
            continue
        name, op, rest = assigned.groups()
        operands = re.findall(_NAME + r"(?:#\d+)?", rest)
        tainted = [origin[o] for o in operands if o in origin]
        if op == "tt.addptr":
            found += tainted
        elif (
            re.search(r"(\bi32|xi32>|\bi64|xi64>)$", rest)
            and not op.startswith("arith.cmp")
            and op != "tt.load"
        ):
            value = _highest(op, rest, [high.get(o, RUNTIME) for o in operands])
            wide = rest.endswith(("i64", "i64>"))
            if not wide and value > 2**31 - 1:
                origin[name] = line
            elif tainted:
                origin[name] = tainted[0]
            high[name] = value if wide else min(value, RUNTIME)
    return found


def _highest(op, rest, operands):
    """The largest value that an operation may give, for operands of 0 up to these; RUNTIME where nothing is
    known.
    """
    number = re.match(r" (?:dense<)?(-?\d+)>? ", rest)
    if op == "arith.constant" and number:
        return abs(int(number[1]))
    if op == "tt.get_program_id":
        return RUNTIME if rest.startswith(" x") else 65535
    if op == "tt.make_range":
        return int(re.search(r"end = (\d+)", rest)[1])
    if op == "arith.extui" and "i1" in rest:
        return 1
    if op == "arith.muli":
        return operands[0] * operands[1]
    if op == "arith.addi":
        return operands[0] + operands[1]
    if op in ("arith.divsi", "arith.ceildivsi"):
        return operands[0] if operands[1] == RUNTIME else -(-operands[0] // max(operands[1], 1))
    if op == "arith.remsi":
        return min(operands)
    if op == "arith.minsi":
        return min(operands)
    if op in ("arith.extsi", "tt.splat", "tt.broadcast", "tt.expand_dims", "arith.subi", "tt.reshape"):
        return operands[0]
    if op in ("arith.maxsi", "arith.select"):
        return max(operands[-2:])
    return RUNTIME
