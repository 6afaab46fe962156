"""bias_gelu: value and every gradient against the eager chain, dispatcher contracts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import FLOATING, KERNEL_ERROR, LAYOUTS, compare, laid_out, names, randn
from torch.nn import functional as F

from mae_fast.ops.bias_gelu import bias_gelu
from mae_fast.ops.bias_gelu import reference as spec

# The last dimension: whole vectors of any instruction set, less than one vector, one value more and less
CASES = [(2, 5, 64), (3, 7, 17), (40, 31), (1, 1), (1, 3), (300, 16), (2, 2, 2, 15), (9,), (1, 3072)]
EMPTY = [(0, 8), (3, 0), (2, 0, 5)]


def eager(x, bias):
    return F.gelu(x + bias)


def inputs(shape, dtype, layout="contiguous", scale=2.0):
    made = {"x": randn(*shape, seed=1) * scale, "bias": randn(shape[-1], seed=2)}
    return {name: laid_out(x.to(dtype), layout) for name, x in made.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", CASES + EMPTY, ids=str)
def test_values_and_gradients(shape, dtype, layout):
    compare(bias_gelu, eager, inputs(shape, dtype, layout), {"x", "bias"}, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_with_other_strides(layout):
    x, bias = (x.requires_grad_() for x in inputs((3, 7, 17), torch.float32).values())
    out, grad = bias_gelu(x, bias), laid_out(randn(3, 7, 17, seed=3, dtype=torch.float32), layout)
    found = torch.autograd.grad(out, (x, bias), grad, retain_graph=True)
    expected = torch.autograd.grad(out, (x, bias), grad.clone(memory_format=torch.contiguous_format))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("width", [256, 640])
def test_more_rows_than_programs(monkeypatch, width):
    """In the backward on a GPU, each program sums several rows."""
    kernels = pytest.importorskip("mae_fast.ops.triton_common")
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 1)  # the interpreter has no GPU to ask
    rows = 9001 if torch.cuda.is_available() else 71
    compare(bias_gelu, eager, inputs((rows, width), torch.float32), {"x", "bias"}, torch.float32)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_far_tails(dtype):
    """Where erf is nearly +-1, the op keeps digits that are lost in 1 + erf."""
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64).to(dtype)
    compare(bias_gelu, eager, {"x": x[:, None].contiguous(), "bias": torch.zeros(1, dtype=dtype)}, {"x"}, dtype)


def test_special_values():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, nan, 1e30, -1e30, inf, 87.0, -87.0]])
    out = bias_gelu(x, torch.zeros(8))
    expected = torch.tensor([[0.0, 0.0, nan, 1e30, 0.0, inf, 87.0, 0.0]])
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=1e-37)  # |gelu(-87)| is smaller


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATING for b in FLOATING if a != b], ids=str)
def test_mixed_dtypes(dtypes):
    """Under autocast, x is bf16 and the bias fp32. They are added in fp32, and only the result is rounded."""
    x, bias = randn(5, 33, seed=1, dtype=dtypes[0]), randn(33, seed=2, dtype=dtypes[1])
    found, expected = bias_gelu(x, bias), spec.bias_gelu_reference(x, bias)
    assert found.dtype == x.dtype
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtypes[0]]
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    grad = randn(5, 33, seed=3, dtype=dtypes[0])
    for a, b in zip(
        torch.ops.mae_fast.bias_gelu_backward(grad, x, bias, True),
        spec.bias_gelu_backward_reference(grad, x, bias, True),
        strict=True,
    ):
        assert a.dtype == b.dtype
        limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[a.dtype]
        torch.testing.assert_close(a, b, rtol=limit, atol=max(limit, 1e-5 if dtypes[0] != torch.float64 else 0))


@pytest.mark.parametrize("wanted", [{"x"}, {"bias"}], ids=names)
def test_only_requested_gradients(wanted):
    compare(bias_gelu, eager, inputs((4, 33), torch.float32), wanted, torch.float32)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_backward_returns_the_same_value_bit_for_bit(dtype):
    made = inputs((7, 45), dtype)
    _, _, value = torch.ops.mae_fast.bias_gelu_backward(torch.ones_like(made["x"]), **made, with_value=True)
    assert torch.equal(value, bias_gelu(**made))


@given(rows=st.integers(1, 80), width=st.integers(1, 70), seed=st.integers(0, 999))
def test_bounds(rows, width, seed):
    """0 <= gelu(h) <= h for h >= 0. gelu(h) is at least -0.17 and increases for h >= -0.75."""
    x, bias = randn(rows, width, seed=seed, dtype=torch.float32) * 3, randn(width, seed=seed + 1, dtype=torch.float32)
    h, out = x + bias, bias_gelu(x, bias)
    assert (out <= h.clamp(min=0)).all()
    assert (out >= -0.17).all()
    order = h.flatten().sort()
    rising = out.flatten()[order.indices][order.values > -0.75]
    assert (rising.diff() >= -1e-6).all()


def test_threads_do_not_change_a_bit():
    made, threads, found = inputs((500, 48), torch.float32), torch.get_num_threads(), []
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        bias = made["bias"].clone().requires_grad_()
        bias_gelu(made["x"], bias).square().sum().backward()
        found.append(bias.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 16), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_opcheck(shape, dtype):
    made = inputs(shape, dtype)
    torch.library.opcheck(torch.ops.mae_fast.bias_gelu.default, tuple(x.requires_grad_() for x in made.values()))
    grad = randn(*shape, seed=5, dtype=dtype)
    arguments = (grad, *(x.detach() for x in made.values()))
    for with_value in (True, False):
        torch.library.opcheck(torch.ops.mae_fast.bias_gelu_backward.default, (*arguments, with_value))


def test_gradcheck():
    made = inputs((3, 2, 7), torch.float64)
    assert torch.autograd.gradcheck(bias_gelu, tuple(x.requires_grad_() for x in made.values()))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_reference_equals_the_eager_chain(dtype):
    made = inputs((6, 11), dtype)
    wide = {name: x.double().requires_grad_() for name, x in made.items()}
    out, grad = eager(**wide), randn(6, 11, seed=5, dtype=dtype)
    expected = torch.autograd.grad(out, list(wide.values()), grad.double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(spec.bias_gelu_reference(**made).double(), out, rtol=limit, atol=limit)
    for a, b in zip(spec.bias_gelu_backward_reference(grad, **made, with_value=True), [*expected, out], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit)


@pytest.mark.parametrize("shapes", [((2, 4), (3,)), ((), (1,)), ((2, 4), (1, 4))], ids=str)
def test_bad_shapes_raise_value_errors(shapes):
    with pytest.raises(ValueError, match=r"bias_gelu: bias must be \[W\] for x \[\.\.\., W\], got"):
        bias_gelu(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.native
def test_kernel_checks_its_own_arguments():
    with pytest.raises(KERNEL_ERROR, match=r"bias must be \[W\]"):
        torch.ops.mae_fast.bias_gelu(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(KERNEL_ERROR, match="size and dtype of x"):
        torch.ops.mae_fast.bias_gelu_backward(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(4), False)
