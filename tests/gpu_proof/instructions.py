"""Instructions that each thread of the largest kernels of a step issues, from their machine code for sm_90.

    python -m gpu_proof.instructions    # prints PER_VALUE and PER_SCORE of mae_fast.bench.predict

The body of a loop counts as often as it runs. N images, T tokens.
"""

import re
from collections.abc import Callable
from math import ceil, log2, prod
from typing import NamedTuple
from unittest import mock

import torch
from gpu_proof import compiled
from gpu_proof.budget import N, _attention, _mlp, _norm
from gpu_proof.compiled import Launch, launches

LABEL_OR_INSTRUCTION = re.compile(r"^\s*\.(L_x_\d+):|^\s*/\*[0-9a-f]{4,}\*/\s+([^;]*);", re.M)
BF16, T = torch.bfloat16, 50


class Code(NamedTuple):
    """Instructions of a kernel, and of each of its loops in the order of their ends."""

    total: int
    loops: list[int]


def code(sass: str) -> Code:
    labels: dict[str, int] = {}
    count, loops = 0, []
    for label, instruction in LABEL_OR_INSTRUCTION.findall(sass):
        if label:
            labels[label] = count
        elif not instruction.startswith("NOP"):
            count += 1
            back = re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", instruction)
            if back and labels.get(back[1], count) < count - 1:
                loops.append(count - labels[back[1]])
    return Code(count, loops)


def found(run: Callable[[], None]) -> list[tuple[Launch, Code]]:
    """The launches of ``run`` for sm_90."""
    codes: list[Code] = []
    inspect = compiled._inspect

    def with_code(name: str, grid: tuple[int, ...], kernel: object) -> Launch:
        codes.append(code(compiled._machine_code(kernel.asm["cubin"])[0]))
        return inspect(name, grid, kernel)

    with mock.patch.object(compiled, "_inspect", with_code), launches(90) as log:
        run()
    return list(zip(log, codes, strict=True))


def gelu(width: int) -> float:
    """Of the GELU's forward and backward, for each value of rows of ``width``."""
    (forward, once), (backward, again), *_ = found(lambda: _mlp(T, width, BF16))
    assert not once.loops
    assert len(again.loops) == 1  # over the tiles of the forward
    return 32 * prod(forward.grid) * (forward.warps * once.total + backward.warps * again.loops[0]) / (N * T * width)


def layer_norm(width: int) -> float:
    """Of the layer norm's forward and backward, for each value of rows of ``width``."""
    (forward, once), (backward, again), *_ = found(lambda: _norm(T, width, BF16))
    assert not once.loops
    assert len(again.loops) == 1  # over rows, 8 values a thread at a time
    rows = max(1, 32 * backward.warps * 8 // 2 ** ceil(log2(width)))
    tiles = N * T // rows
    instructions = prod(forward.grid) * forward.warps * once.total + tiles * backward.warps * again.loops[0]
    return 32 * instructions / (N * T * width)


def attention(tokens: int, width: int, heads: int) -> float:
    """Of attention's forward and backward, for each score, with those of padding in its tiles."""
    (forward, once), (backward, again), *_ = found(lambda: _attention(tokens, width, heads, BF16))
    rows, cols = (64, 32) if width // heads <= 64 else (32, 32)
    steps = ceil(tokens / rows), ceil(tokens / cols)
    executed = nested(once, *steps) + (nested(again, *steps) if again.loops else again.total)
    assert forward.warps == backward.warps
    return executed * 32 * forward.warps / (steps[0] * rows * steps[1] * cols)


def nested(code: Code, outer: int, inner: int) -> int:
    """Executed instructions of a kernel whose loops are pairs, one inside the other."""
    pairs = list(zip(code.loops[::2], code.loops[1::2], strict=True))
    executed = code.total - sum(whole for _, whole in pairs)
    return executed + sum(outer * (whole - body) + outer * inner * body for body, whole in pairs)


if __name__ == "__main__":
    print("GELU", gelu(3072), gelu(2048))
    print("layer norm", layer_norm(768), layer_norm(512))
    for tokens, width, heads in ((197, 512, 16), (50, 768, 12), (65, 1280, 16)):
        print(f"attention, head size {width // heads}:", attention(tokens, width, heads))
