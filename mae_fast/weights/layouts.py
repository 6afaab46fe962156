"""The names of weights in other libraries: a table for each library, and functions that apply it.

A table maps our name of a layer or parameter to the library's name. ``{i}`` is the number of a block. If a library has
separate projections for queries, keys and values, one of our names maps to three of its names.
"""

import itertools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_LISTED = 6  # most names, or patterns of names, in a message

_EMBEDDING = ("cls_token", "pos_embed", "patch_embed.proj")
_IN_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
BATCH_NORM = ("head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked")
_HEAD = ("head", "head.1", *BATCH_NORM)

# Attributes under which DDP and other wrappers hold a model, in the order in which they are tried.
WRAPPERS = ("module", "model", "net", "network", "encoder", "teacher", "ema_model")
# Name parts that torch.compile, FSDP and activation checkpointing insert.
_INSERTED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Why the decoders of the paper's ablations are left out.
NO_PIXELS = "the encoder had mask tokens, or the decoder did not predict pixels"

Table = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """A library's names.

    Attributes:
        table: our name -> the library's names. The library has no counterpart of our other names.
        prefixes: alternative prefixes in the library's files, as (pattern, replacement).
        ignored: patterns of other names in the library's files -> the reason why they can be left out.
    """

    table: Table
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: dict[str, str] = field(default_factory=dict)


def _under(prefix: str, *names: str) -> Table:
    return {name: (prefix + name,) for name in names}


def _blocks(ours: str, theirs: str, inner: dict[str, tuple[str, ...]] | None = None) -> Table:
    inner = inner or _under("", *_IN_BLOCK)
    return {f"{ours}.{{i}}.{a}": tuple(f"{theirs}.{{i}}.{b}" for b in names) for a, names in inner.items()}


_ENCODER = {**_under("", *_EMBEDDING, "norm", "fc_norm"), **_blocks("blocks", "blocks")}
_MAE = {**_ENCODER, **_under("", *_DECODER), **_blocks("decoder_blocks", "decoder_blocks")}

