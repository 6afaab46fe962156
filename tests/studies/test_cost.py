"""The cost of steps: measured for correct models only, in turns with the baseline."""

import json
import os

import pytest
import torch
from support import command, inputs, one_thread, tiny  # noqa: F401

from mae_fast.bench.worker import Unavailable, Worker, one_line
from mae_fast.models.flops import Sizes, train_flops
from mae_fast.studies import cost
from mae_fast.studies.cost import Measured, MeasureOptions, Variant, VariantStep, check, measure, speed
from mae_fast.training.config import PRESETS, PretrainConfig

QUICK = MeasureOptions(batch_size=16, rounds=3, dtype="fp32", device="cpu")


def variant(**options):
    config = PretrainConfig(data_path=".", output_dir=".", **PRESETS["tiny"])
    return Variant.of(config.model_copy(update=options))


def test_variants_match_the_models_of_training():
    model = variant(decoder_depth=3, encoder_mask_token=True).build("meta")
    assert len(model.decoder_blocks) == 3
    assert model.encoder_mask_token is not None
    assert variant() == variant(epochs=3, augmentation="none", mask_sampling="block")  # which cost the same
    others = variant(mask_ratio=0.5), variant(norm_pix_loss=True), variant(target="pca", pca_components=6)
    assert len({variant(), *others}) == 4
    ratio = variant(mask_ratio=0.5).flops()
    assert ratio == train_flops(Sizes.of(variant().build("meta")), 0.5).total
    assert ratio > variant().flops()


def test_steps_are_measured_with_the_baseline():
    cases = {
        "default": variant(),
        "the same": variant(),
        "seen": variant(encoder_mask_token=True, decoder_depth=6),
    }
    found = measure(cases, "default", QUICK)
    assert list(found) == list(cases)
    assert found["default"].ratio == 1
    assert found["the same"] is found["default"]
    assert found["seen"].ratio > 1.2  # four times the FLOPs
    assert found["seen"].above > 1.2 * found["default"].above
    assert all(one.peak > one.above for one in found.values())


class Scripted:
    """A ``Worker`` with known seconds per step; ``turns`` and ``memory`` are by variant."""

    turns, memory = {}, {}

    def __init__(self, name, contender, variant, options):
        self.variant, self.seconds = variant, iter(self.turns[variant])

    def ask(self, method):
        return next(self.seconds) if method == "turn" else self.memory[self.variant]

    def close(self):
        pass


def test_ratio_is_the_median_of_ratios_per_round(monkeypatch):
    """It is not the ratio of the medians, which is 9. The first round does not count."""
    base, other = variant(), variant(mask_ratio=0.5)
    alone = [99.0, 3.0, 1.0, 2.0]
    monkeypatch.setattr(Scripted, "turns", {base: [*alone, 99.0, 1.0, 1.0, 10.0], other: [0.1, 2.0, 9.0, 20.0]})
    monkeypatch.setattr(Scripted, "memory", {base: {"peak": 50, "above": 20}, other: {"peak": 70, "above": 30}})
    monkeypatch.setattr(cost, "Worker", Scripted)
    found = measure({"default": base, "other": other}, "default", QUICK)
    assert found == {"default": Measured(2000.0, 1.0, 50, 20), "other": Measured(9000.0, 2.0, 70, 30)}


class InProcess(Worker):
    """A ``Worker`` that runs in this process."""

    def __init__(self, name, contender, *args):
        self.made = contender(*args)

    def ask(self, method):
        try:
            return getattr(self.made, method)()
        except ValueError as error:
            raise Unavailable(one_line(error)) from error

    def close(self):
        pass


def test_invalid_model_gives_an_error_instead_of_results(one_thread, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cost, "Worker", InProcess)
    impossible = Variant("mae_vit_tiny_patch4", '{"decoder_embed_dim": 30}')
    found = measure({"default": variant(), "impossible": impossible}, "default", QUICK)
    assert found["default"].ratio == 1
    assert found["impossible"].startswith("ValueError: ")


@pytest.mark.parametrize(
    "options",
    [{"target": "pca", "pca_components": 6}, {"norm_pix_loss": True, "mask_ratio": 0.4}, {"predict_ratio": 0.5}],
)
def test_step_keeps_gradients_only_on_request(one_thread, monkeypatch, options):  # noqa: F811
    monkeypatch.setattr(cost, "check", lambda *_: None)
    timer = VariantStep(variant(**options), QUICK)
    model, step = timer.build(), timer.step
    step(keep_gradients=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    once = [p.grad.clone() for p in trained]
    step(keep_gradients=True)
    assert all(torch.equal(p.grad, before) for p, before in zip(trained, once, strict=True))  # they do not add up
    step()
    assert all(p.grad is None for p in trained)


def test_no_results_if_the_baseline_fails(monkeypatch):
    monkeypatch.setattr(cost, "VariantStep", os._exit)
    monkeypatch.setattr(cost, "Worker", lambda name, contender, *args: Worker(name, contender, 7))
    found = measure({"default": variant(), "other": variant(mask_ratio=0.5)}, "default", QUICK)
    assert list(found) == ["default", "other"]
    for why in found.values():
        assert "died (exit status 7)" in why
        assert "--batch-size" in why


@pytest.mark.parametrize("bf16", [False, True])
def test_wrong_losses_are_refused(one_thread, bf16):  # noqa: F811
    model = tiny(norm_pix_loss=True)
    _, noise = inputs(model, n=3)
    images = torch.randint(256, (3, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = float(model.loss(images, 0.75, noise))
    check(loss, model, images, noise, variant(), bf16)
    for wrong in (loss * (1.02 if bf16 else 1.0001), float("nan"), float("inf")):
        with pytest.raises(Unavailable, match="wrong loss"):
            check(wrong, model, images, noise, variant(), bf16)


def faked(variants, baseline, options):
    """The second step takes half of the baseline's time; the third one fails."""
    first, second, third = variants
    assert first == baseline
    return {
        first: Measured(100.0, 1.0, 3 << 20, 2 << 20),
        second: Measured(50.0, 0.5, 2 << 20, 1 << 20),
        third: "too large",
    }


def test_speed_table_includes_the_paper(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "measure", faked)
    done = command(monkeypatch, capsys, "ablate", "speed", "--preset", "large", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "speed.md").read_text()
    assert table in done.stdout
    baseline, faster, failed = [line.split(" | ") for line in table.splitlines() if line.startswith("| large")]
    assert baseline[0].endswith("with mask tokens")
    assert baseline[1:] == ["8", "402.1", "1.00", "-", "100", "1.00", "-", "2 |"]
    assert faster[1:] == ["8", "124.5", "3.23", "3.30", "50", "2.00", "2.80", "1 |"]
    assert failed[1:] == ["1", "96.84", "4.15", "-", "-", "-", "3.70", "- |"]
    assert "large, 1 blocks: not measured: too large\n\n" in table
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["faster"] for row in rows] == [1.0, 2.0, None]
    assert rows[1]["paper_faster"] == 2.8


def test_speed_measures_all_models_of_the_paper_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "measure", faked)
    done = command(monkeypatch, capsys, "ablate", "speed", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["preset"], row["decoder_depth"]) for row in rows] == [
        (preset, depth) for preset in ("base", "large", "huge") for depth in (8, 8, 1)
    ]
    assert [row["paper_faster"] for row in rows] == [None, None, None, None, 2.8, 3.7, None, 3.5, 4.1]
    speed(["tiny"], tmp_path, QUICK)  # another model than the paper's
    assert [row["decoder_depth"] for row in json.loads((tmp_path / "speed.json").read_text())["rows"]] == [2, 2, 1]
