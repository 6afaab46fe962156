"""mlp: value and every gradient against the eager chain, in one chunk and in several chunks of rows."""

import pytest
import torch
from op_cases import KERNEL_ERROR, LAYOUTS, compare, laid_out, names, randn
from support import assert_no_worse_than_eager
from torch.nn import functional as F

from mae_fast.ops.bf16_weight_cache import keep_copy
from mae_fast.ops.mlp import mlp, op, reference
from mae_fast.ops.native import has_matrix_unit

needs_unit = pytest.mark.skipif(not has_matrix_unit(), reason="needs AMX or AVX512_BF16, allowed to oneDNN")
ALL = {"x", "weight1", "bias1", "weight2", "bias2"}


def eager(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def inputs(dtype=torch.float32, rows=(3, 17), d=24, hidden=40, o=24, layout="contiguous"):
    shapes = {"x": (*rows, d), "weight1": (hidden, d), "bias1": (hidden,), "weight2": (o, hidden), "bias2": (o,)}
    scales = {"weight1": d**-0.5, "weight2": hidden**-0.5}
    made = {n: (randn(*s, seed=i) * scales.get(n, 1)).to(dtype) for i, (n, s) in enumerate(shapes.items())}
    return made | {"x": laid_out(made["x"], layout)}


@pytest.fixture(params=[2**21, 40 * 8, 1], ids=["whole", "chunks of 8 rows", "row by row"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [((3, 17), 24, 40, 24), ((51,), 7, 9, 5), ((1, 1), 1, 1, 1)], ids=str)
def test_values_and_gradients(sizes, dtype, layout):
    compare(mlp, eager, inputs(dtype, *sizes, layout), ALL, dtype)


@pytest.mark.parametrize("rows", [(0,), (0, 4), (2, 0)], ids=str)
def test_no_rows(rows):
    compare(mlp, eager, inputs(torch.float32, rows), ALL, torch.float32)


@pytest.mark.parametrize("wanted", [{"x"}, {"weight1"}, {"bias1"}, {"weight2"}, {"bias2"}, {"x", "bias2"}], ids=names)
def test_only_requested_gradients(wanted):
    compare(mlp, eager, inputs(), wanted, torch.float32)


def under_autocast(f, made):
    leaves = {name: x.clone().requires_grad_() for name, x in made.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=made["x"].dtype != torch.float64):
        out = f(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), randn(*out.shape, seed=9, dtype=out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    "sizes",  # whole panels and blocks, one value more and less, several chunks of the bf16 kernel, odd sizes
    [
        *(((3, 17), 24, 40, 24), ((224,), 64, 128, 64), ((257,), 30, 70, 62), ((1,), 2, 2, 2), ((2100,), 8, 66, 6)),
        *(((9,), 7, 40, 6), ((9,), 8, 41, 6), ((9,), 8, 40, 5)),
    ],
    ids=str,
)
def test_under_autocast(sizes):
    made = inputs(torch.float32, *sizes)
    truth = under_autocast(eager, {name: x.double() for name, x in made.items()})
    assert_no_worse_than_eager(under_autocast(mlp, made), under_autocast(eager, made), truth, torch.bfloat16)


@needs_unit
def test_uses_the_stored_copies():
    made = {name: torch.nn.Parameter(x) for name, x in inputs().items()}
    keep_copy(made["weight2"], torch.zeros_like(made["weight2"], dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(**made)
    torch.testing.assert_close(out.float(), made["bias2"].expand_as(out), rtol=1e-2, atol=1e-2)


def arguments(m, d, hidden, o):
    made = inputs(torch.bfloat16, (m,), d, hidden, o)
    return {name: x.float() if "bias" in name else x for name, x in made.items()}


@needs_unit
@pytest.mark.parametrize("sizes", [(5, 4, 6, 8), (300, 32, 64, 16), (0, 2, 4, 2)], ids=str)
def test_opcheck(sizes):
    made = arguments(*sizes)
    for save in (True, False):
        torch.library.opcheck(torch.ops.mae_fast.mlp.default, (*made.values(), save))
    out, h = torch.ops.mae_fast.mlp(**made, save=True)
    assert torch.equal(torch.ops.mae_fast.mlp(**made, save=False)[0], out)
    del made["bias2"]
    grad = randn(sizes[0], sizes[3], seed=9, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.mae_fast.mlp_backward.default, (grad, made.pop("x"), h, *made.values()))


@needs_unit
@pytest.mark.parametrize("extreme", [50.0, -50.0, float("inf"), float("nan")])
def test_extreme_hidden_values(extreme):
    """Far from zero, GELU(h) is 0 or h. NaN stays NaN."""
    made = arguments(3, 2, 2, 2)
    made["x"], made["weight1"], made["weight2"] = (torch.eye(3, 2, dtype=torch.bfloat16)[:n] for n in (3, 2, 2))
    made["bias1"], made["bias2"] = torch.tensor([extreme, 0.0]), torch.zeros(2)
    out, h = torch.ops.mae_fast.mlp(**made, save=True)
    expected = eager(**{name: x.double() for name, x in made.items()}).bfloat16()
    torch.testing.assert_close(out, expected, equal_nan=True)
    dx, *_ = torch.ops.mae_fast.mlp_backward(
        torch.ones(3, 2).bfloat16(), made["x"], h, made["weight1"], made["bias1"], made["weight2"]
    )
    slope = 1.0 if extreme > 0 else 0.0
    torch.testing.assert_close(
        dx[:, 0], torch.full((3,), slope if extreme == extreme else extreme).bfloat16(), equal_nan=True
    )


@needs_unit
def test_threads_do_not_change_a_bit():
    made, threads, found = inputs(rows=(700,), d=64, hidden=192, o=64), torch.get_num_threads(), []
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        found.append(under_autocast(mlp, made))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@needs_unit
def test_kernel_checks_its_own_arguments():
    op, made = torch.ops.mae_fast.mlp, arguments(3, 4, 6, 8)
    _, h = op(**made, save=True)
    wrong = {"x": made["x"].float(), "weight1": made["weight2"], "bias1": torch.zeros(5), "weight2": made["weight1"]}
    for name, value in (wrong | {"bias2": torch.zeros(5)}).items():
        with pytest.raises(KERNEL_ERROR, match="mlp: "):
            op(**made | {name: value}, save=True)
    del made["bias2"]
    grad, backward = torch.zeros(3, 8, dtype=torch.bfloat16), torch.ops.mae_fast.mlp_backward
    for name, value in (wrong | {"grad": grad[:2], "h": h[:, :2]}).items():
        with pytest.raises(KERNEL_ERROR, match="mlp_backward: "):
            backward(**{"grad": grad, "h": h} | made | {name: value})
    with pytest.raises(KERNEL_ERROR, match="must be even"):
        op(*(torch.zeros(n, n, dtype=torch.bfloat16) if n else torch.zeros(3) for n in (3, 3, 0, 3, 0)), save=True)


def test_reference_equals_the_eager_chain():
    made = {name: x.requires_grad_() for name, x in arguments(9, 4, 6, 8).items()}
    out = eager(*(x if "bias" not in name else x.bfloat16() for name, x in made.items()))
    grads = torch.autograd.grad(out, list(made.values()), torch.ones_like(out))
    values = {name: x.detach() for name, x in made.items()}
    found, h = reference.mlp_reference(**values, save=True)
    torch.testing.assert_close(found, out, rtol=2e-2, atol=2e-2)
    del values["bias2"]
    back = reference.mlp_backward_reference(grad=torch.ones_like(out), h=h, **values)
    for a, b in zip(back, grads, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)


def test_gradcheck():
    made = inputs(torch.float64, (2, 3), 3, 4, 2)
    assert torch.autograd.gradcheck(mlp, [x.requires_grad_() for x in made.values()])


def test_double_backward_raises():
    made = [x.requires_grad_() for x in inputs().values()]
    grad = torch.autograd.grad(mlp(*made).square().sum(), made[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients_equal_single_ones(dtype):
    made = [x.requires_grad_() for x in inputs(rows=(2, 3)).values()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = mlp(*made)
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, made, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for found, expected in zip(batched, torch.autograd.grad(out, made, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(found[i], expected)


def test_compiles_to_one_graph():
    made = inputs()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    truth = under_autocast(eager, {name: x.double() for name, x in made.items()})
    assert_no_worse_than_eager(under_autocast(compiled, made), under_autocast(eager, made), truth, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 1000])
@pytest.mark.parametrize("width", [1, 40, 3072])
def test_chunks_cover_all_rows_once(rows, width, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", 40 * 8)
    h = torch.zeros(rows, width)
    for part in op._chunks(h):
        assert len(h[part]) * width <= 40 * 8 or len(h[part]) == 1
        h[part] += 1
    assert (h == 1).all()
