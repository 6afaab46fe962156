"""Self-attention on the packed projection, without copies of q, k and v.

Equals: softmax(q k^T / sqrt d) v, on views of the packed projection.

Shapes: N images, T tokens (the last Q are queries), H heads of d values each.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...console import quieted
from ...errors import UserError
from ..autocast import autocast_dtype
from ..autograd import differentiable_once, forbid_double_backward, is_exporting, needs_torch_ops
from ..native import HAS_TRITON, has_kernel, has_native
from ..patches import check_tensor
from . import reference

torch.library.define(
    "mae_fast::attention",
    "(Tensor qkv, Tensor? bias, int num_heads, bool save_lse, SymInt first_query=0) -> (Tensor, Tensor)",
)
torch.library.define(
    "mae_fast::attention_backward",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor? bias, int num_heads, SymInt first_query=0)"
    " -> (Tensor, Tensor)",
)

# Any device: eager reference. CPU: csrc/cpu/attention.cpp registers itself. CUDA: Triton, for short sequences.
torch.library.impl("mae_fast::attention", "default", reference.attention_reference)
torch.library.impl("mae_fast::attention_backward", "default", reference.attention_backward_reference)
if HAS_TRITON:
    from . import triton_kernels

    torch.library.impl("mae_fast::attention", "CUDA", triton_kernels.attention_forward)
    torch.library.impl("mae_fast::attention_backward", "CUDA", triton_kernels.attention_backward)


@torch.library.register_fake("mae_fast::attention")
def _(qkv, bias, num_heads, save_lse, first_query=0):  # type: ignore[no-untyped-def]
    n, queries, width = qkv.shape[0], qkv.shape[1] - first_query, qkv.shape[2]
    lse = qkv.new_empty((n, num_heads, queries) if save_lse else (0,), dtype=torch.float32)
    return qkv.new_empty((n, queries, width // 3)), lse


@torch.library.register_fake("mae_fast::attention_backward")
def _(grad, qkv, out, lse, bias, num_heads, first_query=0):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, ctx.num_heads, _, ctx.first_query = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, bias, *((out, lse) if lse.numel() else (None, lse)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    qkv, bias, out, lse = ctx.saved_tensors
    out = lse if out is None else out  # empty: without the log-sum-exp, the kernel does not read the output either
    dqkv, dbias = torch.ops.mae_fast.attention_backward(grad, qkv, out, lse, bias, ctx.num_heads, ctx.first_query)
    return dqkv, None if bias is None else dbias, None, None, None


torch.library.register_autograd("mae_fast::attention", _backward, setup_context=_save)
forbid_double_backward("attention_backward")


class _BiasGradient(torch.autograd.Function):
    """Return ``qkv``. The backward also sums its gradient over all tokens, as the gradient of ``bias``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.bias = bias.dtype
        return qkv.view_as(qkv)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad, grad.sum((0, 1), dtype=wide).to(ctx.bias)


Backend = Literal["auto", "triton", "xformers", "sdpa"]

MAX_TOKENS = 320  # the longest sequence for our Triton kernels; libraries compute longer ones

_unsupported: set[tuple[torch.dtype, int]] = set()  # dtype and d without an xformers kernel


@cache
def memory_efficient() -> tuple[Any, str]:
    """xformers.ops and its version, or None and the reason why it cannot be used."""
    try:
        with quieted("xformers"):  # it warns about its C++ extension, which is checked below
            import xformers.ops as found
            from xformers import _cpp_lib

        name = f"xformers {version('xformers')}"
        if not getattr(_cpp_lib, "_built_with_cuda", True):  # without it, xformers has no GPU kernels
            built = getattr(getattr(_cpp_lib, "_cpp_library_load_exception", None), "build_info", None)
            return None, f"{name} was built for {f'torch {built.torch_version}' if built else 'another torch'}"
        return found, name
    except ImportError as error:
        missing = (error.name or "").split(".")[0] == "xformers"
        return None, "xformers is not installed" if missing else f"xformers does not load ({error})"


