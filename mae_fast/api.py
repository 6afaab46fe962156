"""The commands of ``mae-fast`` as functions. Their keyword arguments are the flags, and are checked in the same way.

In a notebook, Ctrl-C (or "interrupt") saves the run and raises ``KeyboardInterrupt``. The same call resumes the run.
Messages are printed unless the program has set up ``logging``.
"""

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .console import shown_messages
from .errors import UserError, train_packages
from .training.config import (
    DetectConfig,
    DvaeConfig,
    FinetuneConfig,
    LinprobeConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
)

if TYPE_CHECKING:
    from .evaluation.features import FeatureFile
    from .evaluation.logreg_probe import Score
    from .evaluation.predict import ClassifierPredictor, DetectionPredictor, SegmentationPredictor
    from .evaluation.predict_files import PredictionFile
    from .models.rollout import AttentionMaps
    from .training.trainer import RunResult
    from .weights.export import Part

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

# For each configuration: the training function, and the modules of ``training.tasks`` that train and evaluate it.
_MODULES: dict[type[RunConfig], tuple[str, str, str]] = {
    PretrainConfig: ("pretrain", "pretrain", ""),
    FinetuneConfig: ("finetune", "classify", "classifier"),
    LinprobeConfig: ("linprobe", "classify", "classifier"),
    SegmentConfig: ("segment", "segment", "segment"),
    DetectConfig: ("detect", "detect", "detect"),
    DvaeConfig: ("train_dvae", "dvae", ""),
}


def run(config: RunConfig) -> "RunResult":
    """Train with ``config``, or evaluate if ``config.eval_only`` is set.

    Raises:
        UserError: on any mistake that the user can fix.
        KeyboardInterrupt: after Ctrl-C. The run is saved.
        SystemExit: after another termination signal. The run is saved.
    """
    function, module, evaluation = _MODULES[type(config)]
    with train_packages():
        from .training.trainer import RunResult
        from .weights.run_reader import checkpoints_in

        if not getattr(config, "eval_only", False):
            result: RunResult = getattr(import_module(f"mae_fast.training.tasks.{module}"), function)(config)
            return result
        metrics = import_module(f"mae_fast.training.tasks.{evaluation}").evaluate(config)
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints_in(config.output_dir / "checkpoints")]
        return RunResult(config.output_dir, metrics, max(steps, default=0))


DATASET = {
    "data": "Map-style dataset, used instead of data_path. Its items are images (PIL images, arrays [H, W, C] or "
    "tensors [C, H, W]), or tuples or dicts that contain an image.",
    "data_name": "Name of the dataset; a resumed run must use the same one. Required with data.",
    "key": "Key of the image, if items are dicts.",
}
LABELLED_DATASET = {
    **DATASET,
    "data": 'Map-style dataset, used instead of data_path. Its items are (image, label), or dicts with a "label".',
    "val_data": "Dataset of the held-out images. Required with data.",
}


def _with_flags_of(
    kind: type[RunConfig], datasets: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Function], Function]:
    """Decorator that sets the signature and docstring of a function: the flags of ``kind`` and ``datasets``."""

    def decorate(function: Function) -> Function:
        keyword, fields = inspect.Parameter.KEYWORD_ONLY, kind.model_fields
        parameters = []
        for name, info in fields.items():
            default = inspect.Parameter.empty if info.is_required() else info.default
            if name == "data_path" and datasets:  # a dataset may replace it
                default = None
            parameters.append(inspect.Parameter(name, keyword, annotation=info.annotation, default=default))
        parameters += [inspect.Parameter(name, keyword, annotation=Any, default=None) for name in datasets]
        preset = inspect.Parameter("preset", keyword, annotation=str | None, default=None)
        parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)
        signature = inspect.Signature([preset, *parameters], return_annotation="RunResult")
        about = re.sub("Run the same (line|command) again", "Make the same call again", f"{kind.__doc__}")
        lines = [about, "", "Args:"]
        lines.append(f"    preset: {', '.join(kind.presets)}; sets the defaults of the arguments below.")
        lines += [f"    {name}: {' '.join((fields[name].description or '').split())}" for name in fields]
        lines += [f"    {name}: {text}" for name, text in datasets.items()]
        lines += ["", "Raises:", "    UserError: on any mistake that the user can fix, such as a wrong argument."]
        function.__doc__ = "\n".join(lines)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


