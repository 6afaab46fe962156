"""The residual stream with pending additions.

A pre-norm transformer repeats ``x = x + branch(norm(x))``. As a separate op, every addition is a pass over memory. Here
the output of a branch stays pending, and the op of the next norm adds it in the same pass. The blocks of flash-attn and
Mamba pass on ``hidden_states, residual`` for the same reason. The result is that of the plain formula. To understand a
model, you can skip this file and read ``add_and_norm`` as an addition and a norm.

Shapes: N images, T tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..ops.add_layer_norm import add_layer_norm
from ..ops.autocast import autocast_dtype
from ..ops.recompute import recomputing

Kind = TypeVar("Kind", bound=nn.Module)
BranchOutput = tuple[Tensor, Tensor | None]  # output [N, T, D] of a branch, and a bias [D] that is not added to it yet


class Residual(NamedTuple):
    """Tokens ``x + (branch + branch_bias)``. The additions are pending.

    If ``branch`` [N, R, D] has fewer tokens than ``x``, the sum has only the last R tokens of ``x``.

    A block of two branches, attention and MLP, is

        with residual.add_and_norm(norm1) as (x, normed):
            residual = Residual(x, *attention(normed))
        with residual.add_and_norm(norm2) as (x, normed):
            residual = Residual(x, *mlp(normed))
    """

    x: Tensor  # [N, T, D]
    branch: Tensor | None = None  # [N, T, D], output of the last branch; None: nothing is pending
    branch_bias: Tensor | None = None  # [D], bias of the branch's last linear layer, not added yet

    def materialize(self) -> Tensor:
        """The tokens [N, T, D], after the pending additions."""
        if self.branch is None:
            return self.x
        return self.x[:, self.x.shape[1] - self.branch.shape[1] :] + add_bias(self.branch, self.branch_bias)

    @contextmanager
    def add_and_norm(self, norm: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Context with ``x = self.materialize()`` and ``norm(x)``.

        If ``norm`` is an unhooked layer norm of the last dimension, one fused op computes both. Inside the context,
        autograd does not save ``norm(x)``. The backward pass recomputes it from ``x``.
        """
        if not is_plain_layer_norm(norm):
            x = self.materialize()
            yield x, norm(x)
            return
        # Under autocast, the next linear layer would cast to this dtype. Autocast does not cast float64.
        dtype = autocast_dtype(self.x.device.type) if self.x.dtype != torch.float64 else None
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        x, normed = add_layer_norm(self.x, self.branch, weight, bias, eps, dtype, self.branch_bias)

        def norm_again() -> Tensor:
            return add_layer_norm(x, None, weight, bias, eps, dtype)[1]

        with nullcontext() if _saves_are_hooked() else recomputing(normed, norm_again):
            yield x, normed


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """``x + bias`` in the dtype of ``x``."""
    return x if bias is None else x + bias.to(x.dtype)


def is_unhooked(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether ``module`` is exactly of type ``kind``, without hooks and with the ``forward`` of its class.

    Only then can an op compute its output directly from its weights.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks) and "forward" not in module.__dict__


def is_plain_layer_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether ``norm`` is an unhooked layer norm of the last dimension."""
    return is_unhooked(norm, nn.LayerNorm) and norm.bias is not None and len(norm.normalized_shape) == 1


def _saves_are_hooked() -> bool:
    """Whether hooks on saved tensors are active, as in activation checkpointing. Our hooks would replace them."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
