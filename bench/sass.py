"""Is the machine code of a kernel what its PTX says? Three signs that it is not, found without a
card.

ptxas 12.8 (in Triton 3.6.0 and 3.7.1) makes code for sm_90 whose second matrix product takes its
descriptor from a register that nothing has written, or that holds something else. The PTX is right,
Triton's interpreter is right, the results on a card are wrong. So the listing of nvdisasm is looked
at:

    unwritten(code)                reads of registers that no instruction before has written, by
                                   data flow over the control-flow graph
    wrong_descriptors(code, ptx)   wgmma descriptors that the PTX does not know, as far as both are
                                   constants
    overwritten(code)              registers that a wgmma may still be reading when they are written

A uniform register (UR) has to be written on every path that leads to a read. Of a vector register
(R) it is enough that some path writes it: a value that only one branch defines and only the same
branch uses is legal.
"""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of nvdisasm: its address, guard ("@!P0" or ""), opcode with suffixes, operands."""

    address: int
    guard: str
    op: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.op.split(".")[0]

    def __str__(self):
        return f"{self.address:#06x} {self.guard} {self.op} {', '.join(self.operands)}"


LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
# what nvdisasm of CUDA 12.8 adds for sm_100 and later: "BRA 0x710  &req={3}  ?trans7"
NOTE = re.compile(r"[ \t]+[&?](?=[A-Za-z])[^\s;]*")


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by nvdisasm --binary."""
    found = LINE.findall(NOTE.sub("", listing))
    return [
        Instruction(int(at, 16), guard.strip(), op, split(rest)) for at, guard, op, rest in found
    ]


