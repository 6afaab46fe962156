"""What is timed, of every contender, each as its users would run it at its best.

``train``: a training step (forward, backward, AdamW) at mask ratio 0.75, normalised-pixel loss, fused AdamW; biases and
norms are not decayed, as published.
``finetune``: a training step of the classifier on every patch: mean of the tokens, 1000 classes, soft targets, drop
path 0.1, layer-wise decay 0.65 in timm's parameter groups.
``features``: the encoder on every patch, without gradients. ``reconstruct``: forward at mask ratio 0.75, without
gradients. All of them: the same weights, the same images in memory, bf16 by autocast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mae_fast
from mae_fast.reference import ReferenceMAE
from mae_fast.training.heap import keep_freed_memory
from mae_fast.training.optim import AdamW

MODELS = {
    "tiny": "mae_vit_tiny_patch4",
    "base": "mae_vit_base_patch16",
    "large": "mae_vit_large_patch16",
    "huge": "mae_vit_huge_patch14",
}
OURS = ("mae_fast", "mae_fast drop-in")
FORMS = {"": "eager", "compiled": "compile", "CUDA graph": "graph"}  # of our training's step
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95)}
RIVALS = ("reference", "reference compiled", "transformers", "timm blocks", "timm vit", "timm vit compiled")
TASKS = {  # and who takes part: without gradients there is one mae_fast, and timm's blocks are the reference's
    "train": (*OURS, *RIVALS[:4]),
    "finetune": ("mae_fast", *RIVALS[4:]),
    "features": ("mae_fast", *RIVALS[:3]),
    "reconstruct": ("mae_fast", *RIVALS[:3]),
}


class Step(Protocol):
    """One step; returns what the contenders have to agree on. ``keep_gradients``: they stay allocated after it."""

    def __call__(self, keep_gradients: bool = False) -> Tensor: ...


def ours(model: str, device: str | torch.device = "cpu") -> nn.Module:
    """Our model with fixed weights, drawn on ``device``."""
    torch.manual_seed(0)
    with torch.device(device):
        built: nn.Module = getattr(mae_fast, MODELS[model])(norm_pix_loss=True)
    return built


def reference(model: str, device: str | torch.device = "cpu") -> nn.Module:
    """The eager reference with SDPA."""
    with torch.device(device):
        return ReferenceMAE.of(ours(model, device))


def timm_blocks(model: str, device: str | torch.device = "cpu") -> nn.Module:
    """The eager reference, its transformer blocks timm's."""
    from timm.models.vision_transformer import Block

    mae = reference(model, device)
    for blocks in (mae.blocks, mae.decoder_blocks):
        for i, block in enumerate(blocks):
            dim, heads = block.attn.proj.in_features, block.attn.num_heads
            theirs = Block(dim, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
            theirs.load_state_dict(block.state_dict())
            blocks[i] = theirs.to(device)
    return mae


def twin(model: Any, mask_ratio: float) -> nn.Module:
    """transformers' ViTMAEForPreTraining with SDPA and the shapes, weights and tables of our model."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from mae_fast.interop.configs import transformers_config
    from mae_fast.interop.layouts import renamed

    config = ViTMAEConfig.from_dict(transformers_config(model, mask_ratio), attn_implementation="sdpa")
    with model.cls_token.device:
        theirs = ViTMAEForPreTraining(config).to(model.cls_token)
    theirs.load_state_dict(renamed(model.state_dict(), "transformers5")[0])
    return theirs


def transformers(model: str, device: str | torch.device = "cpu") -> nn.Module:
    """``twin`` of our model."""
    return twin(ours(model, device), 0.75)


def classifier(model: str, device: str | torch.device = "cpu") -> nn.Module:
    """Our classifier with fixed weights, drawn on ``device``."""
    torch.manual_seed(0)
    with torch.device(device):
        name = MODELS[model].removeprefix("mae_")
        built: nn.Module = getattr(mae_fast, name)(num_classes=1000, drop_path_rate=0.1, global_pool=True)
    return built


def timm_vit(model: str, device: str | torch.device = "cpu") -> nn.Module:
    """timm's VisionTransformer (for ViT-B, what ``vit_base_patch16_224`` builds) with our classifier's weights."""
    from timm.models.vision_transformer import VisionTransformer

    mine: Any = classifier(model, device)
    with torch.device(device):
        theirs = VisionTransformer(
            img_size=mine.patch_embed.img_size[0],
            patch_size=mine.patch_embed.patch_size[0],
            embed_dim=mine.cls_token.shape[2],
            depth=len(mine.blocks),
            num_heads=mine.blocks[0].attn.num_heads,
            num_classes=mine.num_classes,
            global_pool="avg",
            drop_path_rate=0.1,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    theirs.load_state_dict(mine.state_dict())
    return theirs


def _finetune_step(family: str, model: str, images: Tensor, bf16: bool, compiled: bool) -> Step:
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    made: Any = classifier(model, images.device) if family == "mae_fast" else timm_vit(model, images.device)
    made.train()
    groups = param_groups_layer_decay(made, 0.05, made.no_weight_decay(), layer_decay=0.65)
    if family == "mae_fast":  # as ``mae_fast.training.classify`` does
        keep_freed_memory()
        optimizer: torch.optim.Optimizer = AdamW(groups, working_dtype=torch.bfloat16 if bf16 else None, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **ADAMW)
    called = torch.compile(made) if compiled else made
    shares = torch.rand(len(images), 1000, generator=torch.Generator().manual_seed(1)).softmax(1).to(images.device)
    return _step(lambda images: nn.functional.cross_entropy(called(images).float(), shares), optimizer, images, bf16)


def images(model: str, batch: int) -> Tensor:
    """Standardised images [N, 3, H, W], the same ones in every process."""
    side = 32 if model == "tiny" else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def decayed(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """The two groups of the published optimiser: what has one dimension is not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    ]


