"""Products of a few rows, a decoding step's, with all experts of a layer. float32, compiled by numba.

A library lays a matrix out anew before it multiplies, which pays where many rows share it. Here each thread reads its
part of the matrix as it lies, asks for what comes next while it multiplies, and keeps the inputs in its nearest cache
(`scripts/bench_few_rows.py` measures both): a large one once; a small one, of which a library's call costs more than
its work, once for every MOST_ROWS rows. What a row becomes does not depend on how many there are beside it, but differs
from the library's by the order of sums.

The inner loops are written as LLVM's code, since its own choice keeps fewer sums in registers and reads more. There an
address is an integer, of float32 numbers, and the vectors are as long as this processor's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from torch import Tensor

from pipeline.engine.inside.cpu.inlined import exp, intrinsic, look, take
from pipeline.engine.inside.cpu.together import together

MOST_ROWS = 48
"""Of a large matrix; for more the library is as fast."""

_MOST_OF_SMALL = 4 * MOST_ROWS  # rows of a small one, the same
_LARGE = 2**18  # numbers of a matrix; a smaller one stays in a cache, and can be read again for every MOST_ROWS rows
_GROUP = 16  # rows of a matrix whose sums are made together
_BLOCK = 192  # numbers of a row that are multiplied at a time
_AHEAD = 4  # pairs of rows by which a block is asked for before its turn
_LINE = 16  # numbers of a line of memory
_PART = 2**16  # numbers of a matrix that a thread takes at a time
_LAST = 1  # parts

# Numbers of a vector, and rows of the input whose sums are kept at once, so that they fill three quarters of the
# registers; and rows of the matrix, which share what is loaded of the input.
_LANES, _TILE = (16, 12) if binding.get_host_cpu_features().get("avx512f") else (8, 6)
_OUTS = 2

_INT, _NUMBER = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_NUMBER, _LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * _LANES)


def _pointer(builder: Any, address: Any, index: Any = 0) -> Any:
    index = _INT(index) if isinstance(index, int) else index
    return builder.gep(builder.inttoptr(address, _NUMBER.as_pointer()), [index])


def _load(builder: Any, address: Any, index: Any = 0) -> Any:
    value = builder.load(builder.bitcast(_pointer(builder, address, index), _VECTOR.as_pointer()))
    value.align = 4
    return value


def _store(builder: Any, value: Any, address: Any, index: Any = 0) -> None:
    builder.store(value, builder.bitcast(_pointer(builder, address, index), _VECTOR.as_pointer())).align = 4


def _prefetch(builder: Any, address: Any, index: Any) -> None:
    """Ask for a line of memory: to read, in the nearest cache, data."""
    number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    place = builder.bitcast(_pointer(builder, address, index), byte)
    builder.call(function, [place, number(0), number(3), number(1)])


def _multiply_add(builder: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")


@intrinsic
def _add_products(
    typing: Any, rows: Any, sums: Any, x: Any, weight: Any, stride: Any, width: Any, ahead: Any, fresh: Any
) -> Any:
    """To sums[o, r] add weight[o] x[r], a vector's lanes each by itself.

    sums: [_OUTS, rows, _LANES], rows up to _TILE. x: [width / _LANES, rows, _LANES]. weight: [_OUTS, width], a row
    `stride` numbers behind the other. width: a multiple of _LANES, above 0. ahead: the weight that comes next, asked
    for while this one is multiplied; 0: none. fresh: not 0 where sums start from zero, whatever is there.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, *others = arguments
        end = builder.append_basic_block()
        switch = builder.switch(rows, end)
        for number in range(1, _TILE + 1):
            block = builder.append_basic_block()
            switch.add_case(_INT(number), block)
            builder.position_at_end(block)
            _of_rows(number, builder, *others)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def _of_rows(
    rows: int, builder: Any, sums: Any, x: Any, weight: Any, stride: Any, width: Any, ahead: Any, fresh: Any
) -> None:
    before, known, start = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("!=", fresh, _INT(0)), start, known)
    builder.position_at_end(known)
    there = [_load(builder, sums, _LANES * i) for i in range(_OUTS * rows)]
    builder.branch(start)
    builder.position_at_end(start)
    held = [_either(builder, (_ZERO, before), (value, known)) for value in there]
    asking, silent, done = (builder.append_basic_block() for _ in range(3))
    builder.cbranch(builder.icmp_signed("!=", ahead, _INT(0)), asking, silent)
    ends = []
    for body, asks in ((asking, True), (silent, False)):  # a loop of its own where nothing is asked for
        builder.position_at_end(body)
        k, at, *totals = (_either(builder, (value, start)) for value in (_INT(0), _INT(0), *held))
        places = [builder.add(k, builder.mul(stride, _INT(out))) for out in range(_OUTS)]
        factors = [_load(builder, weight, place) for place in places]
        if asks:
            for place in places:
                _prefetch(builder, ahead, place)
        added = [_ZERO] * len(totals)
        for r in range(rows):  # each input is used up before the next is loaded: registers are few
            value = _load(builder, x, builder.add(at, _INT(_LANES * r)))
            for i, factor in zip(range(r, len(totals), rows), factors, strict=True):
                added[i] = builder.call(_multiply_add(builder), [factor, value, totals[i]])
        following = [builder.add(k, _INT(_LANES)), builder.add(at, _INT(_LANES * rows)), *added]
        for value, new in zip((k, at, *totals), following, strict=True):
            value.add_incoming(new, body)
        builder.cbranch(builder.icmp_signed("<", following[0], width), body, done)
        ends.append([(value, body) for value in added])
    builder.position_at_end(done)
    for i, value in enumerate([_either(builder, *pair) for pair in zip(*ends, strict=True)]):
        _store(builder, value, sums, _LANES * i)


