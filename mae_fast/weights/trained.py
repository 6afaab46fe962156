"""The models that training commands make, built from a checkpoint alone."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, first_line
from ..models import vit
from ..models.sizes import VIT_CONFIGS
from .create import LoadedModel, create_model, find_weights, load_checkpoint, load_encoder
from .files import load_weights
from .layouts import unwrap
from .metadata import ModelMetadata
from .run_reader import Checkpoint, find_checkpoint, run_or_checkpoint, run_settings

logger = logging.getLogger(__name__)

TIMM = "timm/"  # begins the names of timm's models
SEGMENTATION, DETECTION = "segmentation", "detection"  # the names of these models in checkpoints


def trained_model(checkpoint: Checkpoint, ema: bool = False) -> Any:
    """The model of a checkpoint of any training command but train-dvae, in evaluation mode.

    Args:
        ema: load the averaged weights.

    Raises:
        UserError: if the weights do not fit.
    """
    state = checkpoint.state
    about = dict(state["model"])
    name = about.pop("name")
    if name == SEGMENTATION:
        from ..models.segmentation import SegmentationModel

        encoder = _saved_encoder(about, about["img_size"])
        model: Any = SegmentationModel(encoder, len(state["classes"]), about["channels"])
    elif name == DETECTION:
        sizes = {key: value for key, value in about.items() if key not in ("encoder", "settings")}
        model = build_detector(_saved_encoder(about, about["size"]), **sizes)
    elif name.startswith(TIMM):
        model = build_classifier(name, None, about.pop("num_classes"), about.pop("img_size"), **about)
        if state["probed"]:
            model.head = vit.probing_head(model.head)
    else:
        return load_checkpoint(checkpoint, ema)
    checkpoint.load_model(model, ema)
    return model.eval()


def load_trained(weights: str | os.PathLike[str], model: str | None = None, ema: bool = False) -> LoadedModel:
    """The model of a run of any training command but train-dvae, else as ``load_encoder``; in evaluation mode."""
    run = run_or_checkpoint(find_weights(weights))
    if run is None or model:
        return load_encoder(weights, model, ema)
    checkpoint = find_checkpoint(run)
    metadata = ModelMetadata.from_state(checkpoint.state, checkpoint.path)
    return LoadedModel(trained_model(checkpoint, ema), checkpoint, run_settings(checkpoint), metadata)


def _saved_encoder(about: dict[str, Any], size: int) -> Any:
    """The encoder that a checkpoint describes, with random weights. Old runs have no settings."""
    return create_model(about["encoder"], num_classes=0, img_size=size, **about.get("settings", {}))


def build_detector(encoder: Any, *, size: int, window: int, **about: Any) -> Any:
    """A ``Detector``. ``window``: 0 for attention over the whole image in every block.

    Raises:
        UserError: if the size does not fit the encoder.
    """
    from ..models.detection import Detector

    try:
        return Detector(encoder, size=size, window=window or None, **about)
    except ValueError as error:
        raise UserError(f"--input-size {size}: {error}") from error


def build_classifier(name: str, weights: str | None, num_classes: int, size: int | list[int], **kwargs: Any) -> Any:
    """A classifier of ours, or timm's (``timm/NAME``), with pre-trained weights where there are any.

    Raises:
        UserError: if there is no such model, or the weights do not fit it.
    """
    if name.startswith(TIMM):
        return _timm_classifier(name.removeprefix(TIMM), weights, num_classes, size, **kwargs)
    if name not in VIT_CONFIGS:
        known = ", ".join(sorted(VIT_CONFIGS))
        raise UserError(f"--model {name} is unknown", f"known are {known}, and {TIMM}NAME for any of timm's")
    return create_model(name, weights, num_classes=num_classes, img_size=size, **kwargs)


def _timm_classifier(
    name: str, weights: str | None, num_classes: int, size: int | list[int], global_pool: bool, **kwargs: Any
) -> Any:
    """A vision transformer of timm's, with its own pooling; ``weights``: a file, "pretrained" for timm's own from the
    hub, None for random ones."""
    import timm

    overlay: dict[str, Any] | None = None
    if weights and weights != "pretrained":
        found, notes = unwrap(load_weights(Path(weights)))
        for note in notes:
            logger.info("%s: %s", weights, note)
        overlay = {"state_dict": found, "file": "", "url": "", "hf_hub_id": None}
        overlay["num_classes"] = len(found["head.weight"]) if "head.weight" in found else 0
    try:
        model: Any = timm.create_model(
            name, bool(weights), pretrained_cfg_overlay=overlay, num_classes=num_classes, img_size=size, **kwargs
        )
        if not isinstance(model.head, nn.Linear) or not hasattr(model.blocks[-1], "norm2"):
            raise TypeError("only plain vision transformers can be trained here")
        with torch.no_grad():
            sides = [size, size] if isinstance(size, int) else size
            model.eval()(torch.zeros(1, kwargs.get("in_chans", 3), *sides))
    except Exception as error:  # of many kinds
        why = first_line(error)
        raise UserError(f"--model {TIMM}{name}: {why}", "give one of timm's plain vision transformers") from error
    if overlay and not overlay["state_dict"].keys() & model.state_dict().keys():
        raise UserError(f"--weights {weights} are none of {TIMM}{name}: they have no name in common")
    return model