def published_step(model: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, bf16: bool) -> Step:
    """The published loop's step: autocast, backward, torch's fused AdamW."""
    return _step(loss, torch.optim.AdamW(decayed(model), fused=True, **ADAMW), images, bf16)


def _step(loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, bf16: bool) -> Step:
    def step(keep_gradients: bool = False) -> Tensor:
        optimizer.zero_grad(set_to_none=not keep_gradients)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            value = loss(images)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not keep_gradients:
            optimizer.zero_grad()  # contenders that wait for their turn then hold none
        return value.detach()

    return step


def _call(f: Callable[[Tensor], Tensor], images: Tensor, bf16: bool) -> Step:
    def step(keep_gradients: bool = False) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return f(images)

    return step


def build(name: str, model: str, images: Tensor, bf16: bool, task: str = "train", noise: Tensor | None = None) -> Step:
    """The step of the contender called ``name``, on the images' device; ``noise`` [N, L]: the masks, else drawn."""
    if task == "finetune":
        return _finetune_step(name.split()[0], model, images, bf16, name.endswith("compiled"))
    if task != "train":
        return _call(_inference(name, model, task), images, bf16)
    family, _, how = name.partition(" ")
    if family == "mae_fast" and how != "drop-in":  # as ``mae_fast.training.pretrain`` does
        keep_freed_memory()
        mine: Any = ours(model, images.device)
        optimizer = AdamW(decayed(mine), working_dtype=torch.bfloat16 if bf16 else None, **ADAMW)
        if noise is not None:
            return _train_step(mine, optimizer, images, noise, bf16, FORMS[how])
        return _step(mine.loss, optimizer, images, bf16)
    makers = {"mae_fast": ours, "reference": reference, "transformers": transformers, "timm": timm_blocks}
    made = makers[family](model, images.device)
    called = torch.compile(made) if how == "compiled" else made
    return published_step(made, lambda images: called(images, noise=noise)[0], images, bf16)


def _train_step(model: Any, optimizer: AdamW, images: Tensor, noise: Tensor, bf16: bool, form: Any) -> Step:
    """Our training's own step, which takes the masks. A form that cannot be had is an error, not eager steps."""
    from mae_fast.training.distributed import Processes, spread
    from mae_fast.training.step import TrainStep

    finite = torch.zeros((), dtype=torch.bool, device=images.device)

    def update() -> Tensor:
        optimizer.step()
        return finite

    def refuse(why: str) -> None:
        raise RuntimeError(why)

    def loss(model: Any, images: Tensor, noise: Tensor) -> Tensor:
        value: Tensor = model.loss(images, 0.75, noise)
        return value

    alone = spread(model, loss, "ddp", Processes(images.device))
    training = TrainStep(model, alone, update, optimizer, bf16=bf16, form=form, tell=refuse)

    def step(keep_gradients: bool = False) -> Tensor:
        loss = training.backward(images, noise)
        training.update()  # frees the gradients, but for a graph's
        return loss

    return step


def _inference(name: str, model: str, task: str) -> Callable[[Tensor], Tensor]:
    """``features``: class token's row [N, D] of the latent, as the order of the others is drawn; else the loss."""
    mask_ratio = 0.0 if task == "features" else 0.75
    if name == "transformers":
        theirs: Any = twin(ours(model), mask_ratio).eval()
        if task == "features":
            return lambda images: theirs.vit(images).last_hidden_state[:, 0]
        return lambda images: theirs(images).loss
    made: Any = {"mae_fast": ours, "reference": reference, "reference compiled": reference}[name](model).eval()
    called = made.forward_encoder if task == "features" else made
    if name.endswith("compiled"):
        called = torch.compile(called)
    if task == "features":
        return lambda images: called(images, mask_ratio, None)[0][:, 0]
    return lambda images: called(images, mask_ratio, None)[0]
