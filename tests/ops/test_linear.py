"""linear: value and gradients under autocast against eager torch, stored copies, dispatcher contracts."""

import pytest
import torch
from op_cases import KERNEL_ERROR, LAYOUTS, laid_out, names, randn
from support import assert_no_worse_than_eager
from torch.nn import functional as F

from mae_fast.ops.bf16_weight_cache import drop_copy, keep_copy, working_copy
from mae_fast.ops.linear import linear
from mae_fast.ops.linear import reference as spec
from mae_fast.ops.native import has_matrix_unit

needs_unit = pytest.mark.skipif(not has_matrix_unit(), reason="needs AMX or AVX512_BF16, allowed to oneDNN")

# M, O, K: whole blocks (of 32 and 2048 rows, 128 outputs, 64 inputs), less than one, one value more and less
SHAPES = [(64, 128, 64), (1, 1, 1), (31, 127, 63), (33, 129, 65), (800, 96, 80), (2049, 130, 66), (4100, 33, 20)]
SHAPES += [(7, 300, 5), (50, 3, 200), (2, 32, 2)]


@needs_unit
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, layout):
    """The rounding error of an fp32 sum grows with the root of its length. A missing row would exceed it ten times."""
    m, o, k = shape
    grad, x = (laid_out(randn(m, w, seed=w, dtype=torch.bfloat16), layout) for w in (o, k))
    dweight, dbias = torch.ops.mae_fast.linear_gradients(grad, x)
    assert (dweight.dtype, dbias.dtype) == (torch.float32, torch.float32)
    grad, x = grad.double(), x.double()
    limit = 8 * m**0.5 * 2**-24
    assert ((dweight - grad.t() @ x).abs() <= limit * (grad.abs().t() @ x.abs())).all()
    assert ((dbias - grad.sum(0)).abs() <= limit * grad.abs().sum(0)).all()


@needs_unit
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 128, 64), (1, 2, 2), (31, 130, 66), (450, 96, 80), (33, 70, 5000)], ids=str)
def test_products(shape, layout):
    """Forward and input gradient. A missing pair of values would exceed the limit ten times."""
    m, o, k = shape
    x, grad = (laid_out(randn(m, w, seed=w, dtype=torch.bfloat16), layout) for w in (k, o))
    weight, bias = laid_out(randn(o, k, seed=1, dtype=torch.bfloat16), layout), randn(o, seed=2, dtype=torch.bfloat16)
    ops = torch.ops.mae_fast
    for found, a, b, added in (
        (ops.linear_product(x, weight, bias), x, weight.t(), bias),
        (ops.linear_product(x, weight, None), x, weight.t(), bias * 0),
        (ops.linear_input_gradient(grad, weight), grad, weight, torch.zeros(k)),
    ):
        truth = a.double() @ b.double() + added.double()
        summed = a.double().abs() @ b.double().abs() + added.double().abs()
        assert found.dtype == torch.bfloat16
        assert ((found - truth).abs() <= 2**-8 * truth.abs() + 8 * a.shape[1] ** 0.5 * 2**-24 * summed).all()