def split(operands: str) -> tuple[str, ...]:
    """Operands, cut at the commas outside of brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^\[(]*[\])])", operands) if part.strip())


# What an instruction writes and reads: sets of registers as bits, R0 to R255 and then UR0 to UR255.

UNIFORM = 256
ALL_VECTOR = (1 << UNIFORM) - 1
REGISTER = re.compile(r"(?<![A-Za-z0-9_])(U?R)(\d+)(\.64)?")
READS_FIRST = {
    "BAR",
    "WARPSYNC",
    "RET",
    "BRX",
    "JMX",
    "NANOSLEEP",
    "R2B",
    "DEPBAR",
    "BRA",
    "CALL",
    "R2P",
}
PREDICATE_FIRST = {
    "SHFL",
    "LOP3",
    "ULOP3",
    "ELECT",
    "MATCH",
    "R2UR",
    "ATOM",
    "ATOMG",
    "ATOMS",
    "ATOMUR",
    "FCHK",
}


def bits(kind: str, first: int, count: int = 1) -> int:
    return ((1 << count) - 1) << (first + (UNIFORM if kind == "UR" else 0))


def written(ins: Instruction) -> int:
    """The registers that an instruction writes; rather too many than too few."""
    where = 0
    if (
        ins.base in PREDICATE_FIRST
        and ins.operands
        and re.fullmatch(r"!?U?P[\dT]", ins.operands[0])
    ):
        where = 1
    if ins.base in READS_FIRST or len(ins.operands) <= where:
        return 0
    target = re.fullmatch(r"(U?R)(\d+)", ins.operands[where])
    return bits(target[1], int(target[2]), count_written(ins)) if target else 0


def count_written(ins: Instruction) -> int:
    parts = ins.op.split(".")
    if shape := re.search(r"\.64x(\d+)x", ins.op):  # wgmma: 64 rows of float32 over 128 threads
        return int(shape[1]) // 2
    if ins.base == "LDTM":
        return max(int(x) for x in re.findall(r"\.x(\d+)", ins.op) or ["1"])
    if ins.base in ("HMMA", "IMMA", "LDSM"):
        return 4
    if ins.base in ("FFMA2", "FADD2", "FMUL2"):  # two float32 at a time, on sm_100
        return 2
    if ins.base == "CS2R":
        return 1 if "32" in parts else 2
    wide = {"256": 8, "128": 4, "64": 2, "WIDE": 2, "F64": 2, "S64": 2, "U64": 2}
    return max(wide.get(part, 1) for part in parts)


def read(ins: Instruction) -> int:
    """The registers that an instruction reads; of more than one in a row only what is certain."""
    found = 0
    skip = re.fullmatch(r"U?R\d+", ins.operands[0]) is not None if ins.operands else False
    for i, operand in enumerate(ins.operands):
        if i == 0 and skip and ins.base not in READS_FIRST:
            continue
        if i == 1 and ins.base in PREDICATE_FIRST and not skip and re.fullmatch(r"U?R\d+", operand):
            continue
        if descriptor := re.match(r"gdesc\[UR(\d+)\]", operand):
            found |= descriptor_registers(ins, int(descriptor[1]))
            continue
        if address := re.match(r"desc\[UR(\d+)\]", operand):
            found |= bits("UR", int(address[1]), 2)
        for kind, number, pair in REGISTER.findall(operand):
            wide = pair or (kind == "UR" and ins.op.startswith("UIADD3.64"))
            found |= bits(kind, int(number), 2 if wide else 1)
    if ins.base in (
        "PRMT",
        "LOP3",
    ):  # a register is filled bit by bit, or one half before the other
        found &= ~(written(ins) & ALL_VECTOR)
    return found


def descriptor_registers(ins: Instruction, first: int) -> int:
    """HGMMA names one group of four registers, A's descriptor and B's; UTCHMMA names one for
    each."""
    if ins.base != "HGMMA":
        return bits("UR", first, 2)
    if re.fullmatch(r"R\d+(\.reuse)?", ins.operands[1]):  # A is in registers
        return bits("UR", first + 2, 2)
    return bits("UR", first, 4)


# The control-flow graph.


def successors(code: list[Instruction]) -> list[list[tuple[int, int]]]:
    """For each instruction, what may come next: (index, registers that are written on the way)."""
    index = {ins.address: i for i, ins in enumerate(code)}
    joins: dict[str, list[int]] = {}
    for ins in code:
        if ins.base == "BSSY":
            joins.setdefault(ins.operands[-2], []).append(target(ins, index))
    return [following(i, ins, index, joins) for i, ins in enumerate(code)]


def following(i: int, ins: Instruction, index: dict, joins: dict) -> list[tuple[int, int]]:
    after = [(i + 1, 0)] if i + 1 < len(index) else []
    conditional = bool(ins.guard) or re.fullmatch(
        r"!?U?P\d", ins.operands[0] if ins.operands else ""
    )
    if ins.base == "BRA":
        return [(target(ins, index), 0)] + (after if conditional else [])
    if ins.base in ("EXIT", "RET", "KILL"):
        return after if ins.guard else []
    if ins.base == "BSYNC":
        ends = joins.get(ins.operands[-1], [])
        return [(at, 0) for at in ([i + 1] if i + 1 in ends else ends)] + (
            after if conditional else []
        )
    if ins.base == "CALL":  # what the routine writes, it has written when it comes back
        return [(target(ins, index), 0)] + [(at, ALL_VECTOR) for at, _ in after]
    if ins.base in ("BRX", "JMP", "JMX"):
        raise ValueError(f"sass: a jump that is not understood: {ins}")
    return after


def target(ins: Instruction, index: dict) -> int:
    return index[int(ins.operands[-1].strip("`()"), 16)]


def written_before(code: list[Instruction]) -> tuple[list[int | None], list[int | None]]:
    """For each instruction the registers that every path, and that some path, has written; None:
    never reached."""
    edges, writes = successors(code), [written(ins) for ins in code]
    every: list[int | None] = [None] * len(code)
    some: list[int | None] = [None] * len(code)
    every[0] = some[0] = 0
    work = [0]
    while work:
        i = work.pop()
        for j, more in edges[i]:
            must = every[i] | writes[i] | more
            may = some[i] | writes[i] | more
            if every[j] is not None:
                must, may = must & every[j], may | some[j]
            if (must, may) != (every[j], some[j]):
                every[j], some[j] = must, may
                work.append(j)
    return every, some


def unwritten(code: list[Instruction]) -> list[str]:
    """The instructions that read a register before anything has written it."""
    every, some = written_before(code)
    found = []
    for ins, must, may in zip(code, every, some):
        if must is None:
            continue
        missing = read(ins) & ~((must & ~ALL_VECTOR) | (may & ALL_VECTOR))
        if missing:
            names = [
                ("UR" if n >= UNIFORM else "R") + str(n % UNIFORM)
                for n in range(512)
                if missing >> n & 1
            ]
            found.append(f"{ins}  <- {', '.join(names)}")
    return found


# A factor of a wgmma in registers: the product goes on while the next instructions run, so these
# registers are its own until a wait. ptxas 12.9 is known to give some of them away too early
# (triton-lang/triton, pull request 11781).


def overwritten(code: list[Instruction]) -> list[str]:
    """The instructions that write a register of a wgmma's first factor before a wait for it."""
    edges, writes = successors(code), [written(ins) & ALL_VECTOR for ins in code]
    in_flight: list[int | None] = [None] * len(code)
    in_flight[0], work = 0, [0]
    while work:
        i = work.pop()
        after = in_flight[i]
        if code[i].op.startswith("WARPGROUP.DEPBAR") and "0x0" in code[i].operands:
            after = 0
        elif code[i].base == "HGMMA":
            first = re.fullmatch(r"R(\d+)(\.reuse)?", code[i].operands[1])
            after |= bits("R", int(first[1]), 4) if first else 0
        for j, _ in edges[i]:
            joined = after | (in_flight[j] or 0)
            if joined != in_flight[j]:
                in_flight[j] = joined
                work.append(j)
    return [str(ins) for ins, busy, w in zip(code, in_flight, writes) if busy and busy & w]


