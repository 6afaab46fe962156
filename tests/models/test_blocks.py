"""Blocks: when fused ops replace the modules, and which tensors are saved for the backward pass."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_fast.models import residual
from mae_fast.models.blocks import Block


def block(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Block(32, 4, **kwargs)


def plain_block(b, x):
    """The formula of the block's docstring, in plain torch."""
    n, t, d = x.shape
    qkv = F.linear(b.norm1(x), b.attn.qkv.weight, b.attn.qkv.bias).reshape(n, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
    x = x + b.attn.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(n, t, d))
    return x + b.mlp.fc2(F.gelu(b.mlp.fc1(b.norm2(x))))


def gradients(b, f, x):
    x = x.clone().requires_grad_()
    out = f(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *b.parameters()])


class Doubling(nn.Linear):
    """A subclass of a layer, such as an adapter."""

    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(nn.Module):
    """A layer around another one, without ``weight`` and ``bias`` attributes."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.more(x)


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


def replaced(name):
    b = block()
    if name == "norm1":
        b.norm1 = Shifted(32)
    elif name == "norm2":
        b.norm2 = nn.Identity()
    elif name == "act":
        b.mlp.act = nn.ReLU()
    elif name == "tanh":
        b.mlp.act = nn.GELU(approximate="tanh")
    elif name == "no bias":
        b.mlp.fc1.bias = None
        b.norm1.bias = None
    else:
        kind, name = name.split()
        owner = b.attn if name in ("qkv", "proj") else b.mlp
        layer = getattr(owner, name)
        setattr(owner, name, Wrapped(layer) if kind == "wrapped" else Doubling(layer.in_features, layer.out_features))
    return b


def by_modules(b, x):
    """The block's output, computed by calling its modules."""
    n, t, d = x.shape
    qkv = b.attn.qkv(b.norm1(x)).reshape(n, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
    x = x + b.attn.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(n, t, d))
    return x + b.mlp.fc2(b.mlp.act(b.mlp.fc1(b.norm2(x))))


LINEARS = [f"{kind} {name}" for kind in ("other", "wrapped") for name in ("qkv", "proj", "fc1", "fc2")]


@pytest.mark.filterwarnings("ignore")  # torch deprecates its quantization
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantized kernels")
def test_quantized_layers_are_called():
    b, x = block(), torch.randn(2, 5, 32)
    for name in ("fc1", "fc2"):
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(getattr(b.mlp, name)), {nn.Linear})
        setattr(b.mlp, name, quantized[0])
    with torch.no_grad():
        torch.testing.assert_close(b(x), by_modules(b, x), rtol=1e-2, atol=1e-2)  # 8 bits


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_linear_layers_of_an_mlp_may_have_no_bias(name):
    b, x = block().double(), torch.randn(2, 5, 32, dtype=torch.float64)
    setattr(b.mlp, name, nn.Linear(*getattr(b.mlp, name).weight.shape[::-1], bias=False, dtype=torch.float64))
    torch.testing.assert_close(gradients(b, b, x), gradients(b, lambda x: by_modules(b, x), x))


