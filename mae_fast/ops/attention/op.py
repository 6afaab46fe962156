"""Self-attention on the packed projection, without copies of q, k and v.

Shapes: N images, T tokens, H heads of d values each.
"""

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


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Same value as

        q, k, v = qkv.reshape(N, T, 3, H, d).permute(2, 0, 3, 1, 4)                         # [N, H, T, d] each
        p = (q @ k.transpose(2, 3) / d**0.5).softmax(-1)                                    # [N, H, T, T]
        (p @ v).transpose(1, 2).reshape(N, T, H * d)

    where p never exists in memory, on a CPU reading and writing the packed layout, elsewhere by torch's
    ``scaled_dot_product_attention``. Sums are at least fp32. Only ``qkv`` is kept for the backward.

    Args:
        qkv: [N, T, 3*H*d], floating, any strides.
        num_heads: H.

    Returns:
        [N, T, H*d] in the dtype of ``qkv``.

    Raises:
        ValueError: on shapes that do not fit.
    """
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be [N, T, 3*H*d] with H = num_heads, got {list(qkv.shape)} and num_heads={num_heads}"
        )
    if qkv.device.type == "cpu" and has_native("attention", "CPU"):
        out: Tensor = torch.ops.mae_fast.attention(qkv, num_heads)
        return out
    n, t, width = qkv.shape
    q, k, v = qkv.reshape(n, t, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width // 3)