# Descriptors of wgmma: two 64-bit numbers that say where a factor lies in shared memory, and how.
# Both listings are evaluated as far as constants go, with None for a word that is none: an address
# that a loop moves, for example.

SHARED = 0x400  # where ptxas puts a kernel's shared memory; CTA 0 of its cluster adds nothing
WORD = 0xFFFFFFFF
Words = dict[
    int | str, int
]  # uniform register, or a predicate's carry -> what it holds, if that is a constant


def constant(operand: str, state: Words) -> int | None:
    if operand == "URZ":
        return 0
    if register := re.fullmatch(r"UR(\d+)", operand):
        return state.get(int(register[1]))
    return int(operand, 0) if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand) else None


def long(operand: str, state: Words) -> tuple[int | None, int | None]:
    """(low, high) of an operand of 64 bits."""
    if register := re.fullmatch(r"UR(\d+)", operand):
        return state.get(int(register[1])), state.get(int(register[1]) + 1)
    value = constant(operand, state)
    return (None, None) if value is None else (value & WORD, value >> 32 & WORD)


def total(values) -> int | None:
    values = list(values)
    return None if None in values else sum(values)


def results(ins: Instruction, state: Words) -> list[int | None]:
    """What the instruction writes to its uniform registers. A descriptor's low word never
    overflows, so an unknown one carries nothing; a known one does as it says."""
    sources = [x for x in ins.operands[1:] if not re.fullmatch(r"!?UP[\dT]", x)]
    if ins.op == "UIADD3.64":
        parts = [long(x, state) for x in sources]
        low, high = total(a for a, _ in parts), total(b for _, b in parts)
        carry = 0 if low is None else low >> 32
        return [low, None if high is None else high + carry]
    x = [constant(operand, state) for operand in sources]
    if ins.op == "S2UR" and "CgaCtaId" in ins.operands[1]:
        return [0]
    if None in x:
        return [None]
    match ins.op, x:
        case ("UMOV", [a]):
            return [a]
        case ("UIADD3", [a, b, c]):
            return [a + b + c]
        case ("UIADD3.X", [a, b, c]):
            carry = next(
                (state.get(f"carry {p}", 0) for p in ins.operands[4:] if re.fullmatch(r"UP\d", p)),
                0,
            )
            return [a + b + c + carry]
        case ("ULEA", [a, b, shift]):
            return [(a << shift) + b]
        case ("USHF.R.U32.HI", [0, shift, a]):
            return [(a & WORD) >> shift]
        case ("USHF.L.U32", [a, shift, 0]):
            return [a << shift]
        case ("USGXT.U32", [a, width]):
            return [a & (1 << width) - 1]
        case ("ULOP3.LUT", [a, b, c, table, *_]):
            at = lambda i: table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1
            return [sum(at(i) << i for i in range(32))]
    return [None]


def step(ins: Instruction, state: Words) -> Words:
    """The state after an instruction."""
    mask = written(ins) >> UNIFORM
    if not mask:
        return state
    first = (mask & -mask).bit_length() - 1
    after = {key: x for key, x in state.items() if not (isinstance(key, int) and mask >> key & 1)}
    values = results(ins, state)
    carries = [x for x in ins.operands[1:3] if re.fullmatch(r"UP\d", x)]
    for name in carries:
        after.pop(f"carry {name}", None)
    if ins.guard:
        return after
    for i, value in enumerate(values):
        if value is not None:
            after[first + i] = value & WORD
    if carries and values[0] is not None and ins.op == "UIADD3":
        sources = [x for x in ins.operands[1:] if not re.fullmatch(r"!?UP[\dT]", x)]
        low = sum(constant(x, state) & WORD for x in sources)
        after[f"carry {carries[0]}"] = low >> 32
    return after


