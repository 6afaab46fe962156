"""Self-attention on the packed projection, without copies of q, k and v.

Shapes: N images, T tokens, H heads of d values each.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import forbid_double_backward
from .._native import has_native
from . import reference

torch.library.define("mae_fast::attention", "(Tensor qkv, int num_heads) -> Tensor")
torch.library.define("mae_fast::attention_backward", "(Tensor grad, Tensor qkv, int num_heads) -> Tensor")

# Who answers where: any device -> eager reference; CPU -> csrc/cpu/attention.cpp registers itself.
torch.library.impl("mae_fast::attention", "default", reference.attention_reference)
torch.library.impl("mae_fast::attention_backward", "default", reference.attention_backward_reference)


@torch.library.register_fake("mae_fast::attention")
def _(qkv, num_heads):  # type: ignore[no-untyped-def]
    n, t, width = qkv.shape
    return qkv.new_empty((n, t, width // 3))


@torch.library.register_fake("mae_fast::attention_backward")
def _(grad, qkv, num_heads):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mae_fast.attention_backward(grad, *ctx.saved_tensors, ctx.num_heads), None


torch.library.register_autograd("mae_fast::attention", _backward, setup_context=_save)
forbid_double_backward("attention_backward")


_refused: set[tuple[torch.dtype, int]] = set()  # dtype and d that xformers has no kernel for


@cache
def memory_efficient() -> tuple[Any, str]:
    """xformers.ops and its version, or None and why it cannot be used."""
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of its own C++, built for another torch; torch's kernels are what is wanted
    try:
        import xformers.ops as found

        return found, f"xformers {version('xformers')}"
    except ImportError as error:
        missing = (error.name or "").split(".")[0] == "xformers"
        return None, "xformers is not installed" if missing else f"xformers does not load ({error})"
    finally:
        log.setLevel(level)


def _by_xformers(qkv: Tensor, lengths: tuple[int, ...] | None) -> Tensor | None:  # [N, T, 3, H, d] -> [N, T, H, d]
    """What ``memory_efficient_attention`` makes of it; None where xformers is missing or has no kernel for it."""
    kind = qkv.dtype, qkv.shape[-1]
    if torch.compiler.is_compiling() or not qkv.is_cuda or kind in _refused:
        return None
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None  # a fake tensor, without a GPU
    ops, _ = memory_efficient()
    if ops is None:
        return None
    try:
        bias = ops.fmha.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device) if lengths else None
        out: Tensor = ops.memory_efficient_attention(*ops.unbind(qkv, 2), attn_bias=bias)
        return out
    except (NotImplementedError, ValueError):
        _refused.add(kind)
        return None


def attention(qkv: Tensor, num_heads: int, lengths: tuple[int, ...] | None = None) -> Tensor:
    """Same value as

        q, k, v = qkv.reshape(N, T, 3, H, d).permute(2, 0, 3, 1, 4)                         # [N, H, T, d] each
        p = (q @ k.transpose(2, 3) / d**0.5).softmax(-1)                                    # [N, H, T, T]
        (p @ v).transpose(1, 2).reshape(N, T, H * d)

    where p never exists in memory, reading the packed layout: on a CPU by our kernel, which keeps only ``qkv`` for the
    backward; on a GPU by xformers' ``memory_efficient_attention``; by torch's ``scaled_dot_product_attention`` on other
    devices, under torch.compile, and where xformers is missing or has no kernel. Sums are at least fp32.

    Args:
        qkv: [N, T, 3*H*d], floating, any strides.
        num_heads: H.
        lengths: with N = 1, of the sequences that lie one after the other in T; each attends to itself only.

    Returns:
        [N, T, H*d] in the dtype of ``qkv``.

    Raises:
        ValueError: on shapes that do not fit.
    """
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be [N, T, 3*H*d] with H = num_heads, got {list(qkv.shape)} and num_heads={num_heads}"
        )
    n, t, width = qkv.shape
    if lengths is not None and (n != 1 or sum(lengths) != t or min(lengths) < 1):
        raise ValueError(f"attention: lengths must add up to T of qkv [1, T, 3*H*d], got {lengths} and {[n, t, width]}")
    if qkv.device.type == "cpu" and has_native("attention", "CPU"):
        return each_sequence(qkv, lengths, lambda part: torch.ops.mae_fast.attention(part, num_heads))
    split = qkv.reshape(n, t, 3, num_heads, width // (3 * num_heads))
    out = _by_xformers(split, lengths)
    if out is None:
        out = each_sequence(split, lengths, _by_torch)
    return out.reshape(n, t, width // 3)


def _by_torch(qkv: Tensor) -> Tensor:  # [N, T, 3, H, d] -> [N, T, H, d]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def each_sequence(x: Tensor, lengths: tuple[int, ...] | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f`` of each sequence in x [1, T, ...], one after the other; of x itself where there are no lengths."""
    return f(x) if lengths is None else torch.cat([f(part) for part in torch.split(x, list(lengths), 1)], 1)
