"""Optimizer groups and learning rates against the published formulas; AdamW against torch."""

import copy
import math

import pytest
import torch
from support import assert_no_worse_than_eager
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from mae_fast.models.mae import build
from mae_fast.ops.adamw import adamw_steps
from mae_fast.ops.bf16_weight_cache import working_copy
from mae_fast.training import optim as module
from mae_fast.training.optim import AdamW, Schedule, adamw


@pytest.mark.parametrize(("warmup", "total", "low"), [(40, 800, 0.0), (0, 10, 0.0), (5, 6, 1e-5), (13, 97, 1e-4)])
def test_schedule_is_linear_then_half_a_cosine(warmup: int, total: int, low: float) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3)
    schedule = Schedule(optimizer, warmup_steps=warmup, total_steps=total, min_lr=low)
    for step in [*range(total), 0, total // 2]:  # also backwards: the rate depends only on the step
        if step < warmup:
            expected = 0.3 * step / warmup
        else:
            share = (step - warmup) / (total - warmup)
            expected = low + (0.3 - low) * 0.5 * (1 + math.cos(math.pi * share))
        assert schedule.set(step) == pytest.approx(expected, abs=1e-15)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-15)


def test_other_schedules() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3)
    line = Schedule(optimizer, kind="linear", warmup_steps=3, total_steps=13, min_lr=0.1)
    for step in [*range(13), 0, 5]:
        expected = 0.1 * step if step < 3 else 0.3 - 0.2 * (step - 3) / 10
        assert line.set(step) == pytest.approx(expected, abs=1e-15)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.3)
    steps = Schedule(optimizer, kind="step", warmup_steps=3, total_steps=54)
    for step in [*range(54), 0, 50]:
        expected = 0.1 * step if step < 3 else 0.3 if step < 48 else 0.03 if step < 52 else 0.003
        assert steps.set(step) == pytest.approx(expected, abs=1e-15)


def test_matrices_and_tokens_decay_but_vectors_and_biases_do_not() -> None:
    model = build("mae_vit_tiny_patch4")
    optimizer = adamw(model, lr=1.0, weight_decay=0.05)
    decay = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert name in ("pos_embed", "decoder_pos_embed")
            assert all(p is not q for group in optimizer.param_groups for q in group["params"])
        else:
            assert (p in decay) == (p.ndim > 1 and not name.endswith(".bias")), name
    assert {model.cls_token, model.mask_token} <= decay
    assert optimizer.defaults["betas"] == (0.9, 0.95)


SHAPES = [(7, 33), (33,), (1, 1, 5), (), (0, 4), (130, 257)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.05}
TORCH = {**OPTIONS, "fused": True}


def net(dtype=torch.float32):
    """A module with parameters of various shapes."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return nn.ParameterList(made)


def give_gradients(model, step, skip=()):
    """Set gradients that depend only on the step and not on the dtype; None for the indices in ``skip``."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).float().to(p.dtype)
        p.grad = None if i in skip else grad