def on_gpus() -> list[tuple[str, str, str]]:
    """The implementations that "auto" chooses on a GPU, as rows of (sequences, implementation, reason)."""
    packed, library = "of several lengths", memory_efficient()
    found = [(packed, "xformers", f"{library[1]} takes them in one call")] if library[0] else []
    if has_kernel("attention", "cuda"):
        found.append((f"of up to {MAX_TOKENS} tokens", "Triton", "no padding to a library's tiles, packed gradients"))
        rest = f"of more than {MAX_TOKENS} tokens"
        found += [] if library[0] else [(packed, "Triton or torch's SDPA", f"one after the other: {library[1]}")]
    else:
        rest = "of one length" if library[0] else "of any length"
    if library[0]:
        return [*found, (rest, "xformers", f"{library[1]}; torch's SDPA where it has no kernel")]
    return [*found, (rest, "torch's SDPA", library[1])]


def _is_cuda_initialized() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _by_xformers(heads: tuple[Tensor, ...], lengths: tuple[int, ...] | None) -> Tensor | None:
    """``memory_efficient_attention`` of q, k, v [N, T, H, d]; None if xformers is missing or has no kernel for them."""
    q = heads[0]
    kind = q.dtype, q.shape[-1]
    if torch.compiler.is_compiling() or not q.is_cuda or kind in _unsupported:
        return None
    if not _is_cuda_initialized():  # fake tensors
        return None
    ops, _ = memory_efficient()
    if ops is None:
        return None
    try:
        bias = ops.fmha.BlockDiagonalMask.from_seqlens(lengths, device=q.device) if lengths else None
        out: Tensor = ops.memory_efficient_attention(*heads, attn_bias=bias)
        return out
    except (NotImplementedError, ValueError):
        _unsupported.add(kind)
        return None


def attention(
    qkv: Tensor,
    num_heads: int,
    lengths: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    backend: Backend = "auto",
    first_query: int = 0,
) -> Tensor:
    """Same value as

        q, k, v = qkv.reshape(N, T, 3, H, d).permute(2, 0, 3, 1, 4)                         # [N, H, T, d] each
        p = (q @ k.transpose(2, 3) / d**0.5).softmax(-1)                                    # [N, H, T, T]
        (p @ v).transpose(1, 2).reshape(N, T, H * d)

    without storing p. Sums are fp32 or wider. CPUs run our C++ kernel. GPUs run our Triton kernels for sequences of up
    to ``MAX_TOKENS`` tokens and head sizes that ``triton_kernels.fits`` accepts, and xformers'
    ``memory_efficient_attention`` for longer sequences and for sequences of several lengths. Everything else runs
    torch's ``scaled_dot_product_attention``.

    Args:
        qkv: [N, T, 3*H*d], floating, any strides.
        num_heads: H.
        lengths: with N = 1, the lengths of the sequences packed in T. Each attends to itself only.
        bias: [3*H*d], the bias of the linear layer that computed ``qkv``. The layer adds the bias
            (``bias_gradient=False``); this op computes its gradient, in the pass that packs those of q, k, v.
        backend: "triton", "xformers" or "sdpa" (torch's). "auto" chooses as described above.
        first_query: index of the first query. Earlier tokens are only keys and values: they have no output, and the
            gradients of their queries are 0.

    Returns:
        [N, Q, H*d] in the dtype of ``qkv``, Q = T - first_query.

    Raises:
        ValueError: on mismatched shapes, ``lengths`` or ``first_query``.
        UserError: if ``backend`` cannot compute this.
    """
    check_tensor("attention: qkv", qkv)
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be [N, T, 3*H*d] with H = num_heads, got {list(qkv.shape)} and num_heads={num_heads}"
        )
    n, t, width = qkv.shape
    if lengths is not None and (n != 1 or sum(lengths) != t or min(lengths) < 1):
        raise ValueError(f"attention: lengths must add up to T of qkv [1, T, 3*H*d], got {lengths} and {[n, t, width]}")
    if first_query and not (lengths is None and 0 < first_query < t):
        raise ValueError(f"attention: first_query must be in 0..{t - 1}, and 0 with lengths, got {first_query}")
    if lengths is not None and len({*lengths}) == 1:
        together = attention(qkv.reshape(len(lengths), lengths[0], width), num_heads, None, bias, backend)
        return together.reshape(n, t, width // 3)
    if needs_torch_ops():
        return each_sequence(qkv, lengths, lambda x: _by_torch_ops(x, bias, num_heads, first_query))
    by_cpp = backend == "auto" and qkv.device.type == "cpu" and has_native("attention", "CPU")
    by_triton = not by_cpp and _triton_fits(qkv, num_heads, lengths, backend)
    if backend == "triton" and not by_triton:
        raise _unsupported_by("triton", qkv)
    if bias is not None and not by_triton:
        qkv, bias = _BiasGradient.apply(qkv, bias), None
    if by_cpp or by_triton:

        def of_one(sequence: Tensor) -> Tensor:
            save_lse = by_triton and triton_kernels.needs_lse(sequence, num_heads)
            out: Tensor = torch.ops.mae_fast.attention(sequence, bias, num_heads, save_lse, first_query)[0]
            return out

        return each_sequence(qkv, lengths, of_one)
    return _by_library(qkv, num_heads, lengths, backend, first_query)


def _by_torch_ops(qkv: Tensor, bias: Tensor | None, num_heads: int, first_query: int) -> Tensor:
    """Attention for transforms, forward-mode AD and exports. torch's fused CPU attention supports only exports."""
    if bias is not None:  # qkv contains it without its gradient: add 0 with this gradient
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype)
    if is_exporting():
        return _by_library(qkv, num_heads, None, "sdpa", first_query)
    off = nullcontext() if autocast_dtype(qkv.device.type) is None else torch.autocast(qkv.device.type, enabled=False)
    with off:  # autocast would round the scores
        return reference.attention_reference(qkv, None, num_heads, False, first_query)[0]


