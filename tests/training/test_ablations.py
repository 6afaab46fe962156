"""Pre-training runs with the flags of the ablations: training, resuming, errors, and use of the weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import command

from mae_fast.data.masks import sampler
from mae_fast.data.rng import MASK, epoch_order, generator
from mae_fast.doctor.debug_step import debug_step
from mae_fast.errors import UserError
from mae_fast.models.mae import MaskedAutoencoderViT
from mae_fast.models.targets import PcaTarget
from mae_fast.training.config import PRESETS, PretrainConfig
from mae_fast.training.tasks.pretrain import pretrain
from mae_fast.weights import run_reader
from mae_fast.weights.create import create_model, load_run

PCA = {"target": "pca", "pca_components": 6}
SWITCHES = {
    "mask tokens": {"encoder_mask_token": True},
    "linear decoder": {"encoder_mask_token": True, "decoder_depth": 0},
    "deep narrow decoder": {"decoder_depth": 3, "decoder_embed_dim": 48},
    "standardised pixels": {"norm_pix_loss": True},
    "components": PCA,
    "block": {"mask_sampling": "block", "mask_ratio": 0.5},
    "grid": {"mask_sampling": "grid"},
    "no augmentation": {"augmentation": "none"},
    "fixed crops": {"augmentation": "crop-fixed"},
    "colour jitter": {"augmentation": "crop-jitter"},
}


def flags(images: Path, run: Path, **changes: object) -> dict[str, object]:
    """The flags of a run of two epochs of five steps."""
    small = {"batch_size": 8, "epochs": 2, "log_every": 1, "save_every": 4, "num_workers": 0, "dtype": "fp32"}
    return {**PRESETS["tiny"], "data_path": images, "output_dir": run, **small, **changes}


def run_of(images: Path, run: Path, **changes: object) -> Path:
    pretrain(PretrainConfig(**flags(images, run, **changes)))
    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run_reader.find_checkpoint(run).path / run_reader.MODEL)


@pytest.fixture(scope="module")
def default(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run without ablation flags."""
    return losses(run_of(images, tmp_path_factory.mktemp("default")))


