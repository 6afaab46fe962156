"""Rebuilds the models of training runs from their checkpoints."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, first_line
from ..models import vit
from ..models.sizes import VIT_CONFIGS
from .create import DETECTION as DETECTION
from .create import SEGMENTATION as SEGMENTATION
from .create import LoadedModel, create_model, find_weights, load_checkpoint, load_encoder, saved_encoder
from .files import load_weights
from .layouts import unwrap
from .metadata import ModelMetadata
from .run_reader import Checkpoint, find_checkpoint, run_or_checkpoint, run_settings

logger = logging.getLogger(__name__)

TIMM = "timm/"  # prefix of the names of timm's models


def trained_model(checkpoint: Checkpoint, ema: bool = False) -> Any:
    """Load the model of a checkpoint of any training command except train-dvae, in evaluation mode.

    Args:
        ema: load the averaged weights.

    Raises:
        UserError: if the weights do not fit.
    """
    state = checkpoint.state
    config = dict(state["model"])
    name = config["name"]
    if name == SEGMENTATION:
        from ..models.segmentation import SegmentationModel

        model: Any = SegmentationModel(saved_encoder(config), len(state["classes"]), config["channels"])
    elif name == DETECTION:
        sizes = {key: value for key, value in config.items() if key not in ("name", "encoder", "settings")}
        model = build_detector(saved_encoder(config), **sizes)
    elif name.startswith(TIMM):
        del config["name"]
        model = build_classifier(name, None, config.pop("num_classes"), config.pop("img_size"), **config)
        if state["probed"]:
            model.head = vit.probing_head(model.head)
    else:
        return load_checkpoint(checkpoint, ema)
    checkpoint.load_model(model, ema)
    return model.eval()


def load_trained(weights: str | os.PathLike[str], model: str | None = None, ema: bool = False) -> LoadedModel:
    """Load the model of a run of any training command except train-dvae. Load other weights by ``load_encoder``."""
    run = run_or_checkpoint(find_weights(weights))
    if run is None or model:
        return load_encoder(weights, model, ema)
    checkpoint = find_checkpoint(run)
    metadata = ModelMetadata.from_state(checkpoint.state, checkpoint.path)
    return LoadedModel(trained_model(checkpoint, ema), checkpoint, run_settings(checkpoint), metadata)


def build_detector(encoder: Any, *, size: int, window: int, **about: Any) -> Any:
    """Build a ``Detector``. ``window``: 0 for global attention in all blocks.

    Raises:
        UserError: if the size does not fit the encoder.
    """
    from ..models.detection import Detector

    try:
        return Detector(encoder, size=size, window=window or None, **about)
    except ValueError as error:
        raise UserError(f"--input-size {size}: {error}", "give another size") from error


def build_classifier(name: str, weights: str | None, num_classes: int, size: int | list[int], **kwargs: Any) -> Any:
    """Build a classifier of ours or of timm (``timm/NAME``).

    Args:
        weights: pre-trained weights. None: random weights.
        size: side, or height and width, of the images.

    Raises:
        UserError: if the model is unknown, or the weights do not fit it.
    """
    if name.startswith(TIMM):
        return _timm_classifier(name.removeprefix(TIMM), weights, num_classes, size, **kwargs)
    if name not in VIT_CONFIGS:
        known = ", ".join(sorted(VIT_CONFIGS))
        raise UserError(f"--model {name} is unknown", f"known are {known}, and {TIMM}NAME for timm's models")
    return create_model(name, weights, num_classes=num_classes, img_size=size, **{"in_chans": 3, **kwargs})


def _timm_classifier(
    name: str, weights: str | None, num_classes: int, size: int | list[int], global_pool: bool, **kwargs: Any
) -> Any:
    """Build a vision transformer of timm, with timm's default pooling.

    ``weights``: a file; "pretrained" for timm's weights from the hub; None for random weights.
    """
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
    except Exception as error:  # timm raises many types
        why = first_line(error)
        raise UserError(f"--model {TIMM}{name}: {why}", "give one of timm's plain vision transformers") from error
    if overlay and not overlay["state_dict"].keys() & model.state_dict().keys():
        raise UserError(
            f"--weights {weights} do not fit {TIMM}{name}: no name in common", "give weights of this architecture"
        )
    return model
