"""The training steps of the contenders."""

import pytest
from support import one_thread  # noqa: F401

from benchmarks.gpu import contender as gpu
from mae_fast.bench import contenders, worker
from mae_fast.bench.contenders import decayed, images, noise, ours
from mae_fast.training.step import GRAPH_WARMUP_STEPS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pretraining_uses_the_published_optimizer():
    model = ours("tiny")
    assert contenders.ADAMW == {"lr": 1e-4, "betas": (0.9, 0.95)}
    plain, shrunk = decayed(model)
    assert (plain["weight_decay"], shrunk["weight_decay"]) == (0.0, 0.05)
    assert {p.ndim for p in plain["params"]} == {1}
    assert min(p.ndim for p in shrunk["params"]) == 2
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(id(p) for group in (plain, shrunk) for p in group["params"])


@pytest.mark.parametrize("name", ["mae_fast", "timm vit"])
def test_all_finetuning_optimizers_have_layer_wise_decay(monkeypatch, name):
    seen = []
    for module, kind in ((contenders, "AdamW"), (contenders.torch.optim, "AdamW")):
        real = getattr(module, kind)
        monkeypatch.setattr(module, kind, lambda groups, real=real, **kw: seen.append(groups) or real(groups, **kw))
    contenders.build(name, "tiny", images("tiny", 2), False, "finetune", noise("tiny", 2))
    [groups] = seen
    scales = {round(group["lr_scale"], 9) for group in groups}
    assert scales == {round(0.65**i, 9) for i in range(6)}  # the head, four blocks, and the embedding
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_cuda_graphs_are_captured_before_timing_and_replayed_before_comparison():
    assert worker.GRAPH_STEPS >= GRAPH_WARMUP_STEPS + 2
    assert gpu.GATE_STEPS >= GRAPH_WARMUP_STEPS + 3
