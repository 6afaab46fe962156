"""Converts weights from one layout to another. Every change is noted; unknown or missing names are errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..models.pos_embed import sincos_2d
from ..models.vit import HEAD_EPS
from .layouts import (
    BATCH_NORM,
    LAYOUTS,
    NO_PIXELS,
    count_known_keys,
    format_keys,
    missing_keys,
    rename_keys,
    strip_prefixes,
    unwrap,
)


@dataclass(frozen=True)
class Converted:
    """The converted ``weights`` by name, and ``notes`` for the user: a line for each change of the weights."""

    weights: dict[str, Tensor]
    notes: list[str]


def detect(weights: dict[str, Tensor]) -> str:
    """The layout in ``LAYOUTS`` that has these names. Encoders of timm have the same names as "ours".

    Raises:
        UserError: if no layout has them.
    """
    unwrapped, _ = unwrap(weights)
    counts = {layout: count_known_keys(unwrapped, layout) for layout in LAYOUTS}
    best = max(counts, key=lambda layout: counts[layout])
    if not counts[best]:
        raise UserError(
            f"these are not weights of a ViT or MAE in a known layout ({', '.join(LAYOUTS)}): "
            f"no patch embedding among {format_keys(weights)}"
        )
    return best


def convert(weights: dict[str, Tensor], source: str, target: str) -> Converted:
    """Weights of a masked autoencoder, an encoder or a classifier under the names of another layout.

    Values do not change, with two exceptions, which are noted: position tables that are all zero are rebuilt
    (sine-cosine, square grid), and the batch norm of a linear probe is folded into its head if the target has no such
    head. Tensors are not copied unless they change.

    Args:
        weights: by name; any floating dtype.
        source: a layout in ``LAYOUTS``; "ours" has the published names.
        target: a layout in ``LAYOUTS``.

    Raises:
        UserError: if names are unknown in the source layout or missing; if position tables cannot be rebuilt; or if the
            target library has no such model.
    """
    for layout in (source, target):
        if layout not in LAYOUTS:
            raise UserError(f"unknown layout {layout!r}", f"known: {', '.join(LAYOUTS)}")
    ours, notes = _to_ours(weights, source)
    notes += _rebuild_tables(ours)
    return Converted(_from_ours(ours, target, notes), notes)


def _to_ours(weights: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    unwrapped, unwrapping = unwrap(weights)
    stripped, left_out = strip_prefixes(unwrapped, source)
    found, unknown = rename_keys(stripped, source, back=True)
    if unknown:
        raise UserError(
            f"{len(unknown)} names are unknown in the layout {source!r}: {format_keys(unknown)}",
            f"give weights of a ViT or MAE, in one of the layouts {', '.join(LAYOUTS)}",
        )
    if not any(name in found for name in BATCH_NORM):  # a head without batch norm
        found = {name.replace("head.1.", "head."): tensor for name, tensor in found.items()}
    if NO_PIXELS in left_out.values():
        decoder = [name for name in found if name.startswith("decoder_") or name == "mask_token"]
        found = {name: tensor for name, tensor in found.items() if name not in decoder}
        # A tokenizer has many tensors, so name only the modules.
        modules = {name.partition(".")[0]: why for name, why in left_out.items() if why == NO_PIXELS}
        left_out = {name: why for name, why in left_out.items() if why != NO_PIXELS} | modules
        left_out |= dict.fromkeys(decoder, NO_PIXELS)
    notes = unwrapping + [
        f"left out {format_keys(name for name in left_out if left_out[name] == why)}: {why}"
        for why in dict.fromkeys(left_out.values())
    ]
    head = [name for name in found if name.startswith("head.")]
    if "decoder_embed.weight" in found and head:  # timm's models always have a head, trained or not
        notes.append(f"left out {format_keys(head)}: a masked autoencoder has no head")
        found = {name: tensor for name, tensor in found.items() if name not in head}
    if "mask_token" in found and not any(name.startswith("decoder_") for name in found):
        notes.append("left out mask_token: these weights have no decoder")
        del found["mask_token"]
    if "norm.weight" in found and "fc_norm.weight" in found:
        raise UserError(
            "these weights have a norm before and one after the pooling, but our models have only one",
            "leave out either norm or fc_norm",
        )
    if missing := missing_keys(found):
        theirs = [name for ours in missing for name in rename_keys({ours: torch.empty(3)}, source)[0] or (ours,)]
        absent = format_keys(name for name in theirs if name not in stripped)
        raise UserError(f"missing in the weights of layout {source!r}: {absent}")
    return found, notes


def _from_ours(ours: dict[str, Tensor], target: str, notes: list[str]) -> dict[str, Tensor]:
    table = LAYOUTS[target].table
    if "head.1" not in table and "head.1.weight" in ours:
        ours = fold_batch_norm(ours)
        notes.append(
            f"folded the linear probe's batch norm (eps {HEAD_EPS:g}) into its head: {target} has no such head"
        )
    if "fc_norm" not in table and "fc_norm.weight" in ours:
        raise UserError(
            f"{target} has no classifier on mean-pooled patches: the input of its head is the class token",
            "convert to timm, or fine-tune with the class token (global_pool=False)",
        )
    found, unknown = rename_keys(ours, target)
    if unknown:
        parts = dict.fromkeys(name.split(".")[0] for name in unknown)
        notes.append(f"left out {', '.join(parts)}: {target} only has the encoder")
    if target == "lightly":
        found["backbone.mask_token"] = torch.zeros_like(ours["cls_token"])
        notes.append("added backbone.mask_token as zeros, like lightly: a masked autoencoder does not use it")
    return found


def fold_batch_norm(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights with the head ``linear((x - mean) / sqrt(var + eps))`` of a linear probe as one linear layer.

    It is computed in fp64.
    """
    weight, bias = ours["head.1.weight"], ours["head.1.bias"]
    scale = (ours["head.0.running_var"].double() + HEAD_EPS).rsqrt()
    scaled = weight.double() * scale
    rest = {name: tensor for name, tensor in ours.items() if not name.startswith("head.")}
    return {
        **rest,
        "head.weight": scaled.to(weight),
        "head.bias": (bias.double() - scaled @ ours["head.0.running_mean"].double()).to(bias),
    }


def _rebuild_tables(ours: dict[str, Tensor]) -> list[str]:
    """Replace position tables that are all zero by sine-cosine tables. Return a note for each."""
    notes = []
    for name in ("pos_embed", "decoder_pos_embed"):
        table = ours.get(name)
        if table is None or table.any():
            continue
        side = math.isqrt(max(0, table.shape[1] - 1)) if table.ndim == 3 else 0
        if table.ndim != 3 or side < 1 or side * side + 1 != table.shape[1] or table.shape[2] % 4:
            raise UserError(
                f"{name} is all zero and cannot be rebuilt: it must be [1, 1 + side * side, a multiple of 4], "
                f"got {list(table.shape)}"
            )
        ours[name] = sincos_2d(table.shape[2], (side, side)).to(table)
        notes.append(f"rebuilt {name}, which was all zero, as the sine-cosine table of {side} x {side} patches")
    return notes
