"""Names of the same weights in other libraries: one table for each, and the one function that applies it.

A table maps our name of a layer or a parameter to theirs, ``{i}`` being the number of a block. Three names of theirs
are the thirds of ours: queries, keys and values in projections of their own.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_EMBEDDING = ("cls_token", "pos_embed", "patch_embed.proj")
_IN_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
BATCH_NORM = ("head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked")
_HEAD = ("head", "head.1", *BATCH_NORM)

# A masked autoencoder of the paper's ablations, whose decoder no other model can use.
NO_PIXELS = "the encoder had mask tokens, or the decoder predicted no pixels"

Table = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """A library's names.

    Attributes:
        table: our name -> theirs. What it lacks, the library has no place for.
        spellings: other starts of their names, which are read: a pattern, and what it stands for.
        surplus: patterns of names that the library may have beside these, and why they can be left out.
    """

    table: Table
    spellings: tuple[tuple[str, str], ...] = ()
    surplus: dict[str, str] = field(default_factory=dict)


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
_BASE_MODEL = (r"(?=(embeddings|encoder|layers|layernorm|pooler)\.)", "vit.")  # ViTModel and ViTMAEModel alone
_POOLER = {r"vit\.pooler\.": "neither model has a pooler behind its last norm"}

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
        # Checkpoints of the pre-training of DINO and of MoCo v3: the same encoder below another name.
        ((r"(backbone|base_encoder)\.(?=(cls_token|pos_embed|patch_embed|blocks|norm)\b)", ""),),
        {
            r"head\.(mlp|last_layer)\.": "DINO's projection is of its pre-training alone",
            r"base_encoder\.head\.|predictor\.": "MoCo's projections are of its pre-training alone",
            r"momentum_encoder\.": "MoCo's average of the encoder is of its pre-training alone",
            r"encoder_mask_token$|target\.": NO_PIXELS,
        },
    ),
    "timm": Layout({**_ENCODER, **_under("", "head")}),
    # as files on the hub have them, and transformers 4.x in memory
    "transformers": Layout(
        {
            **_TRANSFORMERS_EMBEDDING,
            **_blocks("blocks", "vit.encoder.layer", _HUB_BLOCK),
            **_blocks("decoder_blocks", "decoder.decoder_layers", _HUB_BLOCK),
        },
        # The second is what save_pretrained of transformers 5.x makes of the decoder's layers.
        (_BASE_MODEL, (r"decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers.")),
        _POOLER,
    ),
    # as transformers 5.x has them in memory
    "transformers5": Layout(
        {
            **_TRANSFORMERS_EMBEDDING,
            **_blocks("blocks", "vit.layers", _MEMORY_BLOCK),
            **_blocks("decoder_blocks", "decoder.decoder_layers", _MEMORY_BLOCK),
        },
        (_BASE_MODEL,),
        _POOLER,
    ),
    # MaskedVisionTransformerTIMM and MAEDecoderTIMM as ``backbone`` and ``decoder``, as its examples have them
    "lightly": Layout(
        {
            **_under("backbone.vit.", *_EMBEDDING, "norm", "fc_norm", "head"),
            **_blocks("blocks", "backbone.vit.blocks"),
            **_under("decoder.", *_DECODER),
            **_blocks("decoder_blocks", "decoder.decoder_blocks"),
        },
        ((r"(?=(vit\.|mask_token$))", "backbone."),),  # the backbone alone
        {r"backbone\.mask_token$": "a masked autoencoder's encoder sees no mask token"},
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
        surplus={r"data_preprocessor\.": "images are standardised by who loads them"},
    ),
}

_NUMBER = re.compile(r"((?:blocks|layers?)\.)(0|[1-9][0-9]{0,8})(?=\.)")
_KIND = re.compile(r"\.(?:weight|bias)$")


def _split(name: str) -> tuple[str, str, str]:
    """A name as a table has it, the number of its block, and its ending: ``.weight``, ``.bias`` or nothing."""
    if "{i}" in name:  # a number's place in tables; of no weight
        return name, "", ""
    number = _NUMBER.search(name)
    kind = _KIND.search(name)
    stem = name[: kind.start()] if kind else name
    if number:
        stem = f"{stem[: number.start(2)]}{{i}}{stem[number.end(2) :]}"
    return stem, number[2] if number else "", kind[0] if kind else ""


def renamed(weights: dict[str, Tensor], layout: str, *, back: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """Our weights, or gradients, under the names of ``layout``; with ``back`` theirs under ours.

    Returns:
        The renamed tensors, and the names that no row of the table has. Tensors are not copied, but for thirds; a layer
        of which a third is missing is left out.
    """
    table = LAYOUTS[layout].table
    places = {their: (our, names) for our, names in table.items() for their in names}
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        stem, number, kind = _split(name)
        if stem not in (places if back else table):
            unknown.append(name)
            continue
        our, names = places[stem] if back else (stem, table[stem])
        targets = [target.replace("{i}", number) + kind for target in ((our,) if back else names)]
        if len(names) == 1:
            found[targets[0]] = tensor
        elif back:
            thirds.setdefault(targets[0], {})[stem] = tensor
        else:
            found |= {target: third.clone() for target, third in zip(targets, tensor.chunk(len(names)), strict=True)}
    for name, parts in thirds.items():
        names = table[_split(name)[0]]
        if len(parts) == len(names):
            found[name] = torch.cat([parts[part] for part in names])
    return found, unknown


def known(weights: dict[str, Tensor], layout: str) -> int:
    """How many of the names the table of ``layout`` has; 0 if the patch embedding is not among them."""
    places = {their for names in LAYOUTS[layout].table.values() for their in names}
    (embedding,) = LAYOUTS[layout].table["patch_embed.proj"]
    spelled, _ = respelled(weights, layout)
    return sum(_split(name)[0] in places for name in spelled) if f"{embedding}.weight" in spelled else 0


def respelled(weights: dict[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights under the spelling that the table of ``layout`` has, without its surplus.

    Returns:
        The weights, and of each name left out the reason.
    """
    found, left_out = {}, {}
    for name, tensor in weights.items():
        full = name
        for pattern, meaning in LAYOUTS[layout].spellings:
            full = re.sub(rf"^{pattern}", meaning, full, count=1)
        reason = next((why for pattern, why in LAYOUTS[layout].surplus.items() if re.match(pattern, full)), None)
        if reason is None:
            found[full] = tensor
        else:
            left_out[name] = reason
    return found, left_out


def missing(weights: dict[str, Tensor]) -> list[str]:
    """Under our names: what a masked autoencoder, its encoder alone or a classifier needs and ``weights`` lack."""
    pooled = any(name.startswith("fc_norm.") for name in weights)
    layers: list[str] = ["patch_embed.proj", "fc_norm" if pooled else "norm"]
    needed = ["cls_token", "pos_embed"]
    decoder = any(name.startswith("decoder_") or name == "mask_token" for name in weights)
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
        needed = [name for name in needed if not name.endswith("attn.qkv.bias")]  # a classifier may have none
    return [name for name in needed if name not in weights]


def listed(names: Iterable[str]) -> str:
    """All of the names; those that differ in their block's number only, together: ``blocks.{0, 1}.norm1.bias``."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        stem, number, kind = _split(name)
        numbers.setdefault((stem, kind), []).append(number)
    lines = []
    for (stem, kind), found in numbers.items():
        together = ", ".join(found)
        lines.append(stem.replace("{i}", together if len(found) == 1 else f"{{{together}}}") + kind)
    return ", ".join(lines) or "nothing"
