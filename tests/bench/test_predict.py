"""The roofline's arithmetic."""

import os
import subprocess
import sys

import pytest

from mae_fast.bench import predict
from mae_fast.bench.predict import ASSUMED, GPUS, MODELS, Assumed, Counted, Gpu, predicted_seconds
from mae_fast.models.flops import train_flops

GPU = Gpu("a GPU of round figures", peak=100e12, bandwidth=1e12)


def test_roofline(monkeypatch):
    """Worked by hand: one group bound by arithmetic, the others by memory, ten launches."""
    monkeypatch.setitem(predict.STEPS, "ViT-B/16", Counted((1, 1e9), (2, 3e12), (3, 0.5e12), (4, 2e12)))
    flops = train_flops(MODELS["ViT-B/16"], least=True)
    gemm, attention = 256 * flops.gemm, 256 * flops.attention * 3.5 / 3
    assert gemm / 50e12 > 1e9 / 0.25e12  # bound by arithmetic
    assert attention / 10e12 < 3e12 / 0.25e12  # bound by memory
    seconds = predicted_seconds("ViT-B/16", GPU, Assumed(gemm=0.5, attention=0.1, memory=0.25, gap=0.001))
    assert seconds == pytest.approx(gemm / 50e12 + 12 + 2 + 8 + 10 * 0.001)


def test_data_sheet_bounds_every_assumption():
    for model in MODELS:
        for gpu in GPUS.values():
            bound, graph, launches = (predicted_seconds(model, gpu, assumed) for assumed in ASSUMED)
            assert bound < graph < launches


def test_bench_says_that_it_predicts_and_loads_no_torch():
    code = "import sys; sys.argv = ['mae-fast', 'bench', '--predict']; from mae_fast.cli import main; main()"
    command = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "Predicted, not measured" in done.stdout
    for model in MODELS:
        assert done.stdout.count(model) == len(GPUS) * len(ASSUMED)
