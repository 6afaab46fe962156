"""Colour jitter equals torchvision's; RandAugment, erasing and mixing equal timm's; draws depend only on the key."""

import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from batches import training_batches
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment as TimmRandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from mae_fast.data.augment import ColorJitter, Mixing, RandAugment, seeded
from mae_fast.data.loader import Batch
from mae_fast.data.rng import AUGMENT, MIX, generator
from mae_fast.data.sources import Source, open_source
from mae_fast.errors import UserError

POLICY = "rand-m9-mstd0.5-inc1"
CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def draws() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


@pytest.fixture
def untouched() -> Iterator[None]:
    """Check that the test does not change the states of the global generators."""
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    random.gauss(0, 1)  # also stores a second value for the next call
    np.random.randn()  # noqa: NPY002
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == states[0]
    for now, before in zip(np.random.get_state(), states[1], strict=True):  # noqa: NPY002
        assert np.array_equal(now, before)
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        (folder / "abc"[i % 3] / f"{i}.jpg").write_bytes(zoo.jpeg(i))
    return open_source(folder)


def batches(source: Source, policy: str | None = POLICY, **options: Any) -> list[Batch]:
    options = {"size": (40, 48), "channels": 3, "batch_size": 4, "epochs": 3, "seed": 5, **options}
    return list(training_batches(source, scale=(0.08, 1.0), auto_augment=policy, **options))


def published(kind: type, policy: str = POLICY) -> Any:
    """The step of type ``kind`` in timm's training transform for 40 x 48 pixels, with the published settings."""
    made = create_transform(
        (40, 48), is_training=True, color_jitter=None, auto_augment=policy, interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=MEAN.tolist(), std=STD.tolist(),
    )  # fmt: skip
    [found] = [step for step in made.transforms if isinstance(step, kind)]
    return found


# --- the global generators


def test_draws_depend_on_the_whole_key(untouched: None) -> None:
    def drawn(*key: int) -> tuple[Any, ...]:
        with seeded(generator(*key), CPU):
            return draws()

    assert drawn(0, AUGMENT, 1, 2) == drawn(0, AUGMENT, 1, 2)
    keys = [(0, AUGMENT, 1, 2), (1, AUGMENT, 1, 2), (0, MIX, 1, 2), (0, AUGMENT, 2, 2), (0, AUGMENT, 1, 1)]
    for column in zip(*(drawn(*key) for key in keys), strict=True):  # each of the three libraries
        assert len(set(column)) == len(keys)


def test_generators_are_restored_after_an_error(untouched: None) -> None:
    with pytest.raises(TypeError), seeded(generator(0, MIX, 0), CPU):
        random.gauss(*draws())


# --- colour jitter


def photo(channels: int = 3, repeats: int = 1) -> Tensor:
    """uint8 [R, 40, 48, C]."""
    return torch.from_numpy(np.stack([zoo.photo(40, 48, seed=r)[:, :, :channels] for r in range(repeats)]))


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_equals_torchvisions_with_the_same_factors_and_order(channels: int) -> None:
    jitter, theirs = ColorJitter(5, channels), v2.ColorJitter(0.4, 0.4, 0.4)
    names = ("brightness_factor", "contrast_factor", "saturation_factor")
    orders = set()
    for sample in range(60):
        crops = photo(channels, repeats=2)
        made, rng = crops.clone(), generator(5, AUGMENT, 1, sample)
        jitter(made, 1, sample)
        for before, after in zip(crops, made, strict=True):
            factors, order = rng.uniform(0.6, 1.4, 3).tolist(), rng.permutation(3).tolist()
            params = {"fn_idx": order, "hue_factor": None, **dict(zip(names, factors, strict=True))}
            expected = theirs.transform(before.permute(2, 0, 1), params).permute(1, 2, 0)
            assert torch.equal(after, expected)
            orders.add(tuple(order))
    assert len(orders) == 6


