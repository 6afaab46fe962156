"""add_layer_norm: values and every gradient against the eager chain, dispatcher contracts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import FLOATING, LAYOUTS, compare, laid_out, names, randn
from torch.nn import functional as F

from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.add_layer_norm import reference as spec

EPS = 1e-6
# The last dimension: a whole number of vectors at every level, less than one, one value more or less
CASES = [(2, 5, 64), (3, 7, 17), (40, 31), (1, 1), (4, 3), (300, 16), (2, 2, 2, 15), (9,), (2, 1280)]
EMPTY = [(0, 8), (2, 0, 5)]


def eager(x, weight, bias, residual=None):
    """Sum and normalised sum, one above the other: the gradients go through both."""
    x = x if residual is None else x + residual
    return torch.stack([x, F.layer_norm(x, weight.shape, weight, bias, EPS)])


def ours(x, weight, bias, residual=None):
    return torch.stack(add_layer_norm(x, residual, weight, bias, EPS))


def inputs(shape, dtype, layout="contiguous", with_residual=True):
    made = {
        "x": randn(*shape, seed=1) * 2 + 1,
        "residual": randn(*shape, seed=2),
        "weight": randn(shape[-1], seed=3),
        "bias": randn(shape[-1], seed=4),
    }
    if not with_residual:
        del made["residual"]
    return {name: laid_out(x.to(dtype), layout) for name, x in made.items()}


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", CASES + EMPTY, ids=str)
def test_values_and_gradients(shape, dtype, layout, with_residual):
    made = inputs(shape, dtype, layout, with_residual)
    compare(ours, eager, made, set(made), dtype)


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("wanted", [{"x"}, {"residual"}, {"weight"}, {"bias"}, {"x", "weight"}], ids=names)
def test_only_requested_gradients(used, wanted):
    """Of one output alone, to some of the inputs."""
    if used == 0:
        wanted = wanted - {"weight", "bias"} or {"x"}
    compare(
        lambda **made: ours(**made)[used], lambda **made: eager(**made)[used], inputs((4, 33), torch.float32), wanted,
        torch.float32,
    )  # fmt: skip


# x, residual, normed: as the model has them under autocast, then every other mixture
MIXED = [(torch.float32, torch.bfloat16, torch.bfloat16), (torch.float32, None, torch.bfloat16)]
MIXED += [(torch.float32, torch.float16, torch.float16), (torch.float32, torch.float32, torch.bfloat16)]
MIXED += [(torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float32)]
MIXED += [(torch.float64, torch.float32, torch.float32), (torch.float16, torch.bfloat16, None)]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (2, 50, 64)], ids=str)
def test_mixed_dtypes(shape, dtypes):
    """The sum in the wider dtype and unrounded, normalised before it is rounded; every gradient in its own dtype."""
    made = inputs(shape, torch.float64)
    x, residual = (None if d is None else made[n].to(d) for n, d in zip(("x", "residual"), dtypes, strict=False))
    weight, bias = made["weight"].float(), made["bias"].float()
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    total, normed = add_layer_norm(x, residual, weight, bias, EPS, dtypes[2])
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    assert (total.dtype, normed.dtype) == (wide, dtypes[2] or wide)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    made = dict(zip(("x", *(() if residual is None else ("residual",)), "weight", "bias"), exact, strict=True))
    true_total, true_normed = eager(**made)
    grads = randn(*shape, seed=7), randn(*shape, seed=8)
    found = torch.autograd.grad((total, normed), leaves, (grads[0].to(total.dtype), grads[1].to(normed.dtype)))
    truth = torch.autograd.grad(
        (true_total, true_normed), exact, (grads[0].to(total.dtype).double(), grads[1].to(normed.dtype).double())
    )
    for a, b in ((total, true_total), (normed, true_normed), *zip(found, truth, strict=True)):
        limit = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[a.dtype]
        if torch.finfo(wide).bits < 32:
            limit = 3e-2
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit)
    for a, leaf in zip(found, leaves, strict=True):
        assert a.dtype == leaf.dtype


def test_far_from_zero():
    """A mean of a thousand deviations: the variance is of the differences, not a difference of squares."""
    made = inputs((20, 768), torch.float32)
    made["x"] += 3000
    compare(ours, eager, made, set(made), torch.float32)


def test_constant_rows_and_special_values():
    x = torch.ones(3, 40)
    x[1, 3], x[2] = float("nan"), 1e30
    total, normed = add_layer_norm(x, None, torch.full((40,), 2.0), torch.full((40,), 3.0))
    assert total is x
    assert torch.equal(normed[0], torch.full((40,), 3.0))
    assert normed[1].isnan().all()
    assert torch.equal(normed[2], torch.full((40,), 3.0))


@given(rows=st.integers(1, 40), width=st.integers(2, 90), seed=st.integers(0, 999))
def test_normalises(rows, width, seed):
    """With weight 1 and bias 0 each row has mean 0 and variance 1, whatever its own scale."""
    x = randn(rows, width, seed=seed, dtype=torch.float32)
    scale = 10 ** randn(rows, 1, seed=seed + 1, dtype=torch.float32)
    _, normed = add_layer_norm(x * scale, None, torch.ones(width), torch.zeros(width), 1e-12)
    assert normed.mean(-1).abs().max() < 1e-5
    assert (normed.var(-1, correction=0) - 1).abs().max() < 1e-3


def test_threads_do_not_change_a_bit():
    made, threads, found = inputs((500, 48), torch.float32), torch.get_num_threads(), []
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        leaves = {name: x.clone().requires_grad_() for name, x in made.items()}
        ours(**leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 16), (0, 3)], ids=str)
@pytest.mark.parametrize("dtypes", [(d, d) for d in FLOATING] + [(torch.float32, torch.bfloat16)], ids=str)
def test_opcheck(dtypes, shape, with_residual):
    made = inputs(shape, dtypes[0])
    residual = made["residual"].to(dtypes[1]).requires_grad_() if with_residual else None
    x, weight, bias = (made[name].requires_grad_() for name in ("x", "weight", "bias"))
    torch.library.opcheck(torch.ops.mae_fast.add_layer_norm.default, (x, residual, None, weight, bias, EPS, dtypes[1]))
    x, weight = x.detach(), weight.detach()
    _, normed, stats = torch.ops.mae_fast.add_layer_norm(x, None, None, weight, bias.detach(), EPS, dtypes[1])
    grad = randn(*shape, seed=5, dtype=dtypes[0]) if with_residual else None
    arguments = (grad, torch.ones_like(normed), x, stats, weight, None, dtypes[1] if with_residual else dtypes[0])
    torch.library.opcheck(torch.ops.mae_fast.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck(with_residual):
    made = inputs((3, 2, 7), torch.float64, with_residual=with_residual)
    leaves = [x.requires_grad_() for x in made.values()]
    assert torch.autograd.gradcheck(lambda *given: ours(**dict(zip(made, given, strict=True))), leaves)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_reference_is_the_chain(low):
    made = inputs((6, 11), torch.float32)
    leaves = {name: x.double().requires_grad_() for name, x in made.items()}
    out, grads = eager(**leaves), randn(2, 6, 11, seed=5, dtype=torch.float32)
    expected = torch.autograd.grad(out, [leaves[n] for n in ("x", "residual", "weight", "bias")], grads.double())
    x, residual, weight, bias = (made[n] for n in ("x", "residual", "weight", "bias"))
    total, normed, stats = spec.add_layer_norm_reference(x, residual, None, weight, bias, EPS, torch.float32)
    torch.testing.assert_close(torch.stack([total, normed]).double(), out)
    *found, dshift = spec.add_layer_norm_backward_reference(*grads, total, stats, weight, None, low)
    assert not dshift.numel()
    if low == torch.float32:
        assert not found[1].numel()
        found[1] = found[0]
    for a, b in zip(found, expected, strict=True):
        limit = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit)


@pytest.mark.parametrize("shapes", [((2, 4), None, 3), ((2, 4), (2, 3), 4), ((), None, 1)], ids=str)
def test_says_what_is_wrong(shapes):
    x, residual, width = shapes
    with pytest.raises(ValueError, match=r"add_layer_norm: x and residual must be \[\.\.\., D\]"):
        add_layer_norm(
            torch.zeros(x), None if residual is None else torch.zeros(residual), torch.ones(width), torch.zeros(width)
        )


@pytest.mark.native
def test_kernel_checks_its_own_arguments():
    op, back = torch.ops.mae_fast.add_layer_norm, torch.ops.mae_fast.add_layer_norm_backward
    x, one = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must be \[D\]"):
        op(x, None, None, torch.ones(3), one, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"bias must be \[D\]"):
        op(x, None, None, one, torch.ones(3), EPS, torch.float32)
    with pytest.raises(ValueError, match="residual must have the size of x"):
        op(x, torch.zeros(3, 4), None, one, one, EPS, torch.float32)
    with pytest.raises(ValueError, match="residual must have the size of x and its dtype"):
        op(x, x.half(), None, one, one, EPS, torch.bfloat16)
    with pytest.raises(ValueError, match="a sum in Double with BFloat16 is not supported"):
        op(x.double(), None, None, one, one, EPS, torch.bfloat16)
    stats = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="must have the size of sum"):
        back(None, torch.zeros(3, 4), x, stats, one, None, torch.float32)
    with pytest.raises(ValueError, match=r"stats must be \[2, R\]"):
        back(None, x, x, torch.zeros(2, 3), one, None, torch.float32)
    with pytest.raises(ValueError, match="dtype of sum or `low`"):
        back(None, x.half(), x, stats, one, None, torch.bfloat16)