def train(model, optimizer, steps, skip=()):
    for step in steps:
        give_gradients(model, step, skip)
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Every parameter and its state, by name."""
    found = {str(i): p.detach().clone() for i, p in enumerate(model)}
    for i, p in enumerate(model):
        found |= {f"{i} {name}": x.clone() for name, x in optimizer.state[p].items()}
    return {name: x for name, x in found.items() if x.numel()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def global_norm(model):
    return torch.cat([p.grad.double().flatten() for p in model if p.grad is not None]).norm()


@pytest.mark.parametrize("working_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_20_steps_equal_torch(dtype, working_dtype):
    ours, theirs, truth = net(dtype), net(dtype), net(torch.float64)
    truth.load_state_dict(ours.state_dict())
    optimizers = (
        AdamW(ours.parameters(), **OPTIONS, working_dtype=working_dtype),
        *(torch.optim.AdamW(m.parameters(), **TORCH) for m in (theirs, truth)),
    )
    for model, optimizer in zip((ours, theirs, truth), optimizers, strict=True):
        train(model, optimizer, range(20))
    found, eager, exact = map(everything, (ours, theirs, truth), optimizers)
    assert found["0 step"].dtype == torch.float32
    assert_no_worse_than_eager(found, eager, exact, dtype)


@pytest.mark.parametrize("other", [{"fused": True}, {}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_state_dicts_are_interchangeable_with_torch(first, other):
    """State loads in both directions, and training continues as if the loading optimizer had taken all steps."""
    make = {
        "ours": lambda p: AdamW(p, **OPTIONS, working_dtype=torch.bfloat16),
        "theirs": lambda p: torch.optim.AdamW(p, **OPTIONS, **other),
    }
    before, after, stayed = net(), net(), net()
    one = make[first](before.parameters())
    two, three = (make["theirs" if first == "ours" else "ours"](m.parameters()) for m in (after, stayed))
    train(before, one, range(5))
    state = copy.deepcopy(one.state_dict())
    assert all(set(x) == {"step", "exp_avg", "exp_avg_sq"} for x in state["state"].values())
    assert state["param_groups"][0].keys() == torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0].keys()
    after.load_state_dict(before.state_dict())
    two.load_state_dict(state)
    assert same(everything(after, two), everything(before, one))
    stayed.load_state_dict(before.state_dict())  # the same state, loaded directly
    for p, q in zip(before, stayed, strict=True):
        three.state[q] = {name: x.clone() for name, x in one.state[p].items()}
    train(after, two, range(5, 8))
    train(stayed, three, range(5, 8))
    if first == "theirs" or other == {"fused": True}:
        assert same(everything(after, two), everything(stayed, three))
    train(before, one, range(5, 8))
    torch.testing.assert_close(everything(after, two), everything(before, one), rtol=1e-5, atol=1e-6)


def test_checkpoint_helpers_of_torch_support_it():
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    ours, theirs = net(), net()
    one, two = AdamW(ours.parameters(), **OPTIONS), torch.optim.AdamW(theirs.parameters(), **TORCH)
    train(ours, one, range(3))
    state = get_optimizer_state_dict(ours, one, options=flat)
    assert state.keys() == get_optimizer_state_dict(theirs, two, options=flat).keys()
    state = {name: x.clone() if torch.is_tensor(x) else x for name, x in state.items()}
    theirs.load_state_dict(ours.state_dict())
    set_optimizer_state_dict(theirs, two, state, options=flat)
    assert same(everything(theirs, two), everything(ours, one))
    again = net()
    three = AdamW(again.parameters(), **OPTIONS)
    again.load_state_dict(ours.state_dict())
    set_optimizer_state_dict(again, three, state, options=flat)
    train(ours, one, range(3, 6))
    train(again, three, range(3, 6))
    assert same(everything(again, three), everything(ours, one))


@pytest.mark.native
def test_working_copies():
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS, working_dtype=torch.bfloat16)
    buffers = []
    for step in range(3):
        train(model, optimizer, [step], skip=[2])
        kept = [working_copy(p, torch.bfloat16) for p in model]
        for i, p in enumerate(model):
            assert torch.equal(kept[i], p.bfloat16()), i
            assert (working_copy(p, torch.bfloat16) is kept[i]) == (p.ndim > 1 and i != 2), i  # else a new cast
        buffers.append(kept[0].data_ptr())
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})
    for p, old in zip(model, kept, strict=True):
        assert working_copy(p, torch.bfloat16) is not old
        assert torch.equal(working_copy(p, torch.bfloat16), p.bfloat16())
    train(model, optimizer, [3])
    assert {working_copy(model[0], torch.bfloat16).data_ptr()} == set(buffers)  # the buffers are reused
    assert torch.equal(working_copy(model[0], torch.bfloat16), model[0].bfloat16())


@pytest.mark.native
def test_a_step_between_forward_and_backward_is_an_error():
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS, working_dtype=torch.bfloat16)
    train(model, optimizer, [0])
    x = torch.ones(2, 33, dtype=torch.bfloat16, requires_grad=True)
    by_copy = nn.functional.linear(x, working_copy(model[0], torch.bfloat16))
    by_weight = nn.functional.linear(x.float(), model[0])
    train(model, optimizer, [1])
    for out in (by_copy, by_weight):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_no_copies_unless_asked():
    model = net()
    train(model, AdamW(model.parameters(), **OPTIONS), [0])
    assert working_copy(model[0], torch.bfloat16) is not working_copy(model[0], torch.bfloat16)
    with pytest.raises(ValueError, match=r"working_dtype must be torch\.bfloat16 or None, got torch\.float16"):
        AdamW(model.parameters(), working_dtype=torch.float16)


def test_a_step_updates_versions_and_runs_hooks_once():
    torch.optim.AdamW([torch.zeros(1)])  # lets torch add its hooks to its own class
    model, ran = net(), []
    optimizer = AdamW(model.parameters(), **OPTIONS)
    optimizer.register_step_pre_hook(lambda *_: ran.append("pre"))
    optimizer.register_step_post_hook(lambda *_: ran.append("post"))
    versions = [p._version for p in model]
    train(model, optimizer, [0])
    assert ran == ["pre", "post"]
    assert all(p._version > version for p, version in zip(model, versions, strict=True))
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True  # the closure's result


@pytest.mark.native
def test_grad_norm():
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    assert optimizer.grad_norm is None
    for step, skip in enumerate([(), (1, 5)]):
        give_gradients(model, step, skip)
        expected = global_norm(model)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-6, atol=0)
        assert optimizer.grad_norm.shape == ()
    give_gradients(model, 2, range(len(SHAPES)))
    optimizer.step()
    assert optimizer.grad_norm is None  # no gradient at all


def test_no_grad_norm_if_torch_updates_a_parameter():
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS, amsgrad=True)
    give_gradients(model, 0)
    optimizer.step()
    assert optimizer.grad_norm is None


def test_parameters_without_gradient_are_skipped():
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    before = model[1].detach().clone()
    train(model, optimizer, range(2), skip=[1])
    assert torch.equal(model[1], before)
    assert model[1] not in optimizer.state
    assert optimizer.state[model[0]]["step"] == 2
    train(model, optimizer, [2])
    assert not torch.equal(model[1], before)
    assert [optimizer.state[model[i]]["step"].item() for i in (0, 1)] == [3, 1]


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}], ids=str)
def test_other_options_are_left_to_torch(options):
    ours, theirs = net(), net()
    optimizers = (
        AdamW(ours.parameters(), **OPTIONS, **options),
        torch.optim.AdamW(theirs.parameters(), **TORCH, **options),
    )
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, range(3))
    assert same(*map(everything, (ours, theirs), optimizers))


def test_other_parameters_are_left_to_torch():
    """bf16 and non-contiguous parameters, next to one that the kernel updates, with a tensor learning rate."""
    torch.manual_seed(0)
    ours = [torch.randn(4, 6).bfloat16(), torch.randn(6, 4).t(), torch.randn(4, 6)]
    theirs = [x.clone(memory_format=torch.preserve_format) for x in ours]
    options = {**OPTIONS, "lr": torch.tensor(1e-2)}
    optimizers = AdamW(ours, **options, working_dtype=torch.bfloat16), torch.optim.AdamW(theirs, **options, fused=True)
    for step in range(3):
        for x, y in zip(ours, theirs, strict=True):
            x.grad, y.grad = (torch.full_like(z, step - 0.5) for z in (x, y))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[0], theirs[0])
    assert optimizers[0].grad_norm is None  # torch updated some parameters


def test_scaled_gradients_are_left_to_torch():
    ours, theirs = net(), net()
    for model, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer, scaler = kind(model.parameters(), **TORCH), torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))  # initializes the scaler
        for step in range(3):
            give_gradients(model, step)
            if step == 1:
                model[0].grad[0] = float("inf")  # this step must be skipped
            scaler.step(optimizer)
            scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert optimizer.state[theirs[0]]["step"] == 2


def test_with_schedule_and_group_without_decay():
    ours, theirs = net(), net()
    made = []
    for model, kind, options in ((ours, AdamW, OPTIONS), (theirs, torch.optim.AdamW, TORCH)):
        groups = [{"params": [*model][:2], "weight_decay": 0.0}, {"params": [*model][2:], "lr_scale": 1.0}]
        optimizer = kind(groups, **options)
        schedule = Schedule(optimizer, warmup_steps=3, total_steps=10)
        for step in range(10):
            schedule.set(step)
            train(model, optimizer, [step])
        made.append(everything(model, optimizer))
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-6)


def test_a_deepcopy_continues_identically():
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS, working_dtype=torch.bfloat16)
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    assert other.working_dtype == torch.bfloat16
    train(model, optimizer, [2])
    train(twin, other, [2])
    assert same(everything(model, optimizer), everything(twin, other))
    assert torch.equal(working_copy(twin[0], torch.bfloat16), twin[0].bfloat16())


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Patch ``AdamW`` to pass CPU tensors to ``adamw_steps``, like those of a GPU. Returns the parameter counts."""
    calls = []

    def counted(params, *lists, **options):
        calls.append(len(params))
        adamw_steps(params, *lists, **options)

    monkeypatch.setattr(module, "adamw_steps", counted)
    monkeypatch.setattr(module, "_fits_gpu", lambda device, p, *_: p.dtype == torch.float32 and p.is_contiguous())
    monkeypatch.setattr(AdamW, "_may_use_kernel", lambda self, group: False)
    monkeypatch.setattr(AdamW, "_may_use_gpu_kernel", lambda self, group, params: not group["amsgrad"])
    return calls