def test_jitter_has_torchvisions_distribution() -> None:
    """Compares brightness, contrast and saturation of the results with those of torchvision's random draws."""

    def features(x: Tensor) -> list[float]:
        x = x.double()
        return [x.mean().item(), x.mean(2).std().item(), (x.amax(2) - x.amin(2)).mean().item()]

    crop, jitter, n = (40 + photo() // 3)[:, ::4, ::4].contiguous(), ColorJitter(0, 3), 1500  # dark: no clipping
    theirs, ours = v2.ColorJitter(0.4, 0.4, 0.4), []
    for sample in range(n):
        made = crop.clone()
        jitter(made, 0, sample)
        ours.append(features(made[0]))
    torch.manual_seed(0)
    expected = [features(theirs(crop[0].permute(2, 0, 1)).permute(1, 2, 0)) for _ in range(n)]
    for a, b in zip(np.array(ours).T, np.array(expected).T, strict=True):
        assert ks_2samp(a, b).pvalue > 1e-4
        assert abs(a.std() / b.std() - 1) < 0.1


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_jitter_is_keyed_and_does_not_change_other_draws(source: Source, decoder: str, untouched: None) -> None:
    options: dict[str, Any] = {"decoder": decoder, "num_patches": 6}
    plain, jittered = batches(source, None, **options), batches(source, None, color_jitter=True, **options)
    jitter = ColorJitter(5, 3)
    for number, (a, b) in enumerate(zip(plain, jittered, strict=True)):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.ids, b.ids)
        for crop, sample in zip(a.images, a.ids.tolist(), strict=True):
            jitter(crop[None], number // 2, sample)
        assert torch.equal(a.images, b.images)
    variants: list[dict[str, Any]] = [{"first": first} for first in range(1, 6)] + [{"num_workers": 2}]
    for variant in variants:
        found = batches(source, None, color_jitter=True, **options, **variant)
        for a, b in zip(jittered[variant.get("first", 0) :], found, strict=True):
            assert torch.equal(a.images, b.images)


def test_jitter_is_thread_safe(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's threads stay in use, and four threads give the same result as one."""
    monkeypatch.setattr("mae_fast.data.loader.by_processes", None)
    assert len(batches(source, None, decoder="dali", color_jitter=True, num_workers=2)) == 6
    jitter = ColorJitter(0, 3)

    def make(sample: int) -> bytes:
        crops = photo(repeats=2)
        jitter(crops, 0, sample)
        return crops.numpy().tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(60))) == list(map(make, range(60)))


def test_jitter_differs_between_repeats_and_keys() -> None:
    one, three = photo(), photo().expand(3, -1, -1, -1).clone()
    jitter = ColorJitter(0, 3)
    jitter(one, 0, 0)
    jitter(three, 0, 0)
    assert torch.equal(one[0], three[0])
    others = [*three]
    for made, key in ((jitter, (0, 1)), (jitter, (1, 0)), (ColorJitter(1, 3), (0, 0))):
        others.append(photo()[0])
        made(others[-1][None], *key)
    assert len({x.numpy().tobytes() for x in others}) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_supports_1_and_3_channels(source: Source, channels: int) -> None:
    for decoder in ("pil", "dali"):
        plain, found = (
            batches(source, None, channels=channels, color_jitter=on, decoder=decoder, epochs=1) for on in (False, True)
        )
        for a, b in zip(plain, found, strict=True):
            assert a.images.shape == b.images.shape == (4, 40, 48, channels)
            assert not torch.equal(a.images, b.images)


@pytest.mark.parametrize("channels", [2, 4])
def test_jitter_refuses_other_numbers_of_channels(source: Source, channels: int) -> None:
    with pytest.raises(UserError, match=f"1 or 3 channels, got {channels}; train with --augmentation crop"):
        batches(source, None, channels=channels, color_jitter=True)