@_with_flags_of(PretrainConfig, DATASET)
def pretrain(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(PretrainConfig, preset, flags)


@_with_flags_of(FinetuneConfig, LABELLED_DATASET)
def finetune(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(FinetuneConfig, preset, flags)


@_with_flags_of(LinprobeConfig, LABELLED_DATASET)
def linprobe(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(LinprobeConfig, preset, flags)


@_with_flags_of(SegmentConfig)
def segment(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(SegmentConfig, preset, flags)


@_with_flags_of(DetectConfig)
def detect(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(DetectConfig, preset, flags)


@_with_flags_of(DvaeConfig)
def train_dvae(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(DvaeConfig, preset, flags)


def reconstruct(
    weights: str | os.PathLike[str],
    images: str | Path | Sequence[str | Path],
    output: str | Path = "reconstruction.png",
    *,
    mask_ratio: float | Sequence[float] = (),
    mask_sampling: Literal["random", "block", "grid"] | None = None,
    masks: str | Path | None = None,
    whole: bool = False,
    paste_visible: bool = False,
    show: int = 12,
    seed: int = 0,
    model: str | None = None,
    ema: bool = False,
    show_bands: str | Sequence[int] | None = None,
) -> dict[float, tuple[float, float]]:
    """Write a picture or a page of masked images, their reconstructions and originals.

    The arguments are the flags of ``mae-fast reconstruct``, whose help describes them.

    Returns:
        For each mask ratio, the PSNR in dB on the removed patches: that of the model, and that of a constant fill. The
        fill is the mean colour of the visible patches. With ``norm_pix_loss``, it is the mean of each original patch.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    with _session():
        from .data.pixel_format import band_numbers
        from .evaluation.reconstruct import Masking, ReconstructOptions, reconstruct_files

        ratios = (mask_ratio,) if isinstance(mask_ratio, int | float) else tuple(mask_ratio)
        masking = Masking(ratios, mask_sampling, Path(masks) if masks else None, seed)
        bands = band_numbers("show-bands", show_bands)
        options = ReconstructOptions(whole, paste_visible, show, ema, model, bands)
        return reconstruct_files(os.fspath(weights), _paths(images), Path(output), masking, options)


def predict(
    weights: str | os.PathLike[str],
    images: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    top_k: int = 5,
    draw: str | Path | None = None,
    model: str | None = None,
    ema: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> "PredictionFile":
    """Predict classes, masks or objects of images, and write them to files.

    The arguments are the flags of ``mae-fast predict``, whose help describes them. For images in memory, ``load`` gives
    the model as an object with a method ``predict``.

    Returns:
        The path, and the number of images with and without a prediction.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    with _session():
        from .evaluation.encoding import LoadOptions
        from .evaluation.predict import load
        from .evaluation.predict_files import PredictOptions, predict_files

        loading = LoadOptions(batch_size=batch_size, num_workers=num_workers, device=device)
        options = PredictOptions(top_k, Path(draw) if draw else None, batch_size, num_workers)
        predictor = load(weights, model=model, ema=ema, device=str(loading.torch_device()))
        return predict_files(predictor, _paths(images), Path(output) if output else None, options)


def load(
    weights: str | os.PathLike[str],
    *,
    model: str | None = None,
    ema: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> "ClassifierPredictor | SegmentationPredictor | DetectionPredictor":
    """Load a trained model with its preprocessing: ``load(RUN).predict(images)``.

    Args:
        weights: a run of finetune, linprobe, segment or detect, or one of its checkpoints; or a classifier as a file or
            folder of any layout, or as a name on the Hugging Face hub.
        model: the name of a model factory, needed only if the weights do not determine the model's sizes.
        ema: load the averaged weights of a run.
        device: "auto" is a GPU if there is one.

    Returns:
        An object with ``predict(images)``, ``model``, ``classes`` and ``preprocessing``. Images are paths, PIL images,
        arrays [H, W, C] or tensors [C, H, W]. The result of an image is a ``Classification``, ``Segmentation`` or
        ``Detections``.

    Raises:
        UserError: if there are no such weights, or the model has no head that predicts.
    """
    with _session():
        from .evaluation.encoding import LoadOptions
        from .evaluation.predict import load

        return load(weights, model=model, ema=ema, device=str(LoadOptions(device=device).torch_device()))


def features(
    data: str | Path,
    *,
    weights: str | os.PathLike[str],
    output: str | Path,
    model: str | None = None,
    pool: Literal["cls", "mean", "map"] = "mean",
    layers: Sequence[int] = (),
    batch_size: int = 64,
    num_workers: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_bad_fraction: float = 0.01,
    ema: bool = False,
) -> "FeatureFile":
    """Write the features of images to a file, one row per image. Unusable images are left out.

    The arguments are the flags of ``mae-fast features``, whose help describes them.

    Returns:
        The path, the shape of the feature array, and the number of unusable images.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    with _session():
        from .evaluation.features import FeatureOptions, open_data, write_features
        from .weights.create import load_encoder

        options = FeatureOptions(
            pool=pool, layers=layers, batch_size=batch_size, num_workers=num_workers, device=device,
            max_bad_fraction=max_bad_fraction,
        )  # fmt: skip
        source = open_data(Path(data))
        return write_features(load_encoder(weights, model, ema), source, Path(output), options)


def attention(
    images: str | Path | Sequence[str | Path],
    *,
    weights: str | os.PathLike[str],
    output: str | Path = "attention.png",
    model: str | None = None,
    whole: bool = False,
    show: int = 12,
    ema: bool = False,
) -> "list[tuple[str, AttentionMaps]]":
    """Write a picture of the attention maps of images.

    The arguments are the flags of ``mae-fast attention``, whose help describes them. For your own tensors, call
    ``mae_fast.models.attention_maps`` with a model and a batch.

    Returns:
        For each image in the picture, its name and maps: ``heads`` [1, H, h, w] and ``rollout`` [1, h, w].

    Raises:
        UserError: on any mistake that the user can fix.
    """
    with _session():
        from .evaluation.attention import AttentionOptions, draw_attention
        from .weights.create import load_encoder

        options = AttentionOptions(whole, show)
        return draw_attention(load_encoder(weights, model, ema), _paths(images), Path(output), options)


def knn(
    weights: str | os.PathLike[str],
    data_path: str | Path,
    *,
    model: str | None = None,
    k: int = 20,
    temperature: float = 0.07,
    pool: Literal["cls", "mean"] = "mean",
    batch_size: int = 64,
    num_workers: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_bad_fraction: float = 0.01,
    ema: bool = False,
) -> tuple[float, float]:
    """Evaluate frozen features with a k-nearest-neighbour classifier.

    The arguments are the flags of ``mae-fast knn``, whose help describes them.

    Returns:
        Top-1 and top-5 accuracy on ``data_path/val``, between 0 and 1.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    with _session():
        from .evaluation.knn import KnnOptions, knn

        options = KnnOptions(
            k, temperature, pool, batch_size=batch_size, num_workers=num_workers, device=device,
            max_bad_fraction=max_bad_fraction,
        )  # fmt: skip
        found = knn(os.fspath(weights), Path(data_path), model, options, ema)
        logger.info(str(found))
        return found.top1, found.top5


def logreg_probe(
    weights: str | os.PathLike[str],
    data_path: str | Path,
    *,
    model: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_bad_fraction: float = 0.01,
    ema: bool = False,
) -> "dict[str, Score]":
    """Evaluate frozen features with a logistic regression, compared with an untrained encoder and raw pixels.

    The arguments are the flags of ``mae-fast logreg-probe``, whose help describes them.

    Returns:
        For the encoder, the untrained encoder and the pixels: accuracy and mean per-class accuracy on
        ``data_path/val``, between 0 and 1.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    with _session():
        from .evaluation.encoding import LoadOptions
        from .evaluation.logreg_probe import logreg_probe

        options = LoadOptions(
            batch_size=batch_size, num_workers=num_workers, device=device, max_bad_fraction=max_bad_fraction
        )
        scores = logreg_probe(os.fspath(weights), Path(data_path), model, options, ema)
        for name, score in scores.items():
            logger.info(f"probe on {name}: held-out accuracy {score}")
        return scores


def export(
    weights: str | os.PathLike[str],
    output: str | Path,
    *,
    what: "Part | None" = None,
    raw_pixels: bool = False,
    mask_ratio: float | None = None,
    model: str | None = None,
    ema: bool = False,
) -> float | None:
    """Write a trained model as ONNX or as a torch.export program, with its classes and preprocessing.

    The arguments are the flags of ``mae-fast export``, whose help describes them.

    Returns:
        The largest difference between the outputs of onnxruntime and torch; None if they were not compared.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    output, difference = Path(output), None
    if output.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{output}: unknown format {output.suffix!r}", "use a name that ends in .onnx or .pt2")
    with _session():
        from .evaluation.images import preprocessing_of
        from .evaluation.reconstruct import MASK_RATIO
        from .weights.export import export_onnx, parts_of, save_program
        from .weights.trained import load_trained

        loaded = load_trained(weights, model, ema)
        ratio = (loaded.metadata.mask_ratio or MASK_RATIO) if mask_ratio is None else mask_ratio
        part = what or parts_of(loaded.model)[0]
        recorded = replace(loaded.metadata, preprocessing=preprocessing_of(loaded).record())
        if output.suffix == ".pt2":
            save_program(loaded.model, output, part, ratio, raw_pixels, recorded)
            checked = "run it with torch.export.load(PATH).module()(images=...)"
        else:
            difference = export_onnx(loaded.model, output, part, ratio, raw_pixels, recorded)
            checked = (
                "not checked, because onnxruntime is not installed"
                if difference is None
                else f"largest difference between onnxruntime and torch: {difference:.2g}"
            )
        origin = loaded.checkpoint.path.name if loaded.checkpoint else os.fspath(weights)
        logger.info(f"wrote {part} of {origin} to {output}; {checked}")
    return difference


def convert(
    weights: str | os.PathLike[str],
    output: str | Path,
    to: str,
    *,
    from_: str = "auto",
    verify: bool = False,
    ema: bool = False,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    norm_eps: float | None = None,
    norm_pix_loss: bool = False,
) -> bool:
    """Write weights as a file or folder of another library.

    The arguments are the flags of ``mae-fast convert``, whose help describes them.

    Returns:
        True. With ``verify``, False if the outputs of the converted model differ from the input model's; then
        nothing is written.

    Raises:
        UserError: on any mistake that the user can fix.
    """
    for name, heads in ("num-heads", num_heads), ("decoder-num-heads", decoder_num_heads):
        if heads is not None and heads < 1:
            raise UserError(f"--{name} {heads} is out of range", "give 1 or more")
    if norm_eps is not None and not 0 < norm_eps < 1:
        raise UserError(f"--norm-eps {norm_eps} is out of range", "give a number above 0 and below 1")
    with _session():
        from .weights.convert_files import ConversionOptions, convert_files
        from .weights.layouts import LAYOUTS
        from .weights.metadata import ModelMetadata

        for name, layout in ("to", to), ("from", from_):
            if layout not in LAYOUTS and (name, layout) != ("from", "auto"):
                raise UserError(f"--{name} {layout}: unknown layout", f"choose one of {', '.join(LAYOUTS)}")

        given = ModelMetadata(num_heads, decoder_num_heads, norm_eps=norm_eps, norm_pix_loss=norm_pix_loss or None)
        return convert_files(os.fspath(weights), Path(output), to, ConversionOptions(from_, verify, ema, given))


def _paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(path) for path in ([given] if isinstance(given, str | Path) else given)]


def _run(kind: type[RunConfig], preset: str | None, flags: dict[str, Any]) -> "RunResult":
    with _session():
        given = {name: flags.pop(name) for name in LABELLED_DATASET if name in flags}
        if given.get("data") is None:
            if given:
                raise UserError(f"{', '.join(given)} given without data", "add data=DATASET, or leave them out")
            return run(kind.with_preset(preset, **flags))
        return run(_with_datasets(kind, preset, flags, given))


def _with_datasets(
    kind: type[RunConfig], preset: str | None, flags: dict[str, Any], given: dict[str, Any]
) -> RunConfig:
    """A configuration that reads the datasets in ``given``."""
    from .data.datasets import MapDataset

    takes_labels, name, key = kind in (FinetuneConfig, LinprobeConfig), given.get("data_name"), given.get("key")
    if kind is not PretrainConfig and not takes_labels:
        raise UserError("data: segment, detect and train_dvae only read files", "use data_path instead")
    if "data_path" in flags:
        raise UserError("data and data_path are both given", "leave one of them out")
    if not name:
        raise UserError("data is given without data_name", "add data_name; a resumed run must use the same name")
    if not isinstance(name, str):
        raise UserError(f"data_name: expected a string, got {name!r} ({type(name).__name__})", "give a string")
    if takes_labels and given.get("val_data") is None:
        raise UserError("data is given without val_data", "add val_data, a dataset of held-out images")
    config = kind.with_preset(preset, data_path=Path(name), **flags)
    train = MapDataset(given["data"], name, key, takes_labels, config.exif)
    val = MapDataset(given["val_data"], f"{name}-val", key, True, config.exif, "val_data") if takes_labels else None
    return config.with_datasets(train=train, val=val)


@contextmanager
def _session() -> Iterator[None]:
    """Context manager: print log messages, and restore the random number generators at the end."""
    if "torch" not in sys.modules:  # as the command line does
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    with shown_messages(), train_packages(), torch.random.fork_rng(devices):
        yield
