import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import KERNEL_ERROR

from mae_fast.ops.random_masking import random_masking
from mae_fast.ops.random_masking.reference import random_masking_reference

NAMES = ("ids_keep", "ids_removed", "ids_restore", "mask")
DTYPES = (torch.float32, torch.float64)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def check(noise, num_keep):
    ours, expected = random_masking(noise, num_keep), random_masking_reference(noise.contiguous(), num_keep)
    for name, a, b in zip(NAMES, ours, expected, strict=True):
        assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, True), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# 196 and 256 are the numbers of patches of ViTs. Rows of more than 512 use another code path in C++.
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 196, 256, 512, 513, 1024, 5000])
def test_equals_reference(length, dtype):
    for num_keep in {0, 1, length // 4, length}:
        check(draw(3, length, dtype=dtype), num_keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_in_parallel(dtype):
    check(draw(700, 196, dtype=dtype), 49)


@pytest.mark.parametrize("shape", [(0, 7), (0, 0), (3, 0)], ids=str)
def test_nothing_to_mask(shape):
    check(torch.empty(shape), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [100, 600])
def test_any_strides(length, dtype):
    check(draw(length, 6, dtype=dtype).t(), 20)
    check(draw(6, 2 * length, dtype=dtype)[1::2, ::2], 20)
    check(draw(1, length, dtype=dtype).expand(4, length), 20)
    check(draw(4, 1, dtype=dtype).expand(4, length), 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [200, 600])
def test_order_of_special_values(length, dtype):
    inf, nan = float("inf"), float("nan")
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, tiny / 2, -tiny / 2, 1e30], dtype=dtype)
    picks = torch.randint(len(values), (5, length), generator=torch.Generator().manual_seed(0))
    check(values[picks], length // 4)


@pytest.mark.parametrize("length", [200, 600])
def test_ties_keep_their_order(length):
    ids_keep, ids_removed, ids_restore, _ = random_masking(torch.zeros(2, length), 30)
    in_order = torch.arange(length).expand(2, length)
    assert torch.equal(torch.cat([ids_keep, ids_removed], dim=1), in_order)
    assert torch.equal(ids_restore, in_order)


@given(
    n=st.integers(0, 4),
    length=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([1, 3, 1 << 24]),
    data=st.data(),
)
def test_is_a_permutation(n, length, dtype, levels, data):
    num_keep = data.draw(st.integers(0, length))
    noise = (draw(n, length, seed=data.draw(st.integers(0, 1000))) * levels).floor().to(dtype)
    ids_keep, ids_removed, ids_restore, mask = random_masking(noise, num_keep)
    ids_shuffle = torch.cat([ids_keep, ids_removed], dim=1)
    patches = torch.arange(length).expand(n, length)
    assert torch.equal(ids_shuffle.sort(dim=1).values, patches)
    assert torch.equal(ids_shuffle.gather(1, ids_restore), patches)
    assert (noise.gather(1, ids_shuffle).diff(dim=1) >= 0).all()
    assert (mask.sum(1) == length - num_keep).all()
    assert (mask.gather(1, ids_keep) == 0).all()


def test_outputs_have_no_gradient():
    outputs = random_masking(draw(2, 9).requires_grad_(), 3)
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    noise = draw(2, 9).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.mae_fast.random_masking.default, (noise, 3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def keep_a_quarter(noise):
        return random_masking(noise, noise.shape[1] // 4)

    compiled = torch.compile(keep_a_quarter, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(2, 16), (3, 40)]:
        for a, b in zip(compiled(draw(*shape)), keep_a_quarter(draw(*shape)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("noise", "num_keep", "message"),
    [
        (torch.zeros(4), 1, r"noise must be \[N, L\], got \[4\]"),
        (torch.zeros(2, 4).half(), 1, r"noise must be float32 or float64, got torch\.float16"),
        (torch.zeros(2, 4), 5, r"num_keep must be in 0\.\.4, got 5"),
        (torch.zeros(2, 4), -1, r"num_keep must be in 0\.\.4, got -1"),
    ],
    ids=["dimensions", "dtype", "too many", "negative"],
)
def test_bad_arguments_raise_value_errors(noise, num_keep, message):
    with pytest.raises(ValueError, match=f"random_masking: {message}"):
        random_masking(noise, num_keep)


@pytest.mark.native
def test_kernel_checks_its_own_arguments():
    op = torch.ops.mae_fast.random_masking
    with pytest.raises(KERNEL_ERROR, match=r"num_keep must be in 0\.\.4, got 5"):
        op(torch.zeros(2, 4), 5)
    with pytest.raises(KERNEL_ERROR, match="dtype Half is not supported"):
        op(torch.zeros(2, 4).half(), 1)