def test_replacements_of_bad_images_have_their_jitter(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(zoo.jpeg(0))  # equal images with different keys
    whole = batches(open_source(tmp_path), None, color_jitter=True, batch_size=6)
    (tmp_path / "3.jpg").write_bytes(b"")
    after = batches(open_source(tmp_path), None, color_jitter=True, batch_size=6)
    assert any(batch.skipped for batch in after)
    for a, b in zip(whole, after, strict=True):
        assert torch.equal(a.images, b.images)


# --- RandAugment


@pytest.mark.parametrize("policy", [POLICY, "rand-m5-n3-mstd101-p0.9", "rand-m9-t3aw"])
def test_randaugment_equals_timms(source: Source, policy: str, untouched: None) -> None:
    plain, augmented = batches(source, None), batches(source, policy)
    theirs = published(TimmRandAugment, policy)
    changed = 0
    for number, (a, b) in enumerate(zip(plain, augmented, strict=True)):
        assert torch.equal(a.ids, b.ids)
        for before, after, sample in zip(a.images, b.images, a.ids.tolist(), strict=True):
            with seeded(generator(5, AUGMENT, number // 2, sample), CPU):
                expected = np.asarray(theirs(Image.fromarray(before.numpy())))
            assert np.array_equal(after.numpy(), expected)
            changed += not torch.equal(before, after)
    assert changed >= 12  # of 24; each of two layers is applied with probability 0.5


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_workers_and_resuming_do_not_change_batches(source: Source, decoder: str, untouched: None) -> None:
    options: dict[str, Any] = {"decoder": decoder, "num_patches": 6}
    whole = batches(source, **options)
    variants = [(first, batches(source, first=first, **options)) for first in range(6)]
    for first, found in [*variants, (0, batches(source, num_workers=2, **options))]:
        for a, b in zip(whole[first:], found, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.noise, b.noise)
            assert torch.equal(a.labels, b.labels)


def test_epochs_and_samples_have_different_augmentations(source: Source) -> None:
    """The same crop with different keys."""
    augment = RandAugment("rand-m9-mstd0.5-inc1-p1", 0, 3)
    crop = torch.from_numpy(zoo.photo(40, 48)[None])
    made = []
    for key in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        made.append(crop.clone())
        augment(made[-1], *key)
    assert torch.equal(made[0], made[3])
    assert len({x.numpy().tobytes() for x in made}) == 3


def test_ranks_together_have_the_images_of_one_process(source: Source) -> None:
    alone = batches(source)
    ranks = [batches(source, batch_size=2, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_decoders_have_the_same_augmentations(source: Source) -> None:
    """Crops of DALI and Pillow with the same key get the same augmentation."""
    augment = RandAugment(POLICY, 5, 3)
    for number, (a, b) in enumerate(
        zip(batches(source, None, decoder="dali"), batches(source, decoder="dali"), strict=True)
    ):
        for crop, sample in zip(a.images, a.ids.tolist(), strict=True):
            augment(crop[None], number // 2, sample)
        assert torch.equal(a.images, b.images)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_for_a_gpu_worker_processes_decode_on_the_cpu(source: Source) -> None:
    expected = batches(source, decoder="dali")
    for a, b in zip(expected, batches(source, decoder="dali", device=torch.device("cuda:0")), strict=True):
        assert torch.equal(a.images, b.images)


def test_draws_are_equal_in_a_new_process() -> None:
    augment, crop = RandAugment("rand-m9-mstd0.5-inc1-p1", 3, 3), torch.from_numpy(zoo.photo(40, 48)[None])
    sent = pickle.loads(pickle.dumps(augment))
    for sample in range(20):
        made = [crop.clone(), crop.clone()]
        augment(made[0], 0, sample)
        sent(made[1], 0, sample)
        assert torch.equal(*made)


def test_each_repeat_has_its_own_augmentation(source: Source) -> None:
    policy = "rand-m9-mstd0.5-inc1-p1"
    one, three = batches(source, policy, epochs=1), batches(source, policy, batch_size=12, epochs=1, repeats=3)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a.images, b.images[::3])
        assert len({x.numpy().tobytes() for x in b.images}) == 12


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m0", "rand-m30-mmax30-inc1", "rand-m9-t3aw"]
)
def test_every_operation_at_every_magnitude(policy: str, channels: int) -> None:
    augment = RandAugment(policy, 0, channels)
    crop = torch.from_numpy(zoo.photo(40, 48)[None, :, :, :channels].copy())
    operations = augment.transform.ops
    assert len(operations) >= 14
    for op in operations:
        op.prob = 1.0
        augment.transform.ops, augment.transform.num_layers, augment.transform.choice_weights = [op], 1, None
        # Of 100 magnitudes 9 +- 0.5, two are above the maximum of 10. The others differ only in sign.
        made = [crop.clone() for _ in range(100 if "mstd" in policy else 8)]
        for sample, x in enumerate(made):
            augment(x, 0, sample)
        assert all(x.shape == crop.shape for x in made)
        if op.name.startswith("Posterize") and ("m10" in policy or "m0" in policy or "m30" in policy):
            assert not any(x.any() for x in made)  # no bit is left: black, as in older versions of Pillow


@pytest.mark.parametrize("policy", ["m9", "", "rand-q9", "rand-m9x"])
def test_unknown_policies_are_refused(source: Source, policy: str) -> None:
    with pytest.raises(UserError, match=f"--aa {policy}: .*rand-m9"):
        batches(source, policy)


def test_randaugment_refuses_4_channels(source: Source) -> None:
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        batches(source, channels=4)


def test_replacements_of_bad_images_have_their_augmentation(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(zoo.jpeg(0))  # equal images with different keys
    whole = batches(open_source(tmp_path), batch_size=6)
    (tmp_path / "3.jpg").write_bytes(b"")
    after = batches(open_source(tmp_path), batch_size=6)
    assert any(batch.skipped for batch in after)
    for a, b in zip(whole, after, strict=True):
        assert torch.equal(a.images, b.images)


# --- mixing


def photos(n: int = 8, side: int = 32) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.stack([zoo.photo(side, side, seed=i) for i in range(n)]))
    return images, torch.arange(n) % 5


def standardised(images: Tensor) -> Tensor:
    return ((images / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def mixing(**options: Any) -> Mixing:
    return Mixing(**{"num_classes": 5, "seed": 7, "pixel_stats": (MEAN, STD), **options})


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=str)
def test_mixing_equals_timms(alphas: tuple[float, float], untouched: None) -> None:
    images, labels = photos()
    standardise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    erase = published(RandomErasing)
    mix = Mixup(
        mixup_alpha=alphas[0], cutmix_alpha=alphas[1], cutmix_minmax=None, prob=1.0, switch_prob=0.5, mode="batch",
        label_smoothing=0.1, num_classes=5,
    )  # fmt: skip
    ours = mixing(rank=1, mixup=alphas[0], cutmix=alphas[1])
    for step in range(12):
        with seeded(generator(7, MIX, step, 1), CPU):
            expected = mix(torch.stack([erase(standardise(Image.fromarray(x.numpy()))) for x in images]), labels)
        found = ours(images, labels, step)
        for got, wanted in zip(found, expected, strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, wanted)
        assert found[0].is_contiguous()
    assert torch.equal(images, photos()[0])  # not changed


def test_floating_images_are_not_standardised_again(untouched: None) -> None:
    images, labels = photos()
    floating = standardised(images)
    before = floating.clone()
    for ours, same in zip(mixing()(floating, labels, 3), mixing()(images, labels, 3), strict=True):
        assert torch.equal(ours, same)
    assert torch.equal(floating, before)


def test_steps_and_ranks_have_independent_draws_in_any_order() -> None:
    images, labels = photos()
    made = mixing()
    forward = [made(images, labels, step) for step in range(20)]
    for step in reversed(range(20)):
        again = mixing()(images, labels, step)
        assert torch.equal(forward[step][0], again[0])
        assert torch.equal(forward[step][1], again[1])
    assert len({targets.numpy().tobytes() for _, targets in forward}) == 20
    others = [mixing(rank=1)(images, labels, 0)[1], mixing(seed=8)(images, labels, 0)[1], forward[0][1]]
    assert len({targets.numpy().tobytes() for targets in others}) == 3


def test_erasing_has_the_requested_probability_and_normal_noise() -> None:
    images, labels = torch.zeros(400, 3, 16, 16), torch.zeros(400, dtype=torch.int64)
    erased, targets = mixing(mixup=0, cutmix=0, smoothing=0.0)(images, labels, 0)
    touched = (erased != 0).flatten(1).any(1)
    assert 70 <= touched.sum() <= 130  # expected 100, standard deviation 8.7
    noise = erased[erased != 0]
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert torch.equal(targets, torch.eye(5)[labels])


def test_without_mixing_images_are_standardised_and_targets_smoothed() -> None:
    images, labels = photos(5)  # odd, so nothing could be paired
    made, targets = mixing(mixup=0, cutmix=0, reprob=0)(images, labels, 0)
    assert torch.equal(made, standardised(images))
    loss = torch.nn.functional.cross_entropy
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(logits, targets), loss(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("n", [1, 7])
def test_the_middle_image_of_an_odd_batch_is_mixed_with_itself(n: int, alphas: tuple[float, float]) -> None:
    images, labels = photos(n)
    twice = [*range(n // 2 + 1), *range(n // 2, n)]
    once = [i for i in range(n + 1) if i != n // 2]
    made = mixing(mixup=alphas[0], cutmix=alphas[1], reprob=0)
    for step in range(12):
        odd, even = made(images, labels, step), made(images[twice], labels[twice], step)
        for ours, timms in zip(odd, even, strict=True):
            assert torch.equal(ours, timms[once])
        torch.testing.assert_close(odd[0][n // 2], standardised(images)[n // 2])  # mixed with itself
