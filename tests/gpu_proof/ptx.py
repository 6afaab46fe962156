"""An emulator of PTX, the code that Triton and nvcc pass to the GPU's assembler, in numpy.

All threads of all blocks of a launch advance together, one instruction at a time. If threads diverge, those that are
furthest behind run first, so that they reconverge. These are errors:

* an opcode, state space or type that is not modelled;
* an access outside the buffers of the launch or of shared memory, or not aligned to its size;
* a read of a register or of shared memory that was never written;
* a race: two threads access a byte, one of them changes it, and neither a barrier nor atomics of their blocks at the
  same address order the accesses (in global memory, a write after a read is not checked);
* a barrier or warp operation that only some of the threads reach.

Results of approximate instructions have the largest error that the PTX manual allows; the bits of the result determine
its sign. Global accesses are counted in 32-byte sectors. The assembler, caches and time are not modelled.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WARP, SECTOR = 32, 32  # lanes, bytes
MANY = -2  # in a shadow: several threads, or several warps
POISON = 0xA5  # contents of a register in threads that have not written it

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


class PTXError(Exception):
    """The kernel has an error, or uses a feature that is not modelled."""


# --- program text ---


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode.modifiers operands;``"""

    text: str
    guard: str  # a predicate register, or ""
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def has(self, *modifiers: str) -> bool:
        return any(m in self.modifiers for m in modifiers)


@cache
def _bits(kind: str) -> int:
    """The bits of a type such as ``pred``, ``b32``, ``s64`` or ``bf16``."""
    match = re.fullmatch(r"(?:[bus](?=8|16|32|64)|f(?=16|32|64)|bf(?=16))(\d\d?)|pred", kind)
    if not match:
        raise PTXError(f"type {kind}: not modelled")
    return int(match[1] or 1)


