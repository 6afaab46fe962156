"""mlp: value and every gradient against the eager chain, whole and in chunks of rows."""

import pytest
import torch
from op_cases import LAYOUTS, compare, laid_out, names, randn
from support import assert_no_worse_than_eager
from torch.nn import functional as F

from mae_fast.ops.bf16_weight_cache import keep_copy
from mae_fast.ops.mlp import mlp, op
from mae_fast.ops.native import has_matrix_unit

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
@pytest.mark.parametrize("rows", [(3, 17), (400,)], ids=str)
def test_under_autocast(rows):
    made = inputs(rows=rows)
    truth = under_autocast(eager, {name: x.double() for name, x in made.items()})
    assert_no_worse_than_eager(under_autocast(mlp, made), under_autocast(eager, made), truth, torch.bfloat16)


@pytest.mark.skipif(not has_matrix_unit(), reason="needs AMX or AVX512_BF16, allowed to oneDNN")
def test_takes_the_kept_copies():
    made = {name: torch.nn.Parameter(x) for name, x in inputs().items()}
    keep_copy(made["weight2"], torch.zeros_like(made["weight2"], dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(**made)
    torch.testing.assert_close(out.float(), made["bias2"].expand_as(out), rtol=1e-2, atol=1e-2)


def test_gradcheck():
    made = inputs(torch.float64, (2, 3), 3, 4, 2)
    assert torch.autograd.gradcheck(mlp, [x.requires_grad_() for x in made.values()])


def test_double_backward_raises():
    made = [x.requires_grad_() for x in inputs().values()]
    grad = torch.autograd.grad(mlp(*made).square().sum(), made[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients_are_those_of_each(dtype):
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
    found, expected = (under_autocast(f, made) for f in (compiled, mlp))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 1000])
@pytest.mark.parametrize("width", [1, 40, 3072])
def test_chunks_cover_all_rows_once(rows, width, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", 40 * 8)
    h = torch.zeros(rows, width)
    for part in op._chunks(h):
        assert len(h[part]) * width <= 40 * 8 or len(h[part]) == 1
        h[part] += 1
    assert (h == 1).all()