def test_20_steps_of_all_groups_at_once(as_on_gpu):
    """Groups with different rates, decays and betas; their state, copies, and parameters without gradients."""
    models = net(), net(), net(torch.float64)
    groups = [{"lr": 1e-2, "weight_decay": 0.0}, {"betas": (0.8, 0.99), "eps": 1e-6}]
    optimizers = []
    for kind, model in zip((AdamW, torch.optim.AdamW, torch.optim.AdamW), models, strict=True):
        parts = [{"params": part, **group} for part, group in zip(([*model][:2], [*model][2:]), groups, strict=True)]
        extra = {"working_dtype": torch.bfloat16} if kind is AdamW else {"fused": True}
        optimizers.append(kind(parts, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, **extra))
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(20):
            optimizer.param_groups[1]["lr"] = 1e-2 / (1 + step)
            train(model, optimizer, [step], skip=[1] if step == 3 else ())
    ours, theirs, truth = (everything(*pair) for pair in zip(models, optimizers, strict=True))
    assert as_on_gpu == [len(SHAPES) - (step == 3) for step in range(20)]
    assert_no_worse_than_eager(ours, theirs, truth, torch.float32)
    for p in models[0]:
        kept = working_copy(p, torch.bfloat16)
        assert kept is working_copy(p, torch.bfloat16)  # biases, too
        assert torch.equal(kept, p.bfloat16())
    assert optimizers[0].grad_norm is None