def _either(builder: Any, *values: tuple[Any, Any]) -> Any:
    """A value by the block that the processor comes from."""
    phi = builder.phi(values[0][0].type)
    for value, block in values:
        phi.add_incoming(value, block)
    return phi


@intrinsic
def _add_lanes(typing: Any, sums: Any, of_pair: Any, of_out: Any, output: Any) -> Any:
    """output[i] = the sum of the lanes of a vector, for _LANES vectors: _OUTS of them `of_out` numbers apart, and as
    many again `of_pair` numbers further."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, of_pair, of_out, output = arguments

        def place(i: int) -> Any:
            return builder.add(builder.mul(of_pair, _INT(i // _OUTS)), builder.mul(of_out, _INT(i % _OUTS)))

        vectors = [_load(builder, sums, place(i)) for i in range(_LANES)]
        length = _LANES  # of the stretch of a vector that belongs to one sum
        while len(vectors) > 1:
            first = [i for i in range(2 * _LANES) if i % length < length // 2]
            second = [i + length // 2 for i in first]
            halves = [ir.Constant(ir.VectorType(ir.IntType(32), _LANES), half) for half in (first, second)]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [builder.fadd(*(builder.shuffle_vector(*pair, half) for half in halves)) for pair in pairs]
            length //= 2
        _store(builder, vectors[0], output)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _move(typing: Any, origin: Any, target: Any) -> Any:
    """A vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        origin, target = arguments
        _store(builder, _load(builder, origin), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@njit("f4[::1](i8)", nogil=True, cache=True)
def _lines(numbers):
    """Of memory, from the beginning of one."""
    array = np.empty(numbers + _LINE, np.float32)
    return array[-(array.ctypes.data // 4) % _LINE :]


@njit("void(f4[:,::1], i8[::1], i8, f4[::1])", nogil=True, cache=True)
def _pack(x, rows, height, packed):
    """packed: [blocks, tiles, block / LANES, height, LANES], of x[rows], and zeros where a tile has no row."""
    inner, at = x.shape[1], 0
    to_x, to_packed = x.ctypes.data, packed.ctypes.data
    for begin in range(0, inner, _BLOCK):
        for tile in range(0, len(rows), height):
            for k in range(begin, min(inner, begin + _BLOCK), _LANES):
                for i in range(tile, tile + height):
                    if i < len(rows):
                        _move(to_x + 4 * (rows[i] * inner + k), to_packed + 4 * at)
                    else:
                        packed[at : at + _LANES] = 0
                    at += _LANES


# A division by zero is infinite and not an error, so that the loop has no branch.
@njit("void(f4[:,::1], f4[:,::1])", nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _silu_and_multiply(gate_up, output):
    """output = gate / (1 + exp(-gate)) up. gate_up: [rows, 2 inner]. output: [rows, inner]."""
    inner = output.shape[1]
    for i in range(output.shape[0]):
        gate, up, out = gate_up[i, :inner], gate_up[i, inner:], output[i]
        for j in range(inner):
            out[j] = gate[j] / (np.float32(1) + exp(-gate[j])) * up[j]


@njit("UniTuple(i8[::1], 2)(i8[::1], i8)", cache=True)
def _spans(starts, most):
    """`spans` and `of` of `_products` where an expert's rows are those from its start to the next expert's: MOST_ROWS
    at a time, or all at once where they are more than `most`, and so the library's."""
    spans, of = [starts[0]], [0]
    for e in range(len(starts) - 1):
        count = starts[e + 1] - starts[e]
        step = MOST_ROWS if count <= most else count
        for start in range(starts[e], starts[e + 1], step):
            spans.append(min(start + step, starts[e + 1]))
            of.append(e)
    return np.array(spans), np.array(of)[1:]


_PRODUCTS = "void(f4[:,::1], i8[::1], f4[:,:,::1], i8[::1], i8[::1], f4[:,::1], i8[::1], b1, b1)"


@njit(_PRODUCTS, nogil=True, cache=True)
def _products(x, rows, weight, spans, of, output, counters, leads, waits):
    """output[i] = weight[of[s]] x[rows[i]] where spans[s] <= i < spans[s + 1], of spans s of MOST_ROWS rows or fewer.
    Where x is twice as wide as that takes: of `_silu_and_multiply` of x[i].

    counters: [2] zeros, shared by threads, which take parts of the weights by turns. leads: this thread does the last
    by itself, so that the others are gone, and have had Python's lock, when it wants that. waits: until all is done.
    """
    outs, inner = weight.shape[1:]
    gated = x.shape[1] == 2 * inner
    sums, packed = _lines(_GROUP * (MOST_ROWS + _TILE) * _LANES), _lines((MOST_ROWS + _TILE) * inner)
    held = np.empty((MOST_ROWS if gated else 0, inner), np.float32)
    each = np.arange(MOST_ROWS)
    to_sums, to_x, to_weight, to_output = sums.ctypes.data, packed.ctypes.data, weight.ctypes.data, output.ctypes.data
    to_next, to_done = counters.ctypes.data, counters.ctypes.data + 8
    pairs = _GROUP // _OUTS
    part = max(1, _PART // (_GROUP * inner)) * _GROUP
    parts = (outs + part - 1) // part
    total = len(of) * parts
    packed_of, height, tiles, count = -1, 0, 0, 0
    mine = max(0, total - _LAST)
    shared = mine
    number = take(to_next)
    while True:
        if number >= shared:
            if not leads or mine >= total:
                break
            number, mine = mine, mine + 1
        following = min(take(to_next), mine)  # known before it is begun, so that its weights can be asked for
        after = 0
        if following < total:
            after = to_weight + 4 * (of[following // parts] * outs + following % parts * part) * inner
        span, first = number // parts, number % parts * part
        start, own, last = spans[span], to_weight + 4 * of[span] * outs * inner, min(outs, first + part)
        if span != packed_of:
            packed_of, count = span, spans[span + 1] - start
            if count > MOST_ROWS:
                count = 0  # the library's
            tiles = (count + _TILE - 1) // _TILE
            height = (count + tiles - 1) // max(1, tiles)
            if count and gated:
                _silu_and_multiply(x[start : start + count], held[:count])
                _pack(held, each[:count], height, packed)
            elif count:
                _pack(x, rows[start : start + count], height, packed)
        size = _OUTS * height * _LANES
        for n in range(first, last if count else first, _GROUP):
            for k in range(0, inner, _BLOCK):
                width = min(_BLOCK, inner - k)
                for pair in range(pairs):
                    next_n, next_k, next_pair = n, k, pair + _AHEAD
                    if next_pair >= pairs:
                        next_pair -= pairs
                        next_k += _BLOCK
                        if next_k >= inner:
                            next_k = 0
                            next_n += _GROUP
                    ahead = own + 4 * ((next_n + _OUTS * next_pair) * inner + next_k)
                    if next_n >= last:
                        ahead = after + 4 * _OUTS * next_pair * inner if after else 0
                    here = own + 4 * ((n + _OUTS * pair) * inner + k)
                    for tile in range(tiles):
                        sum_, x_ = (pair * tiles + tile) * size, height * (tiles * k + tile * width)
                        asks = ahead if tile == 0 else 0
                        _add_products(height, to_sums + 4 * sum_, to_x + 4 * x_, here, inner, width, asks, k == 0)
            for tile in range(tiles):
                for r in range(min(height, count - tile * height)):
                    i = start + tile * height + r
                    for o in range(0, _GROUP, _LANES):
                        place = to_sums + 4 * ((o // _OUTS * tiles + tile) * size + r * _LANES)
                        _add_lanes(place, tiles * size, height * _LANES, to_output + 4 * (i * outs + n + o))
        take(to_done)
        number = following
    while waits and look(to_done) < total:  # a moment
        pass
    sums[0] = 0  # numba frees an array behind its last use, and an address is none


_OF_EXPERTS = (
    "void(f4[:,::1], i8[::1], f4[:,:,::1], f4[:,:,::1], i8[::1], i8[::1], f4[:,::1], f4[:,::1], i8[:,::1], b1)"
)


@njit(_OF_EXPERTS, nogil=True, cache=True)
def _gated_products(x, rows, gate_up, down, spans, of, between, output, counters, leads):
    _products(x, rows, gate_up, spans, of, between, counters[0], leads, True)
    _products(between, rows, down, spans, of, output, counters[1], leads, leads)


def most_rows(*weights: Tensor) -> int:
    """Of an expert that `experts` multiplies. weights: its matrices, each with those of the other experts,
    [experts, out, in]. 0: it does not fit them."""
    for weight in weights:
        outs, inner = weight.shape[1:]
        shaped = outs % _GROUP == 0 and inner % _GROUP == 0
        if not shaped or weight.dtype != torch.float32 or not weight.is_contiguous():
            return 0
    return MOST_ROWS if max(weight[0].numel() for weight in weights) >= _LARGE else _MOST_OF_SMALL


def experts(x: Tensor, rows: np.ndarray, gate_up: Tensor, down: Tensor, starts: np.ndarray, most: int) -> Tensor:
    """Of expert e, for i from starts[e] to starts[e + 1]: down[e] (silu(g) u), where [g, u] = gate_up[e] x[rows[i]].

    x: [tokens, hidden] float32. rows: [n] int64. gate_up: [experts, 2 inner, hidden]. down: [experts, hidden, inner].
    starts: [experts + 1] int64. most: `most_rows` of the weights; not 0. Returns [n, hidden], of experts with more rows
    whatever memory holds.
    """
    between, output = x.new_empty(len(rows), gate_up.shape[1]), x.new_empty(len(rows), x.shape[1])
    spans, of = _spans(starts, most)
    weights, counters = (gate_up.detach().numpy(), down.detach().numpy()), np.zeros((2, 2), np.int64)
    arrays = (x.contiguous().numpy(), rows, *weights, spans, of, between.numpy(), output.numpy(), counters)
    try:
        together(partial(_gated_products, *arrays))
    except BaseException:
        counters[:, 1] = 2**62  # so that nobody waits for this thread's part
        raise
    return output
