"""Weights from one layout to another, complete or refused; what changed on the way is said."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..models.pos_embed import sincos_2d
from ..models.vit import HEAD_EPS
from .layouts import BATCH_NORM, LAYOUTS, NO_PIXELS, known, listed, missing, renamed, respelled


@dataclass(frozen=True)
class Converted:
    """``weights`` by name; ``notes``: one line each for what was left out or rebuilt, and why. Show them."""

    weights: dict[str, Tensor]
    notes: list[str]


def detect(weights: dict[str, Tensor]) -> str:
    """The layout, one of ``LAYOUTS``, whose names these are. What timm has, we call the same: that is "ours".

    Raises:
        UserError: if it is none of them.
    """
    counts = {layout: known(_without_module(weights), layout) for layout in LAYOUTS}
    best = max(counts, key=lambda layout: counts[layout])
    if not counts[best]:
        raise UserError(
            f"these are no weights of a ViT or MAE in a known layout ({', '.join(LAYOUTS)}): "
            f"no patch embedding among {listed(weights)}"
        )
    return best


def convert(weights: dict[str, Tensor], source: str, target: str) -> Converted:
    """Weights of a masked autoencoder, its encoder alone or a classifier under the names of another layout.

    The values stay as they are, bit by bit, with two exceptions, which are noted: position tables that are all zero
    are rebuilt (sine-cosine, square grid), and a linear probe's batch norm is folded into its head for libraries that
    have no such head. Tensors are not copied unless they change.

    Args:
        weights: by name; any floating dtype.
        source: of ``LAYOUTS``; "ours" are the published names.
        target: of ``LAYOUTS``. "transformers" are the names of its files, and of 4.x in memory; "transformers5" those
            of 5.x in memory.

    Raises:
        UserError: on names that the source layout does not have, or that are missing in it, all of them listed; on
            position tables that cannot be rebuilt; on what the target library has no place for.
    """
    for layout in (source, target):
        if layout not in LAYOUTS:
            raise UserError(f"unknown layout {layout!r}", f"known: {', '.join(LAYOUTS)}")
    ours, notes = _to_ours(weights, source)
    notes += _rebuild_tables(ours)
    return Converted(_from_ours(ours, target, notes), notes)


def _to_ours(weights: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    spelled, left_out = respelled(_without_module(weights), source)
    found, unknown = renamed(spelled, source, back=True)
    if unknown:
        raise UserError(
            f"{len(unknown)} names that the layout {source!r} does not have: {listed(unknown)}",
            f"is it another model, or another layout ({', '.join(LAYOUTS)})?",
        )
    if not any(name in found for name in BATCH_NORM):  # then it is an ordinary head, whatever its name
        found = {name.replace("head.1.", "head."): tensor for name, tensor in found.items()}
    if NO_PIXELS in left_out.values():
        decoder = [name for name in found if name.startswith("decoder_") or name == "mask_token"]
        found = {name: tensor for name, tensor in found.items() if name not in decoder}
        # A tokenizer has many tensors, of which the name says enough.
        whole = {name.partition(".")[0]: why for name, why in left_out.items() if why == NO_PIXELS}
        left_out = {name: why for name, why in left_out.items() if why != NO_PIXELS} | whole
        left_out |= dict.fromkeys(decoder, NO_PIXELS)
    notes = [f"left out {listed(group)}: {why}" for why, group in _by_reason(left_out).items()]
    head = [name for name in found if name.startswith("head.")]
    if "decoder_embed.weight" in found and head:  # timm's models have one from the start, trained or not
        notes.append(f"left out {listed(head)}: a masked autoencoder has no head")
        found = {name: tensor for name, tensor in found.items() if name not in head}
    if "norm.weight" in found and "fc_norm.weight" in found:
        raise UserError("these weights have a norm before and behind the pooling", "ours and timm's models have one")
    if lacks := missing(found):
        theirs = [name for ours in lacks for name in renamed({ours: torch.empty(3)}, source)[0] or (ours,)]
        raise UserError(f"missing in the weights of layout {source!r}: {listed(x for x in theirs if x not in spelled)}")
    return found, notes


def _from_ours(ours: dict[str, Tensor], target: str, notes: list[str]) -> dict[str, Tensor]:
    table = LAYOUTS[target].table
    if "head.1" not in table and "head.1.weight" in ours:
        ours = folded(ours)
        notes.append(
            f"folded the linear probe's batch norm (eps {HEAD_EPS:g}) into its head: {target} has no such head"
        )
    if "fc_norm" not in table and "fc_norm.weight" in ours:
        raise UserError(
            f"{target} has no classifier that pools patches: its head sees the class token, this one the "
            "mean of the patches through fc_norm",
            "convert to timm, or fine-tune with the class token (global_pool=False)",
        )
    found, unknown = renamed(ours, target)
    if unknown:
        parts = dict.fromkeys(name.split(".")[0] for name in unknown)
        notes.append(f"left out {', '.join(parts)}: {target} has the encoder alone")
    if target == "lightly":
        found["backbone.mask_token"] = torch.zeros_like(ours["cls_token"])
        notes.append("added backbone.mask_token, zeros as lightly makes them: a masked autoencoder does not use it")
    return found


def folded(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights with a linear probe's head, ``linear((x - mean) / sqrt(var + eps))``, as one layer; made in fp64."""
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
    """Write sine-cosine tables for those that are all zero, and say so; others stay as they are."""
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


def _without_module(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that ``DistributedDataParallel`` puts before every name."""
    if weights and all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _by_reason(left_out: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, why in left_out.items():
        groups.setdefault(why, []).append(name)
    return groups