@pytest.mark.parametrize("name", SWITCHES)
def test_variants_resume_exactly_and_start_other_models(
    name: str, images: Path, tmp_path: Path, default: list[float]
) -> None:
    """A run resumed after step 8 equals an uninterrupted one. A classifier and the run's model load the weights."""
    run = run_of(images, tmp_path / "run", **SWITCHES[name])
    curve, state = losses(run), weights(run)
    assert curve != default
    (run / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    run_of(images, run, **SWITCHES[name])
    assert losses(run) == curve
    assert all(torch.equal(value, state[key]) for key, value in weights(run).items())
    again, found = load_run(run)
    assert found.step == 10
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    classifier = create_model("vit_tiny_patch4", run, num_classes=3)
    assert all(torch.equal(value, state[key]) for key, value in classifier.state_dict().items() if "blocks" in key)


def test_decoder_heads_default_to_one_per_32_of_its_width(images: Path, tmp_path: Path) -> None:
    for width, heads, given in ((48, 1, None), (96, 3, None), (144, 4, None), (40, 1, None), (48, 6, 6)):
        options = {"decoder_embed_dim": width, "decoder_num_heads": given}
        model, _ = load_run(run_of(images, tmp_path / f"{width}-{given}", **options))
        assert isinstance(model, MaskedAutoencoderViT)
        assert model.decoder_blocks[0].attn.num_heads == heads


def test_components_are_fitted_to_the_crops_of_the_run(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    moments = PcaTarget.moments

    def watch(self, batches, mean, std):
        kept = [batch.clone() for batch in batches]
        seen.append(torch.cat(kept))
        return moments(self, kept, mean, std)

    monkeypatch.setattr(PcaTarget, "moments", watch)
    run = run_of(images, tmp_path / "run", **PCA)
    told = re.search(r"the target's 6 components explain (\d+\.\d)% of the variance of patches", caplog.text)
    assert told
    assert 50 < float(told[1]) < 100  # smooth pictures
    run_of(images, run, **PCA)
    (run / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    run_of(images, run, **PCA)
    assert [len(part) for part in seen] == [40]  # one pass, and none in the resumed run
    basis = weights(run)["target.basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-5, rtol=0)
    fitted = PcaTarget((4, 4), 3, 6)
    stats = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    fitted.fit(*moments(fitted, seen[0].split(8), *stats))
    assert torch.equal(fitted.basis, basis)


def test_two_processes_find_the_components_of_all_images(images: Path, tmp_path: Path) -> None:
    one = run_of(images, tmp_path / "one", **PCA)
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    line = flags(images, tmp_path / "two", batch_size=4, **PCA)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in line.items()]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "mae_fast", "pretrain", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mine, theirs = weights(one), weights(tmp_path / "two")
    for name in ("target.centre", "target.basis"):
        signs = (mine[name] * theirs[name]).sum(0).sign()
        torch.testing.assert_close(mine[name], theirs[name] * signs, atol=1e-4, rtol=0)


def test_masks_follow_the_flags(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, torch.Tensor]] = []
    loss = MaskedAutoencoderViT.loss

    def watch(self, images, mask_ratio, noise):
        seen.append((mask_ratio, noise.clone()))
        return loss(self, images, mask_ratio, noise)

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", watch)
    run_of(images, tmp_path / "block", mask_sampling="block", mask_ratio=0.5, epochs=2)
    draw = sampler("block", (8, 8), 0.5)
    expected = [torch.from_numpy(draw(generator(0, MASK, 0, int(i)))) for i in epoch_order(0, 0, 40)[:8]]
    assert seen[0][0] == 0.5
    assert torch.equal(seen[0][1], torch.stack(expected))

    seen.clear()
    masks = np.zeros((3, 8, 8), dtype=np.uint8)
    for i in range(3):
        masks[i, i : i + 5] = 1  # 40 of 64
    np.save(tmp_path / "masks.npy", masks)
    monkeypatch.chdir(tmp_path)
    run_of(images, tmp_path / "file", masks=Path("masks.npy"), epochs=2)
    shown = {tuple((row >= 1).int().tolist()) for _, noise in seen for row in noise}
    assert shown == {tuple(mask.flatten().tolist()) for mask in masks}
    assert all(int(64 * (1 - ratio)) == 24 for ratio, _ in seen)
    monkeypatch.chdir(images)
    run_of(images, tmp_path / "file", masks=tmp_path / "masks.npy", epochs=2)  # the same file
    np.save(tmp_path / "masks.npy", masks[:, ::-1])
    with pytest.raises(UserError, match="masks_sha256"):
        run_of(images, tmp_path / "file", masks=tmp_path / "masks.npy", epochs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_depth": 0}, "--decoder-depth 0 .* add --encoder-mask-token"),
        ({"decoder_embed_dim": 50, "decoder_num_heads": 3}, r"multiple of the number of heads, got 50 and 3"),
        ({"decoder_embed_dim": 50}, "multiple of 4"),
        ({"target": "pca", "pca_components": 49}, "1 to 48 components, got 49"),
        ({"target": "pca", "pca_components": 6, "norm_pix_loss": True}, "--norm-pix-loss requires --target pixel"),
        ({"target": "dvae"}, "--target dvae needs --tokenizer"),
        ({"tokenizer": Path("x")}, "--tokenizer x requires --target dvae, got --target pixel"),
        ({"target": "dvae", "tokenizer": Path("nowhere")}, "nowhere"),
        ({"mask_sampling": "grid", "mask_ratio": 0.7}, "--mask-sampling grid: .*0.75"),
        ({"masks": Path("nowhere.npy")}, "--masks nowhere.npy: cannot be read"),
        ({"masks": Path("x.npy"), "mask_sampling": "block"}, "--masks x.npy .* --mask-sampling block"),
    ],
)
def test_contradicting_flags_are_errors(changes: dict[str, object], message: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_of(images, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_earlier_version_is_resumed(images: Path, tmp_path: Path) -> None:
    run = run_of(images, tmp_path)
    curve = losses(run)
    (run / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    config = json.loads((run / "config.json").read_text())
    for name in (
        "mask_sampling",
        "masks",
        "augmentation",
        "encoder_mask_token",
        "decoder_depth",
        "target",
        "tokenizer",
    ):
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mask_sampling: 'random' in the run, 'block' now"):
        run_of(images, run, mask_sampling="block")
    run_of(images, run)
    assert losses(run) == curve


@pytest.mark.parametrize("name", ["mask tokens", "components", "block", "colour jitter"])
def test_debug_step_reproduces_a_step_of_a_variant(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``debug_step`` builds the model, batches and loss of the run."""
    values: list[float] = []
    loss = MaskedAutoencoderViT.loss

    def watch(self, *args):
        value = loss(self, *args)
        values.append(value.item())
        return value

    monkeypatch.setattr(MaskedAutoencoderViT, "loss", watch)
    run = run_of(images, tmp_path / "run", **SWITCHES[name])
    ninth = values[8]
    values.clear()
    dump = run / "not_finite" / "step-00000009.json"
    dump.parent.mkdir(exist_ok=True)
    before = run / "checkpoints" / "step-00000008" / run_reader.MODEL  # the weights before the ninth step
    shutil.copy(before, dump.parent / "step-00000009.safetensors")
    ids = epoch_order(0, 1, 40)[24:32].tolist()
    dump.write_text(json.dumps({"step": 9, "seed": 0, "ids": ids, "weights": "step-00000009.safetensors"}))
    caplog.clear()
    assert not debug_step(dump, "cpu")
    assert "other images" not in caplog.text
    assert values == [ninth]


def test_variants_convert_to_other_layouts(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mask tokens", "components"):
        run = run_of(images, tmp_path / name, **SWITCHES[name])
        capsys.readouterr()
        done = command(monkeypatch, capsys, "convert", run, tmp_path / f"{name}.safetensors", "--to", "timm")
        assert done.returncode == 0, done.stderr
        assert "the encoder had mask tokens, or the decoder did not predict pixels" in done.stdout + done.stderr
        encoder = create_model("vit_tiny_patch4", tmp_path / f"{name}.safetensors")
        assert torch.equal(encoder.blocks[0].attn.qkv.weight, weights(run)["blocks.0.attn.qkv.weight"])
        fresh = create_model("mae_vit_tiny_patch4", run)
        assert "these weights have no decoder: it starts at random" in capsys.readouterr().err
        assert torch.equal(fresh.blocks[0].attn.qkv.weight, weights(run)["blocks.0.attn.qkv.weight"])
