"""``python -m benchmarks.data [FILE]``: compares loaders of augmented 224-pixel images, and writes JSON to FILE.

The images are 500 x 375 JPEGs cut from real photographs. Each loader has two workers or threads and batches of 64.
``uint8`` loaders return uint8 images. ``normalised`` loaders return standardised floats. Our models standardise images
in ``embed_visible`` and ``masked_loss``; for a fair comparison, the extra time of these ops is added to our loader.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae_fast.bench.timing import commit, interleave, machine
from mae_fast.data.cache import Cached
from mae_fast.data.loader import LoaderConfig, training_batches
from mae_fast.data.sources import open_source
from mae_fast.memory import disable_malloc_trim

IMAGES, BATCH, WORKERS, SIZE = 1024, 64, 2, 224
BASELINE = {"uint8": "torchvision", "normalised": "torchvision normalised"}


def photographs(folder: Path) -> None:
    """Write crops of scikit-learn's two photographs, at several scales, as JPEGs of about 80 kB."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    (folder / "all").mkdir()
    for i in range(IMAGES):
        photo = photos[i % len(photos)]
        scale = rng.uniform(0.9, 1.3)
        large = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
        x, y = rng.integers(large.width - 500 + 1), rng.integers(large.height - 375 + 1)
        window = large.crop((x, y, x + 500, y + 375))
        window.save(folder / "all" / f"{i:04}.jpg", quality=95)


def ours(folder: Path, seed: int, decoder: str, cached: bool = False, **options: Any) -> Iterator[Any]:
    loader = LoaderConfig(
        size=(SIZE, SIZE),
        batch_size=BATCH,
        seed=seed,
        decoder=decoder,  # type: ignore[arg-type]
        num_workers=WORKERS,
        **options,
    )
    return training_batches(_cached(folder) if cached else open_source(folder), loader, num_patches=196)


@cache
def _cached(folder: Path) -> Cached:
    return Cached(open_source(folder), threads=WORKERS)


def torchvision(folder: Path, seed: int, normalised: bool = False) -> Iterator[Any]:
    """The published loader: ``ImageFolder``, Pillow, RandomResizedCrop(0.2 to 1, bicubic), flip."""
    from torchvision import datasets
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=3), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    if normalised:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    data = datasets.ImageFolder(str(folder), v2.Compose(steps))
    torch.manual_seed(seed)
    return iter(DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True))


class _SimpleJpeg(Dataset[Tensor]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "all").iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        import simplejpeg
        from torchvision.transforms import RandomResizedCrop

        image = torch.from_numpy(simplejpeg.decode_jpeg(self.paths[index].read_bytes())).permute(2, 0, 1)
        y, x, h, w = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        window = image[None, :, y : y + h, x : x + w]
        resized = torch.nn.functional.interpolate(window, (SIZE, SIZE), mode="bicubic", antialias=True)[0]
        return resized.flip(2) if torch.rand(()) < 0.5 else resized


def simplejpeg(folder: Path, seed: int) -> Iterator[Any]:
    torch.manual_seed(seed)
    return iter(DataLoader(_SimpleJpeg(folder), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True))


