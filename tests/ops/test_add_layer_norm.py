"""add_layer_norm: values and every gradient against the eager chain, dispatcher contracts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import FLOATING, KERNEL_ERROR, LAYOUTS, compare, laid_out, names, randn
from support import assert_no_worse_than_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.add_layer_norm import reference as spec
from mae_fast.ops.native import has_kernel

EPS = 1e-6
# The last dimension: whole vectors of any instruction set, less than one vector, one value more and less
CASES = [(2, 5, 64), (3, 7, 17), (40, 31), (1, 1), (4, 3), (300, 16), (2, 2, 2, 15), (9,), (2, 1280)]
EMPTY = [(0, 8), (2, 0, 5), (3, 0)]


def eager(x, weight, bias, residual=None, residual_bias=None):
    """Sum and normalised sum, stacked, so that gradients flow through both."""
    if residual is not None:
        x = x[..., x.shape[-2] - residual.shape[-2] :, :] if x.ndim > 1 else x
        x = x + (residual if residual_bias is None else residual + residual_bias)
    return torch.stack([x, F.layer_norm(x, weight.shape, weight, bias, EPS)])


def ours(x, weight, bias, residual=None, residual_bias=None):
    return torch.stack(add_layer_norm(x, residual, weight, bias, EPS, residual_bias=residual_bias))


def inputs(shape, dtype, layout="contiguous", with_residual=True, with_residual_bias=False):
    made = {
        "x": randn(*shape, seed=1) * 2 + 1,
        "residual": randn(*shape, seed=2),
        "weight": randn(shape[-1], seed=3),
        "bias": randn(shape[-1], seed=4),
        "residual_bias": randn(shape[-1], seed=6),
    }
    if not with_residual:
        del made["residual"]
    if not with_residual_bias:
        del made["residual_bias"]
    return {name: laid_out(x.to(dtype), layout) for name, x in made.items()}


ORDER = ("x", "weight", "bias", "residual", "residual_bias")


# Shape of x, and tokens of the residual
FEWER = [((2, 5, 64), 3), ((3, 7, 17), 6), ((2, 2, 4, 15), 1), ((40, 31), 9), ((2, 197, 24), 147), ((0, 4, 3), 2)]
FEWER += [((2, 4, 3), 0)]


def with_fewer_tokens(shape, tokens, dtype, layout="contiguous", with_residual_bias=False):
    made = inputs(shape, dtype, layout, with_residual_bias=with_residual_bias)
    return made | {"residual": laid_out(made["residual"][..., :tokens, :].contiguous(), layout)}


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("shape", "tokens"), FEWER, ids=str)
def test_values_and_gradients_of_a_residual_with_fewer_tokens(shape, tokens, dtype, layout):
    """The result leaves out the first tokens of x, and their gradient is 0."""
    made = with_fewer_tokens(shape, tokens, dtype, layout)
    compare(ours, eager, made, set(made), dtype)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("shape", "tokens"), FEWER, ids=str)
def test_residual_bias_in_the_kernel_with_fewer_tokens(kernel, shape, tokens, dtype):
    made = with_fewer_tokens(shape, tokens, dtype, with_residual_bias=True)
    compare(kernel, eager, made, set(made), dtype)


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("wanted", [{"x"}, {"residual"}], ids=names)
def test_only_requested_gradients_with_fewer_tokens(used, wanted):
    made = with_fewer_tokens((2, 5, 33), 3, torch.float32)
    compare(lambda **x: ours(**x)[used], lambda **x: eager(**x)[used], made, wanted, torch.float32)


@pytest.mark.parametrize("wanted", [{"x"}, {"residual"}, {"x", "residual"}], ids=names)
def test_gradients_of_the_sum_alone_with_fewer_tokens(wanted):
    """If the norm is not used, its kernel does not run in the backward pass."""
    made = with_fewer_tokens((2, 5, 33), 3, torch.float32)
    compare(
        lambda **x: add_layer_norm(x["x"], x["residual"], x["weight"], x["bias"])[0], lambda **x: eager(**x)[0], made,
        wanted, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes_with_fewer_tokens(dtypes):
    """As under autocast: the residual is bf16, or the sum is wider than x."""
    made = with_fewer_tokens((2, 7, 33), 4, torch.float32)
    made = made | {"x": made["x"].to(dtypes[0]), "residual": made["residual"].to(dtypes[1])}
    leaves = {name: x.requires_grad_() for name, x in made.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    grad = randn(2, 2, 4, 33, seed=9)
    found = torch.autograd.grad(ours(**leaves), [*leaves.values()], grad.float())
    truth = torch.autograd.grad(eager(**exact), [*exact.values()], grad)
    for a, b, leaf in zip(found, truth, leaves.values(), strict=True):
        assert (a.dtype, a.shape) == (leaf.dtype, leaf.shape)
        limit = 3e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    "sizes", [((2, 3, 4), (2, 4, 4)), ((2, 3, 4), (1, 2, 4)), ((2, 3, 4), (3, 4)), ((4,), (1, 4))], ids=str
)
def test_a_residual_of_other_sizes_raises_a_value_error(sizes):
    x, residual = map(torch.zeros, sizes)
    with pytest.raises(ValueError, match=r"add_layer_norm: x must be \[\.\.\., T, D\], residual"):
        add_layer_norm(x, residual, torch.ones(4), torch.ones(4))


@pytest.fixture
def kernel():
    """``ours`` by the op itself. The public function passes it no residual_bias on CPUs."""

    def op(x, weight, bias, residual, residual_bias):
        return torch.stack(
            torch.ops.mae_fast.add_layer_norm(x, residual, residual_bias, weight, bias, EPS, x.dtype)[:2]
        )

    one = torch.ones(1)
    try:
        op(one[None], one, one, one[None], one)
    except KERNEL_ERROR:
        pytest.skip("the C++ kernel does not support residual_bias")
    return op


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", CASES + EMPTY, ids=str)
def test_values_and_gradients(shape, dtype, layout, with_residual):
    made = inputs(shape, dtype, layout, with_residual)
    compare(ours, eager, made, set(made), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_with_other_strides(layout):
    leaves = [x.requires_grad_() for x in inputs((3, 7, 17), torch.float32).values()]
    x, residual, weight, bias = leaves
    out = add_layer_norm(x, residual, weight, bias, EPS)
    grads = [laid_out(randn(3, 7, 17, seed=i, dtype=torch.float32), layout) for i in (7, 8)]
    found = torch.autograd.grad(out, leaves, grads, retain_graph=True)
    expected = torch.autograd.grad(out, leaves, [g.clone(memory_format=torch.contiguous_format) for g in grads])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", CASES + EMPTY, ids=str)
def test_residual_bias(shape, dtype, layout):
    made = inputs(shape, dtype, layout, with_residual_bias=True)
    compare(ours, eager, made, set(made), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", CASES + EMPTY, ids=str)
def test_residual_bias_in_the_kernel(kernel, shape, dtype, layout):
    made = inputs(shape, dtype, layout, with_residual_bias=True)
    compare(kernel, eager, made, set(made), dtype)


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("wanted", [{"x"}, {"residual"}, {"residual_bias"}], ids=names)
def test_only_requested_gradients_in_the_kernel(kernel, used, wanted):
    made = inputs((4, 33), torch.float32, with_residual_bias=True)
    compare(lambda **x: kernel(**x)[used], lambda **x: eager(**x)[used], made, wanted, torch.float32)


@pytest.mark.parametrize(("rows", "width", "size"), [(2100, 3, 1), (70, 500, 1), (70, 1300, 1), (140, 1000, 132)])
def test_more_rows_than_programs(monkeypatch, rows, width, size):
    """In the backward on a GPU, each program sums several rows, and there are several groups of programs."""
    kernels = pytest.importorskip("mae_fast.ops.triton_common")
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", size)  # the interpreter has no GPU to ask
    made = inputs((rows * (75 if torch.cuda.is_available() else 1), width), torch.float32)
    compare(ours, eager, made, set(made), torch.float32)


@pytest.mark.parametrize("width", [8192, 8200])
def test_wide_rows(width):
    """The widest row that the GPU kernel supports, and a wider one."""
    made = inputs((5, width), torch.float32)
    compare(ours, eager, made, set(made), torch.float32)


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("wanted", [{"x"}, {"residual"}, {"weight"}, {"bias"}, {"x", "weight"}], ids=names)
def test_only_requested_gradients(used, wanted):
    """Gradients of one of the two outputs with respect to some of the inputs."""
    if used == 0:
        wanted = wanted - {"weight", "bias"} or {"x"}
    compare(
        lambda **made: ours(**made)[used], lambda **made: eager(**made)[used], inputs((4, 33), torch.float32), wanted,
        torch.float32,
    )  # fmt: skip


# x, residual, normed: the model's dtypes under autocast, then all other combinations
MIXED = [(torch.float32, torch.bfloat16, torch.bfloat16), (torch.float32, None, torch.bfloat16)]
MIXED += [(torch.float32, torch.float16, torch.float16), (torch.float32, torch.float32, torch.bfloat16)]
MIXED += [(torch.bfloat16, torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16, torch.float32)]
MIXED += [(torch.float64, torch.float32, torch.float32), (torch.float16, torch.bfloat16, None)]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("shape", [(33,), (5, 33), (2, 50, 64)], ids=str)
def test_mixed_dtypes(shape, dtypes):
    """The sum has the wider dtype and is normalised before it is rounded. Each gradient has the dtype of its input."""
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


# Dtypes of the op: x and the sum, residual, residual_bias, normed
KINDS = [(torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)]
KINDS += [(torch.float32, torch.float16, torch.float16, torch.float32)]
KINDS += [(torch.float32, torch.float32, torch.bfloat16, torch.float16)]
KINDS += [(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)]
KINDS += [(torch.float64, torch.bfloat16, torch.float32, torch.float32)]
KINDS += [(torch.float16, torch.float16, torch.float64, torch.float16)]


@pytest.mark.parametrize("dtypes", KINDS, ids=str)
def test_mixed_dtypes_in_the_kernel(kernel, dtypes):
    """Against the reference in float64, forward and backward are as exact as the reference in the same dtypes."""

    def run(op, backward, made, dtype, low):
        x, residual, residual_bias, weight, bias, grad_sum, grad = made
        total, normed, stats = op(x, residual, residual_bias, weight, bias, EPS, dtype)
        return total, normed, stats, *backward(grad_sum, grad, total, stats, weight, residual_bias, low)

    shape, (wide, *_, out) = (7, 33), dtypes
    made = [randn(*(shape if i in (0, 1, 5, 6) else shape[1:]), seed=i) for i in range(7)]
    kinds = (*dtypes[:3], torch.float32, torch.bfloat16, wide, out)
    made = [x.to(dtype) for x, dtype in zip(made, kinds, strict=True)]
    forward, backward = spec.add_layer_norm_reference, spec.add_layer_norm_backward_reference
    op, op_backward = torch.ops.mae_fast.add_layer_norm, torch.ops.mae_fast.add_layer_norm_backward
    found = run(op, op_backward, made, out, dtypes[1])
    yardstick = run(forward, backward, made, out, dtypes[1])
    truth = list(run(forward, backward, [x.double() for x in made], torch.float64, torch.float64))
    truth[4] = truth[3] if dtypes[1] != wide else truth[4]
    for mine, eagers, exact in zip(found, yardstick, truth, strict=True):
        assert mine.dtype == eagers.dtype
        if exact.numel():
            dtype = eagers.dtype if wide.itemsize >= 4 else wide  # the sum was rounded to it
            assert_no_worse_than_eager({"": mine}, {"": eagers}, {"": exact}, dtype)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_a_gpu_runs_a_single_op(dtypes):
    """No addition, layer norm or rounding runs separately, in any dtype. Only x may be cast."""
    if not has_kernel("add_layer_norm", "cuda"):
        pytest.skip("Triton is not installed")
    calls = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(str(op))
            return op(*args, **(kwargs or {}))

    with FakeTensorMode(), Log():
        x, residual, one = (torch.empty(s, device="cuda") for s in ((2, 3, 8), (2, 3, 8), 8))
        x, residual = x.to(dtypes[0]), None if dtypes[1] is None else residual.to(dtypes[1])
        calls.clear()
        total, normed = add_layer_norm(x, residual, one, one, EPS, dtypes[2], None if residual is None else one)
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    assert (total.dtype, normed.dtype) == (wide, dtypes[2] or wide)
    calls = [name for name in calls if not name.startswith("prim.") and name != "aten.promote_types.default"]
    assert calls == ["aten._to_copy.default"] * (x.dtype != wide) + ["mae_fast.add_layer_norm.default"]


@pytest.mark.parametrize("with_residual_bias", [False, True])
def test_torch_compile(with_residual_bias):
    made = inputs((4, 33), torch.float32, with_residual_bias=with_residual_bias)
    compare(torch.compile(ours, fullgraph=True, backend="aot_eager"), eager, made, set(made), torch.float32)


def test_large_mean_does_not_lose_precision():
    """With a mean of 3000 std, the variance must be computed from differences, not as a difference of squares."""
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


def test_constant_rows_after_rounding():
    """The sum is rounded before it is normalised: here to 300, so that its std is 0."""
    x, residual = torch.full((2, 40), 300.0), torch.linspace(-0.9, 0.9, 40).expand(2, 40)
    weight, bias = torch.full((40,), 2.0), torch.full((40,), 3.0)
    total, normed = add_layer_norm(*(t.bfloat16() for t in (x, residual, weight, bias)))
    assert torch.equal(total.float(), x)
    assert torch.equal(normed.float(), torch.full((2, 40), 3.0))


@given(rows=st.integers(1, 40), width=st.integers(2, 90), seed=st.integers(0, 999))
def test_rows_get_mean_0_and_variance_1(rows, width, seed):
    """This holds with weight 1 and bias 0, whatever the scale of the row."""
    x = randn(rows, width, seed=seed, dtype=torch.float32)
    scale = 10 ** randn(rows, 1, seed=seed + 1, dtype=torch.float32)
    _, normed = add_layer_norm(x * scale, None, torch.ones(width), torch.zeros(width), 1e-12)
    rounding = 2**-23 * x.abs().amax(-1) / x.std(-1, correction=0)  # of the mean, divided by the std
    assert (normed.mean(-1).abs() < 1e-5 + rounding).all()
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


@pytest.mark.parametrize("dtypes", [(d, d) for d in FLOATING] + [(torch.float32, torch.bfloat16)], ids=str)
def test_opcheck_with_fewer_tokens(dtypes):
    made = with_fewer_tokens((2, 5, 8), 3, dtypes[0])
    x, residual, weight, bias = (made[n].requires_grad_() for n in ("x", "residual", "weight", "bias"))
    residual = residual.detach().to(dtypes[1]).requires_grad_()
    torch.library.opcheck(torch.ops.mae_fast.add_layer_norm.default, (x, residual, None, weight, bias, EPS, dtypes[1]))
    given = [t.detach() for t in (x, residual, weight, bias)]
    total, normed, stats = torch.ops.mae_fast.add_layer_norm(*given[:2], None, *given[2:], EPS, dtypes[1])
    arguments = (total, normed, total, stats, given[2], None, dtypes[1], 2)
    torch.library.opcheck(torch.ops.mae_fast.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("dtypes", [(d, d) for d in FLOATING] + [(torch.float32, torch.bfloat16)], ids=str)
def test_opcheck_with_residual_bias(kernel, dtypes):
    x, weight, bias, residual, residual_bias = (
        made.requires_grad_() for made in (inputs((2, 3, 5), dtypes[0], with_residual_bias=True)[n] for n in ORDER)
    )
    residual = residual.detach().to(dtypes[1]).requires_grad_()
    torch.library.opcheck(
        torch.ops.mae_fast.add_layer_norm.default, (x, residual, residual_bias, weight, bias, EPS, dtypes[1])
    )
    given = [t.detach() for t in (x, residual, residual_bias, weight, bias)]
    total, normed, stats = torch.ops.mae_fast.add_layer_norm(*given, EPS, dtypes[1])
    arguments = (total, normed, total, stats, given[3], given[2], dtypes[1])
    torch.library.opcheck(torch.ops.mae_fast.add_layer_norm_backward.default, arguments)


def test_gradcheck_with_residual_bias(kernel):
    made = inputs((3, 2, 7), torch.float64, with_residual_bias=True)
    leaves = [made[name].requires_grad_() for name in ORDER]
    assert torch.autograd.gradcheck(kernel, leaves)


@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck(with_residual):
    made = inputs((3, 2, 7), torch.float64, with_residual=with_residual)
    leaves = [x.requires_grad_() for x in made.values()]
    assert torch.autograd.gradcheck(lambda *given: ours(**dict(zip(made, given, strict=True))), leaves)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_reference_equals_the_eager_chain(low):
    made = inputs((6, 11), torch.float32)
    leaves = {name: x.double().requires_grad_() for name, x in made.items()}
    out, grads = eager(**leaves), randn(2, 6, 11, seed=5, dtype=torch.float32)
    expected = torch.autograd.grad(out, [leaves[n] for n in ("x", "residual", "weight", "bias")], grads.double())
    x, residual, weight, bias = (made[n] for n in ("x", "residual", "weight", "bias"))
    total, normed, stats = spec.add_layer_norm_reference(x, residual, None, weight, bias, EPS, torch.float32)
    torch.testing.assert_close(torch.stack([total, normed]).double(), out)
    *found, dresidual_bias = spec.add_layer_norm_backward_reference(*grads, total, stats, weight, None, low)
    assert not dresidual_bias.numel()
    if low == torch.float32:
        assert not found[1].numel()
        found[1] = found[0]
    for a, b in zip(found, expected, strict=True):
        limit = 1e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_reference_with_residual_bias_equals_the_eager_chain(low):
    made = inputs((6, 11), torch.float32, with_residual_bias=True)
    leaves = {name: x.double().requires_grad_() for name, x in made.items()}
    out, grads = eager(**leaves), randn(2, 6, 11, seed=5, dtype=torch.float32)
    expected = torch.autograd.grad(out, [leaves[n] for n in ("x", "weight", "bias", "residual_bias")], grads.double())
    x, weight, bias, residual, residual_bias = (made[n] for n in ORDER)
    total, normed, stats = spec.add_layer_norm_reference(x, residual, residual_bias, weight, bias, EPS, torch.float32)
    torch.testing.assert_close(torch.stack([total, normed]).double(), out)
    dx, _, *found = spec.add_layer_norm_backward_reference(*grads, total, stats, weight, residual_bias, low)
    for a, b in zip((dx, *found), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual_bias", [(3,), (1, 4), ()], ids=str)
def test_a_bad_residual_bias_raises_a_value_error(residual_bias):
    x, one = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"add_layer_norm: residual_bias must be \[\d+\]"):
        add_layer_norm(x, x, one, one, residual_bias=torch.zeros(residual_bias))
    with pytest.raises(ValueError, match="needs a residual"):
        add_layer_norm(x, None, one, one, residual_bias=one)


@pytest.mark.parametrize("shapes", [((2, 4), None, 3), ((2, 4), (2, 3), 4), ((), None, 1)], ids=str)
def test_bad_shapes_raise_value_errors(shapes):
    x, residual, width = shapes
    with pytest.raises(ValueError, match=r"add_layer_norm: x must be"):
        add_layer_norm(
            torch.zeros(x), None if residual is None else torch.zeros(residual), torch.ones(width), torch.zeros(width)
        )


@pytest.mark.native
def test_kernel_checks_its_own_arguments():
    op, back = torch.ops.mae_fast.add_layer_norm, torch.ops.mae_fast.add_layer_norm_backward
    x, one = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(KERNEL_ERROR, match=r"weight must be \[D\]"):
        op(x, None, None, torch.ones(3), one, EPS, torch.float32)
    with pytest.raises(KERNEL_ERROR, match=r"bias must be \[D\]"):
        op(x, None, None, one, torch.ones(3), EPS, torch.float32)
    with pytest.raises(KERNEL_ERROR, match="residual must have the size of x"):
        op(x, torch.zeros(3, 4), None, one, one, EPS, torch.float32)
    with pytest.raises(KERNEL_ERROR, match="residual must have the size of x, or fewer tokens"):
        op(torch.zeros(2, 3, 4), torch.zeros(1, 2, 4), None, one, one, EPS, torch.float32)
    with pytest.raises(KERNEL_ERROR, match="residual must have the dtype of x or of normed"):
        op(x, x.half(), None, one, one, EPS, torch.bfloat16)
    with pytest.raises(KERNEL_ERROR, match="sum dtype Double with BFloat16 is not supported"):
        op(x.double(), None, None, one, one, EPS, torch.bfloat16)
    with pytest.raises(KERNEL_ERROR, match="residual_bias is not supported"):
        op(x, x, one, one, one, EPS, torch.float32)
    stats = torch.zeros(2, 2)
    with pytest.raises(KERNEL_ERROR, match="residual_bias is not supported"):
        back(None, x, x, stats, one, one, torch.float32)
    with pytest.raises(KERNEL_ERROR, match="must have the size of sum"):
        back(None, torch.zeros(3, 4), x, stats, one, None, torch.float32)
    with pytest.raises(KERNEL_ERROR, match=r"stats must be \[2, R\]"):
        back(None, x, x, torch.zeros(2, 3), one, None, torch.float32)
    with pytest.raises(KERNEL_ERROR, match="dtype of sum or residual_dtype"):
        back(None, x.half(), x, stats, one, None, torch.bfloat16)