@pytest.mark.parametrize("name", ["norm1", "norm2", "act", "tanh", "no bias", *LINEARS])
def test_replaced_modules_are_called(name):
    b, x = replaced(name).double(), torch.randn(2, 5, 32, dtype=torch.float64)
    for (out, grads), (expected, truth) in [(gradients(b, b, x), gradients(b, lambda x: by_modules(b, x), x))]:
        torch.testing.assert_close(out, expected)
        for a, c in zip(grads, truth, strict=True):
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize("name", ["norm1", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2", "attn.qkv", "attn.proj"])
def test_hooks_are_called_and_may_change_the_output(name):
    b, x = block(), torch.randn(2, 5, 32)
    before, seen = b(x), []

    def hook(module, args, output):
        seen.append(name)
        return output + 1

    handle = b.get_submodule(name).register_forward_hook(hook)
    assert not torch.allclose(b(x), before)
    assert seen == [name]
    handle.remove()
    assert torch.equal(b(x), before)


PARTS = ["norm1", "attn", "attn.qkv", "attn.proj", "drop_path", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2"]


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_assigned_to_an_instance_is_called(name):
    b, x = block(), torch.randn(2, 5, 32)
    before, module = b(x), b.get_submodule(name)
    own = module.forward
    module.forward = lambda x: own(x) + 1
    assert not torch.allclose(b(x), before)
    del module.forward
    assert torch.equal(b(x), before)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Identity])
@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_a_branch_that_drops_tokens_raises_a_value_error(name, kind):
    class Shorter(nn.Module):
        def forward(self, x):
            return x[:, 1:]

    b = block(norm_layer=kind)
    setattr(b, name, Shorter())
    with pytest.raises(ValueError, match=r"got \[2, 4, 32\] for \[2, 5, 32\]"):
        b(torch.randn(2, 5, 32))


@pytest.mark.parametrize("name", ["norm1", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2", "attn.qkv", "attn.proj"])
@pytest.mark.parametrize("when", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_called(name, when):
    b, seen = block(), []
    getattr(b.get_submodule(name), when)(lambda module, *gradients: seen.append(module))
    b(torch.randn(2, 5, 32, requires_grad=True)).sum().backward()
    assert seen == [b.get_submodule(name)]


@pytest.mark.native
@pytest.mark.parametrize("bf16", [False, True])
def test_only_activations_that_are_expensive_to_recompute_are_saved(bf16):
    """They are the block's input, the sum after attention, q, k and v, the attention output, and the output of fc1.

    The outputs of the norms and of GELU are recomputed.
    """
    b, x = block(), torch.randn(3, 7, 32, requires_grad=True)
    kept = {}

    def pack(saved):
        if saved.ndim > 1 and saved.numel() % (3 * 7) == 0 and saved.untyped_storage().nbytes() >= 3 * 7 * 32 * 2:
            kept[saved.untyped_storage().data_ptr()] = saved.numel() // (3 * 7 * 32)
        return saved

    recompute = residual.recomputing

    def counting(value, compute):  # counts only what our own hooks save
        hooks = recompute(value, compute)
        inner = hooks.pack_hook
        hooks.pack_hook = lambda saved: inner(saved) if isinstance(inner(saved), torch.Size) else pack(saved)
        return hooks

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        patch.setattr(residual, "recomputing", counting)
        patch.setattr(residual, "_saves_are_hooked", lambda: False)  # ignore the hooks of this test
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = b(x)
    assert sorted(kept.values()) == [1, 1, 1, 3, 4]
    assert out.requires_grad


def test_recomputation_changes_no_bit(monkeypatch):
    b, x = block(), torch.randn(3, 7, 32)
    found = gradients(b, b, x)
    monkeypatch.setattr(residual, "recomputing", lambda value, compute: nullcontext())
    kept = gradients(b, b, x)
    assert torch.equal(found[0], kept[0])
    assert all(map(torch.equal, found[1], kept[1]))


@pytest.mark.parametrize("bf16", [False, True])
def test_backward_runs_twice_with_equal_results(bf16):
    b, x = block(), torch.randn(3, 7, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = b(x).square().sum()
    first = torch.autograd.grad(loss, list(b.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(b.parameters()))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(use_reentrant):
    b, x = block(), torch.randn(3, 7, 32)
    call = lambda x: torch.utils.checkpoint.checkpoint(b, x, use_reentrant=use_reentrant)  # noqa: E731
    x.requires_grad_()
    b(x).square().sum().backward()
    expected = [p.grad.clone() for p in (x, *b.parameters())]
    for p in (x, *b.parameters()):
        p.grad = None
    call(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip((x, *b.parameters()), expected, strict=True))


class LiveTensors(TorchDispatchMode):
    """Counts the memory of tensors that operations created and that are still alive."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def bytes(self, given):
        known = {StorageWeakRef(x.untyped_storage()) for x in given}
        return sum(size for storage, size in self.made.items() if not storage.expired() and storage not in known)


def test_checkpointing_keeps_no_activations():
    """Our hooks for recomputation do not disable those of activation checkpointing."""
    b, x, kept = block(), torch.randn(3, 7, 32, requires_grad=True), []
    for f in (b, lambda x: torch.utils.checkpoint.checkpoint(b, x, use_reentrant=False)):
        with LiveTensors() as live:
            out = f(x)
        kept.append(live.bytes([x, *b.parameters()]) // x.untyped_storage().nbytes())
        assert out.grad_fn is not None
    assert kept[0] >= 10
    assert kept[1] == 1  # the output


def test_a_block_equals_its_formula():
    b, x = block().double(), torch.randn(2, 9, 32, dtype=torch.float64)
    (out, grads), (expected, truth) = gradients(b, b, x), gradients(b, lambda x: plain_block(b, x), x)
    torch.testing.assert_close(out, expected)
    for a, c in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, c)
