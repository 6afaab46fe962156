"""FLOPs, the GEMM lower bound, and the code, commit and versions that are stored with results."""

import subprocess

import pytest
import torch
from support import one_thread  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from mae_fast.bench import gemm_lower_bound, timing
from mae_fast.bench.case import Case
from mae_fast.bench.contenders import EAGER, TASKS, build, classifier, images, noise, ours
from mae_fast.bench.flops import flops

pytestmark = pytest.mark.usefixtures("one_thread")


def case(task, size=32, ratio=0.75):
    return Case(task, "tiny", 16, "bf16", size, ratio)


@pytest.mark.parametrize(("size", "ratio"), [(32, 0.75), (64, 0.5)])
@pytest.mark.parametrize("task", TASKS)
def test_flops_match_the_flop_counter_of_torch(task, size, ratio):
    x, masks = (made("tiny", 1, size).to("meta") for made in (images, noise))
    step = build(EAGER.get(task, "reference"), "tiny", x, False, task, masks, ratio)
    with FlopCounterMode(display=False) as counter:
        step()
    assert flops(case(task, size, ratio)) == counter.get_total_flops()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("task", ["train", "infer", "finetune"])
def test_products_of_our_step(monkeypatch, task, bf16):
    """One product per weight matrix, three in training. The patch embedding has no gradient of its input."""
    monkeypatch.setattr("mae_fast.ops.mlp.op.CHUNK", 2**12)
    step = build("mae_fast", "tiny", images("tiny", 4), bf16, task, noise("tiny", 4))
    step()
    with gemm_lower_bound.Products() as seen:
        step()
    visible, every, removed = (4 * rows for rows in (1 + 16, 1 + 64, 48))
    model, passes = (classifier("tiny"), 3) if task == "finetune" else (ours("tiny"), 3 if task == "train" else 1)
    embedded = 4 * (16 if task == "train" else 64)
    wanted = (passes - 1 or 1) * embedded * model.patch_embed.proj.weight.numel()
    for name, p in model.named_parameters():
        if p.ndim != 2 or (task == "infer" and "decoder" in name):
            continue
        of_last = (
            name.startswith(f"decoder_blocks.{len(getattr(model, 'decoder_blocks', ())) - 1}") and "qkv" not in name
        )
        only_removed = "decoder_pred" in name or (task == "train" and of_last)
        rows = removed if only_removed else every if "decoder_blocks" in name else 4 if "head" in name else 0
        wanted += passes * (rows or (visible if task == "train" else every)) * p.numel()
    assert sum(count * m * k * n for (m, k, n), count in seen.products.items()) == wanted


def test_gemm_lower_bound_computes_each_product_as_often(monkeypatch):
    taken = []
    monkeypatch.setattr(gemm_lower_bound.torch, "mm", lambda a, b: taken.append((*a.shape, b.shape[1], a.dtype)))
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5, 6)

    def step():
        torch.addmm(torch.zeros(3, 5), a, b)
        torch.addmm(torch.zeros(3, 5), a, b)
        (a @ b) @ c

    take = gemm_lower_bound.gemm_lower_bound(step, "bf16")
    taken.clear()
    take()
    assert sorted(taken, key=str) == [(3, 4, 5, torch.bfloat16)] * 3 + [(3, 5, 6, torch.bfloat16)]


def test_code_hash_covers_the_timed_files(monkeypatch, tmp_path):
    package = tmp_path / "mae_fast"
    (package / "bench").mkdir(parents=True)
    for name in ("models", "training", "targets", "ops/attention"):
        (package / name).mkdir(parents=True)
    monkeypatch.setattr(timing, "__file__", str(package / "bench" / "timing.py"))
    seen = {timing.code()}
    timed = ("models/mae.py", "training/optim.py", "targets/pca.py", "ops/attention/op.py", "reference.py", "_C.so")
    for name in (*timed, "bench/contenders.py", "__init__.py"):
        (package / name).write_text(name)
        seen.add(timing.code())
    (package / "models" / "mae.py").write_text("changed")
    seen.add(timing.code())
    assert len(seen) == 10
    assert all(len(one) == 12 for one in seen)
    for name in ("bench/tables.py", "cli.py"):
        (package / name).write_text(name)
        assert timing.code() in seen


def test_commit(monkeypatch, tmp_path):
    package = tmp_path / "mae_fast"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(timing, "__file__", str(package / "bench" / "timing.py"))
    from mae_fast import __version__

    def git(*words):
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(("git", *names, *words), cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert timing.commit() == __version__
    git("init", "-q")
    git("commit", "-qm", "another's", "--allow-empty")
    assert timing.commit() == __version__  # the package is in a folder of a repository that does not track it
    git("add", ".")
    git("commit", "-qm", "ours")
    head = git("rev-parse", "HEAD").strip()
    assert timing.commit()
    assert head.startswith(timing.commit())
    (package / "__init__.py").write_text("1")
    assert timing.commit().endswith("-dirty")


def test_versions():
    found = timing.versions()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert list(found) == list(timing.PACKAGES)
