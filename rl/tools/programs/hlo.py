"""The work of a compiled program, read from its HLO text: FLOPs, bytes of memory traffic, collectives.

In: the optimised HLO of one device (`jax.stages.Compiled.as_text()`). Out: `Work`, in which the body of a loop counts
as often as it runs. XLA's own cost analysis counts it once. A loop's number of rounds is read from its condition. Loops
whose length is a number of the input are named with `jax.named_scope`, and the caller says how often they run.

FLOPs are those of matrix products (dot, and convolution, into which XLA for TPU turns them), two for each multiply-add.
Bytes are reads and writes of instructions outside of fusions, in the device's main memory (memory space 0).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing: names for parts of other values, control flow, the ends of asynchronous ones.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "call",
        "conditional",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "optimization-barrier",
        "iota",
        "domain",
        "async-update",
        "async-done",
    ]
)
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_ARRAY = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|(?:true|false)_computation|branch_computations|to_apply)=(\{[^}]*\}|%?[\w.\-]+)")
# The TPU compiler's form of the part of a collective that crosses the network between slices.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_COPIES = ("copy", "bitcast", "convert", "copy-done", "copy-start")  # the same number elsewhere
_BEGIN = 'custom_call_target="AsyncCollectiveStart"'  # begins a collective that others continue (TPU)
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind: how often they run, and the bytes that a device receives."""

    count: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in one run of a program. `unknown_loops`: loops that count once because their length is
    unknown.
    """

    flops: int
    num_bytes: int
    collectives: Mapping[str, Collective]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


def work_of(hlo: str, rounds: Mapping[str, int]) -> Work:
    """Sums over a whole program.

    Args:
      rounds: {named scope: how often its loops run}.
    """
    return _Reader(_parse(hlo), rounds).entry()


def array_bytes(text: str, main_memory_only: bool = False) -> int:
    """Bytes of an HLO shape such as `(f32[2,3], bf16[4])`; with `main_memory_only`, only of arrays in main memory."""
    total = 0
    for kind, dims, layout in _ARRAY.findall(text):
        if main_memory_only and re.search(r"S\([1-9]", layout or ""):
            continue
        total += math.ceil(_bits(kind) * math.prod(_sizes(dims)) / 8)
    return total


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    number = re.search(r"[0-9]+", kind)
    return int(number.group()) if number else 0


def _sizes(dims: str) -> list[int]:
    return [int(size.lstrip("<=")) for size in dims.split(",") if size]


def _parse(hlo: str) -> dict[str, list[_Instruction]]:
    """Computations by name; the entry is also called "ENTRY"."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] | None = None
    for line in hlo.splitlines():
        if current is None:
            if start := _COMPUTATION.match(line):
                current = computations[start[2]] = []
                if start[1]:
                    computations["ENTRY"] = current
        elif _END.match(line):
            current = None
        elif found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            inside, rest = _closing(found[5])
            operands = tuple(re.findall(r"%([\w.\-]+)", inside)) if found[4] != "constant" else (inside,)
            if found[4] == "parameter":
                operands = (inside,)
            current.append(_Instruction(found[2], found[4], found[3], operands, rest, bool(found[1])))
        elif current:  # a kernel's own description has several lines
            current[-1] = dataclasses.replace(current[-1], attributes=current[-1].attributes + line)
    return computations