def _instruction(text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", text)
    if not match:
        raise PTXError(f"not an instruction: {text}")
    negated, guard, opcode, modifiers, operands = match.groups()
    modifiers = modifiers.replace("::cta", "")
    split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
    return Instruction(
        text, guard or "", bool(negated), opcode, tuple(modifiers.split(".")[1:]), tuple(part.strip() for part in split)
    )


class Program:
    """A kernel (``.entry``) of a PTX module."""

    def __init__(self, ptx: str, name: str = r"[\w$]+") -> None:
        ptx = re.sub(r"//[^\n]*", "", ptx)
        entry = re.search(rf"\.entry\s+({name})\s*\((.*?)\)(.*?)\{{", ptx, re.S)
        if not entry:
            raise PTXError(f"no entry {name}")
        self.name, end, depth = entry[1], entry.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        body = ptx[entry.end() : end - 1]
        self.params = [re.sub(r"\[.*", "", param.split()[-1]) for param in entry[2].split(",")]
        self.widths: dict[str, int] = {}
        for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
            for register in names.split(","):
                self.widths[register.split("<")[0].strip()] = _bits(kind)
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        for align, kind, symbol, size in re.findall(r"\.shared(?: \.align (\d+))? \.(\w+) ([\w$]+)\[(\d+)\];", body):
            self.shared_bytes += -self.shared_bytes % int(align or 1)
            self.shared[symbol] = self.shared_bytes
            self.shared_bytes += _bits(kind) // 8 * int(size)
        for symbol in re.findall(r"\.extern \.shared [^;]*?([\w$]+)\[\];", ptx):
            self.shared[symbol] = self.shared_bytes
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        body = re.sub(r"(?m)^\s*\.loc[^\n]*", "", body)
        body = re.sub(r"\.(?:reg|shared|pragma)\s[^;]*;", "", body)
        body = re.sub(r"(?m)^\s*([$\w]+):(?!:)", r"\1:;", body)
        for line in body.split(";"):
            text = " ".join(line.split()).strip()
            while text[:1] in ("{", "}") and text:  # the scope of inline assembly
                text = text[1:].strip()
            if text.endswith(":"):
                self.labels[text[:-1]] = len(self.instructions)
            elif text:
                self.instructions.append(_instruction(text))

    def edited(self, index: int, text: str | None) -> "Program":
        """A copy in which one instruction is replaced or removed."""
        changed = copy(self)
        put = [] if text is None else [_instruction(text)]
        changed.instructions = [*self.instructions[:index], *put, *self.instructions[index + 1 :]]
        if text is None:
            changed.labels = {label: at - (at > index) for label, at in self.labels.items()}
        return changed

    def width(self, register: str) -> int:
        """Bits of a register, from its declaration or that of its family (``%r<218>``)."""
        known = self.widths.get(register) or self.widths.get(register.rstrip("0123456789"))
        if known is None:
            raise PTXError(f"not declared: {register}")
        return known


# --- numbers ---


def _as_type(raw: Array, kind: str) -> Array:
    """Convert raw bits, at least as wide as ``kind``, to numbers of that type; bf16 to fp32."""
    if kind == "pred":
        return raw
    bits = _bits(kind)
    raw = np.ascontiguousarray(raw.astype(UNSIGNED[bits], copy=False))
    if kind == "bf16":
        raw = np.left_shift(raw, 16, dtype=np.uint32)
        return raw.view(np.float32)
    if kind[0] in "sf":
        return raw.view((SIGNED if kind[0] == "s" else FLOAT)[bits])
    return raw


def _as_bits(values: Array, kind: str) -> Array:
    """Convert numbers to raw bits of type ``kind``, rounded to nearest even if it is narrower."""
    if kind == "pred":
        return values.astype(np.bool_)
    bits = _bits(kind)
    if kind == "bf16":
        wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
        nearest = (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)
    if kind[0] == "f":
        return np.ascontiguousarray(values, FLOAT[bits]).view(UNSIGNED[bits])
    return values.astype(UNSIGNED[bits])


def _fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    if a.dtype != np.float32:
        return (a.astype(np.longdouble) * b + c).astype(a.dtype)  # fp64: first rounded to a 64-bit mantissa
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    # Round to odd first, so that the second rounding resolves ties correctly.
    even = (total.view(np.int64) & 1) == 0
    toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(even & (error != 0) & np.isfinite(total), toward, total).astype(np.float32)


def _mistaken(values: Array, ulps: int) -> Array:
    """Change fp32 ``values`` by up to ``ulps`` units in the last place, depending on their bits.

    Powers of two do not change, as the double-precision exponential of libdevice relies on them.
    """
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    step = (raw * np.uint32(2654435761) >> np.uint32(16)) % np.uint32(2 * ulps + 1)
    moved = raw + step - np.uint32(ulps)
    ordinary = (np.abs(values) > 1e-37) & (np.abs(values) < 1e37) & (raw << np.uint32(9) != 0)
    return np.where(ordinary, moved, raw).view(np.float32)


def _flushed(values: Array) -> Array:
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _divide(x: Array, y: Array) -> Array:
    """Integer division truncates towards zero. Division by zero is an error."""
    if x.dtype.kind == "f":
        return x / y
    if (y == 0).any():
        raise PTXError("integer division by zero")
    quotient = np.abs(x.astype(np.int64)) // np.abs(y.astype(np.int64))
    return np.where((x < 0) == (y < 0), quotient, -quotient).astype(x.dtype)


def _double_width(x: Array, y: Array) -> Array:
    double = {2: np.int32, 4: np.int64} if x.dtype.kind == "i" else {2: np.uint32, 4: np.uint64}
    if x.dtype.itemsize not in double:
        raise PTXError("the high half of a 64-bit product")
    wide = double[x.dtype.itemsize]
    return x.astype(wide) * y.astype(wide)


ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": lambda x, y: np.fmin(x, y) if x.dtype.kind == "f" else np.minimum(x, y),
    "max": lambda x, y: np.fmax(x, y) if x.dtype.kind == "f" else np.maximum(x, y),
    "div": _divide,
    "fma": _fma,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.divide(x.dtype.type(1), x),
    "rsqrt": lambda x: np.divide(x.dtype.type(1), np.sqrt(x)),
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
    "cvta": np.array,
}
NAN_WINS: dict[str, Callable[..., Array]] = {"min": np.minimum, "max": np.maximum}
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
LOGIC: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}
UNUSUAL = ("sat", "cc", "rm", "rp", "rz", "rna", "NaN", "relu", "xorsign")
ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


# --- memory ---


@dataclass
class Buffer:
    """Global memory that a launch may access."""

    name: str
    address: int
    data: Array  # uint8
    shadow: "Shadow" = field(init=False)

    def __post_init__(self) -> None:
        self.shadow = Shadow(self.data.size)


@dataclass
class Threads:
    """The block and warp of each thread, and the number of barriers that they have passed."""

    block: Array
    warp: Array
    block_epoch: Array
    warp_epoch: Array
    sees: Array  # [blocks, blocks]: the first block sees the writes of the second before this epoch, by atomics