def plain_dali(folder: Path, seed: int) -> Iterator[Any]:
    """A DALI pipeline on the CPU."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(BATCH, num_threads=WORKERS, device_id=None, seed=seed + 1)
    with pipeline:
        jpegs, _ = fn.readers.file(file_root=str(folder), shuffle_after_epoch=True, name="reader")
        images = fn.decoders.image_random_crop(
            jpegs, random_area=[0.2, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], adjust_orientation=False
        )
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()))
    pipeline.build()
    for _ in range(IMAGES // BATCH):
        (out,) = pipeline.run()
        yield torch.from_dlpack(out.as_tensor())


CONTENDERS: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "mae_fast dali": partial(ours, decoder="dali"),
    "mae_fast pil": partial(ours, decoder="pil"),
    "torchvision": torchvision,
    "torchvision normalised": partial(torchvision, normalised=True),
    "plain DALI": plain_dali,
    "simplejpeg + torch": simplejpeg,
    "mae_fast dali, 4 crops an image": partial(ours, decoder="dali", repeats=4),
    "mae_fast dali, cached": partial(ours, decoder="dali", cached=True),
}


def seconds_per_image(make: Callable[[Path, int], Iterator[Any]], folder: Path, seed: int) -> dict[str, float]:
    """The seconds until the first batch of an epoch, and the seconds per image after that."""
    start = time.perf_counter()
    batches = make(folder, seed)
    # When the first batch arrives, each other worker has nearly finished one, too. These do not count.
    next(batches)
    first = time.perf_counter()
    list(islice(batches, WORKERS - 1))
    second = time.perf_counter()
    number = sum(1 for _ in batches)
    assert number > 2
    return {"first": first - start, "each": (time.perf_counter() - second) / (number * BATCH)}


def normalisation(rounds: int) -> float:
    """The extra seconds per image of ``embed_visible`` and ``masked_loss`` for uint8 images, for ViT-B/16."""
    from mae_fast import mae_vit_base_patch16

    model = mae_vit_base_patch16(norm_pix_loss=True)
    model.blocks = torch.nn.ModuleList()  # leaves ``embed_visible`` and a norm of the encoder
    coded = torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
    standardised = ((coded / 255 - model.pixel_mean) / model.pixel_std).permute(0, 3, 1, 2).contiguous()
    noise = torch.rand(BATCH, 196)
    removed = noise.argsort(1)[:, 49:]
    pred, mask = torch.randn(BATCH, 147, 768), torch.ones(BATCH, 147)

    def run(images: Tensor) -> None:
        with torch.no_grad():
            model.forward_encoder(images, 0.75, noise)
            model.forward_loss(images, pred, mask, removed)

    times = interleave({"coded": lambda: run(coded), "standardised": lambda: run(standardised)}, rounds)
    longer = statistics.median(a - b for a, b in zip(times["coded"], times["standardised"], strict=True))
    return max(0.0, longer) / BATCH  # if the model is faster with uint8, the loader gets no credit


def memory_of_a_child(name: str, folder: Path) -> float:
    """The peak memory in MiB of a new process that loads an epoch, and of its workers."""
    command = [
        sys.executable,
        "-c",
        f"from benchmarks.data.__main__ import *; print(memory({name!r}, Path({str(folder)!r})))",
    ]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) / 2**20


def memory(name: str, folder: Path) -> int:
    """The peak memory in bytes of this process and its workers in an epoch. Shared memory counts once."""
    disable_malloc_trim()
    most = 0
    for _ in CONTENDERS[name](folder, 0):
        processes = ["self", *(str(child.pid) for child in active_children())]
        found = (Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes)
        most = max(most, sum(int(text.split("Pss:")[1].split()[0]) for text in found) * 1024)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("output", type=Path, nargs="?", help="write the result to this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder))
        disable_malloc_trim()  # as in training; workers of the baselines inherit this setting
        rows = measure(Path(folder), args.contenders, args.rounds)
    show(rows)
    print(machine())
    if args.output:
        content = {"machine": machine(), "commit": commit(), "rounds": args.rounds, "rows": rows}
        args.output.write_text(json.dumps(content, indent=1) + "\n")


def measure(folder: Path, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of interleaved epochs, and ratios to the baselines in the same round."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            found = seconds_per_image(CONTENDERS[name], folder, number)
            if number:  # the first round only warms up caches
                times[name].append(found)
    extra = normalisation(rounds)
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        each = [found["each"] for found in times[name]]
        rows[name] = {
            "images/s": 1 / statistics.median(each),
            "first batch s": statistics.median(found["first"] for found in times[name]),
        }
        for kind, other in BASELINE.items():
            if other in times and name not in BASELINE.values():
                added = extra if kind == "normalised" else 0.0
                pairs = zip(times[other], times[name], strict=True)
                rows[name][f"vs {other}"] = statistics.median(a["each"] / (b["each"] + added) for a, b in pairs)
        rows[name]["peak MiB"] = memory_of_a_child(name, folder)
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    print(f"{'':34}{'images/s':>9}{'first batch':>13}{'memory':>10}   speedup over torchvision, torchvision normalised")
    for name, row in rows.items():
        versus = ", ".join(f"{row[f'vs {other}']:.2f}" for other in BASELINE.values() if f"vs {other}" in row)
        print(f"{name:34}{row['images/s']:9.0f}{row['first batch s']:11.2f} s{row['peak MiB']:6.0f} MiB   {versus}")


if __name__ == "__main__":
    main()