_TRANSFORMERS_EMBEDDING: Table = {
    "cls_token": ("vit.embeddings.cls_token",),
    "pos_embed": ("vit.embeddings.position_embeddings",),
    "patch_embed.proj": ("vit.embeddings.patch_embeddings.projection",),
    "norm": ("vit.layernorm",),
    "head": ("classifier",),
    **_under("decoder.", *_DECODER),
}
_HUB_BLOCK: Table = {
    "norm1": ("layernorm_before",),
    "attn.qkv": tuple(f"attention.attention.{which}" for which in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
_MEMORY_BLOCK: Table = {
    "norm1": ("layernorm_before",),
    "attn.qkv": tuple(f"attention.{letter}_proj" for letter in "qkv"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
_BASE_MODEL = (r"(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit.")  # ViTModel and ViTMAEModel without a head
_POOLER = {r"vit\.pooler\.": "our models have no pooler after the last norm"}

_MMPRETRAIN_BLOCK: Table = {
    "norm1": ("ln1",),
    "attn.qkv": ("attn.qkv",),
    "attn.proj": ("attn.proj",),
    "norm2": ("ln2",),
    "mlp.fc1": ("ffn.layers.0.0",),
    "mlp.fc2": ("ffn.layers.1",),
}

LAYOUTS: dict[str, Layout] = {
    "ours": Layout(
        {**_MAE, **_under("", *_HEAD)},
        # Pre-training checkpoints of DINO and MoCo v3 have the same encoder under a prefix.
        ((r"(backbone|base_encoder)\.(?=(cls_token|pos_embed|patch_embed|blocks|norm)\b)", ""),),
        {
            r"head\.(mlp|last_layer)\.": "DINO's projection head is used only in its pre-training",
            r"base_encoder\.head\.|predictor\.": "MoCo's projection heads are used only in its pre-training",
            r"momentum_encoder\.": "MoCo's momentum encoder is used only in its pre-training",
            r"encoder_mask_token$|target\.": NO_PIXELS,
        },
    ),
    "timm": Layout({**_ENCODER, **_under("", "head")}),
    # Files on the hub, and transformers 4.x in memory.
    "transformers": Layout(
        {
            **_TRANSFORMERS_EMBEDDING,
            **_blocks("blocks", "vit.encoder.layer", _HUB_BLOCK),
            **_blocks("decoder_blocks", "decoder.decoder_layers", _HUB_BLOCK),
        },
        # The second prefix is that of the decoder's layers in save_pretrained of transformers 5.x.
        (_BASE_MODEL, (r"decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.")),
        _POOLER,
    ),
    # transformers 5.x in memory.
    "transformers5": Layout(
        {
            **_TRANSFORMERS_EMBEDDING,
            **_blocks("blocks", "vit.layers", _MEMORY_BLOCK),
            **_blocks("decoder_blocks", "decoder.decoder_layers", _MEMORY_BLOCK),
        },
        (_BASE_MODEL,),
        _POOLER,
    ),
    # MaskedVisionTransformerTIMM as ``backbone`` and MAEDecoderTIMM as ``decoder``, as in lightly's examples.
    "lightly": Layout(
        {
            **_under("backbone.vit.", *_EMBEDDING, "norm", "fc_norm", "head"),
            **_blocks("blocks", "backbone.vit.blocks"),
            **_under("decoder.", *_DECODER),
            **_blocks("decoder_blocks", "decoder.decoder_blocks"),
        },
        ((r"(?=(vit\.|mask_token$))", "backbone."),),  # for a backbone alone
        {r"backbone\.mask_token$": "the encoder of a masked autoencoder uses no mask token"},
    ),
    "mmpretrain": Layout(
        {
            **_under("backbone.", "cls_token", "pos_embed"),
            "patch_embed.proj": ("backbone.patch_embed.projection",),
            **_blocks("blocks", "backbone.layers", _MMPRETRAIN_BLOCK),
            "norm": ("backbone.ln1",),
            "fc_norm": ("backbone.ln2",),
            **_under("neck.", *_DECODER),
            "decoder_norm": ("neck.ln1",),
            **_blocks("decoder_blocks", "neck.decoder_blocks", _MMPRETRAIN_BLOCK),
            "head": ("head.fc",),
            "head.1": ("head.layers.head",),
            **{name: (name.replace("head.0", "neck.bn"),) for name in BATCH_NORM},
        },
        ignored={r"data_preprocessor\.": "images are standardised by the data loader"},
    ),
}

_NUMBER = re.compile(r"((?:blocks|layers?)\.)(0|[1-9][0-9]{0,8})(?=\.)")
_KIND = re.compile(r"\.(?:weight|bias)$")


def _split(name: str) -> tuple[str, str, str]:
    """The name as it is in a table, the number of the block or "", and the suffix ``.weight``, ``.bias`` or ""."""
    if "{i}" in name:  # no valid name contains the placeholder
        return name, "", ""
    number = _NUMBER.search(name)
    kind = _KIND.search(name)
    stem = name[: kind.start()] if kind else name
    if number:
        stem = f"{stem[: number.start(2)]}{{i}}{stem[number.end(2) :]}"
    return stem, number[2] if number else "", kind[0] if kind else ""


def rename_keys(weights: dict[str, Tensor], layout: str, *, back: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """Rename our weights, or gradients, to the names of ``layout``. ``back``: from ``layout`` to our names.

    Returns:
        The renamed tensors, and the names that are not in the table. Tensors are copied only to split or join the
        projections of queries, keys and values. If one of the three is missing, the projection is left out.
    """
    table = LAYOUTS[layout].table
    rows = {their: (our, names) for our, names in table.items() for their in names}
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    split: dict[str, dict[str, Tensor]] = {}  # parts of a projection to be joined
    for name, tensor in weights.items():
        stem, number, kind = _split(name)
        if stem not in (rows if back else table):
            unknown.append(name)
            continue
        our, names = rows[stem] if back else (stem, table[stem])
        targets = [target.replace("{i}", number) + kind for target in ((our,) if back else names)]
        if len(names) == 1:
            found[targets[0]] = tensor
        elif back:
            split.setdefault(targets[0], {})[stem] = tensor
        else:
            found |= {target: part.clone() for target, part in zip(targets, tensor.chunk(len(names)), strict=True)}
    for name, parts in split.items():
        names = table[_split(name)[0]]
        if len(parts) == len(names):
            found[name] = torch.cat([parts[part] for part in names])
    return found, unknown


def count_known_keys(weights: dict[str, Tensor], layout: str) -> int:
    """The number of names in the table of ``layout``; 0 without a patch embedding."""
    known = {their for names in LAYOUTS[layout].table.values() for their in names}
    (embedding,) = LAYOUTS[layout].table["patch_embed.proj"]
    stripped, _ = strip_prefixes(weights, layout)
    return sum(_split(name)[0] in known for name in stripped) if f"{embedding}.weight" in stripped else 0


def unwrap(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the names of wrappers, such as ``_orig_mod.``, ``module.`` or Lightning's ``model.``, in any combination.

    Returns:
        The weights of the wrapped model, and notes about the changes. If no prefix of ``WRAPPERS`` leads to names of a
        layout, only the parts that torch inserts are removed.
    """
    plain = {_INSERTED.sub("", name): x for name, x in weights.items()}
    prefix, found = _find_wrapped(plain) or ("", plain)
    removed = [prefix] if prefix else []
    removed += dict.fromkeys(match for name in weights for match in _INSERTED.findall(name))
    notes = [f"removed {', '.join(map(repr, removed))} from the names of the weights"] if removed else []
    if beside := [name for name in plain if not name.startswith(prefix)]:
        notes.append(f"left out {format_keys(beside)}: outside of {prefix!r}")
    return found, notes


def _find_wrapped(weights: dict[str, Tensor], depth: int = 4) -> tuple[str, dict[str, Tensor]] | None:
    """The prefix of the wrappers, and the weights without it. None if no prefix leads to names of a layout."""
    if any(count_known_keys(weights, layout) for layout in LAYOUTS):
        return "", weights
    for wrapper in WRAPPERS if depth else ():
        part = f"{wrapper}."
        inner = {name.removeprefix(part): x for name, x in weights.items() if name.startswith(part)}
        if inner and (found := _find_wrapped(inner, depth - 1)):
            return part + found[0], found[1]
    return None


def strip_prefixes(weights: dict[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Replace the alternative prefixes of ``layout``, and leave out ignored names.

    Returns:
        The weights, and a reason for each name that was left out.
    """
    found, left_out = {}, {}
    for name, tensor in weights.items():
        full = name
        for pattern, prefix in LAYOUTS[layout].prefixes:
            full = re.sub(rf"^{pattern}", prefix, full, count=1)
        reason = next((why for pattern, why in LAYOUTS[layout].ignored.items() if re.match(pattern, full)), None)
        if reason is None:
            found[full] = tensor
        else:
            left_out[name] = reason
    return found, left_out


def missing_keys(weights: dict[str, Tensor]) -> list[str]:
    """The names that ``weights`` needs for a masked autoencoder, an encoder or a classifier but does not have."""
    pooled = any(name.startswith("fc_norm.") for name in weights)
    layers: list[str] = ["patch_embed.proj", "fc_norm" if pooled else "norm"]
    needed = ["cls_token", "pos_embed"]
    decoder = any(name.startswith("decoder_") for name in weights)
    if decoder:
        needed += ["mask_token", "decoder_pos_embed"]
        layers += ["decoder_embed", "decoder_norm", "decoder_pred"]
    for blocks in ("blocks", "decoder_blocks") if decoder else ("blocks",):
        numbers = {int(_split(name)[1]) for name in weights if _split(name)[0].startswith(f"{blocks}.{{i}}.")}
        gap = next(i for i in itertools.count() if i not in numbers)
        count = gap if 0 < gap == len(numbers) else gap + 1
        layers += [f"{blocks}.{i}.{layer}" for i in range(count) for layer in _IN_BLOCK]
    probe = any(name.startswith("head.0.") for name in weights)
    if any(name.startswith("head.") for name in weights):
        layers.append("head.1" if probe else "head")
    if probe:
        needed += BATCH_NORM
    needed += [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    if not decoder and not any(name.endswith("attn.qkv.bias") for name in weights):
        needed = [name for name in needed if not name.endswith("attn.qkv.bias")]  # optional in a classifier
    return [name for name in needed if name not in weights]


def format_keys(names: Iterable[str]) -> str:
    """List the first names and count the others, which are logged at DEBUG.

    Names that differ only in the block's number are joined: ``blocks.{0, 1}.norm1.bias``.
    """
    names = list(names)
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        stem, number, kind = _split(name)
        numbers.setdefault((stem, kind), []).append(number)
    found = []
    for (stem, kind), blocks in numbers.items():
        joined = ", ".join(blocks if len(blocks) <= MAX_LISTED else [*blocks[: MAX_LISTED - 2], "...", blocks[-1]])
        found.append(stem.replace("{i}", joined if len(blocks) == 1 else f"{{{joined}}}") + kind)
    if len(found) <= MAX_LISTED:
        return ", ".join(found) or "nothing"
    logger.debug("all names: %s", ", ".join(names))
    more = sum(map(len, list(numbers.values())[MAX_LISTED - 1 :]))
    return f"{', '.join(found[: MAX_LISTED - 1])} and {more} more"
