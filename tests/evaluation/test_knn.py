"""k-NN: votes against scikit-learn, features of both pools, runs and files."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier
from support import command

from mae_fast.data.loader import LoaderConfig, evaluation_batches
from mae_fast.data.sources import open_source
from mae_fast.errors import UserError
from mae_fast.evaluation.knn import KnnOptions, knn, knn_votes
from mae_fast.models.mae import build
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw

MODEL = "mae_vit_tiny_patch4"
CLASSES = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of a single colour with noise. The colours of the eight classes overlap."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(4)
    colours = rng.integers(0, 80, (CLASSES, 3))
    for split, count in (("train", 8), ("val", 6)):
        for label, colour in enumerate(colours):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 40, (32, 32, 3)) + rng.integers(0, 80, 3) + colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return root


def pixels_of(pictures, split):
    """The crops of the evaluation, uint8 [N, H, W, 3], and the labels [N]."""
    source = open_source(pictures, split)
    (batch,) = evaluation_batches(source, LoaderConfig(size=(32, 32), batch_size=64))
    return batch.images, batch.labels


def expected(model, pictures, pool, k):
    """Top-1 and top-5 accuracy of the votes on the features of the model, for a ``k`` with votes for every class."""
    (train, labels), (val, truth) = (pixels_of(pictures, split) for split in ("train", "val"))
    with torch.inference_mode():
        features, queries = (model.forward_features(images, pool=pool) for images in (train, val))
    votes = knn_votes(queries, features, labels, CLASSES, k)
    assert (votes > 0).all()
    ranks = (votes > votes.gather(1, truth[:, None])).sum(1)
    return (ranks < 1).double().mean().item(), (ranks < 5).double().mean().item()


def model_with_seed(seed):
    torch.manual_seed(seed)
    return build(MODEL).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose averaged weights are from another model."""
    folder, model, averages = (
        tmp_path_factory.mktemp("run"),
        model_with_seed(0),
        dict(model_with_seed(1).named_parameters()),
    )
    trained = {name: averages[name].detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"model": {"name": MODEL}, "mask_ratio": 0.75}
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), state, trained)
    checkpoint.write(folder / "checkpoints", saved)
    return folder


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_equal_scikit_learn(k):
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (60, 25))
    labels = torch.randint(4, (60,), generator=generator)
    votes = knn_votes(asked, known, labels, 4, k, temperature=0.2)
    theirs = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.2), metric="cosine", algorithm="brute").fit(
        known.numpy(), labels.numpy()
    )
    probabilities = theirs.predict_proba(asked.numpy())
    np.testing.assert_allclose((votes / votes.sum(1, keepdim=True)).numpy(), probabilities, atol=1e-9)


def test_votes_do_not_overflow():
    known, labels = torch.tensor([[1.0, 0.0], [1.0, 0.02], [0.0, 1.0]]), torch.tensor([1, 0, 0])
    votes = knn_votes(torch.tensor([[1.0, 0.0]]), known, labels, 2, 3, temperature=1e-5)
    assert votes.isfinite().all()
    assert votes.argmax() == 1


def test_pools_of_a_run_score_their_own_features(run, pictures):
    scores = {}
    for pool in ("cls", "mean"):
        found = knn(str(run), pictures, options=KnnOptions(k=64, pool=pool))
        scores[pool] = found.top1, found.top5
        assert scores[pool] == pytest.approx(expected(model_with_seed(0), pictures, pool, 64))
        assert found.top1 < found.top5 < 1
        assert (found.images, found.k) == (6 * CLASSES, 64)
    assert scores["cls"] != scores["mean"]


def test_averaged_weights_of_a_run(run, pictures):
    found = knn(str(run), pictures, options=KnnOptions(k=64), ema=True)
    wanted = expected(model_with_seed(1), pictures, "mean", 64)
    assert (found.top1, found.top5) == pytest.approx(wanted)
    assert wanted != pytest.approx(expected(model_with_seed(0), pictures, "mean", 64))


def test_weights_of_a_file(pictures, tmp_path):
    save_file(model_with_seed(0).state_dict(), tmp_path / "mae.safetensors")
    found = knn(str(tmp_path / "mae.safetensors"), pictures, MODEL, KnnOptions(k=64))
    assert (found.top1, found.top5) == pytest.approx(expected(model_with_seed(0), pictures, "mean", 64))
    assert knn(str(tmp_path / "mae.safetensors"), pictures, options=KnnOptions(k=64)) == found
    with pytest.raises(UserError, match="--ema"):
        knn(str(tmp_path / "mae.safetensors"), pictures, MODEL, ema=True)


def test_there_are_no_more_neighbours_than_images(run, pictures):
    assert knn(str(run), pictures, options=KnnOptions(k=1000)).k == 8 * CLASSES


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"k": 0}, "--k 0"),
        ({"temperature": 0}, "--temperature 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"num_workers": -1}, "--num-workers -1"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction 1.5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, flag):
    with pytest.raises(UserError, match=flag):
        KnnOptions(**options)


def test_flags_of_the_command_line_reach_the_vote(run, pictures, monkeypatch, capsys):
    found = knn(str(run), pictures, options=KnnOptions(3, 0.5, "cls"), ema=True)
    flags = ["--k", 3, "--temperature", 0.5, "--pool", "cls", "--ema", "--batch-size", 7]
    done = command(monkeypatch, capsys, "knn", run, "--data-path", pictures, *flags)
    assert (done.returncode, done.stdout) == (0, f"{found}\n"), done.stderr
    assert f"3 nearest neighbours: top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, of 48 images" == str(found)
