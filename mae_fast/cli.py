"""``mae-fast VERB``: every verb is one function here; heavy imports happen inside it."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .errors import UserError


def pretrain(args: list[str]) -> None:
    """Pre-train a masked autoencoder; run the same line again to resume."""
    import argparse

    from .training.config import PRESETS, PretrainConfig

    # The preset sets the defaults of the other flags, so it is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    for name in ("job_dir", "resume", *NO_LONGER):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="")
    chosen, args = first.parse_known_args(args)
    if chosen.resume:
        raise UserError(
            f"--resume {chosen.resume}: a run resumes by itself when its line is run again, leave the flag out; "
            "to start from a file's weights, use --init"
        )
    if chosen.job_dir:
        args = [*args, "--output-dir", chosen.job_dir]
    given = [f"--{name}" for name in NO_LONGER if getattr(chosen, name) is not None]
    if given:
        print(f"mae-fast: note: nothing to do for {', '.join(given)}: torchrun starts processes", file=sys.stderr)
    if chosen.preset is not None and chosen.preset not in PRESETS:
        raise UserError(f"--preset {chosen.preset}: known are {', '.join(PRESETS)}")
    fields = PretrainConfig.model_fields
    defaults: dict[str, Any] = {n: tyro.MISSING if f.is_required() else f.default for n, f in fields.items()}
    config = tyro.cli(
        PretrainConfig,
        prog="mae-fast pretrain",
        description=f"{PretrainConfig.__doc__} --preset {{{','.join(PRESETS)}}} sets the defaults below.",
        args=args,
        default=PretrainConfig.model_construct(**{**defaults, **PRESETS.get(chosen.preset or "", {})}),
    )
    from .training.pretrain import pretrain

    pretrain(config)


# Flags of the published scripts, accepted so that their command lines run.
NO_LONGER = (
    "start_epoch", "pin_mem", "no_pin_mem", "world_size", "local_rank", "dist_on_itp", "dist_url", "nodes", "ngpus",
    "timeout", "partition", "use_volta32", "comment",
)  # fmt: skip


def replay(args: list[str]) -> None:
    """Run a step that was left out again, image by image, and say what in it is not finite."""

    def command(dump: tyro.conf.Positional[Path], device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
        """Take the images, masks and weights of a step that was left out, and look for what is not finite.

        Args:
            dump: A file of the run's not_finite/: step-00001234.json.
            device: Where to compute; auto: cuda if there is one.
        """
        from .report.replay import replay

        if not replay(dump, device):
            sys.exit(1)

    tyro.cli(command, prog="mae-fast replay", args=args)


def reconstruct(args: list[str]) -> None:
    """Show what a pre-trained model makes of masked images."""

    def command(
        run: tyro.conf.Positional[Path],
        images: Annotated[list[Path], tyro.conf.arg(metavar="PATH...")],
        output: Path = Path("reconstruction.png"),
        mask_ratio: float | None = None,
        paste_visible: bool = False,
        show: int = 12,
        seed: int = 0,
        ema: bool = False,
    ) -> None:
        """Write a picture of masked images, their reconstructions and originals, and print the error.

        Args:
            run: Output folder of 'mae-fast pretrain', or one checkpoint in it.
            images: Image files or folders (their val/ where there is one).
            output: The picture to write.
            mask_ratio: Share of patches to remove; the run's own if not given.
            paste_visible: Show visible patches as they are, not as predicted.
            show: Images in the picture; the error is over all of them.
            seed: Seed of the masks.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from .report.reconstruct import reconstruct_files

        reconstruct_files(run, images, output, mask_ratio, paste_visible, show, seed, ema)

    tyro.cli(command, prog="mae-fast reconstruct", args=args)


def probe(args: list[str]) -> None:
    """Score frozen features with a logistic regression."""

    def command(run: tyro.conf.Positional[Path], data_path: Path, ema: bool = False) -> None:
        """Print the held-out accuracy of a logistic regression on frozen, mean-pooled features.

        Args:
            run: Output folder of 'mae-fast pretrain', or one checkpoint in it.
            data_path: Folder with train/ and val/, the same class folders in both.
            ema: With the averaged weights of a run with --ema-decay.
        """
        from .report.probe import probe

        probe(run, data_path, ema)

    tyro.cli(command, prog="mae-fast probe", args=args)


