"""Skipped steps: by the host or by the optimizer itself as on a GPU, and their effect on batch norms."""

import pytest
import torch
from torch import nn

from mae_fast.training import nonfinite, optim
from mae_fast.training.distributed import DistContext
from mae_fast.training.nonfinite import ROLL_BACK_AFTER, NonFiniteGuard


def test_a_skipped_step_does_not_change_batch_norms(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    good = {}

    def roll_back():
        model[1].load_state_dict(good)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = NonFiniteGuard(model, optimizer, tmp_path, 0, DistContext(torch.device("cpu")), roll_back)

    def step(number, x):
        optimizer.zero_grad()
        model(x).sum().backward()
        guard.resolve()
        bad = guard.update()
        guard.record(bad, number, [])
        return {name: x.clone() for name, x in model[1].state_dict().items()}

    x = torch.randn(8, 3)
    good = step(1, x)
    assert good["num_batches_tracked"] == 1
    assert good["running_mean"].abs().max() > 0
    broken = x.clone()
    broken[0, 0] = float("nan")
    after = step(2, broken)
    assert all(torch.equal(after[name], value) for name, value in good.items())
    assert step(3, x)["num_batches_tracked"] == 2
    # After a rollback, they are those of the checkpoint.
    for number in range(4, 4 + ROLL_BACK_AFTER):
        step(number, broken)
    guard.resolve()
    assert guard.roll_backs == 1
    after = step(20, broken)
    assert all(torch.equal(after[name], value) for name, value in good.items())


def test_an_interrupted_step_does_not_change_batch_norms(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = NonFiniteGuard(model, optimizer, tmp_path, 0, DistContext(torch.device("cpu")), lambda: None)
    model(torch.randn(5, 3)).sum().backward()
    guard.update()
    after_a_step = [buffer.clone() for buffer in model.buffers()]
    model(torch.randn(5, 3))
    assert not all(map(torch.equal, model.buffers(), after_a_step))
    guard.forget_unfinished_step()
    assert all(map(torch.equal, model.buffers(), after_a_step))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_steps_that_skip_on_the_gpu_equal_steps_that_skip_on_the_host(tmp_path, monkeypatch, kind, clip):
    """The optimizer gets ``found_inf`` and ``grad_scale``, and the host does not read whether gradients are finite."""

    def train(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer = make(model.parameters(), lr=0.1, fused=True)
        guard = NonFiniteGuard(model, optimizer, tmp_path, 0, DistContext(torch.device("cpu")), lambda: None, clip)
        found = []
        for number in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
            x[0, 0] = float("nan") if number == 2 else 1
            (10 * model(x).square().sum()).backward()
            found.append(bool(guard.update()))
            assert not hasattr(optimizer, "found_inf")
            assert not hasattr(optimizer, "grad_scale")
        return found, model.state_dict(), [x["step"] for x in optimizer.state.values()]

    expected = train(torch.optim.AdamW)
    monkeypatch.setattr(nonfinite, "_skips_by_itself", lambda optimizer: True)
    monkeypatch.setattr(optim, "_fits_gpu", lambda *_: True)
    monkeypatch.setattr(optim.AdamW, "_may_use_gpu_kernel", lambda self, group, params: True)
    monkeypatch.setattr(optim.AdamW, "_may_use_kernel", lambda self, group: False)
    ours = train(optim.AdamW if kind == "ours" else torch.optim.AdamW)
    assert expected[0] == [False, False, True, False]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