def _closing(text: str) -> tuple[str, str]:
    """(text before, text after) the parenthesis that closes the one already open."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


class _Reader:
    def __init__(self, computations: dict[str, list[_Instruction]], rounds: Mapping[str, int]) -> None:
        self._computations, self._rounds = computations, rounds
        self._shapes = {c: {i.name: i.result for i in body} for c, body in computations.items()}
        self._by_name = {c: {i.name: i for i in body} for c, body in computations.items()}
        begun = [c for c, body in computations.items() if any(_BEGIN in i.attributes for i in body)]
        self._begun_in: dict[str | None, str] = {
            channel: c for c in begun for i in computations[c] if (channel := _channel(i))
        }
        self._of = functools.cache(self._sum)

    def entry(self) -> Work:
        return self._of("ENTRY")

    def _sum(self, computation: str) -> Work:
        total = Work(0, 0, {}, 0)
        for instruction in self._computations[computation]:
            total = _added(total, self._one(computation, instruction))
        return total

    def _one(self, computation: str, instruction: _Instruction) -> Work:
        shapes, opcode = self._shapes[computation], instruction.opcode
        called = [
            name for group in _CALLED.findall(instruction.attributes) for name in re.findall(r"%?([\w.\-]+)", group)
        ]
        called = [name for name in called if name in self._computations]
        kind = opcode.removesuffix("-start")
        if opcode == "while":
            times, unknown = self._times(computation, instruction)
            work = _times(self._of(_named(instruction.attributes, "body")), times)
            return dataclasses.replace(work, unknown_loops=work.unknown_loops + unknown)
        if opcode in ("call", "async-start", "fusion") or (opcode == "custom-call" and called):
            inner = _added(*[self._of(name) for name in called], Work(0, 0, {}, 0))
            if opcode in ("call", "async-start"):
                return inner
            return dataclasses.replace(inner, num_bytes=self._fusion_bytes(computation, instruction, called))
        if opcode == "conditional":
            return max((self._of(name) for name in called), key=lambda w: (w.flops, w.num_bytes))
        flops = self._flops(shapes, instruction)
        if opcode == "recv" and (transfer := _BETWEEN_SLICES.search(instruction.attributes)):
            size = array_bytes(_parts(instruction.result)[0])
            name = f"{transfer[1].lower().replace('_', '-')} between slices"
            return Work(0, self._touched(shapes, instruction), {name: Collective(1, size)}, 0)
        if self._goes_on(computation, instruction):
            return Work(0, 0, {}, 0)
        if kind in COLLECTIVES:
            size = array_bytes(_last_part(instruction.result) if opcode.endswith("-start") else instruction.result)
            moved = self._touched(shapes, instruction)
            return Work(0, moved, {kind: Collective(1, size)}, 0)
        if opcode in _FREE or opcode.endswith("-done"):
            return Work(0, 0, {}, 0)
        return Work(flops, self._touched(shapes, instruction), {}, 0)

    def _touched(self, shapes: Mapping[str, str], instruction: _Instruction) -> int:
        """Bytes of main memory that an instruction outside of a fusion reads and writes."""
        operands = [shapes.get(name, "") for name in instruction.operands]
        size = functools.partial(array_bytes, main_memory_only=True)
        if instruction.opcode == "copy-start":
            parts = _parts(instruction.result)
            return sum(size(part) for part in parts[:2])
        is_start = instruction.opcode.endswith("-start")
        if is_start or instruction.opcode in ("dynamic-slice", "slice", "gather"):
            result = _last_part(instruction.result) if is_start else instruction.result
            read = array_bytes(result) if any(size(operand) for operand in operands) else 0
            return read + size(result)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * size(operands[1])
        return size(instruction.result) + sum(size(operand) for operand in operands)

    def _fusion_bytes(self, computation: str, instruction: _Instruction, called: list[str]) -> int:
        """Bytes of a fusion's operands and results. Where it slices an array, or updates it in place, only that part
        counts.
        """
        body = self._computations[called[0]]
        inner, total = self._shapes[called[0]], 0
        size = functools.partial(array_bytes, main_memory_only=True)
        roots = [i for i in body if i.is_root]
        written = {name for root in roots for name in (root.operands if root.opcode == "tuple" else (root.name,))}
        updates = [i for i in body if i.opcode == "dynamic-update-slice"]
        in_place = {i.operands[0] for i in updates}
        passing = self._passing(called[0])
        for parameter in (i for i in body if i.opcode == "parameter"):
            number = int(parameter.operands[0])
            if number >= len(instruction.operands) or number in passing:
                continue
            operand = self._shapes[computation].get(instruction.operands[number], parameter.result)
            if not size(operand):
                continue
            users = [i for i in body if parameter.name in i.operands]
            if users and all(i.opcode in ("dynamic-slice", "slice", "gather") for i in users):
                total += min(size(operand), sum(array_bytes(i.result) for i in users))
            elif not (users and parameter.name in in_place and len(users) == 1):
                total += size(operand)
        aliases = re.findall(r"\{(\d*)\}: \((\d+),", instruction.attributes)
        begins = called[0] in self._begun_in.values()
        given_on = {int(result or 0) for result, operand in aliases if begins or int(operand) in passing}
        results = [part for place, part in enumerate(_parts(instruction.result)) if place not in given_on]
        if updates and any(i.name in written for i in updates):
            shrunk = sum(array_bytes(inner.get(i.operands[1], "")) for i in updates if i.name in written)
            return total + 2 * min(shrunk, sum(size(part) for part in results))
        return total + sum(size(part) for part in results)

    def _goes_on(self, computation: str, instruction: _Instruction) -> bool:
        """Whether this is a later part of a collective. XLA for TPU spreads a collective over the fusions that compute
        meanwhile. Each of them holds the instruction again, with the channel of the first.
        """
        return self._begun_in.get(_channel(instruction), computation) != computation

    def _passing(self, computation: str) -> set[int]:
        """Parameters of a fusion that only a continued collective reads. Its bytes count at its begin."""
        body = self._computations[computation]
        parts = {i.name for i in body if self._goes_on(computation, i)}
        if not parts:
            return set()
        ends = parts | {i.name for i in body if i.is_root and i.opcode in ("tuple", "custom-call")}
        passing = set()
        for parameter in (i for i in body if i.opcode == "parameter"):
            if {i.name for i in body if parameter.name in i.operands} <= ends:
                passing.add(int(parameter.operands[0]))
        return passing

    def _flops(self, shapes: Mapping[str, str], instruction: _Instruction) -> int:
        if instruction.opcode == "dot":
            contracted = _sizes(_dims(instruction.attributes, "lhs_contracting_dims"))
            left = _sizes(_ARRAY.findall(shapes[instruction.operands[0]])[0][1])
            out = _sizes(_ARRAY.findall(instruction.result)[0][1])
            return 2 * math.prod(out) * math.prod(left[dim] for dim in contracted)
        if instruction.opcode == "custom-call":  # a kernel, which may state its cost
            stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?([0-9]+)', instruction.attributes)
            return int(stated[1]) if stated else 0
        if instruction.opcode == "convolution":
            left, right = (_sizes(_ARRAY.findall(shapes[name])[0][1]) for name in instruction.operands[:2])
            return _convolution_flops(left, right, _sizes(_ARRAY.findall(instruction.result)[0][1]), instruction)
        return 0

    def _times(self, computation: str, loop: _Instruction) -> tuple[int, int]:
        """(rounds of a loop, 1 if one round is a guess, else 0)."""
        known = re.search(r'known_trip_count[^0-9]*"?n"?[^0-9]*([0-9]+)', loop.attributes)
        if known:
            return int(known[1]), 0
        scope = re.search(r'op_name="([^"]*)"', loop.attributes)
        path = scope[1].split("/") if scope else []
        # The scope inside the names of the transformations that it was traced in: transpose(jvp(scope)).
        name = re.sub(r"^(\w+\()+(.*?)\)+$", r"\2", path[-2]) if len(path) >= 2 and path[-1] == "while" else ""
        if name in self._rounds:
            return self._rounds[name], 0
        counted = self._counted_rounds(computation, loop)
        return (1, 1) if counted is None else (counted, 0)

    def _counted_rounds(self, computation: str, loop: _Instruction) -> int | None:
        """Rounds of a loop that counts from one constant to another; None for any other loop. The step need not be 1:
        where XLA for TPU splits a product to overlap it with communication, one round does the work of two.
        """
        condition, body = _named(loop.attributes, "condition"), _named(loop.attributes, "body")
        compare = self._root(condition)
        if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (self._source(condition, name) for name in compare.operands)
        place = _place(counter)
        if place is None:
            return None
        start = self._part(computation, self._source(computation, loop.operands[0]), place)
        following = self._part(body, self._root(body), place)
        if following is None or following.opcode != "add":
            return None
        added = sorted((self._source(body, name) for name in following.operands), key=lambda i: _place(i) != place)
        begin, end, step = (_constant(number) for number in (start, limit, added[1]))
        if _place(added[0]) != place or begin is None or end is None or not step:
            return None
        return len(range(begin, end, step))

    def _part(self, computation: str, made: _Instruction | None, place: int) -> _Instruction | None:
        """The instruction at a place of a tuple."""
        return self._source(computation, made.operands[place]) if made and made.opcode == "tuple" else None

    def _root(self, computation: str) -> _Instruction | None:
        return next((i for i in self._computations.get(computation, ()) if i.is_root), None)

    def _source(self, computation: str, name: str) -> _Instruction | None:
        """The instruction that made a value, behind copies of it."""
        found = self._by_name[computation].get(name)
        while found is not None and found.opcode in _COPIES:
            found = self._by_name[computation].get(found.operands[0])
        return found


def _convolution_flops(left: list[int], right: list[int], out: list[int], instruction: _Instruction) -> int:
    """Two FLOPs for each product with an input that exists; padding and dilation holes cost nothing."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    assert labels is not None, instruction.attributes
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(pair.split("=") for pair in window[1].split()) if window else {}
    num_spatial = sum(letter.isdigit() for letter in labels[1])
    sizes = [int(x) for x in settings.get("size", "x".join("1" * num_spatial)).split("x")] if num_spatial else []

    def each(name: str, default: str) -> list[str]:
        return settings[name].split("x") if name in settings else [default] * num_spatial

    products = 1
    for dim in range(num_spatial):
        stride, low = int(each("stride", "1")[dim]), int(each("pad", "0_0")[dim].split("_")[0])
        left_hole, right_hole = int(each("lhs_dilate", "1")[dim]), int(each("rhs_dilate", "1")[dim])
        num_in = left[labels[1].index(str(dim))]
        num_out = out[labels[3].index(str(dim))]
        valid = 0
        for k in range(sizes[dim]):
            for o in range(num_out):
                place = o * stride - low + k * right_hole
                valid += 0 <= place < (num_in - 1) * left_hole + 1 and place % left_hole == 0
        products *= valid
    groups = re.search(r"batch_group_count=([0-9]+)", instruction.attributes)
    batch = out[labels[3].index("b")] if not groups else left[labels[1].index("b")] // int(groups[1])
    return 2 * products * batch * right[labels[2].index("i")] * out[labels[3].index("f")]