def test_reference_equals_the_eager_chain():
    grad, x = randn(9, 4, seed=1, dtype=torch.bfloat16), randn(9, 5, seed=2, dtype=torch.bfloat16)
    dweight, dbias = spec.linear_gradients_reference(grad, x)
    torch.testing.assert_close(dweight.double(), grad.double().t() @ x.double())
    torch.testing.assert_close(dbias.double(), grad.double().sum(0))
    weight, bias = randn(4, 5, seed=3, dtype=torch.bfloat16), randn(4, seed=4, dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    out = F.linear(leaf, weight, bias)
    assert torch.equal(spec.linear_product_reference(x, weight, bias), out)
    assert torch.equal(spec.linear_input_gradient_reference(grad, weight), torch.autograd.grad(out, leaf, grad)[0])


@needs_unit
@pytest.mark.parametrize("shape", [(0, 5, 6), (3, 0, 6), (3, 5, 0)], ids=str)
def test_empty(shape):
    m, o, k = shape
    grad, x = torch.ones(m, o, dtype=torch.bfloat16), torch.ones(m, k, dtype=torch.bfloat16)
    dweight, dbias = torch.ops.mae_fast.linear_gradients(grad, x)
    assert dweight.shape == (o, k)
    assert torch.equal(dbias, torch.full((o,), float(m)))
    assert not dweight.any() or m


@needs_unit
def test_nan_stays_in_its_row_and_column():
    grad, x = torch.ones(70, 40, dtype=torch.bfloat16), torch.ones(70, 50, dtype=torch.bfloat16)
    grad[66, 7] = x[3, 9] = float("nan")
    dweight, dbias = torch.ops.mae_fast.linear_gradients(grad, x)
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[7], expected[:, 9] = True, True
    assert torch.equal(dweight.isnan(), expected)
    assert dbias.isnan().nonzero().tolist() == [[7]]


def made(shape=(3, 17), k=40, o=24):
    return {
        "x": randn(*shape, k, seed=1, dtype=torch.float32),
        "weight": randn(o, k, seed=2, dtype=torch.float32),
        "bias": randn(o, seed=3, dtype=torch.float32),
    }


def run(f, inputs, wanted, autocast=True):
    leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = f(**leaves)
    grads = torch.autograd.grad(out, [leaves[n] for n in sorted(wanted)], randn(*out.shape, seed=9, dtype=out.dtype))
    return {"out": out.detach()} | dict(zip(sorted(wanted), grads, strict=True))


@pytest.mark.parametrize("wanted", [{"x", "weight", "bias"}, {"x"}, {"weight"}, {"bias"}, {"x", "bias"}], ids=names)
@pytest.mark.parametrize("low", [False, True], ids=["x fp32", "x bf16"])
def test_under_autocast(wanted, low):
    inputs = made()
    if low:
        inputs["x"] = inputs["x"].bfloat16()
    found, eager = run(linear, inputs, wanted), run(F.linear, inputs, wanted)
    wide = {name: x.double() for name, x in inputs.items()}
    truth = run(F.linear, wide, wanted, autocast=False)
    assert_no_worse_than_eager(found, eager, truth, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_without_autocast_equals_torch(dtype):
    inputs = {name: x.to(dtype) for name, x in made().items()}
    found, eager = (run(f, inputs, set(inputs), autocast=False) for f in (linear, F.linear))
    assert all(torch.equal(found[name], eager[name]) for name in eager)


def test_without_bias_and_in_two_dimensions():
    inputs = made((19,))
    del inputs["bias"]
    found, eager = run(linear, inputs, {"weight"}), run(F.linear, inputs, {"weight"})
    torch.testing.assert_close(found["out"], eager["out"], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found["weight"], eager["weight"], rtol=1e-2, atol=1e-1)


@needs_unit
def test_bf16_gradients_of_the_weight_are_not_rounded():
    found = run(linear, made(), {"weight"})["weight"]
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@needs_unit
def test_uses_the_stored_copy_until_the_weight_changes():
    weight, x = torch.nn.Parameter(torch.ones(4, 6)), torch.ones(2, 6)
    keep_copy(weight, torch.zeros(4, 6, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear(x, weight).any()
        assert torch.equal(linear(x.requires_grad_(), weight).sum().backward() or x.grad, torch.zeros(2, 6))
        with torch.no_grad():
            weight.mul_(2)
        assert (linear(x, weight) == 12).all()
    keep_copy(weight, torch.zeros(4, 6, dtype=torch.bfloat16))
    assert (working_copy(weight, torch.float32) == 2).all()  # another dtype than the copy's
    weight.data.fill_(3)
    assert not working_copy(weight, torch.bfloat16).any()  # as documented, a write through .data is not detected
    drop_copy(weight)
    assert (working_copy(weight, torch.bfloat16) == 3).all()


@needs_unit
def test_double_backward_raises():
    inputs = {name: x.requires_grad_() for name, x in made().items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(**inputs)
    grad = torch.autograd.grad(out.float().square().sum(), inputs["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_compiles_to_one_graph():
    inputs = made()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    found, eager = run(compiled, inputs, set(inputs)), run(F.linear, inputs, set(inputs))
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value)


@needs_unit
@pytest.mark.parametrize("shape", [(5, 3, 7), (40, 64, 32), (0, 2, 3)], ids=str)
def test_opcheck(shape):
    m, o, k = shape
    arguments = randn(m, o, seed=1, dtype=torch.bfloat16), randn(m, k, seed=2, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.mae_fast.linear_gradients.default, arguments)


@needs_unit
@pytest.mark.parametrize("shape", [(5, 4, 6), (40, 64, 32), (0, 2, 4)], ids=str)
def test_opcheck_of_products(shape):
    m, o, k = shape
    x, weight, grad = (randn(*s, seed=1, dtype=torch.bfloat16) for s in ((m, k), (o, k), (m, o)))
    for bias in (None, randn(o, seed=2, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.mae_fast.linear_product.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.mae_fast.linear_input_gradient.default, (grad, weight))


@needs_unit
@pytest.mark.parametrize("sizes", [(40, 23), (39, 24), (39, 23), (40, 24)], ids=str)
def test_odd_sizes(sizes):
    """The matrix unit multiplies pairs of values, so torch computes products of odd sizes."""
    inputs = made((3, 17), *sizes)
    found, eager = (run(f, inputs, set(inputs)) for f in (linear, F.linear))
    truth = run(F.linear, {name: x.double() for name, x in inputs.items()}, set(inputs), autocast=False)
    assert_no_worse_than_eager(found, eager, truth, torch.bfloat16)


@pytest.mark.native
def test_kernel_checks_its_own_arguments():
    op, x = torch.ops.mae_fast.linear_gradients, torch.zeros(2, 4, dtype=torch.bfloat16)
    with pytest.raises(KERNEL_ERROR, match=r"must have the same number of rows, got 3 and 2"):
        op(torch.zeros(3, 4, dtype=torch.bfloat16), x)
    with pytest.raises(KERNEL_ERROR, match="inputs must be bf16 matrices"):
        op(x.float(), x)
    ops, odd = torch.ops.mae_fast, torch.zeros(3, 3, dtype=torch.bfloat16)
    for call in (
        lambda: ops.linear_product(x, odd, None),
        lambda: ops.linear_product(odd, odd, None),
        lambda: ops.linear_product(x, x, x[0]),
        lambda: ops.linear_input_gradient(odd, odd),
        lambda: ops.linear_input_gradient(x, x),
    ):
        with pytest.raises(KERNEL_ERROR, match="weight must be"):
            call()


@pytest.mark.native
def test_kernel_without_the_matrix_unit_raises_an_error():
    with torch.backends.mkldnn.flags(enabled=False), pytest.raises(KERNEL_ERROR, match="bf16 matrix products need"):
        torch.ops.mae_fast.linear_gradients(*(torch.zeros(2, 4, dtype=torch.bfloat16),) * 2)


def test_without_the_matrix_unit_equals_torch():
    inputs = made()
    with torch.backends.mkldnn.flags(enabled=False):
        found, eager = run(linear, inputs, set(inputs)), run(F.linear, inputs, set(inputs))
    assert all(torch.equal(found[name], eager[name]) for name in eager)
