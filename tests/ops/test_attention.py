"""attention: value and gradient against the eager chain, dispatcher contracts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import FLOATING, KERNEL_ERROR, LAYOUTS, compare, laid_out, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mae_fast.errors import UserError
from mae_fast.models.blocks import set_attention
from mae_fast.models.mae import build
from mae_fast.ops.attention import attention, op
from mae_fast.ops.attention import reference as spec
from mae_fast.ops.attention.op import has_native
from mae_fast.ops.linear import linear
from mae_fast.ops.native import has_matrix_unit

# N, T, H, d: heads of the paper's models (64 and 80 in the encoders, 32 in the decoders), then odd ones
CASES = [(2, 50, 3, 64), (1, 65, 2, 80), (2, 197, 2, 32), (1, 257, 2, 32), (3, 1, 2, 8), (1, 2, 1, 1), (2, 49, 5, 7)]
CASES += [(1, 48, 1, 16), (1, 96, 2, 17), (1, 97, 1, 33), (5, 7, 4, 3), (1, 1030, 1, 64)]
EMPTY = [(0, 5, 2, 4), (2, 0, 2, 4)]


def eager(heads, first_query=0):
    """Attention as separate eager ops."""

    def call(qkv):
        n, t, width = qkv.shape
        q, k, v = qkv.reshape(n, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
        return (p @ v).transpose(1, 2).reshape(n, t, width // 3)[:, first_query:]

    return call


def ours(heads, first_query=0):
    return lambda qkv: attention(qkv, heads, first_query=first_query)


def packed(case, dtype, layout="contiguous", seed=1, scale=1.0):
    n, t, heads, d = case
    return laid_out((randn(n, t, 3 * heads * d, seed=seed) * scale).to(dtype), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_values_and_gradients(case, dtype, layout):
    made = {"qkv": packed(case, dtype, layout)}
    compare(ours(case[2]), eager(case[2]), made, {"qkv"}, dtype)


# A case and its first query: one query, all but one, and counts around the size of a block of queries
LAST_QUERIES = [
    ((2, 197, 2, 32), 50),
    ((2, 50, 3, 64), 13),
    ((1, 65, 2, 80), 64),
    ((2, 49, 5, 7), 1),
    ((2, 2, 1, 2), 1),
]
LAST_QUERIES += [((1, 160, 1, 16), first) for first in (15, 16, 80, 95, 97, 112)]


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("case", "first"), LAST_QUERIES, ids=str)
def test_values_and_gradients_of_the_last_queries(case, first, dtype, layout):
    """The earlier tokens are keys and values only."""
    made = {"qkv": packed(case, dtype, layout)}
    compare(ours(case[2], first), eager(case[2], first), made, {"qkv"}, dtype)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_last_queries_without_the_matrix_unit_and_with_sdpa(backend):
    made = {"qkv": packed((2, 70, 2, 32), torch.bfloat16)}
    with torch.backends.mkldnn.flags(enabled=False):
        compare(
            lambda qkv: attention(qkv, 2, backend=backend, first_query=9), eager(2, 9), made, {"qkv"}, torch.bfloat16
        )


def test_bias_gradient_with_the_last_queries():
    made = {"qkv": packed((2, 9, 2, 4), torch.float64), "bias": randn(24, seed=2)}

    def split(qkv, bias):
        return attention(qkv + bias.detach(), 2, bias=bias, first_query=4)

    compare(split, lambda qkv, bias: eager(2, 4)(qkv + bias), made, set(made), torch.float64)


@pytest.mark.parametrize("first", [-1, 9, 10])
def test_an_invalid_first_query_raises_a_value_error(first):
    qkv = torch.zeros(2, 9, 24)
    with pytest.raises(ValueError, match=f"first_query must be in 0..8, .*got {first}"):
        attention(qkv, 2, first_query=first)
    with pytest.raises(ValueError, match="0 with lengths, got 2"):
        attention(qkv[:1], 2, (4, 5), first_query=2)


@pytest.mark.parametrize("dtype", FLOATING[:2], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 6.0, 40.0])
def test_uniform_and_peaked_softmax(scale, dtype):
    """From nearly equal weights to rows in which one token has the weight 1."""
    made = {"qkv": packed((2, 60, 2, 16), dtype, scale=scale)}
    compare(ours(2), eager(2), made, {"qkv"}, dtype)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_nan_affects_only_its_image(dtype):
    qkv = packed((3, 9, 2, 8), dtype)
    qkv[1, 4, 3] = float("nan")  # a query of head 0
    out, expected = attention(qkv, 2), spec.attention_reference(qkv, None, 2, False)[0]
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().sum() == 8
    qkv[1, 4, 19] = float("nan")  # a key of head 0, which every query attends to
    assert attention(qkv, 2).isnan().sum() == 9 * 8


@pytest.mark.parametrize("dtype", FLOATING[1:3], ids=str)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_without_the_matrix_unit(case, dtype):
    """Without oneDNN, the kernel computes the products itself, in fp32."""
    with torch.backends.mkldnn.flags(enabled=False):
        compare(ours(case[2]), eager(case[2]), {"qkv": packed(case, dtype)}, {"qkv"}, dtype)


@pytest.mark.skipif(not has_matrix_unit(), reason="needs AMX or AVX512_BF16, allowed to oneDNN")
def test_on_the_matrix_unit_and_without_it():
    """The results are close but not equal, which shows that both implementations ran."""
    qkv = packed((2, 70, 2, 32), torch.bfloat16)
    found = attention(qkv, 2)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = attention(qkv, 2)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [63, 64, 65, 79, 80, 81, 128, 144, 145, 160, 161])
def test_around_a_block_of_queries(tokens):
    made = {"qkv": packed((1, tokens, 1, 16), torch.bfloat16)}
    compare(ours(1), eager(1), made, {"qkv"}, torch.bfloat16)


@given(
    n=st.integers(1, 3), t=st.integers(1, 120), heads=st.integers(1, 3), d=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_output_is_an_average_of_the_values(n, t, heads, d, seed):
    """Each output lies between the smallest and largest value. With equal keys it is the mean of the values."""
    qkv = packed((n, t, heads, d), torch.float32, seed=seed)
    q, k, v = qkv.reshape(n, t, 3, heads * d).unbind(2)
    out = attention(qkv, heads)
    assert (out <= v.amax(1, keepdim=True) + 1e-5).all()
    assert (out >= v.amin(1, keepdim=True) - 1e-5).all()
    same = torch.cat([q, k[:, :1].expand_as(k), v], dim=2)
    torch.testing.assert_close(attention(same, heads), v.mean(1, keepdim=True).expand_as(v), rtol=1e-5, atol=2e-6)


def test_threads_do_not_change_a_bit():
    qkv, threads, found = packed((3, 100, 4, 32), torch.float32), torch.get_num_threads(), []
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, 4)
        out.square().sum().backward()
        found.append((out.detach(), leaf.grad))
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("case", [(2, 5, 2, 4), (1, 1, 1, 1), (0, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_opcheck(case, dtype):
    qkv = packed(case, dtype).requires_grad_()
    torch.library.opcheck(torch.ops.mae_fast.attention.default, (qkv, None, case[2], False))
    grad = randn(case[0], case[1], case[2] * case[3], seed=5, dtype=dtype)
    out, lse = torch.ops.mae_fast.attention(qkv.detach(), None, case[2], False)
    torch.library.opcheck(torch.ops.mae_fast.attention_backward.default, (grad, qkv.detach(), out, lse, None, case[2]))
    if case[1] > 2:
        torch.library.opcheck(torch.ops.mae_fast.attention.default, (qkv, None, case[2], False, 2))
        arguments = (grad[:, 2:], qkv.detach(), out[:, 2:], lse, None, case[2], 2)
        torch.library.opcheck(torch.ops.mae_fast.attention_backward.default, arguments)


@pytest.mark.parametrize("case", [(2, 5, 2, 4), (1, 7, 1, 3)], ids=str)
def test_gradcheck(case):
    for first in (0, 3):
        assert torch.autograd.gradcheck(ours(case[2], first), packed(case, torch.float64).requires_grad_())


def test_double_backward_is_refused():
    qkv = packed((1, 4, 1, 4), torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(attention(qkv, 1).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    compiled = torch.compile(ours(2), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in [(2, 5, 2, 4), (3, 9, 2, 4)]:
        qkv = packed(case, torch.float32)
        assert torch.equal(compiled(qkv), attention(qkv, 2))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES[:6] + EMPTY, ids=str)
def test_reference_equals_the_eager_chain(case, dtype):
    """The reference, which runs without a compiler, and its gradient."""
    qkv, heads = packed(case, dtype), case[2]
    grad = randn(case[0], case[1], heads * case[3], seed=5, dtype=dtype)
    wide = qkv.double().requires_grad_()
    out = eager(heads)(wide)
    (expected,) = torch.autograd.grad(out, wide, grad.double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        spec.attention_reference(qkv, None, heads, False)[0].double(), out, rtol=limit, atol=limit
    )
    found = spec.attention_backward_reference(grad, qkv, None, None, None, heads)[0].double()
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    if len(qkv) and case[1] > 1:
        out, lse = spec.attention_reference(qkv, None, heads, True)
        last = spec.attention_reference(qkv, None, heads, True, 1)
        torch.testing.assert_close(last, (out[:, 1:], lse[:, :, 1:]))
        (expected,) = torch.autograd.grad(eager(heads, 1)(wide), wide, grad[:, 1:].double())
        found = spec.attention_backward_reference(grad[:, 1:], qkv, None, None, None, heads, 1)[0].double()
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr("mae_fast.ops.attention.op.has_native", lambda op, key: not has_native(op, key))
    compare(ours(2), eager(2), {"qkv": packed((2, 9, 2, 8), torch.float32)}, {"qkv"}, torch.float32)


@pytest.mark.parametrize(("shape", "heads"), [((2, 12), 1), ((2, 4, 13), 1), ((2, 4, 12), 0), ((2, 4, 12), 5)], ids=str)
def test_bad_shapes_raise_value_errors(shape, heads):
    with pytest.raises(ValueError, match=r"attention: qkv must be \[N, T, 3\*H\*d\] with H = num_heads, got"):
        attention(torch.zeros(shape), heads)


@pytest.mark.native
def test_kernel_checks_its_own_arguments():
    op, backward = torch.ops.mae_fast.attention, torch.ops.mae_fast.attention_backward
    with pytest.raises(KERNEL_ERROR, match="must be a multiple of 3"):
        op(torch.zeros(1, 4, 13), None, 1, False)
    with pytest.raises(KERNEL_ERROR, match=r"first_query must be in 0\.\.3, got 4"):
        op(torch.zeros(1, 4, 12), None, 1, False, 4)
    with pytest.raises(KERNEL_ERROR, match="bias and save_lse are not supported"):
        op(torch.zeros(1, 4, 12), None, 1, True)
    empty, qkv = torch.empty(0), torch.zeros(1, 4, 12)
    with pytest.raises(KERNEL_ERROR, match=r"grad must be \[1, 4, 4\]"):
        backward(torch.zeros(1, 5, 4), qkv, empty, empty, None, 1)
    with pytest.raises(KERNEL_ERROR, match="dtype of qkv"):
        backward(torch.zeros(1, 4, 4).double(), qkv, empty, empty, None, 1)
    with pytest.raises(KERNEL_ERROR, match="bias is not supported"):
        backward(torch.zeros(1, 4, 4), qkv, empty, empty, torch.zeros(12), 1)


@pytest.mark.parametrize("dtype", FLOATING[:2], ids=str)
def test_bias_gradient_equals_that_of_the_projection(dtype):
    """``qkv`` already contains ``bias``. Attention computes the gradient that the projection does not."""
    x, weight, bias = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((2, 7, 12), (24, 12), (24,))))
    made = {"x": x, "weight": weight, "bias": bias}

    def whole(x, weight, bias):
        return eager(2)(F.linear(x, weight, bias))

    def split(x, weight, bias):
        return attention(linear(x, weight, bias, bias_gradient=False), 2, bias=bias)

    compare(split, whole, made, set(made), dtype)


class Xformers:
    """Mock of xformers.ops for tensors without data. It records its calls."""

    def __init__(self, refuses=()):
        self.refuses, self.calls, self.fmha = refuses, [], self
        self.BlockDiagonalMask = self

    def from_seqlens(self, lengths, device):
        return f"{tuple(lengths)} on {device.type}"

    def memory_efficient_attention(self, q, k, v, attn_bias):
        if q.dtype in self.refuses:
            raise NotImplementedError("No operator found")
        assert all(x.shape == q.shape and x.untyped_storage() is q.untyped_storage() for x in (k, v))
        self.calls.append((q.dtype, tuple(q.shape), attn_bias))
        return torch.empty_like(q)


@pytest.fixture
def xformers(monkeypatch):
    found = Xformers(refuses=(torch.float64,))
    monkeypatch.setattr(op, "memory_efficient", lambda: (found, "xformers"))
    monkeypatch.setattr(op, "_unsupported", set())
    monkeypatch.setattr(op, "_is_cuda_initialized", lambda: True)
    return found


def test_a_gpu_runs_xformers_where_our_kernels_do_not_fit(xformers):
    """Long sequences, fp64, and sequences of several lengths. If xformers has no kernel, torch computes them, and
    xformers is not called again."""
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float64):
            out = attention(torch.empty(2, 1025, 3 * 12 * 64, dtype=dtype, device="cuda"), 12)
            assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 1025, 768), dtype, "cuda")
        attention(torch.empty(1, 12, 3 * 2 * 32, dtype=torch.bfloat16, device="cuda"), 2, (3, 1, 8))
        assert attention(torch.empty(1, 12, 24, dtype=torch.float64, device="cuda"), 2, (3, 9)).shape == (1, 12, 8)
    assert xformers.calls == [
        (torch.bfloat16, (2, 1025, 12, 64), None),
        (torch.float32, (2, 1025, 12, 64), None),
        (torch.bfloat16, (1, 12, 2, 32), "(3, 1, 8) on cuda"),
    ]
    assert op._unsupported == {(torch.float64, 64), (torch.float64, 4)}


@pytest.mark.parametrize(
    ("dtype", "tokens", "head_dim", "expected"),
    [
        (torch.bfloat16, 50, 64, True), (torch.float16, 197, 32, True), (torch.bfloat16, 320, 80, True),
        (torch.bfloat16, 321, 64, False), (torch.bfloat16, 50, 160, False), (torch.float32, 257, 64, True),
        (torch.float32, 50, 80, False), (torch.float64, 50, 64, False), (torch.bfloat16, 0, 64, False),
    ],
)  # fmt: skip
def test_our_kernels_compute_short_sequences_on_a_gpu(xformers, dtype, tokens, head_dim, expected):
    called = []
    with FakeTensorMode(), CalledOps(called):
        attention(torch.empty(2, tokens, 3 * 2 * head_dim, dtype=dtype, device="cuda"), 2)
    assert ("mae_fast::attention" in called) == expected


@pytest.mark.parametrize(
    ("backend", "tokens", "called"),
    [("triton", 50, "ours"), ("xformers", 50, "xformers"), ("sdpa", 50, "torch"), ("sdpa", 1025, "torch")],
)
def test_the_backend_can_be_chosen_on_a_gpu(xformers, backend, tokens, called):
    names = []
    with FakeTensorMode(), CalledOps(names):
        attention(torch.empty(2, tokens, 3 * 2 * 64, dtype=torch.bfloat16, device="cuda"), 2, backend=backend)
    found = "ours" if "mae_fast::attention" in names else "xformers" if xformers.calls else "torch"
    assert found == called


def test_an_unsupported_backend_is_an_error(xformers):
    with FakeTensorMode():
        long = torch.empty(2, 1025, 3 * 2 * 64, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(UserError, match=r"triton .* bfloat16 \[2, 1025, 384\] on cuda"):
            attention(long, 2, backend="triton")
        with pytest.raises(UserError, match=r"xformers .* float64 .* on cuda"):
            attention(long.double(), 2, backend="xformers")


def test_set_attention_sets_the_backend_of_all_blocks(monkeypatch):
    model, seen = build("mae_vit_tiny_patch4"), []
    monkeypatch.setattr("mae_fast.models.blocks.attention", lambda *a: seen.append(a[4]) or attention(*a))
    set_attention(model, "sdpa")
    model.loss(torch.rand(1, 3, 32, 32))
    assert len(seen) == len(model.blocks) + len(model.decoder_blocks)
    assert {*seen} == {"sdpa"}


def test_packed_sequences_of_one_length_are_a_batch(xformers):
    called = []
    with FakeTensorMode(), CalledOps(called):
        out = attention(torch.empty(1, 40, 3 * 2 * 32, dtype=torch.bfloat16, device="cuda"), 2, (10, 10, 10, 10))
    assert out.shape == (1, 40, 64)
    assert called.count("mae_fast::attention") == 1
    assert not xformers.calls


class CalledOps(TorchDispatchMode):
    """Records the names of the called ops."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [(2, 50, 2, 16), (1, 97, 1, 8)], ids=str)
def test_packed_sequences_of_one_length_have_the_values_of_a_batch(case):
    qkv = packed(case, torch.float32)
    n, t, heads, _ = case
    together = attention(qkv.reshape(1, n * t, -1), heads, (t,) * n)
    assert torch.equal(together.reshape(n, t, -1), attention(qkv, heads))


def test_xformers_runs_only_on_gpus(xformers):
    attention(packed((2, 5, 2, 8), torch.float32), 2)
    attention(torch.empty(2, 5, 24, device="meta"), 2)
    assert xformers.calls == []