def descriptors(code: list[Instruction]) -> list[tuple]:
    """(instruction, rows of B, words of A or None if it is in registers, words of B) of every
    HGMMA."""
    if not any(ins.base == "HGMMA" for ins in code):
        return []
    edges = successors(code)
    states: list[Words | None] = [None] * len(code)
    states[0], work = {}, [0]
    while work:
        i = work.pop()
        after = step(code[i], states[i])
        for j, _ in edges[i]:
            joined = after
            if states[j] is not None:
                joined = {key: x for key, x in states[j].items() if after.get(key) == x}
            if joined != states[j]:
                states[j] = joined
                work.append(j)
    found = []
    for ins, state in zip(code, states):
        if ins.base == "HGMMA" and state is not None:
            group = int(
                next(
                    re.match(r"gdesc\[UR(\d+)\]", x)[1]
                    for x in ins.operands
                    if x.startswith("gdesc")
                )
            )
            words = [state.get(group + i) for i in range(4)]
            a = None if re.fullmatch(r"R\d+(\.reuse)?", ins.operands[1]) else tuple(words[:2])
            found.append((ins, int(re.search(r"64x(\d+)x", ins.op)[1]), a, tuple(words[2:])))
    return found


class Ptx:
    """The constants of a kernel's PTX, whose registers are written once but for those that a loop
    moves."""

    DEFINITION = re.compile(r"^\s*([a-z][\w.]*)\s+(%\w+), (.*?);", re.M)
    PRODUCT = re.compile(r"wgmma\.mma_async\.\S*m64n(\d+)k\S+ \{[^}]*\}, (\{[^}]*\}|%\w+), (%\w+),")

    def __init__(self, ptx: str):
        self.ptx, self.known = ptx, {}
        self.definitions: dict[str, list] = {}
        for op, register, operands in self.DEFINITION.findall(ptx):
            self.definitions.setdefault(register, []).append(
                (op, [x.strip() for x in operands.split(",")])
            )

    def value(self, name: str) -> tuple[int | None, int | None]:
        """(low, high) word."""
        if name == "global_smem":
            return SHARED, 0
        if not name.startswith("%"):
            return (
                (int(name, 0) & WORD, int(name, 0) >> 32 & WORD)
                if re.fullmatch(r"-?\w+", name)
                else (None, None)
            )
        if name not in self.known:
            self.known[name] = (None, None)  # for a register that a loop defines by itself
            found = self.definitions.get(name, [])
            if len(found) == 1:
                self.known[name] = self.evaluate(*found[0])
        return self.known[name]

    def evaluate(self, op: str, operands: list[str]) -> tuple[int | None, int | None]:
        if not all(re.fullmatch(r"-?[%\w]+", x) for x in operands):
            return None, None
        parts = [self.value(x) for x in operands]
        low = [a for a, _ in parts]
        if op == "mov.b32" or op == "cvt.u64.u32":
            return low[0], 0
        if op in ("or.b64", "add.s64"):
            if None in low:
                return None, total(b for _, b in parts)
            whole = [a | (b or 0) << 32 for a, b in parts]
            number = whole[0] | whole[1] if op == "or.b64" else sum(whole)
            return number & WORD, number >> 32 & WORD
        if None in low:
            return None, 0 if op.endswith("32") else None
        match op.split(".")[0], low:
            case ("add", [a, b]) if op.endswith("32"):
                return (a + b) & WORD, 0
            case ("bfe", [a, at, width]):
                return a >> at & (1 << width) - 1, 0
            case ("shl", [a, by]) if op.endswith("32"):
                return a << by & WORD, 0
        return None, 0 if op.endswith("32") else None

    def descriptors(self) -> list[tuple]:
        """(rows of B, words of A or None if it is in registers, words of B) of every wgmma."""
        products = self.PRODUCT.findall(self.ptx)
        return [
            (int(n), None if a.startswith("{") else self.value(a), self.value(b))
            for n, a, b in products
        ]


def agree(mine, theirs) -> bool:
    """Two descriptors, as far as their words are known."""
    if mine is None or theirs is None:
        return mine is theirs
    return all(x is None or y is None or x == y for x, y in zip(mine, theirs))


def wrong_descriptors(code: list[Instruction], ptx: str) -> list[str]:
    """The HGMMAs whose descriptors are not those of any wgmma of the PTX."""
    known = Ptx(ptx).descriptors()
    show = lambda words: (
        "registers" if words is None else " ".join("?" if w is None else f"{w:#x}" for w in words)
    )
    return [
        f"{ins}: A {show(a)}, B {show(b)}"
        for ins, n, a, b in descriptors(code)
        if not any(n == m and agree(a, c) and agree(b, d) for m, c, d in known)
    ]
