"""decoder_tokens: values and gradients against the eager chain, bounds, dispatcher contracts."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import FLOATING, LAYOUTS, compare, laid_out, names, permutations, randn

from mae_fast.ops.decoder_tokens import decoder_tokens
from mae_fast.ops.decoder_tokens import reference as spec
from mae_fast.ops.random_masking import random_masking

# N, L, K, E
CASES = [
    (2, 16, 4, 8),
    (3, 15, 7, 10),
    (1, 1, 1, 5),  # nothing removed
    (1, 1, 0, 3),  # nothing visible
    (2, 9, 0, 4),
    (2, 6, 6, 33),
    (0, 4, 1, 8),
    (5, 49, 12, 64),
    (2, 196, 49, 96),
    (7, 3, 1, 1),
]
ALL = {"x", "mask_token", "pos"}


def inputs(case, dtype, layout="contiguous"):
    n, length, k, width = case
    made = {
        "x": randn(n, 1 + k, width, seed=1),
        "mask_token": randn(1, 1, width, seed=2),
        "pos": randn(1, 1 + length, width, seed=3),
    }
    made = {name: laid_out(x.to(dtype), layout) for name, x in made.items()}
    return made | {"ids_restore": laid_out(permutations(n, length, 4), layout)}


def eager(x, mask_token, ids_restore, pos):
    """As in the paper: append mask tokens, un-shuffle, put the class token first, add positions."""
    n, length, width = *ids_restore.shape, x.shape[2]
    joined = torch.cat([x[:, 1:], mask_token.expand(n, length + 1 - x.shape[1], -1)], dim=1)
    ordered = joined.gather(1, ids_restore[:, :, None].expand(-1, -1, width))
    return torch.cat([x[:, :1], ordered], dim=1) + pos


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, layout):
    compare(decoder_tokens, eager, inputs(case, dtype, layout), ALL, dtype)


def shuffled(function):
    """``function`` without image order."""
    return partial(function, image_order=False)


def eager_shuffled(x, mask_token, ids_restore, pos):
    """The eager chain, then the tokens in the shuffled order, with the mask tokens last."""
    return eager(x, mask_token, ids_restore, pos).gather(1, places(ids_restore, x.shape[2]))


def places(ids_restore, width):
    order = torch.cat([ids_restore.new_zeros(len(ids_restore), 1), 1 + ids_restore.argsort(1)], dim=1)
    return order[:, :, None].expand(-1, -1, width)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_with_the_mask_tokens_last(case, dtype, layout):
    made = inputs(case, dtype, layout)
    compare(shuffled(decoder_tokens), eager_shuffled, made, ALL, dtype)
    compare(shuffled(spec.decoder_tokens_reference), eager_shuffled, made, set(), dtype)
    grad = randn(case[0], 1 + case[1], case[3], seed=6, dtype=dtype)
    arguments = (grad, made["ids_restore"], case[2], dtype, dtype, dtype, True, False)
    expected = spec.decoder_tokens_backward_reference(*arguments)
    for found, wanted in zip(torch.ops.mae_fast.decoder_tokens_backward(*arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def fewer(case):
    """Numbers of mask tokens from none to all."""
    removed = case[1] - case[2]
    return sorted({0, min(1, removed), removed // 2, removed})


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_with_fewer_mask_tokens(case, dtype, layout):
    made = inputs(case, dtype, layout)
    for count in fewer(case)[:-1]:
        tokens = 1 + case[2] + count

        def expected(*args, tokens=tokens, **kwargs):
            return eager_shuffled(*args, **kwargs)[:, :tokens]

        compare(partial(decoder_tokens, image_order=False, num_mask_tokens=count), expected, made, ALL, dtype)
        ours = partial(spec.decoder_tokens_reference, image_order=False, num_mask_tokens=count)
        compare(ours, expected, made, set(), dtype)
        grad = randn(case[0], tokens, case[3], seed=6, dtype=dtype)
        arguments = (grad, made["ids_restore"], case[2], dtype, dtype, dtype, True, False)
        wanted = spec.decoder_tokens_backward_reference(*arguments)
        torch.testing.assert_close(torch.ops.mae_fast.decoder_tokens_backward(*arguments), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fewer_mask_tokens_have_the_bits_of_all(case):
    made = inputs(case, torch.float32)
    whole = decoder_tokens(**made, image_order=False)
    for count in fewer(case):
        found = decoder_tokens(**made, image_order=False, num_mask_tokens=count)
        assert torch.equal(found, whole[:, : 1 + case[2] + count])


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATING for b in FLOATING for c in FLOATING], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_exact_in_mixed_dtypes(case, dtypes):
    made = inputs(case, torch.float64)
    arguments = [made[name].to(dtype) for name, dtype in zip(("x", "mask_token", "pos"), dtypes, strict=True)]
    arguments.insert(2, made["ids_restore"])
    for image_order in (True, False):
        ours = torch.ops.mae_fast.decoder_tokens(*arguments, image_order)
        assert torch.equal(ours, spec.decoder_tokens_reference(*arguments, image_order))
    assert ours.dtype == torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])


@pytest.mark.parametrize("wanted", [{"x"}, {"mask_token"}, {"pos"}, {"x", "pos"}], ids=names)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_requested_gradients(case, wanted):
    compare(decoder_tokens, eager, inputs(case, torch.float32), wanted, torch.float32)
    compare(shuffled(decoder_tokens), eager_shuffled, inputs(case, torch.float32), wanted, torch.float32)


@given(n=st.integers(0, 3), length=st.integers(1, 60), seed=st.integers(0, 1000), data=st.data())
def test_unshuffle_of_shuffle_is_the_identity(n, length, seed, data):
    """Visible tokens of random_masking return to their positions. All other tokens are mask tokens."""
    k = data.draw(st.integers(0, length))
    tokens = randn(n, length, 3, seed=seed, dtype=torch.float32)
    ids_keep, _, ids_restore, mask = random_masking(torch.rand(n, length), k)
    x = torch.cat([torch.zeros(n, 1, 3), tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, 3))], dim=1)
    back = decoder_tokens(x, torch.full((1, 1, 3), 7.0), ids_restore, torch.zeros(1, 1 + length, 3))
    assert torch.equal(back[:, 1:], torch.where(mask[:, :, None] == 0, tokens, 7.0))


def test_threads_do_not_change_a_bit():
    made = inputs((9, 196, 49, 128), torch.float32)
    grads = []
    threads = torch.get_num_threads()
    for count in (1, 2, threads):
        torch.set_num_threads(count)
        token = made["mask_token"].clone().requires_grad_()
        decoder_tokens(**made | {"mask_token": token}).square().sum().backward()
        grads.append(token.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("bad", [-1, 16, 2**31, -(2**63)])
def test_out_of_range_index_is_named(bad):
    made = inputs(CASES[0], torch.float32)
    made["ids_restore"][1, 2] = bad
    with pytest.raises(IndexError, match=rf"decoder_tokens: ids_restore must be in 0\.\.15, got {bad}"):
        decoder_tokens(**made)
    grad, dtypes = randn(2, 17, 8, seed=1, dtype=torch.float32), (torch.float32,) * 3
    with pytest.raises(IndexError, match=rf"decoder_tokens_backward: ids_restore must be in 0\.\.15, got {bad}"):
        torch.ops.mae_fast.decoder_tokens_backward(grad, made["ids_restore"], 4, *dtypes, False)


@pytest.mark.parametrize("image_order", [True, False])
@pytest.mark.parametrize("case", CASES[:8], ids=str)
@pytest.mark.parametrize("dtype", FLOATING[:3], ids=str)
def test_opcheck(case, dtype, image_order):
    made = inputs(case, dtype)
    x, mask_token, pos = (made[name].requires_grad_() for name in ("x", "mask_token", "pos"))
    for count in [None] if image_order else [None, (case[1] - case[2]) // 2]:
        arguments = x, mask_token, made["ids_restore"], pos, image_order, count
        torch.library.opcheck(torch.ops.mae_fast.decoder_tokens.default, arguments)
        tokens = 1 + case[1] if count is None else 1 + case[2] + count
        grad = randn(case[0], tokens, case[3], seed=5, dtype=dtype)
        for needs_pos in (False, True):
            torch.library.opcheck(
                torch.ops.mae_fast.decoder_tokens_backward.default,
                (grad, made["ids_restore"], case[2], dtype, dtype, dtype, needs_pos, image_order),
            )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c[0] and c[1] * c[3] < 300], ids=str)
def test_gradcheck(case, fast):
    made = inputs(case, torch.float64)
    floats = [made[name].requires_grad_() for name in ("x", "mask_token", "pos")]

    half = {"image_order": False, "num_mask_tokens": (case[1] - case[2]) // 2}
    for kwargs in ({}, {"image_order": False}, half):

        def f(x, mask_token, pos, kwargs=kwargs):
            return decoder_tokens(x, mask_token, made["ids_restore"], pos, **kwargs)

        assert torch.autograd.gradcheck(f, floats, fast_mode=fast)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 18, 8)}, "1 to 17 tokens, got"),
        ({"x": torch.zeros(2, 0, 8)}, "1 to 17 tokens, got"),
        ({"x": torch.zeros(3, 5, 8)}, r"x must be \[N, 1\+K, E\]"),
        ({"mask_token": torch.zeros(8)}, r"mask_token must be \[1, 1, 8\]"),
        ({"pos": torch.zeros(1, 16, 8)}, r"pos \[1, 17, 8\]"),
        ({"ids_restore": torch.zeros(2, 16)}, "got .* torch.float32"),
        ({"num_mask_tokens": 3}, "num_mask_tokens must be in 0..12 .*got num_mask_tokens=3 and image_order=True"),
        ({"num_mask_tokens": 13, "image_order": False}, "in 0..12 .*got num_mask_tokens=13 and image_order=False"),
        ({"num_mask_tokens": -1, "image_order": False}, "in 0..12 .*got num_mask_tokens=-1 and image_order=False"),
    ],
)
def test_bad_arguments_raise_value_errors(change, message):
    with pytest.raises(ValueError, match=message):
        decoder_tokens(**inputs(CASES[0], torch.float32) | change)
