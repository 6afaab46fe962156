"""``torch.func`` on whole models: gradients, per-sample gradients, forward-mode AD, second derivatives."""

import pytest
import torch
from support import assert_close, inputs, one_thread, pictures, tiny, tiny_vit  # noqa: F401
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

pytestmark = pytest.mark.usefixtures("one_thread")


def mae_forward(model, weights, images, noise):
    return functional_call(model, weights, (images, 0.75, noise))[0]


def mae_forward_loss(model, weights, images, noise):
    pred = model.patchify(images) * weights["decoder_pred.weight"].sum() / 9
    return model.forward_loss(images, pred, (noise > 0.25).double())


def logits(model, weights, images):
    return functional_call(model, weights, (images,)).square().mean()


def case(name):
    """A model in fp64, a scalar function of its weights and a batch, and the batch."""
    if name.startswith("mae"):
        model = tiny(norm_pix_loss=True).double()
        f = mae_forward if name == "mae" else mae_forward_loss
        return model, lambda *x: f(model, *x), inputs(model, 3)
    model = tiny_vit(global_pool=name == "vit").double()
    return model, lambda *x: logits(model, *x), (pictures(model, 3),)


cases = pytest.mark.parametrize("name", ["mae", "mae, forward_loss", "vit", "vit, class token"])


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def kernel_gradients(f, weights, batch):
    leaves = {name: p.clone().requires_grad_() for name, p in weights.items()}
    found = torch.autograd.grad(f(leaves, *batch), [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@cases
def test_func_grad_equals_the_backward_pass(name):
    model, f, batch = case(name)
    weights = weights_of(model)
    assert_close(grad(f)(weights, *batch), kernel_gradients(f, weights, batch))


@cases
def test_vmapped_gradients_equal_those_of_each_sample(name):
    model, f, batch = case(name)
    weights = weights_of(model)

    def of_one(weights, *sample):
        return f(weights, *(x[None] for x in sample))

    found = vmap(grad(of_one), in_dims=(None, *(0,) * len(batch)))(weights, *batch)
    for i in range(3):
        expected = kernel_gradients(f, weights, [x[i : i + 1] for x in batch])
        assert_close({key: value[i] for key, value in found.items()}, expected)


@cases
def test_forward_mode_equals_the_backward_pass(name):
    model, f, (images, *rest) = case(name)
    weights, tangent = weights_of(model), torch.randn_like(images)
    leaf = images.clone().requires_grad_()
    expected = (torch.autograd.grad(f(weights, leaf, *rest), leaf)[0] * tangent).sum()
    _, found = jvp(lambda x: f(weights, x, *rest), (images,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(weights, forward_ad.make_dual(images, tangent), *rest)).tangent
    assert_close({"jvp": found, "dual": dual}, {"jvp": expected, "dual": expected})


@cases
def test_a_gradient_can_be_differentiated_by_torch_func_only(name):
    model, f, (images, *rest) = case(name)
    weights, direction = weights_of(model), torch.randn_like(images)

    def slope(x):
        return (grad(lambda y: f(weights, y, *rest))(x) * direction).sum()

    ahead, behind = (
        torch.autograd.grad(f(weights, x, *rest), x)[0]
        for x in ((images + step * direction).requires_grad_() for step in (1e-5, -1e-5))
    )
    assert_close({"second": grad(slope)(images)}, {"second": (ahead - behind) / 2e-5}, 1e-6)
    leaf = images.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(weights, leaf, *rest), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward is not supported.*torch\.func\.grad"):
        torch.autograd.grad(first.square().sum(), leaf)


def test_grad_checkpointing_does_not_change_gradients_of_torch_func():
    model, f, batch = case("mae")
    expected = grad(f)(weights_of(model), *batch)
    model.set_grad_checkpointing()
    assert_close(grad(f)(weights_of(model), *batch), expected)


@pytest.mark.slow
def test_per_sample_gradients_compile():
    model, f, batch = case("vit")
    per_sample = vmap(grad(lambda weights, x: f(weights, x[None])), in_dims=(None, 0))
    compiled = torch.compile(per_sample, backend="aot_eager")
    assert_close(compiled(weights_of(model), *batch), per_sample(weights_of(model), *batch))
