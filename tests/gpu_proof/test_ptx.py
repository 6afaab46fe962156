"""Our kernels in the PTX emulator: values, sectors, races and bounds; tests of the emulator; and mutation tests."""

import random
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
from gpu_proof import budget
from gpu_proof.ptx import Buffer, Instruction, Machine, Program, PTXError, per_block, per_request
from gpu_proof.ptx_cases import Case, masking_case, model_cases, triton_cases

TRITON = {case.name: case for case in triton_cases()}
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@lru_cache
def run_on_sm_90(name):
    """Run a Triton case, check its values, and return its launches."""
    return TRITON[name].check(90)


# --- values ---


@pytest.mark.parametrize("name", TRITON)
def test_triton_equals_the_reference(name):
    assert run_on_sm_90(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TRITON)
def test_triton_equals_the_reference_on_sm_80(name):
    assert TRITON[name].check(80)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_whole_image_equals_the_reference(dtype):
    for arch, case in product((80, 90), model_cases(dtype)):
        case.check(arch)


MASKING = [("128x2", 3, 196, 49), ("256x4", 2, 600, 150), ("512x8", 1, 2500, 625), ("rank", 2, 303, 75)]
MORE_MASKING = [
    *(("128x2", 2, length, length // 4) for length in (1, 2, 31, 129, 255, 256)),
    *(("256x4", 1, length, length) for length in (257, 1023, 1024)),
    *(("512x8", 1, length, 0) for length in (1025, 4095, 4096)),
    *(("rank", 1, length, 3) for length in (4, 256, 257, 512, 4097)),
]


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("instance", MASKING, ids=str)
def test_random_masking_equals_the_reference(instance, dtype):
    masking_case(*instance, dtype).check(90)


@needs_nvcc
@pytest.mark.exhaustive
def test_more_instances_of_random_masking_equal_the_reference():
    for arch, dtype, instance in product((80, 90), (torch.float32, torch.float64), MORE_MASKING):
        masking_case(*instance, dtype).check(arch)


@pytest.mark.parametrize("name", ["add_layer_norm backward width 40", "bias_gelu backward width 40"])
def test_sums_of_columns_wait_for_their_block_and_read_past_its_cache(name):
    """There is a barrier between the stores of a block and its count. Loads after a count bypass the L1 cache."""
    instructions = run_on_sm_90(name)[0].program.instructions
    counts = [n for n, i in enumerate(instructions) if i.opcode == "atom"]
    assert len(counts) == 2
    for count in counts:
        before = [i for i in instructions[:count] if i.opcode == "bar" or (i.opcode == "st" and i.has("global"))]
        assert before[-1].opcode == "bar"
    after = [i for i in instructions[counts[0] :] if i.opcode == "ld" and i.has("global")]
    assert after
    assert all(i.has("cg") for i in after)


# --- sectors ---

# 32-byte sectors relative to the minimum for the same bytes: per request, and with a cache that keeps all sectors of a
# block. A request is one instruction of one warp. If a thread loads 8 values of 4 bytes, each of its two 128-bit loads
# accesses every sector and uses half of it. The loss reads pixels in the order of its rows, [p, q, c], 4 bytes at a
# time.
LOADS = {
    "gather_patches fp32": (1.00, 1.00),
    "gather_patches fp32 to bf16": (1.97, 1.00),
    "gather_patches bf16": (1.00, 1.00),
    "gather_patches uint8": (12.20, 3.89),
    "gather_patches patch 14": (4.43, 1.26),
    "masked_loss": (5.43, 1.01),
    "masked_loss backward": (4.99, 1.06),
    "masked_loss uint8": (1.06, 1.14),
    "masked_loss uint8 backward": (1.08, 1.12),
    "masked_loss patch 14": (3.70, 1.30),
    "masked_loss patch 14 backward": (3.23, 1.10),
}


@pytest.mark.parametrize("name", LOADS)
def test_sectors_of_loads(name):
    """The counts equal the table. For float images and patches of 16 pixels, blocks load at most 10% extra sectors.

    Another Triton than that of the table loads no more sectors per block, but may divide them into other requests.
    """
    traffic = run_on_sm_90(name)[0].traffic
    found = per_request(traffic, "ld"), per_block(traffic, "ld")
    if triton.__version__ == budget.committed()["made_by"]["triton"]:
        assert found == pytest.approx(LOADS[name], abs=0.01)
    assert found[1] <= LOADS[name][1] + 0.01
    if "uint8" not in name and "patch 14" not in name:
        assert found[1] <= 1.1, f"{name}: {found}"


@pytest.mark.parametrize("name", ["gather_patches fp32", "gather_patches fp32 to bf16", "add_positions",
                                  "decoder_tokens", "decoder_tokens backward", "masked_loss backward"])  # fmt: skip
def test_rows_are_stored_in_whole_sectors(name):
    traffic = run_on_sm_90(name)[0].traffic
    assert per_request(traffic, "st") <= 1.1, f"{name}: {per_request(traffic, 'st')}"


# --- the emulator itself ---

MODULE = """.version 8.0
.target sm_80
.visible .entry kernel(.param .u64 kernel_param_0)
{{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
.shared .align 16 .b8 tile[512];
ld.param.u64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
{body}
ret;
}}
"""


def _emulate(body: str, threads: int = 64, blocks: int = 1) -> np.ndarray:
    """Run ``body`` with %rd1 pointing to 64 words of memory, which are returned, and the thread in %r1."""
    memory = np.zeros(256, np.uint8)
    params = [(1 << 20).to_bytes(8, "little")]
    Machine(Program(MODULE.format(body=body)), (blocks,), threads, params, [Buffer("words", 1 << 20, memory)]).run(9999)
    return memory.view(np.uint32)


OWN_WORD = "mad.wide.u32 %rd2, %r1, 4, %rd1; shl.b32 %r2, %r1, 2; mov.u32 %r3, tile; add.u32 %r3, %r3, %r2;"
TURNED = OWN_WORD + "xor.b32 %r4, %r3, {lanes}; st.shared.u32 [%r3], %r1; {between} ld.shared.u32 %r5, [%r4];"
TURNED += "st.global.u32 [%rd2], %r5;"
FAULTS = {
    "leave the buffers": "st.global.u32 [%rd1+256], %r1;",
    "leave the buffers, one at 0xffffc": "ld.global.u32 %r2, [%rd1+-4];",
    "not aligned": "ld.global.u32 %r2, [%rd1+2];",
    "outside the 512 bytes": "mov.u32 %r2, tile; st.shared.u32 [%r2+512], %r1;",
    "nobody wrote": "mov.u32 %r2, tile; ld.shared.u32 %r3, [%r2];",
    "was never written": "add.u32 %r2, %r1, %r3;",
    "not modelled": "nanosleep.u32 20;",
    "same barrier": "setp.lt.u32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0;\n$out:",
    "not all lanes": "setp.lt.u32 %p1, %r1, 16; @%p1 bra $out; bar.sync 0;\n$out:",
    "instructions": "\n$again: bra $again;",
    "race": "st.global.u32 [%rd1], %r1;",
    "a race": TURNED.format(lanes=128, between=""),
    ": a race": TURNED.format(lanes=128, between="bar.warp.sync -1;"),
    "ld.shared.u32 .*: a race": TURNED.format(lanes=4, between=""),
    "st.shared.u32 .*: a race": TURNED.format(lanes=128, between="bar.sync 0;") + "st.shared.u32 [%r3], %r5;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_errors(message):
    with pytest.raises(PTXError, match=message):
        _emulate(FAULTS[message])


@pytest.mark.parametrize(("lanes", "between"), [(128, "bar.sync 0;"), (4, "bar.sync 0;"), (4, "bar.warp.sync -1;")])
def test_barriers_order_what_is_before_and_after(lanes, between):
    threads = np.arange(64)
    assert (_emulate(TURNED.format(lanes=lanes, between=between)) == threads ^ (lanes // 4)).all()


def test_a_barrier_orders_a_read_and_the_write_after_it():
    body = TURNED.format(lanes=128, between="bar.sync 0;") + "bar.sync 0; st.shared.u32 [%r3], %r5;"
    assert (_emulate(body) == np.arange(64) ^ 32).all()


READERS = {  # readers of one word, before its last reader writes it
    "at once": ("mov.pred %p1, -1;", "mov.pred %p2, 0;"),
    "of one warp": ("setp.eq.u32 %p1, %r1, 32;", "setp.eq.u32 %p2, %r1, 63;"),
    "of two warps": ("setp.eq.u32 %p1, %r1, 0;", "setp.eq.u32 %p2, %r1, 63;"),
}


@pytest.mark.parametrize("readers", READERS)
def test_every_reader_is_remembered(readers):
    body = "mov.u32 %r2, tile; setp.eq.u32 %p3, %r1, 63; @%p3 st.shared.u32 [%r2], %r1; bar.sync 0;"
    body += "".join(READERS[readers]) + "@%p1 ld.shared.u32 %r3, [%r2]; @%p2 ld.shared.u32 %r3, [%r2]; {}"
    body += "@%p3 st.shared.u32 [%r2], 7;"
    _emulate(body.format("bar.sync 0;"))
    for between in ("", "bar.warp.sync -1;") if readers != "of one warp" else ("",):
        with pytest.raises(PTXError, match="race"):
            _emulate(body.format(between))


def test_barriers_do_not_order_blocks():
    body = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r1, 0; setp.eq.and.u32 %p2, %r2, 0, %p1;"
    body += "setp.eq.and.u32 %p3, %r2, 1, %p1; @%p2 st.global.u32 [%rd1], 5; bar.sync 0; @%p3 st.global.u32 [%rd1], 6;"
    assert _emulate(body)[0] == 5
    with pytest.raises(PTXError, match="race"):
        _emulate(body, blocks=2)


MEET = "mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, 40; setp.eq.and.u32 %p2, %r2, 0, %p2;"
MEET += "@%p2 st.global.u32 [%rd1], 5; {before} mov.u32 %r3, %r2; {atomic} mov.u32 %r4, tile;"
MEET += "@%p1 st.shared.u32 [%r4], %r3; bar.sync 0; ld.shared.u32 %r3, [%r4];"
MEET += "setp.eq.u32 %p2, %r1, 40; setp.eq.and.u32 %p2, %r3, 1, %p2; @%p2 ld.global.u32 %r5, [%rd1]; @%p2 st.global.u32"
MEET += "[%rd1+8], %r5;"
ATOMIC = "@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%rd1+4], 1;"


def test_atomics_order_blocks():
    """A thread stores, its block increments a counter, and another thread of the block that counts last reads."""
    found = _emulate(MEET.format(before="bar.sync 0;", atomic=ATOMIC), blocks=2)
    assert found[:3].tolist() == [5, 2, 5]
    for without in ({"before": ""}, {"atomic": ""}):
        with pytest.raises(PTXError, match="a race"):
            _emulate(MEET.format(**{"before": "bar.sync 0;", "atomic": ATOMIC, **without}), blocks=2)


def test_other_atomics_are_not_modelled():
    for instruction in ("atom.global.gpu.relaxed.add.u32", "atom.global.gpu.acq_rel.add.f32"):
        with pytest.raises(PTXError, match="not modelled"):
            _emulate(f"{instruction} %r2, [%rd1], 1;", threads=32)
    with pytest.raises(PTXError, match="a race"):
        _emulate("st.global.u32 [%rd1], 0; mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 1; @%p1 bra $add; "
                 "bar.sync 0; st.global.u32 [%rd1+4], %r1; bra $out;\n$add: bar.sync 0; bar.sync 0; "
                 "atom.global.gpu.acq_rel.add.u32 %r2, [%rd1+4], 1;\n$out:", threads=32, blocks=2)  # fmt: skip


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_in_shared_memory(trans):
    """8 x 8 16-bit values, row by row in memory and in the lanes; with .trans, column by column in the lanes."""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    turned = matrix.T if trans else matrix
    pair = "shl.b32 %r6, %r1, 17; shl.b32 %r7, %r1, 1; or.b32 %r5, %r6, %r7; add.u32 %r5, %r5, 65536;"  # 2 T, 2 T + 1
    row = OWN_WORD + "and.b32 %r4, %r1, 7; shl.b32 %r4, %r4, 4; mov.u32 %r8, tile; add.u32 %r4, %r4, %r8;"
    load = f"st.shared.u32 [%r3], %r5; bar.sync 0; ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r5}}, [%r4];"
    store = f"stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r4], {{%r5}}; bar.sync 0; ld.shared.u32 %r5, [%r3];"
    for body in (load, store):
        found = _emulate(row + pair + body + "st.global.u32 [%rd2], %r5;", threads=32)[:32]
        assert (found == np.ascontiguousarray(turned).view(np.uint32).ravel()).all()


SHUFFLES = {
    "bfly.b32 %r5, %r1, 5, 31, -1": lambda lane: lane ^ 5,
    "up.b32 %r5, %r1, 3, 0, -1": lambda lane: lane - 3 if lane >= 3 else lane,
    "down.b32 %r5, %r1, 3, 31, -1": lambda lane: lane + 3 if lane < 29 else lane,
    "idx.b32 %r5, %r1, 9, 31, -1": lambda lane: 9,
    "up.b32 %r5, %r1, 3, 6144, -1": lambda lane: lane - 3 if lane % 8 >= 3 else lane,  # segments of 8 lanes
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles(shuffle):
    found = _emulate(OWN_WORD + f"shfl.sync.{shuffle}; st.global.u32 [%rd2], %r5;", threads=32)[:32]
    assert found.tolist() == [SHUFFLES[shuffle](lane) for lane in range(32)]


def test_diverged_threads_reconverge():
    body = OWN_WORD + "setp.lt.u32 %p1, %r1, 5; mov.u32 %r5, 7; @%p1 bra $out; mov.u32 %r5, 9;\n$out: bar.sync 0;"
    assert _emulate(body + "st.global.u32 [%rd2], %r5;").tolist() == [7] * 5 + [9] * 59


BITS = {  # one instruction with %r2, %r3, %r4 for inputs and %r5 for its result
    "mul.hi.s32 %r5, %r2, %r3": lambda a, b, c: _signed(a) * _signed(b) >> 32,
    "mul.hi.u32 %r5, %r2, %r3": lambda a, b, c: a * b >> 32,
    "mul.lo.s32 %r5, %r2, %r3": lambda a, b, c: a * b,
    "mad.lo.s32 %r5, %r2, %r3, %r4": lambda a, b, c: a * b + c,
    "sub.s32 %r5, %r2, %r3": lambda a, b, c: a - b,
    "div.s32 %r5, %r2, %r3": lambda a, b, c: int(Fraction(_signed(a), _signed(b) or 1)) if b else None,
    "shr.s32 %r5, %r2, %r4": lambda a, b, c: _signed(a) >> min(c, 31),
    "shr.u32 %r5, %r2, %r4": lambda a, b, c: a >> c if c < 32 else 0,
    "shl.b32 %r5, %r2, %r4": lambda a, b, c: a << c if c < 32 else 0,
    "min.s32 %r5, %r2, %r3": lambda a, b, c: min(_signed(a), _signed(b)),
    "max.u32 %r5, %r2, %r3": lambda a, b, c: max(a, b),
    "bfe.u32 %r5, %r2, 5, 7": lambda a, b, c: a >> 5 & 127,
    "bfe.s32 %r5, %r2, 5, 1": lambda a, b, c: -(a >> 5 & 1),
    "bfe.s32 %r5, %r2, 25, 9": lambda a, b, c: _signed(a) >> 25,
    "bmsk.clamp.b32 %r5, %r4, 9": lambda a, b, c: 511 << c if c < 32 else 0,
    "prmt.b32 %r5, %r2, %r3, 0x7160U": lambda a, b, c: (
        a & 255 | (b >> 16 & 255) << 8 | (a >> 8 & 255) << 16 | b >> 24 << 24
    ),
    "neg.s32 %r5, %r2": lambda a, b, c: -a,
}


def _signed(x: int) -> int:
    return x - (x >> 31 << 32)


@pytest.mark.parametrize("instruction", BITS)
def test_integer_instructions(instruction):
    rng = random.Random(0)
    edges = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    for _ in range(30):
        a, b = (rng.choice([*edges, rng.getrandbits(32), rng.getrandbits(9)]) for _ in range(2))
        c = rng.randrange(40)
        expected = BITS[instruction](a, b, c)
        if expected is not None:
            inputs = "".join(f"mov.b32 %r{n}, {value};" for n, value in zip((2, 3, 4), (a, b, c), strict=True))
            assert _emulate(f"{inputs} {instruction}; st.global.u32 [%rd1], %r5;")[0] == expected & 0xFFFFFFFF, (
                a,
                b,
                c,
            )


FLOATS = {  # %r2, %r3, result
    "cvt.rni.f32.f32 %r5, %r2": (2.5, 0.0, 2.0),
    "cvt.rzi.s32.f32 %r5, %r2": (-2.9, 0.0, np.int32(-2)),
    "cvt.rn.f32.s32 %r5, %r2": (np.int32(-7), 0.0, -7.0),
    "cvt.rn.bf16x2.f32 %r5, %r2, %r3": (1.0, 1.00390625, np.uint32(0x3F803F80)),  # a tie: to even
    "cvt.rn.f16x2.f32 %r5, %r2, %r3": (-2.0, 70000.0, np.uint32(0xC0007C00)),
    "add.f16x2 %r5, %r2, %r3": (np.uint32(0x3C00C000), np.uint32(0x3C003C00), np.uint32(0x4000BC00)),
    "add.bf16x2 %r5, %r2, %r3": (np.uint32(0x3F80C000), np.uint32(0x3F803F80), np.uint32(0x4000BF80)),
    "min.f32 %r5, %r2, %r3": (np.nan, 3.0, 3.0),
    "min.NaN.f32 %r5, %r2, %r3": (np.nan, 3.0, np.nan),
    "max.NaN.f32 %r5, %r2, %r3": (-1.0, 3.0, 3.0),
    "mul.ftz.f32 %r5, %r2, %r3": (1e-39, 2.0, 0.0),
    "mul.f32 %r5, %r2, %r3": (1e-39, 2.0, np.float32(1e-39) * np.float32(2)),
    "setp.lt.f32 %p1, %r2, %r3; selp.u32 %r5, 1, 0, %p1": (np.nan, 3.0, np.uint32(0)),
    "setp.ltu.f32 %p1, %r2, %r3; selp.u32 %r5, 1, 0, %p1": (np.nan, 3.0, np.uint32(1)),
    "setp.ne.f32 %p1, %r2, %r3; selp.u32 %r5, 1, 0, %p1": (np.nan, 3.0, np.uint32(0)),
    "setp.nan.f32 %p1, %r2, %r3; selp.u32 %r5, 1, 0, %p1": (3.0, np.nan, np.uint32(1)),
    "setp.lt.f16x2 %p1|%p2, %r2, %r3; selp.u32 %r5, 1, 0, %p1": (
        np.uint32(0x40003C00),
        np.uint32(0x3C004000),
        np.uint32(1),
    ),
    "setp.lt.f16x2 %p1|%p2, %r2, %r3; selp.u32 %r5, 1, 0, %p2": (
        np.uint32(0x40003C00),
        np.uint32(0x3C004000),
        np.uint32(0),
    ),
}


def _word(x: float | np.generic) -> int:
    return int((np.float32(x) if isinstance(x, float) else x).view(np.uint32))


@pytest.mark.parametrize("instruction", FLOATS)
def test_floating_point_instructions(instruction):
    *inputs, expected = map(_word, FLOATS[instruction])
    body = "".join(f"mov.b32 %r{n}, {value};" for n, value in zip((2, 3), inputs, strict=True))
    assert _emulate(f"{body} {instruction}; st.global.u32 [%rd1], %r5;", threads=32)[0] == expected


def test_approximations_are_off_by_what_is_allowed():
    body = OWN_WORD + "cvt.rn.f32.u32 %r4, %r1; add.f32 %r4, %r4, 0f3F000000; {}; st.global.u32 [%rd2], %r5;"
    x = np.arange(64, dtype=np.float32) + np.float32(0.5)
    for instruction, exact, ulps in (
        ("div.full.f32 %r5, 0f40400000, %r4", 3 / x, 2),
        ("sqrt.approx.ftz.f32 %r5, %r4", np.sqrt(x), 1),
        ("rsqrt.approx.ftz.f32 %r5, %r4", 1 / np.sqrt(x), 2),
        ("rcp.approx.f32 %r5, %r4", 1 / x, 1),
    ):
        found = _emulate(body.format(instruction)).view(np.int32) - exact.view(np.int32)
        assert set(found) == set(range(-ulps, ulps + 1))


def test_fma_is_rounded_once():
    rng, odd = np.random.default_rng(0), 0
    for _ in range(200):
        # Products near a tie of fp32, and an addend that matters only in an exact sum.
        a, b = (np.float32(1 + int(k) * 2.0**-12) for k in rng.integers(0, 4096, 2))
        c = np.float32(rng.choice([2.0**-60, -(2.0**-60), 0.0]))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        words = [int(x.view(np.uint32)) for x in (a, b, c)]
        body = "".join(f"mov.b32 %r{n}, 0f{word:08X};" for n, word in zip((2, 3, 4), words, strict=True))
        found = _emulate(body + "fma.rn.f32 %r5, %r2, %r3, %r4; st.global.u32 [%rd1], %r5;")[:1].view(np.float32)[0]
        error = abs(Fraction(float(found)) - exact)
        for side in (-np.inf, np.inf):
            other = Fraction(float(np.nextafter(found, np.float32(side))))
            assert error <= abs(other - exact), (a, b, c)
        odd += bool(c and found != np.float32(float(a) * float(b)))
    assert odd  # double rounding would have been detected


# --- mutants ---

SWAPPED = {
    "add": "sub", "sub": "add", "and": "or", "or": "and", "xor": "or", "shl": "shr", "shr": "shl",
    "min": "max", "max": "min", "neg": "mov", "abs": "mov", "mad": "mul", "fma": "mul",
}  # fmt: skip
NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


def _mutants(i: Instruction) -> list[str]:
    """Variants of ``i`` with one mistake that compute something else."""
    found: list[str] = []

    def add(opcode: str, modifiers: Sequence[str], *operands: str) -> None:
        guard = f"@{'!' * i.negated}{i.guard} " if i.guard else ""
        found.append(f"{guard}{'.'.join((opcode, *modifiers))} {', '.join(operands)}")

    target, *inputs = i.operands or ("",)
    unchanging = i.opcode in ("add", "sub", "or", "xor", "shl", "shr") and inputs[-1] in ("0", "0f00000000")
    if i.opcode in SWAPPED and not unchanging:
        add(SWAPPED[i.opcode], i.modifiers, target, *inputs[:2])
    if i.opcode == "mul" and not i.has("wide", "hi"):
        add("add", [m for m in i.modifiers if m != "lo"], target, *inputs)
    if i.opcode == "setp" and i.modifiers[0] in NEGATED:
        add("setp", (NEGATED[i.modifiers[0]], *i.modifiers[1:]), target, *inputs)
    if i.opcode == "selp" and inputs[0] != inputs[1]:
        add("selp", i.modifiers, target, inputs[1], inputs[0], inputs[2])
    if i.opcode == "shfl" and inputs[1] != "0":
        add("shfl", i.modifiers, target, inputs[0], "0", *inputs[2:])
    constant = re.fullmatch(r"-?\d+", inputs[-1]) if inputs else None
    if (
        constant and i.opcode in ("add", "mul", "setp", "shl", "shr") and not i.has("hi")
    ):  # constants of divisions have some slack
        add(i.opcode, i.modifiers, target, *inputs[:-1], str(int(inputs[-1]) + 1))
    if constant and i.opcode in ("and", "bfe") and i.type != "pred":  # one bit less
        less = int(inputs[-1]) // 2 if i.opcode == "and" else int(inputs[-1]) - 1
        add(i.opcode, i.modifiers, target, *inputs[:-1], str(less))
    assert i.text not in found
    return found


def _survivors(case: Case, arch: int, mistakes: int, barriers: int) -> tuple[list[str], Counter[str]]:
    """The undetected mutants of the first kernel of ``case``, and the number of all mutants by kind."""
    first, *rest = case.check(arch)
    program, rng = first.program, random.Random(case.name)
    executed = sorted(first.executed)
    bars = [(i, None) for i in executed if program.instructions[i].opcode == "bar"]
    every = [(i, text) for i in executed for text in _mutants(program.instructions[i])]
    chosen = rng.sample(bars, min(barriers, len(bars))) + rng.sample(every, min(mistakes, len(every)))
    limit, survivors = 2 * max(run.steps for run in (first, *rest)) + 1000, []
    for index, text in chosen:
        try:
            case.check(arch, lambda p, index=index, text=text: p.edited(index, text) if p is program else p, limit)
        except PTXError as error:
            if re.search("not modelled|too narrow|not declared", str(error)):  # not valid PTX
                raise
        except AssertionError:
            pass
        else:
            kind = "barrier" if text is None else "arithmetic"
            survivors.append(f"{kind}: sm_{arch} {case}: {index}: {program.instructions[index].text} -> {text}")
    return survivors, Counter("barrier" if text is None else "arithmetic" for _, text in chosen)


# With --exhaustive, 4% of 1846 arithmetic mutants and of 338 removed barriers survive. Nearly all of them do not change
# the results for these inputs: a condition that is always true (columns that fill their tile), a block index of 0, a
# mean of 0 without norm_pix, a patch index that no lane has, sign bits of values that are never negative, the choice of
# the thread that stores a result, CUB's padding against bank conflicts. The others are below the tolerance: leading
# coefficients of erf in bf16, and the 1e-6 that is added to the variance of a patch. The surviving barriers are the
# first of a kernel, before which shared memory is unused, and either of CUB's last two, which are consecutive.
@pytest.mark.exhaustive
def test_mutants_are_detected(capsys):
    mistakes, barriers = 25, 99
    cases = list(TRITON.values())
    if shutil.which("nvcc"):
        cases += [masking_case(*instance) for instance in MASKING]
    survivors, made = [], Counter()
    for arch in (80, 90):
        for case in cases:
            alive, count = _survivors(case, arch, mistakes, barriers)
            survivors += alive
            made += count
    with capsys.disabled():
        print("", *survivors, dict(made), sep="\n")
    for kind in ("arithmetic", "barrier"):
        alive = sum(line.startswith(kind) for line in survivors)
        assert made[kind] >= 25
        assert 1 - alive / made[kind] >= 0.85, f"{kind}: {alive} of {made[kind]} survive"
