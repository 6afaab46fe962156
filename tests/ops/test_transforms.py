"""All public ops under ``torch.func`` transforms and forward-mode AD, against their kernels in fp64; array inputs."""

import pytest
import torch
from op_cases import permutations, randn
from torch.autograd import forward_ad

from mae_fast.ops import registry
from mae_fast.ops.add_layer_norm import add_layer_norm
from mae_fast.ops.attention import attention
from mae_fast.ops.bias_gelu import bias_gelu
from mae_fast.ops.decoder_tokens import decoder_tokens
from mae_fast.ops.embed_visible import embed_visible
from mae_fast.ops.linear import linear
from mae_fast.ops.masked_loss import masked_loss
from mae_fast.ops.mlp import mlp
from mae_fast.ops.random_masking import random_masking

IDS = permutations(2, 6, seed=0)
OPS = {  # the op as a function of floating tensors, and their shapes
    "add_layer_norm": (lambda x, r, w, b: add_layer_norm(x, r, w, b)[1], [(2, 5, 8), (2, 3, 8), (8,), (8,)]),
    "add_layer_norm, no residual": (lambda x, w, b: sum(add_layer_norm(x, None, w, b)), [(2, 5, 8), (8,), (8,)]),
    "attention": (lambda qkv: attention(qkv, 2, first_query=1), [(2, 5, 24)]),
    "attention, packed": (lambda qkv: attention(qkv, 2, lengths=(2, 3)), [(1, 5, 24)]),
    "bias_gelu": (bias_gelu, [(2, 5, 8), (8,)]),
    "decoder_tokens": (lambda x, token, pos: decoder_tokens(x, token, IDS, pos), [(2, 3, 8), (1, 1, 8), (1, 7, 8)]),
    "decoder_tokens, fewer": (
        lambda x, token, pos: decoder_tokens(x, token, IDS, pos, image_order=False, num_mask_tokens=2),
        [(2, 3, 8), (1, 1, 8), (1, 7, 8)],
    ),
    "embed_visible": (
        lambda images, w, b, pos, cls: embed_visible(images, IDS[:, :4], w, b, pos, cls),
        [(2, 3, 4, 6), (8, 3, 2, 2), (8,), (1, 7, 8), (1, 1, 8)],
    ),
    "linear": (linear, [(2, 5, 8), (6, 8), (6,)]),
    "masked_loss": (
        lambda images, pred: masked_loss(images, pred, torch.ones(2, 6), patch=2, norm_pix=True),
        [(2, 3, 4, 6), (2, 6, 12)],
    ),
    "mlp": (mlp, [(2, 5, 8), (16, 8), (16,), (8, 16), (8,)]),
}
DIFFERENTIABLE_TWICE = {"linear"}  # without autocast, it runs torch's linear layer
ops = pytest.mark.parametrize("op", OPS)


def test_every_differentiable_op_is_tested():
    names = {name.split(",")[0] for name in OPS}
    assert names == {op.name for op in registry.ops()} - {"adamw", "random_masking"}


def made(op):
    """A scalar function of the op's output, and its inputs."""
    f, shapes = OPS[op]
    inputs = tuple(randn(*shape, seed=i) for i, shape in enumerate(shapes))
    cotangent = randn(*f(*inputs).shape, seed=99)
    return lambda *x: (f(*x).square() * cotangent).sum(), inputs


def kernel_gradients(f, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves)


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


@ops
def test_func_grad_equals_the_backward_pass(op):
    f, inputs = made(op)
    found = torch.func.grad(f, argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(found, kernel_gradients(f, inputs))


@ops
def test_forward_mode_equals_the_backward_pass(op):
    f, inputs = made(op)
    tangents = tuple(randn(*x.shape, seed=50 + i) for i, x in enumerate(inputs))
    expected = dot(kernel_gradients(f, inputs), tangents)
    torch.testing.assert_close(torch.func.jvp(f, inputs, tangents)[1], expected)
    with forward_ad.dual_level():
        value = f(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, expected)


@ops
def test_vmap_equals_one_call_for_each(op):
    f, shapes = OPS[op]
    batches = [randn(3, *shape, seed=i) for i, shape in enumerate(shapes)]
    expected = torch.stack([f(*(x[i] for x in batches)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(f)(*batches), expected)


@ops
def test_grad_of_grad_equals_the_difference_of_gradients(op):
    f, inputs = made(op)
    tangents = tuple(randn(*x.shape, seed=50 + i) for i, x in enumerate(inputs))

    def along(*x):
        return dot(torch.func.grad(f, argnums=tuple(range(len(x))))(*x), tangents)

    ahead, behind = (
        kernel_gradients(f, [x + step * t for x, t in zip(inputs, tangents, strict=True)]) for step in (1e-5, -1e-5)
    )
    differences = tuple((a - b) / 2e-5 for a, b in zip(ahead, behind, strict=True))
    found = torch.func.grad(along, argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(found, differences, rtol=1e-6, atol=1e-6)


@ops
def test_the_error_on_double_backward_names_the_alternatives(op):
    f, inputs = made(op)
    x = inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(f(x, *inputs[1:]), x, create_graph=True)
    if op in DIFFERENTIABLE_TWICE:
        torch.autograd.grad(grad.sum(), x)
        return
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*torch\.func\.grad.*ReferenceMAE"):
        torch.autograd.grad(grad.sum(), x)


def test_vmapped_masks_equal_single_ones():
    noise = randn(3, 2, 6, seed=0)
    found = torch.func.vmap(lambda x: random_masking(x, 2))(noise)
    for i, one in enumerate(noise):
        assert all(torch.equal(a[i], b) for a, b in zip(found, random_masking(one, 2), strict=True))


def test_func_grad_of_the_attention_bias_equals_the_kernel():
    def f(bias):
        qkv = randn(2, 5, 24, seed=0)
        return attention(qkv + bias.detach(), 2, bias=bias).square().sum()

    bias = randn(24, seed=1)
    torch.testing.assert_close(torch.func.grad(f)(bias), *kernel_gradients(f, [bias]))


def test_transforms_under_autocast_do_not_round_attention_scores():
    qkv = 2 * randn(2, 50, 96, seed=0, dtype=torch.bfloat16)  # large scores show rounding
    truth = attention(qkv.double(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.vmap(lambda x: attention(x[None], 2)[0])(qkv)
        kernel = attention(qkv, 2)
    assert (found - truth).abs().max() <= 2 * (kernel - truth).abs().max()


@ops
def test_arrays_raise_type_errors(op):
    f, shapes = OPS[op]
    first, *rest = (randn(*shape, seed=0) for shape in shapes)
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got numpy.ndarray: convert it with torch.from_numpy"):
        f(first.numpy(), *rest)


def test_an_array_of_noise_raises_a_type_error():
    with pytest.raises(TypeError, match=r"random_masking: noise must be a torch.Tensor, got numpy.ndarray"):
        random_masking(randn(2, 6, seed=0).numpy(), 2)
