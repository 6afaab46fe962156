"""``benchmarks.profile_step`` on the tiny model."""

import json
import sys

import pytest
from support import one_thread  # noqa: F401

from benchmarks import profile_step
from mae_fast.ops.native import has_matrix_unit

pytestmark = pytest.mark.usefixtures("one_thread")


def run(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--model", "tiny", "--batch", "4", *map(str, flags)])
    main()


@pytest.mark.parametrize("contender", ["mae_fast", "reference"])
def test_profile(monkeypatch, tmp_path, capsys, contender):
    run(monkeypatch, profile_step.main, "--contender", contender, "--output", tmp_path / "profile.json")
    result = json.loads((tmp_path / "profile.json").read_text())
    assert sum(group["share"] for group in result["groups"].values()) == pytest.approx(1)
    for group in (*profile_step.GEMM, "attention", "attention backward", "optimizer"):
        assert result["groups"][group]["ms"] > 0, group
    fused = contender == "mae_fast" and has_matrix_unit()
    assert [result["groups"].get(group, {"ms": 0})["ms"] > 0 for group in profile_step.MLP] == [fused, fused]
    assert capsys.readouterr().out.splitlines()[-1].startswith("lower bound / step: ")


@pytest.mark.parametrize("bf16", [False, True])
def test_profile_counts_products_of_chunks(monkeypatch, bf16):
    """In total, three products per weight matrix. The patch embedding has no gradient of its input."""
    monkeypatch.setattr("mae_fast.ops.mlp.op.CHUNK", 2**12)
    step = profile_step.build("mae_fast", "tiny", profile_step.images("tiny", 4), bf16)
    step()
    with profile_step.profile(record_shapes=True) as profiler:
        step()
    _, products, _ = profile_step.sort_events(profiler.events(), set())
    model = profile_step.ours("tiny")
    visible, every, removed = 4 * (1 + 16), 4 * (1 + 64), 4 * 48
    wanted = 2 * 4 * 16 * model.patch_embed.proj.weight.numel()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            of_last = name.startswith(f"decoder_blocks.{len(model.decoder_blocks) - 1}") and "qkv" not in name
            only_removed = "decoder_pred" in name or of_last
            rows = removed if only_removed else every if "decoder_blocks" in name else visible
            wanted += 3 * rows * p.numel()
    assert sum(count * m * k * n for (m, k, n), count in products.items()) == wanted


def test_profile_counts_products(monkeypatch):
    """Four encoder and two decoder blocks have four linear layers each; then embedding, decoder_embed, decoder_pred."""
    step = profile_step.build("reference", "tiny", profile_step.images("tiny", 4), bf16=True)
    with profile_step.profile(record_shapes=True) as profiler:
        step()
    weights = {tuple(p.shape) for p in profile_step.ours("tiny").parameters() if p.ndim == 2}
    groups, products, _ = profile_step.sort_events(profiler.events(), weights)
    linear = 4 * (4 + 2) + 2  # the reference embeds patches with a convolution
    assert products.total() == 3 * linear
    tokens = {1 + 16: 4, 1 + 64: 2}  # number of blocks by tokens: encoder, decoder
    width = {1 + 16: 128, 1 + 64: 96}
    flops = sum(4 * 4 * t**2 * width[t] * blocks for t, blocks in tokens.items())
    assert groups["attention"].flops == flops
    assert groups["attention backward"].flops == 2.5 * flops