def test_copies_are_correct_after_a_skipped_first_step(as_on_gpu):
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS, working_dtype=torch.bfloat16)
    give_gradients(model, 0)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    assert all(torch.equal(working_copy(p, torch.bfloat16), p.bfloat16()) for p in model)
    assert all(optimizer.state[p]["step"] == 0 for p in model)


def test_scaled_gradients_of_all_groups_at_once(as_on_gpu):
    model, expected = net(), net()
    ours, theirs = AdamW(model.parameters(), **OPTIONS), torch.optim.AdamW(expected.parameters(), **TORCH)
    for step in range(3):
        for of_one, scale in ((model, 8.0), (expected, 1.0)):
            give_gradients(of_one, step)
            for p in of_one:
                p.grad.mul_(scale)
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.zeros(())
        ours.step()
        theirs.step()
    torch.testing.assert_close([*model], [*expected], rtol=1e-6, atol=1e-6)


def test_the_gpus_kernel_leaves_other_parameters_to_torch(as_on_gpu):
    torch.manual_seed(0)
    ours = [torch.randn(4, 6).bfloat16(), torch.randn(6, 4).t(), torch.randn(4, 6)]
    theirs = [x.clone(memory_format=torch.preserve_format) for x in ours]
    optimizers = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **TORCH)
    for x, y in zip(ours, theirs, strict=True):
        x.grad, y.grad = torch.ones_like(x), torch.ones_like(y)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert as_on_gpu == [1]
    model = net()
    train(model, AdamW(model.parameters(), **OPTIONS, amsgrad=True), [0])
    assert as_on_gpu == [1]
