"""The residual stream: pending additions give the same values as plain additions."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mae_fast.models.residual import Residual, is_unhooked


class ShiftedNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def tensors():
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.float64)
    return x, branch, torch.randn(8, generator=generator, dtype=torch.float64)


def norm_layer(kind=nn.LayerNorm):
    norm = kind(8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_materialize_and_the_next_norm_make_the_pending_additions(pending):
    x, branch, bias = tensors()
    residual = Residual(*(x, branch, bias)[: 1 + pending])
    total = (x, x + branch, x + (branch + bias))[pending]
    norm = norm_layer()
    torch.testing.assert_close(residual.materialize(), total)
    with residual.add_and_norm(norm) as (found, normed):
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(normed, F.layer_norm(total, (8,), norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("norm", [norm_layer(), norm_layer(ShiftedNorm)], ids=["fused", "called"])
def test_a_branch_of_fewer_tokens_drops_the_first_ones(norm):
    x, branch, bias = tensors()
    residual = Residual(x, branch[:, 2:], bias)
    total = x[:, 2:] + (branch[:, 2:] + bias)
    torch.testing.assert_close(residual.materialize(), total)
    with residual.add_and_norm(norm) as (found, normed):
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(normed, norm(total))


def test_a_replaced_or_hooked_norm_is_called_on_the_sum():
    x, branch, bias = tensors()
    total, seen = x + (branch + bias), []
    hooked = norm_layer()
    hooked.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    for norm in (norm_layer(ShiftedNorm), hooked, nn.Identity()):
        with Residual(x, branch, bias).add_and_norm(norm) as (found, normed):
            torch.testing.assert_close(found, total)
            torch.testing.assert_close(normed, norm(total))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], total)


def test_only_exact_types_without_hooks_are_unhooked():
    assert is_unhooked(nn.Linear(2, 2), nn.Linear)
    assert not is_unhooked(ShiftedNorm(2), nn.LayerNorm)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer = nn.Linear(2, 2)
        handle = getattr(layer, register)(lambda *_: None)
        assert not is_unhooked(layer, nn.Linear)
        handle.remove()
        assert is_unhooked(layer, nn.Linear)
