"""Count the instructions that a thread of the largest kernels of a step issues, in their machine code for sm_90.

    python -m gpu_proof.instructions    # prints PER_VALUE and PER_SCORE of mae_fast.bench.predict

The body of a loop counts as often as it runs. Shapes: N images, T tokens.
"""

from collections.abc import Callable
from math import ceil

import torch
from gpu_proof.budget import _attention, _mlp, _norm
from gpu_proof.compiled import Code, Launch, launches

BF16, T = torch.bfloat16, 50


def found(run: Callable[[], None]) -> list[Launch]:
    """The launches of ``run`` for sm_90."""
    with launches(90) as log:
        run()
    return log


def gelu(width: int) -> float:
    """Instructions per value of the forward and backward of GELU, for rows of ``width`` values."""
    return sum(len(launch.tile) / launch.values for launch in found(lambda: _mlp(T, width, BF16)))


def layer_norm(width: int) -> float:
    """Instructions per value of the forward and backward of layer norm, for rows of ``width`` values."""
    return sum(len(launch.tile) / launch.values for launch in found(lambda: _norm(T, width, BF16)))


def attention(tokens: int, width: int, heads: int) -> float:
    """Instructions per score of the forward and backward of attention, including those for padding in tiles."""
    forward, backward = found(lambda: _attention(tokens, width, heads, BF16))
    again = backward.code
    rows, cols = (64, 32) if width // heads <= 64 else (32, 32)
    steps = ceil(tokens / rows), ceil(tokens / cols)
    executed = nested(forward.code, *steps) + (nested(again, *steps) if again.loops else len(again.whole))
    assert forward.warps == backward.warps
    return executed * 32 * forward.warps / (steps[0] * rows * steps[1] * cols)


def nested(code: Code, outer: int, inner: int) -> int:
    """The number of executed instructions of a kernel with pairs of nested loops."""
    pairs = [(len(body), len(whole)) for body, whole in zip(code.loops[::2], code.loops[1::2], strict=True)]
    executed = len(code.whole) - sum(whole for _, whole in pairs)
    return executed + sum(outer * (whole - body) + outer * inner * body for body, whole in pairs)


if __name__ == "__main__":
    print("GELU", gelu(3072), gelu(2048))
    print("layer norm", layer_norm(768), layer_norm(512))
    for tokens, width, heads in ((197, 512, 16), (50, 768, 12), (65, 1280, 16)):
        print(f"attention, head size {width // heads}:", attention(tokens, width, heads))