def _added(*works: Work) -> Work:
    collectives: dict[str, Collective] = {}
    for work in works:
        for kind, other in work.collectives.items():
            sofar = collectives.get(kind, Collective(0, 0))
            collectives[kind] = Collective(sofar.count + other.count, sofar.num_bytes + other.num_bytes)
    return Work(
        sum(w.flops for w in works), sum(w.num_bytes for w in works), collectives, sum(w.unknown_loops for w in works)
    )


def _times(work: Work, times: int) -> Work:
    collectives = {k: Collective(times * c.count, times * c.num_bytes) for k, c in work.collectives.items()}
    return Work(times * work.flops, times * work.num_bytes, collectives, work.unknown_loops)


def _channel(instruction: _Instruction) -> str | None:
    """The channel, which the parts of one collective have in common."""
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes) if instruction.opcode in COLLECTIVES else None
    return found[1] if found else None


def _constant(instruction: _Instruction | None) -> int | None:
    """The value of an instruction that is a whole constant; None for any other."""
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.operands[0]):
        return None
    return int(instruction.operands[0])


def _named(attributes: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", attributes)
    assert found is not None, attributes
    return found[1]


def _place(instruction: _Instruction | None) -> int | None:
    """The index of the part that an instruction takes from a tuple; None if it takes none."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.findall(r"\bindex=(\d+)", instruction.attributes)[0])


def _dims(attributes: str, name: str) -> str:
    found = re.search(rf"\b{name}=\{{([0-9,]*)\}}", attributes)
    return found[1] if found else ""


def _parts(result: str) -> list[str]:
    """The arrays of a result, each as text."""
    return [found.group() for found in _ARRAY.finditer(result)]


def _last_part(result: str) -> str:
    """The result of an asynchronous instruction: in (operands, results, contexts), the largest array after
    the first.
    """
    parts = _parts(result)
    return max(parts[1:] or parts, key=array_bytes)
