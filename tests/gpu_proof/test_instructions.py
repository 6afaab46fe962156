"""Instruction counts of the largest kernels, from their machine code, against those of ``bench.predict``."""

import pytest

pytest.importorskip("triton")
from gpu_proof.compiled import code
from gpu_proof.instructions import attention, gelu, layer_norm, nested

from mae_fast.bench.predict import PER_SCORE, PER_VALUE

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   FADD R3, R3, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   NOP ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_loops_are_found_and_counted_as_often_as_they_run():
    found = code(SASS)
    assert len(found.whole) == 7
    assert [len(loop) for loop in found.loops] == [2, 4]  # the last line, which jumps to itself, is not a loop
    assert nested(found, 3, 5) == 3 + 3 * 2 + 3 * 5 * 2


def test_loops_that_few_programs_run_are_left_out():
    found = code(SASS.replace("FADD R3, R3, R4", "LDG.E.STRONG.GPU R5, [R4.64]"))
    assert (len(found.whole), found.loops) == (3, [])


def test_the_prediction_has_the_current_instruction_counts():
    """Within 10 %. ``python -m gpu_proof.instructions`` prints them."""
    assert gelu(3072) == pytest.approx(PER_VALUE["GELU"], rel=0.1)
    assert layer_norm(768) == pytest.approx(PER_VALUE["layer norm"], rel=0.1)
    for shape in ((197, 512, 16), (50, 768, 12), (65, 1280, 16)):
        assert attention(*shape) == pytest.approx(PER_SCORE[shape[1] // shape[2]], rel=0.1), shape