def data(args: list[str]) -> None:
    """Make the demo set, find bad images, write smaller copies: 'mae-fast data {demo,check,pack}'."""

    def demo(directory: tyro.conf.Positional[Path]) -> None:
        """Build the demo set, satellite tiles with land-cover classes, from two packages of the index.

        Args:
            directory: Where to put train/ and val/.
        """
        from .data.demo import build_demo

        print(build_demo(directory))

    def check(
        path: tyro.conf.Positional[Path],
        output: Path | None = None,
        channels: int = 3,
        every_pixel: bool = False,
        max_bad_fraction: float = 0.01,
        num_workers: int = 0,
    ) -> None:
        """List the images that cannot be used in bad.jsonl, which training heeds. Interrupted, it goes on next time.

        Args:
            path: What is to be checked: images, tar shards, a saved Hugging Face dataset.
            output: Where to write the list; training looks for PATH/bad.jsonl.
            channels: Of the model that is to see them.
            every_pixel: Decode all images; else only their headers, and all of those that do not end as they should.
            max_bad_fraction: Fail if the share of bad images is larger.
            num_workers: Processes that look.
        """
        import time

        from .data.check import bad_file, summary
        from .data.check import check as run
        from .data.sources import open_source

        _at_least(channels=(channels, 1), num_workers=(num_workers, 0))
        source = open_source(_without_splits(path))
        start = time.perf_counter()
        bad = run(source, output, channels, every_pixel, num_workers)
        print(f"{summary(source, bad, time.perf_counter() - start)}\nwrote {output or bad_file(source)}")
        if len(bad) > max_bad_fraction * len(source):
            raise UserError(
                f"{len(bad)} of {len(source)} images are bad, more than --max-bad-fraction {max_bad_fraction:g}"
            )

    def pack(
        path: tyro.conf.Positional[Path],
        output: tyro.conf.Positional[Path],
        size: int = 256,
        quality: int = 92,
        per_shard: int = 10_000,
        exif: bool = False,
        num_workers: int = 0,
    ) -> None:
        """Write smaller copies of images as WebDataset tar shards of JPEGs, and say what that buys.

        Args:
            path: Images, tar shards, a saved Hugging Face dataset.
            output: New folder for the shards.
            size: The shorter side is at most this, in pixels.
            quality: Of the JPEGs, 1 to 95.
            per_shard: Images per shard.
            exif: Turn images as their EXIF orientation says.
            num_workers: Processes that write.
        """
        from .data.pack import pack as run
        from .data.pack import rate, size_of_all
        from .data.sources import open_source

        _at_least(size=(size, 1), quality=(quality, 1), per_shard=(per_shard, 1), num_workers=(num_workers, 0))
        if quality > 95:
            raise UserError(f"--quality {quality}: give 1 to 95")
        source = open_source(_without_splits(path))
        run(source, output, size, quality, per_shard, exif, num_workers)
        packed = open_source(output)
        print(f"{len(source)} images: {len(packed)} packed, {len(source) - len(packed)} left out as bad")
        for name, images in (("before", source), ("packed", packed)):
            print(f"{name}: {size_of_all(images) / 1e6:.1f} MB, {rate(images):.0f} augmented images/s by one process")

    verbs = {verb.__name__: verb for verb in (demo, check, pack)}
    if args[:1] and args[0] not in (*verbs, "-h", "--help"):
        raise UserError(f"data {args[0]}: known are {', '.join(verbs)}")
    tyro.extras.subcommand_cli_from_dict(verbs, prog="mae-fast data", args=args)


def demo(args: list[str]) -> None:
    """Demo set, pre-training, reconstruction and probe in one go, minutes on two cores."""

    def command(directory: tyro.conf.Positional[Path]) -> None:
        """Build the demo set, pre-train the tiny model on it, reconstruct held-out tiles and probe the features.

        Args:
            directory: Where everything goes; a second run continues the first.
        """
        data_path, run, picture = directory / "data", directory / "run", directory / "reconstruction.png"
        steps: list[tuple[Callable[[list[str]], None], list[str]]] = [
            (data, ["demo", str(data_path)]),
            (pretrain, ["--preset", "tiny", "--data-path", str(data_path), "--output-dir", str(run)]),
        ]
        for verb, words in steps:
            _step(verb, words)
        # Land only: open water is nearly one colour, which any fill predicts.
        land = sorted(d for d in (data_path / "val").iterdir() if d.name not in ("water_bodies", "snow_and_ice"))
        _step(reconstruct, [str(run), "--images", *map(str, land), "--output", str(picture), "--paste-visible"])
        _step(probe, [str(run), "--data-path", str(data_path)])

    tyro.cli(command, prog="mae-fast demo", args=args)


def bench(args: list[str]) -> None:
    """Predict a training step's time on GPUs: 'mae-fast bench --predict'."""

    def command(predict: bool = False) -> None:
        """Print what a roofline makes of the counted FLOPs and bytes of a training step, for A100 and H100.

        Args:
            predict: Needed: nothing is measured here yet.
        """
        from .predict import print_predictions

        if not predict:
            raise UserError("bench: give --predict; what is measured comes by 'make bench-ops' and 'make bench-model'")
        print_predictions()

    tyro.cli(command, prog="mae-fast bench", args=args)


def doctor(args: list[str]) -> None:
    """Say which kernel answers each op on this machine, and why."""

    def command() -> None:
        """Print versions, processor and GPUs, and which kernel answers each op on each device, and why."""
        from .report.doctor import doctor

        doctor()

    tyro.cli(command, prog="mae-fast doctor", args=args)


def _at_least(**flags: tuple[int, int]) -> None:
    for name, (value, least) in flags.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")


def _without_splits(path: Path) -> Path:
    if (path / "train").is_dir():
        raise UserError(f"{path} holds train/, which training reads by itself: give {path / 'train'}")
    return path


def _step(verb: Callable[[list[str]], None], words: list[str]) -> None:
    print(f"\n$ mae-fast {verb.__name__} {' '.join(words)}", flush=True)
    verb(words)


VERBS = {verb.__name__: verb for verb in (pretrain, replay, reconstruct, probe, data, demo, bench, doctor)}


def main() -> None:
    """Entry point: run the verb, or say in one line what is wrong and exit with status 2."""
    # Read when torch loads: threads that wait at a barrier sleep instead of spinning. No slower on idle cores; where
    # another process wants the core too, spinning threads were seen to slow training down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: mae-fast VERB [FLAGS]; 'mae-fast VERB --help' for the flags\n")
        print("\n".join(f"  {name:12} {verb.__doc__}" for name, verb in VERBS.items()))
        return
    if args[0] == "--version":
        from . import __version__

        print(f"mae_fast {__version__}")
        return
    try:
        if args[0] not in VERBS:
            raise UserError(f"unknown verb {args[0]!r}; known: {', '.join(VERBS)}")
        VERBS[args[0]](args[1:])
    except UserError as error:
        print(f"mae-fast: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk or a right that went away
        print(f"mae-fast: error: {error.strerror or error}: {error.filename or 'no file'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mae-fast: interrupted", file=sys.stderr)
        sys.exit(130)