class Shadow:
    """The last accesses of each byte: by which thread or warp, and when."""

    def __init__(self, size: int) -> None:
        self.writer, self.reader, self.reader_warp = (np.full(size, -1, np.int32) for _ in range(3))
        self.written, self.read, self.read_warp = (np.zeros(size, np.int32) for _ in range(3))  # epochs

    def note_load(self, place: Array, thread: Array, now: Threads) -> bool:
        """Record that bytes ``place`` [lanes, bytes] are read. Returns whether this is a race."""
        thread = thread[:, None]
        warp, epoch, warp_epoch = now.warp[thread], now.block_epoch[thread], now.warp_epoch[thread]
        race = self.unordered(place, thread, now)
        same_block = self.read[place] == epoch
        same_warp = same_block & (self.read_warp[place] == warp_epoch)
        reader = np.where(same_warp & (self.reader[place] != thread), MANY, thread)
        reader_warp = np.where(same_block & (self.reader_warp[place] != warp), MANY, warp)
        self.read[place], self.read_warp[place] = epoch, warp_epoch
        for kept, new in ((self.reader, reader), (self.reader_warp, reader_warp)):
            kept[place] = new
            lost = kept[place] != new  # several lanes access one byte
            kept[place[lost]] = MANY
        return bool(race.any())

    def note_store(self, place: Array, thread: Array, now: Threads, changes: Array) -> bool:
        """Record a write of bytes ``place``, with new values where ``changes``. Returns whether this is a race."""
        thread = thread[:, None]
        warp, epoch, warp_epoch = now.warp[thread], now.block_epoch[thread], now.warp_epoch[thread]
        race = self.unordered(place, thread, now) & changes
        others = (self.read_warp[place] == warp_epoch) & (self.reader[place] != thread)
        race |= (self.read[place] == epoch) & ((self.reader_warp[place] != warp) | others)
        self.writer[place] = thread
        # One number is enough for both epochs, as the epoch of a warp grows with that of its block.
        self.written[place] = warp_epoch
        return bool(race.any())

    def unordered(self, place: Array, thread: Array, now: Threads) -> Array:
        """Whether another thread has written since the last barrier between it and ``thread``."""
        writer = self.writer[place]
        known = np.maximum(writer, 0)
        same_warp = now.warp[known] == now.warp[thread]
        # The warp of the writer has passed ``now.warp_epoch`` barriers. The last barrier of its block was at
        # ``now.block_epoch``.
        since = np.where(same_warp, now.warp_epoch[thread], now.block_epoch[thread])
        ordered = (now.block[known] == now.block[thread]) & (self.written[place] < since)
        ordered |= self.written[place] < now.sees[now.block[thread], now.block[known]]
        unordered: Array = (writer >= 0) & (writer != thread) & ~ordered
        return unordered


@dataclass
class Traffic:
    """Global accesses of one instruction. A request is the access of one warp."""

    kind: str  # "ld" or "st"
    size: int  # bytes per lane
    requests: int = 0
    sectors: int = 0
    ideal: int = 0  # sectors if the bytes of each request were contiguous
    touched: list[Array] = field(default_factory=list)  # block << 48 | address


def per_request(traffic: Iterable[Traffic], kind: str) -> float:
    """Sectors of all requests, relative to the minimum for their bytes."""
    chosen = [t for t in traffic if t.kind == kind]
    return sum(t.sectors for t in chosen) / sum(t.ideal for t in chosen)