def _by_library(
    qkv: Tensor, num_heads: int, lengths: tuple[int, ...] | None, backend: Backend, first_query: int
) -> Tensor:
    """Attention by xformers, or by torch if ``backend`` is "sdpa" or xformers cannot compute it."""
    n, t, width = qkv.shape
    q, k, v = qkv.reshape(n, t, 3, num_heads, width // (3 * num_heads)).unbind(2)
    heads = q[:, first_query:], k, v
    out = None if backend == "sdpa" else _by_xformers(heads, lengths)
    if out is None and backend == "xformers":
        raise _unsupported_by(f"xformers ({memory_efficient()[1]})", qkv)
    if out is None and lengths is None:
        out = _by_torch(*heads)
    elif out is None:
        parts = zip(*(torch.split(x, [*(lengths or ())], 1) for x in heads), strict=True)
        out = torch.cat([_by_torch(*part) for part in parts], 1)
    return out.reshape(n, t - first_query, width // 3)


def _unsupported_by(backend: str, qkv: Tensor) -> UserError:
    given = f"{str(qkv.dtype).removeprefix('torch.')} {list(qkv.shape)} on {qkv.device.type}"
    return UserError(f"attention: the backend {backend} cannot compute qkv {given}", 'use backend="auto"')


def _triton_fits(qkv: Tensor, num_heads: int, lengths: tuple[int, ...] | None, backend: Backend) -> bool:
    """Whether our Triton kernels compute this. xformers takes sequences of several lengths in one call."""
    device = qkv.device.type
    if backend not in ("auto", "triton") or not HAS_TRITON or not has_kernel("attention", device):
        return False
    if device == "cpu" and has_native("attention", "CPU"):  # the registered kernel is the C++ one
        return False
    if backend == "auto" and lengths is not None and memory_efficient()[0] is not None:
        return False
    tokens = max(lengths or qkv.shape[1:2])
    return tokens <= MAX_TOKENS and triton_kernels.fits(qkv, num_heads, tokens)


def _by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, T, H, d] each
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def each_sequence(x: Tensor, lengths: tuple[int, ...] | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``f`` to each sequence in x [1, T, ...] and concatenate the results; ``f(x)`` without lengths."""
    return f(x) if lengths is None else torch.cat([f(part) for part in torch.split(x, list(lengths), 1)], 1)