def per_block(traffic: Iterable[Traffic], kind: str) -> float:
    """Like ``per_request``, but with a perfect cache: a sector counts once per block for any number of requests."""
    spread = [(np.concatenate(t.touched)[:, None] + np.arange(t.size)).ravel() for t in traffic if t.kind == kind]
    touched = np.unique(np.concatenate(spread))  # block << 48 | address of a byte
    _, counts = np.unique(touched >> 48, return_counts=True)
    return float(np.unique(touched // SECTOR).size / (-(-counts // SECTOR)).sum())


# --- execution ---


class Machine:
    """A launch of ``program``. Call ``run`` once, then read the buffers and ``traffic``."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        block: int,
        params: Sequence[bytes],
        buffers: Sequence[Buffer],
        dynamic_shared: int = 0,
    ) -> None:
        self.program, self.buffers = program, buffers
        self.params = dict(zip(program.params, params, strict=True))
        self.block_size, self.blocks = block, int(np.prod(grid))
        self.count = block * self.blocks
        if block % WARP:
            raise PTXError(f"{block} threads are not whole warps")
        thread = np.arange(self.count)
        index = thread // block
        self.lane = thread % WARP
        sees = np.zeros((self.blocks, self.blocks), np.int32)
        self.now = Threads(index, thread // WARP, np.ones(self.count, np.int32), np.ones(self.count, np.int32), sees)
        self.acquired = sees.copy()  # ``sees`` after the next barrier of a block
        self.released: dict[int, Array] = {}  # address of an atomic -> epoch per block, before which writes are visible
        sides = (*grid, 1, 1)
        special: dict[str, Any] = {"%tid.x": thread % block, "%ntid.x": block}
        special |= {"%laneid": self.lane, "%warpid": thread % block // WARP}
        special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        special |= {f"%nctaid.{axis}": side for axis, side in zip("xyz", sides, strict=False)}
        special["%ctaid.x"] = index % sides[0]
        special["%ctaid.y"] = index // sides[0] % sides[1]
        special["%ctaid.z"] = index // (sides[0] * sides[1])
        self.registers = {name: np.atleast_1d(value).astype(np.uint32) for name, value in special.items()}
        self.constants: dict[tuple[str, str], Array] = {}
        self.shared_size = program.shared_bytes + dynamic_shared
        self.shared = np.zeros(self.blocks * self.shared_size, np.uint8)
        self.shadow = Shadow(self.shared.size)
        self.traffic: dict[int, Traffic] = {}
        self.executed: set[int] = set()
        self.steps = 0
        self.pc = np.zeros(self.count, np.int64)
        self.waiting = np.zeros(self.count, np.bool_)
        self.done = np.zeros(self.count, np.bool_)

    def run(self, max_steps: int = 2_000_000) -> None:
        """Run until all threads have returned."""
        with np.errstate(all="ignore"):
            for self.steps in range(max_steps):
                active = ~(self.done | self.waiting)
                if not active.any():
                    if self.done.all():
                        return
                    self._release()
                    continue
                self.at = int(self.pc[active].min())
                if self.at >= len(self.program.instructions):
                    raise PTXError("control runs past the last instruction")
                here = active & (self.pc == self.at)
                self.pc[here] += 1
                instruction = self.program.instructions[self.at]
                if instruction.guard:
                    wanted = self.read(instruction.guard, "pred")
                    here &= ~wanted if instruction.negated else wanted
                if here.any():
                    self.executed.add(self.at)
                    try:
                        self._execute(instruction, here)
                    except PTXError as error:
                        raise PTXError(f"{self.program.name}: {instruction.text}: {error}") from None
        raise PTXError(f"{self.program.name}: not done after {max_steps} instructions")

    def _release(self) -> None:
        """If all threads wait or have returned, let blocks whose threads all wait at the same barrier continue."""
        stuck = self.waiting.reshape(self.blocks, self.block_size)
        place = self.pc.reshape(self.blocks, self.block_size)
        whole = stuck.all(1)
        if (stuck.any(1) & ~whole).any() or (place[whole] != place[whole][:, :1]).any():
            raise PTXError(f"{self.program.name}: not every thread of a block reaches the same barrier")
        # Each block has one clock for epochs, so that the epochs of a warp and of its block can be compared.
        tick = 1 + self.now.warp_epoch.reshape(self.blocks, self.block_size).max(1, keepdims=True)
        tick = np.broadcast_to(tick, stuck.shape).reshape(-1)
        for epoch in (self.now.block_epoch, self.now.warp_epoch):
            epoch[self.waiting] = tick[self.waiting]
        blocks = np.unique(self.now.block[self.waiting])
        self.now.sees[blocks] = np.maximum(self.now.sees[blocks], self.acquired[blocks])
        self.waiting[:] = False

    def _execute(self, i: Instruction, active: Array) -> None:
        if i.opcode == "bra":
            self.pc[active] = self.program.labels[i.operands[0]]
        elif i.opcode in ("ret", "exit"):
            self.done |= active
        elif i.opcode in ("bar", "barrier"):
            self._barrier(i, active)
        elif i.opcode in ELEMENTWISE:
            self._elementwise(i, active)
        elif handler := getattr(self, f"_{i.opcode}_", None):
            handler(i, active)
        else:
            raise PTXError("not modelled")

    def read(self, operand: str, kind: str) -> Array:
        """The values of an operand, one per thread or one for all."""
        if operand in self.registers:
            return _as_type(self.registers[operand], kind)
        if operand[0] == "!":
            return ~self.read(operand[1:], kind)
        if (operand, kind) not in self.constants:
            self.constants[operand, kind] = _as_type(np.array([self._constant(operand, kind)]), kind)
        return self.constants[operand, kind]

    def _constant(self, operand: str, kind: str) -> Any:
        if operand in self.program.shared:
            return np.uint64(self.program.shared[operand])
        if match := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", operand):
            return UNSIGNED[32 if match[1] == "f" else 64](int(match[2], 16))
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            raise PTXError(f"{operand} was never written")
        value = int(operand.rstrip("U"), 0)
        return np.bool_(value) if kind == "pred" else np.uint64(value & (2**64 - 1))

    def write(self, register: str, values: Array, kind: str, active: Array) -> None:
        """Write ``values`` of type ``kind`` where ``active``, sign- or zero-extended to the width of the register."""
        if register == "_":
            return
        raw, width = _as_bits(values, kind), self.program.width(register)
        if width > _bits(kind):
            raw = (_as_type(raw, kind) if kind[0] == "s" else raw).astype(UNSIGNED[width])
        elif width < _bits(kind):
            raise PTXError(f"{register} is too narrow for {kind}")
        if register not in self.registers:
            poison = np.frombuffer(bytes([POISON]) * raw.itemsize, raw.dtype) if kind != "pred" else np.array([False])
            self.registers[register] = np.broadcast_to(poison, (self.count,))
        if active.all():
            self.registers[register] = np.broadcast_to(raw, (self.count,)).copy()
        else:
            self.registers[register] = np.where(active, raw, self.registers[register])

    # --- arithmetic ---

    def _elementwise(self, i: Instruction, active: Array) -> None:
        kind = i.type
        if i.has(*UNUSUAL) and not (i.has("NaN") and i.opcode in NAN_WINS):
            raise PTXError("not modelled")
        if kind.endswith("x2"):  # two numbers per word
            words, kind = [self.read(operand, "b32") for operand in i.operands[1:]], kind[:-2]
            pairs = ((_as_type(word >> np.uint32(shift), kind) for word in words) for shift in (0, 16))
            low, high = (_as_bits(ELEMENTWISE[i.opcode](*pair), kind).astype(np.uint32) for pair in pairs)
            return self.write(i.operands[0], high << np.uint32(16) | low, "b32", active)
        inputs = [self.read(operand, kind) for operand in i.operands[1:]]
        if i.opcode == "div" and kind[0] != "f":  # inactive threads may hold a 0
            inputs[1] = np.where(active, inputs[1], inputs[1].dtype.type(1))
        if i.has("ftz"):
            inputs = [_flushed(x) for x in inputs]
        values = (NAN_WINS if i.has("NaN") else ELEMENTWISE)[i.opcode](*inputs)
        if i.has("approx", "full"):
            if kind != "f32":
                raise PTXError("not modelled")
            values = _mistaken(values, 1 if i.opcode in ("rcp", "sqrt") else 2)
        self.write(i.operands[0], _flushed(values) if i.has("ftz") else values, kind, active)

    def _multiply(self, i: Instruction, active: Array) -> None:
        """``mul``, or ``mad`` with an addend."""
        kind = i.type
        if i.has(*UNUSUAL):
            raise PTXError("not modelled")
        x, y = (self.read(operand, kind) for operand in i.operands[1:3])
        if i.has("wide"):
            values, kind = _double_width(x, y), f"{kind[0]}{2 * _bits(kind)}"
        elif i.has("hi"):
            wide = _double_width(x, y)
            values = (wide >> wide.dtype.type(_bits(kind))).astype(x.dtype)
        elif i.has("ftz"):
            values = _flushed(_flushed(x) * _flushed(y))
        else:
            values = x * y
        if i.opcode == "mad":
            values = values + self.read(i.operands[3], kind)
        self.write(i.operands[0], values, kind, active)

    _mul_ = _mad_ = _multiply

    def _shift(self, i: Instruction, active: Array) -> None:
        kind, bits = i.type, _bits(i.type)
        x, amount = self.read(i.operands[1], kind), self.read(i.operands[2], "u32")
        shift = np.left_shift if i.opcode == "shl" else np.right_shift
        shifted = shift(x, np.minimum(amount, bits - 1).astype(x.dtype))
        beyond = np.where(x < 0, -1, 0).astype(x.dtype) if i.opcode == "shr" else np.zeros_like(x)
        self.write(i.operands[0], np.where(amount < bits, shifted, beyond), kind, active)

    _shl_ = _shr_ = _shift

    def _bfe_(self, i: Instruction, active: Array) -> None:
        """``length`` bits from bit ``start``, and copies of their highest bit above them if the type is signed."""
        if i.type not in ("u32", "s32"):
            raise PTXError("not modelled")
        start, length = (np.minimum(self.read(x, "u32") & 255, 32).astype(np.uint64) for x in i.operands[2:])
        length = np.minimum(length, np.uint64(32) - start)
        x, mask = self.read(i.operands[1], "u32"), (np.uint64(1) << length) - np.uint64(1)
        bits = x.astype(np.uint64) >> start & mask
        if i.type == "s32":
            negative = bits & (mask ^ mask >> np.uint64(1)) != 0
            bits = np.where(negative, bits | np.uint64(2**32 - 1) ^ mask, bits)
        self.write(i.operands[0], bits, "u32", active)

    def _bmsk_(self, i: Instruction, active: Array) -> None:
        """``length`` ones from bit ``start``."""
        start, length = (np.minimum(self.read(x, "u32"), 32).astype(np.uint64) for x in i.operands[1:])
        ones = (np.uint64(1) << length) - np.uint64(1)
        self.write(i.operands[0], (ones << start) & np.uint64(2**32 - 1), "u32", active)

    def _prmt_(self, i: Instruction, active: Array) -> None:
        """Four of the eight bytes of two operands, selected by the digits of the third."""
        pick = self.read(i.operands[3], "u32")
        if (pick & 0x8888).any():  # copies of a sign
            raise PTXError("not modelled")
        low, high = (self.read(x, "u32").astype(np.uint64) for x in i.operands[1:3])
        both, result = high << np.uint64(32) | low, np.zeros(1, np.uint64)
        for byte in range(4):
            chosen = both >> (8 * (pick >> 4 * byte & 7)).astype(np.uint64) & np.uint64(255)
            result = result | chosen << np.uint64(8 * byte)
        self.write(i.operands[0], result, "u32", active)

    def _setp_(self, i: Instruction, active: Array) -> None:
        if not i.type.endswith("x2"):
            x, y = (self.read(operand, i.type) for operand in i.operands[1:3])
            return self.write(i.operands[0], self._compared(i, x, y), "pred", active)
        words = [self.read(operand, "b32") for operand in i.operands[1:3]]
        for shift, target in zip((0, 16), i.operands[0].split("|"), strict=True):  # a result for each half
            x, y = (_as_type(word >> np.uint32(shift), i.type[:-2]) for word in words)
            self.write(target, self._compared(i, x, y), "pred", active)

    def _compared(self, i: Instruction, x: Array, y: Array) -> Array:
        compare, *rest = i.modifiers
        unordered = i.type[0] in "fb" and compare[-1] == "u"
        base = compare[:-1] if unordered else compare
        if base not in COMPARE:
            raise PTXError("not modelled")
        result = COMPARE[base](x, y)
        if unordered:
            result = result | np.isnan(x) | np.isnan(y)
        elif base == "ne" and x.dtype.kind == "f":
            result = result & ~np.isnan(x) & ~np.isnan(y)
        for combine in set(rest) & set(LOGIC):
            result = LOGIC[combine](result, self.read(i.operands[3], "pred"))
        return result

    def _selp_(self, i: Instruction, active: Array) -> None:
        yes, no = (self.read(operand, i.type) for operand in i.operands[1:3])
        self.write(i.operands[0], np.where(self.read(i.operands[3], "pred"), yes, no), i.type, active)

    def _mov_(self, i: Instruction, active: Array) -> None:
        target, source = i.operands
        if source[0] == "{":
            parts, bits = _list(source), _bits(i.type)
            each = bits // len(parts)
            packed = np.zeros(1, UNSIGNED[bits])
            for place, part in enumerate(parts):
                shift = UNSIGNED[bits](place * each)
                packed = packed | self.read(part, f"b{each}").astype(UNSIGNED[bits]) << shift
            self.write(target, packed, i.type, active)
        elif target[0] == "{":
            parts, bits = _list(target), _bits(i.type)
            each, whole = bits // len(parts), self.read(source, f"b{bits}")
            for place, part in enumerate(parts):
                self.write(part, whole >> UNSIGNED[bits](place * each), f"b{each}", active)
        else:
            self.write(target, self.read(source, i.type), i.type, active)

    def _cvt_(self, i: Instruction, active: Array) -> None:
        target, source = i.modifiers[-2:]
        if i.has(*UNUSUAL):
            raise PTXError("not modelled")
        if target in ("bf16x2", "f16x2"):  # the first operand is the upper half
            high, low = (_as_bits(self.read(x, source), target[:-2]).astype(np.uint32) for x in i.operands[1:])
            return self.write(i.operands[0], high << np.uint32(16) | low, "b32", active)
        values = self.read(i.operands[1], source)
        rounding = next((ROUND[m] for m in i.modifiers if m in ROUND), None)
        if rounding:
            values = rounding(values)
        if target[0] in "us" and source[0] in "fb":
            limits = np.iinfo((SIGNED if target[0] == "s" else UNSIGNED)[_bits(target)])
            wide = np.nan_to_num(values.astype(np.float64), nan=0.0)
            kept = np.clip(wide, float(limits.min), float(limits.max)).astype(limits.dtype)
            values = np.where(wide >= float(limits.max), limits.max, kept).astype(limits.dtype)
        elif target[0] == "f":
            values = values.astype(FLOAT[_bits(target)])
        self.write(i.operands[0], values, target, active)

    # --- warps and blocks ---

    def _whole_warps(self, active: Array) -> None:
        warps = active.reshape(-1, WARP)
        if (warps.any(1) & ~warps.all(1)).any():
            raise PTXError("not all lanes of a warp are active")

    def _barrier(self, i: Instruction, active: Array) -> None:
        if i.has("warp"):
            if i.operands != ("-1",) and i.operands != ("0xffffffff",):
                raise PTXError("not modelled")
            self._whole_warps(active)
            self.now.warp_epoch[active] += 1
        elif i.has("sync") and i.operands == ("0",):
            self._whole_warps(active)
            self.waiting |= active
        else:
            raise PTXError("not modelled")

    def _shfl_(self, i: Instruction, active: Array) -> None:
        target, _, found = i.operands[0].partition("|")
        self._whole_warps(active)
        if (self.read(i.operands[4], "u32") != 2**32 - 1).any():
            raise PTXError("not modelled")
        values, by, clamp = (self.read(x, "u32").astype(np.int64) for x in i.operands[1:4])
        segment = (clamp >> 8) & 31
        last = (self.lane & segment) | (clamp & 31 & ~segment)
        by = by & 31
        source = {"bfly": self.lane ^ by, "up": self.lane - by, "down": self.lane + by}.get(i.modifiers[1])
        if source is None:  # "idx"
            source = (self.lane & segment) | (by & ~segment)
        inside = source >= last if i.modifiers[1] == "up" else source <= last
        source = np.where(inside, source, self.lane)
        values = np.broadcast_to(values, (self.count,))[np.arange(self.count) - self.lane + source]
        self.write(target, values, "b32", active)
        if found:
            self.write(found, inside, "pred", active)

    def _ldmatrix_(self, i: Instruction, active: Array) -> None:
        """Load 8 x 8 matrices of 16-bit values. Lane 8 m + r has the address of row r of matrix m."""
        self._whole_warps(active)
        targets = _list(i.operands[0])
        for target, place in zip(targets, self._matrix_places(i, i.operands[1], len(targets), active), strict=True):
            values = np.zeros((self.count, 4), np.uint8)
            values[active] = self._load_shared(place, active)
            self.write(target, values.view(np.uint32)[:, 0], "b32", active)

    def _stmatrix_(self, i: Instruction, active: Array) -> None:
        self._whole_warps(active)
        sources = _list(i.operands[1])
        for source, place in zip(sources, self._matrix_places(i, i.operands[0], len(sources), active), strict=True):
            values = np.broadcast_to(self.read(source, "b32"), (self.count,))[active]
            self._store(self.shared, self.shadow, place, np.ascontiguousarray(values)[:, None].view(np.uint8), active)

    def _matrix_places(self, i: Instruction, operand: str, matrices: int, active: Array) -> list[Array]:
        """The addresses in shared memory of the two values of each matrix that a lane holds, [lanes, 4] bytes each."""
        if not i.has("m8n8") or i.type != "b16":
            raise PTXError("not modelled")
        address = self._address(operand)
        first = np.arange(self.count) - self.lane
        major, minor = self.lane // 4, self.lane % 4 * 2
        places = []
        for matrix in range(matrices):
            self._shared_places(
                address, 16, active & (self.lane // 8 == matrix)
            )  # check whole rows in the lanes that have their addresses
            halves = []
            for half in range(2):
                row, col = (minor + half, major) if i.has("trans") else (major, minor + half)
                halves.append(address[first + 8 * matrix + row] + 2 * col)
            places.append(np.concatenate([self._shared_places(half, 2, active) for half in halves], axis=1))
        return places

    # --- memory ---

    def _address(self, operand: str) -> Array:
        """``[register or symbol + offset]``"""
        base, _, offset = operand.strip("[] ").partition("+")
        base = base.strip()
        kind = f"u{self.program.width(base)}" if base in self.registers else "u64"
        address = self.read(base, kind).astype(np.int64) + int(offset or 0)
        return np.broadcast_to(address, (self.count,))

    def _aligned(self, address: Array, size: int) -> None:
        if (address % size).any():
            raise PTXError(f"{size} bytes at an address that is not aligned to them")

    def _race(self, race: bool) -> None:
        if race:
            raise PTXError("a race")

    def _load_shared(self, place: Array, active: Array) -> Array:
        if (self.shadow.writer[place] < 0).any():
            raise PTXError("reads shared memory that nobody wrote")
        self._race(self.shadow.note_load(place, np.flatnonzero(active), self.now))
        return self.shared[place]

    def _shared_places(self, address: Array, size: int, active: Array) -> Array:
        """Bytes of ``self.shared``, [active threads, size]."""
        near = address[active]
        if ((near < 0) | (near + size > self.shared_size)).any():
            raise PTXError(f"outside the {self.shared_size} bytes of shared memory")
        self._aligned(near, size)
        places: Array = (near + self.now.block[active] * self.shared_size)[:, None] + np.arange(size)
        return places

    def _global_places(self, address: Array, size: int, active: Array) -> list[tuple[Buffer, Array, Array]]:
        """The buffers that threads access, with these threads and their bytes [threads, size]."""
        found, left = [], active.copy()
        for buffer in self.buffers:
            inside = left & (address >= buffer.address) & (address + size <= buffer.address + buffer.data.size)
            if inside.any():
                found.append((buffer, inside, (address[inside] - buffer.address)[:, None] + np.arange(size)))
                left &= ~inside
        if left.any():
            spans = ", ".join(f"{b.name} [{b.address:#x}, {b.address + b.data.size:#x})" for b in self.buffers)
            outside = int(address[left][0])
            raise PTXError(f"{left.sum()} threads leave the buffers, one at {outside:#x}; buffers: {spans}")
        self._aligned(address[active], size)
        return found

    def _count(self, kind: str, address: Array, size: int, active: Array) -> None:
        # Aligned accesses of one size are equal or disjoint, so distinct addresses are distinct bytes.
        traffic = self.traffic.setdefault(self.at, Traffic(kind, size))
        warp = self.now.warp[active] << 48
        _, counts = np.unique(np.unique(warp | address[active]) >> 48, return_counts=True)
        traffic.requests += counts.size
        traffic.sectors += np.unique(warp | address[active] // SECTOR).size
        traffic.ideal += int((-(-counts * size // SECTOR)).sum())
        traffic.touched.append(np.unique(self.now.block[active] << 48 | address[active]))

    def _store(self, memory: Array, shadow: Shadow, place: Array, data: Array, active: Array) -> None:
        race = shadow.note_store(place, np.flatnonzero(active), self.now, memory[place] != data)
        memory[place] = data
        self._race(race or bool((memory[place] != data).any()))  # two threads, one byte, two values

    def _ld_(self, i: Instruction, active: Array) -> None:
        targets, each = _list(i.operands[0]), _bits(i.type) // 8
        size = each * len(targets)
        data = np.zeros((self.count, size), np.uint8)
        if i.has("param"):
            name, _, offset = i.operands[1].strip("[] ").partition("+")
            start = int(offset or 0)
            data[:] = np.frombuffer(self.params[name.strip()][start : start + size], np.uint8)
        elif i.has("shared"):
            data[active] = self._load_shared(self._shared_places(self._address(i.operands[1]), size, active), active)
        elif i.has("global"):
            address = self._address(i.operands[1])
            for buffer, inside, place in self._global_places(address, size, active):
                data[inside] = buffer.data[place]
                self._race(bool(buffer.shadow.unordered(place, np.flatnonzero(inside)[:, None], self.now).any()))
            self._count("ld", address, size, active)
        else:
            raise PTXError("not modelled")
        for n, target in enumerate(targets):
            raw = np.ascontiguousarray(data[:, n * each : (n + 1) * each]).view(UNSIGNED[8 * each])[:, 0]
            self.write(target, _as_type(raw, i.type), i.type, active)

    def _st_(self, i: Instruction, active: Array) -> None:
        values = [np.broadcast_to(_as_bits(self.read(x, i.type), i.type), (self.count,)) for x in _list(i.operands[1])]
        data = np.stack([np.ascontiguousarray(x) for x in values], axis=1).view(np.uint8)  # [threads, bytes]
        address = self._address(i.operands[0])
        if i.has("shared"):
            place = self._shared_places(address, data.shape[1], active)
            self._store(self.shared, self.shadow, place, data[active], active)
        elif i.has("global"):
            for buffer, inside, place in self._global_places(address, data.shape[1], active):
                self._store(buffer.data, buffer.shadow, place, data[inside], inside)
            self._count("st", address, data.shape[1], active)
        else:
            raise PTXError("not modelled")

    def _atom_(self, i: Instruction, active: Array) -> None:
        """Sequential additions. Each releases the accesses of its block before the last barrier, and those it saw."""
        if not i.has("global") or set(i.modifiers) - {"global"} != {"gpu", "acq_rel", "add", "u32"}:
            raise PTXError("not modelled")
        address, old = self._address(i.operands[1]), np.zeros(self.count, np.uint32)
        values = np.broadcast_to(self.read(i.operands[2], "u32"), (self.count,))
        for thread in np.flatnonzero(active):
            ((buffer, _, place),) = self._global_places(address, 4, np.arange(self.count) == thread)
            block, first = self.now.block[thread], int(address[thread])
            if first not in self.released:
                self._race(bool(buffer.shadow.unordered(place, np.array([[thread]]), self.now).any()))
                self.released[first] = np.zeros(self.blocks, np.int32)
            word = buffer.data[place[0]].view(np.uint32)
            old[thread] = word[0]
            buffer.data[place[0]] = (word + values[thread]).view(np.uint8)
            buffer.shadow.writer[place], buffer.shadow.written[place] = thread, self.now.warp_epoch[thread]
            seen = np.maximum(self.released[first], self.now.sees[block])
            self.acquired[block] = np.maximum(self.acquired[block], seen)
            seen[block] = self.now.block_epoch[thread]
            self.released[first] = seen
        self.write(i.operands[0], old, "u32", active)


def _list(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]
