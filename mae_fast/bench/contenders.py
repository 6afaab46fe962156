"""The contenders and their timed steps. Each contender uses the fastest settings that its users have.

- ``train``: a training step (forward, backward, AdamW) with the loss on normalised pixels. Biases and norms have no
  weight decay, as in the published code. Baselines use torch's fused AdamW.
- ``finetune``: a training step of the classifier on all patches, with mean pooling, 1000 classes, soft targets, drop
  path 0.1, and layer-wise decay 0.65 in the parameter groups of timm.
- ``infer``: the encoder on all patches, without gradients.
- ``reconstruct``: the forward pass of the masked autoencoder, without gradients.

All contenders have the same weights, masks, and images in memory. bf16 is autocast.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mae_fast
from mae_fast.memory import disable_malloc_trim
from mae_fast.models.reference import ReferenceMAE
from mae_fast.models.sizes import ENCODERS
from mae_fast.training.optim import AdamW

MODELS = {
    "tiny": "mae_vit_tiny_patch4",
    "base": "mae_vit_base_patch16",
    "large": "mae_vit_large_patch16",
    "huge": "mae_vit_huge_patch14",
}
PATCH = {name: ENCODERS[name]["patch_size"] for name in MODELS}
IMAGE_SIZE = {name: ENCODERS[name]["img_size"] for name in MODELS}
OURS = ("mae_fast", "mae_fast drop-in", "mae_fast CUDA graph")
PREDICT = "predict "  # "mae_fast predict 0.5": our training step, which predicts half of the removed patches
EXECUTIONS = {"compiled": "compile", "CUDA graph": "cuda-graph"}  # values of --execution, by suffix of the name
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95)}
BASELINES = ("reference", "reference compiled", "transformers", "timm blocks", "timm vit", "timm vit compiled")
# By task, the contender for each baseline. For fine-tuning, "compile" is timm's model under torch.compile, because the
# reference has no drop path and transformers has no classifier with mean pooling. timm has no masked autoencoder, so
# its transformer blocks replace those of the reference.
TASKS: dict[str, dict[str, str]] = {
    "train": {
        "eager": "reference",
        "compile": "reference compiled",
        "transformers": "transformers",
        "timm": "timm blocks",
    },
    "finetune": {"timm": "timm vit", "compile": "timm vit compiled"},
    "infer": {
        "eager": "reference",
        "compile": "reference compiled",
        "transformers": "transformers",
        "timm": "timm vit",
    },
    "reconstruct": {"eager": "reference", "compile": "reference compiled", "transformers": "transformers"},
}
EAGER = {"finetune": "timm vit"}  # the contender with the correct results, by task; default: the reference


def predicting(ratio: float) -> str:
    """The suffix of a contender's name for a predict ratio. ``predict_ratio`` parses it."""
    return f"{PREDICT}{ratio}"


def predict_ratio(name: str) -> float:
    """The predict ratio of the contender called ``name``."""
    _, found, ratio = name.partition(PREDICT)
    return float(ratio) if found else 1.0


class Step(Protocol):
    """A timed step. It returns the result on which all contenders must agree.

    Args:
        keep_gradients: keep gradients allocated after the step.
        exact: disable drop path, which is random. A classifier then returns its logits instead of the loss, because the
            loss over 1000 classes hardly depends on errors.
    """

    def __call__(self, keep_gradients: bool = False, exact: bool = False) -> Tensor: ...


def ours(model: str, device: str | torch.device = "cpu", image_size: int | None = None) -> nn.Module:
    """Our model with fixed weights, drawn on ``device``."""
    torch.manual_seed(0)
    with torch.device(device):
        size = image_size or IMAGE_SIZE[model]
        built: nn.Module = getattr(mae_fast, MODELS[model])(norm_pix_loss=True, img_size=size)
    return built


def reference(model: str, device: str | torch.device = "cpu", image_size: int | None = None) -> nn.Module:
    """The eager reference with SDPA."""
    with torch.device(device):
        return ReferenceMAE.of(ours(model, device, image_size))


def timm_blocks(model: str, device: str | torch.device = "cpu", image_size: int | None = None) -> nn.Module:
    """The eager reference with the transformer blocks of timm."""
    from timm.models.vision_transformer import Block

    mae: Any = reference(model, device, image_size)
    for blocks in (mae.blocks, mae.decoder_blocks):
        for i, block in enumerate(blocks):
            dim, heads = block.attn.proj.in_features, block.attn.num_heads
            norm: Any = partial(nn.LayerNorm, eps=1e-6)
            theirs = Block(dim, heads, qkv_bias=True, norm_layer=norm)
            theirs.load_state_dict(block.state_dict())
            blocks[i] = theirs.to(device)
    return mae  # type: ignore[no-any-return]


def transformers_mae(model: Any, mask_ratio: float) -> nn.Module:
    """ViTMAEForPreTraining of transformers, with SDPA and the sizes, weights and position embeddings of our model."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from mae_fast.weights.hub_configs import transformers_config
    from mae_fast.weights.layouts import rename_keys
    from mae_fast.weights.metadata import ModelMetadata

    config = ViTMAEConfig.from_dict(
        transformers_config(model, ModelMetadata(mask_ratio=mask_ratio)), attn_implementation="sdpa"
    )
    with model.cls_token.device:
        theirs: nn.Module = ViTMAEForPreTraining(config).to(model.cls_token)
    theirs.load_state_dict(rename_keys(model.state_dict(), "transformers5")[0])
    return theirs


def classifier(model: str, device: str | torch.device = "cpu", image_size: int | None = None) -> nn.Module:
    """Our classifier with fixed weights, drawn on ``device``."""
    torch.manual_seed(0)
    with torch.device(device):
        name, size = MODELS[model].removeprefix("mae_"), image_size or IMAGE_SIZE[model]
        built: nn.Module = getattr(mae_fast, name)(
            num_classes=1000, drop_path_rate=0.1, global_pool=True, img_size=size
        )
        # The published initialisation of the head is close to zero: its logits would pass any check.
        nn.init.normal_(built.get_parameter("head.weight"), std=built.get_parameter("head.weight").shape[1] ** -0.5)
    return built


def timm_vit(mine: Any) -> nn.Module:
    """timm's VisionTransformer, such as ``vit_base_patch16_224``, with the weights of our classifier or encoder."""
    from timm.models.vision_transformer import VisionTransformer

    classes = getattr(mine, "num_classes", 0)
    with mine.cls_token.device:
        theirs = VisionTransformer(
            img_size=mine.patch_embed.img_size[0],
            patch_size=mine.patch_embed.patch_size[0],
            embed_dim=mine.cls_token.shape[2],
            depth=len(mine.blocks),
            num_heads=mine.blocks[0].attn.num_heads,
            num_classes=classes,
            global_pool="avg" if classes else "token",
            drop_path_rate=0.1 if classes else 0.0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
    weights = mine.state_dict()
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    return theirs


def images(model: str, batch: int, image_size: int | None = None) -> Tensor:
    """Random standardised images [N, 3, H, W], the same in every process."""
    side = image_size or IMAGE_SIZE[model]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def noise(model: str, batch: int, image_size: int | None = None) -> Tensor:
    """Random numbers [N, L] for the masks, the same in every process."""
    patches = ((image_size or IMAGE_SIZE[model]) // PATCH[model]) ** 2
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(1))


def decayed(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """The two parameter groups of the published code: vectors have no weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    ]


def build(
    name: str,
    model: str,
    images: Tensor,
    bf16: bool,
    task: str = "train",
    noise: Tensor | None = None,
    mask_ratio: float = 0.75,
) -> Step:
    """The step of the contender called ``name``, for the device and size of ``images``.

    Args:
        noise: [N, L], which determines the masks; None: random masks in each step.
    """
    if task == "finetune":
        return _finetune_step(name, model, images, bf16)
    if task != "train":
        return _call(_inference(name, model, images, task, noise, mask_ratio), images, bf16)
    family, _, how = name.partition(" ")
    side = images.shape[-1]
    if family == "mae_fast" and how != "drop-in":  # as ``mae_fast.training.tasks.pretrain`` does
        disable_malloc_trim()
        mine: Any = ours(model, images.device, side)
        optimizer = AdamW(decayed(mine), working_dtype=torch.bfloat16 if bf16 else None, **ADAMW)
        ratio = predict_ratio(name)
        if ratio < 1:
            return _step(lambda x: mine.loss(x, mask_ratio, noise, predict_ratio=ratio), optimizer, images, bf16)
        if how:
            assert noise is not None
            return _train_step(mine, optimizer, images, noise, bf16, mask_ratio, EXECUTIONS[how])
        return _step(lambda images: mine.loss(images, mask_ratio, noise), optimizer, images, bf16)
    called, made = _autoencoder(name, model, images, mask_ratio)
    theirs = _fused_adamw(decayed(made), images)
    return _step(lambda images: called(images, noise), theirs, images, bf16)


def _autoencoder(
    name: str, model: str, images: Tensor, mask_ratio: float
) -> tuple[Callable[[Tensor, Tensor | None], Tensor], nn.Module]:
    """The loss function of images and noise, and the model, of the contender called ``name``."""
    family, side, device = name.split()[0], images.shape[-1], images.device

    def forward(made: Any) -> Any:
        """The model, under torch.compile if the name of the contender ends with "compiled" or "max-autotune"."""
        mode = "max-autotune" if name.endswith("max-autotune") else None
        return torch.compile(made, mode=mode) if mode or name.endswith("compiled") else made

    if family == "transformers":
        theirs: Any = transformers_mae(ours(model, device, side), mask_ratio)
        called = forward(theirs)
        return lambda images, noise: called(images, noise=noise).loss, theirs
    makers = {"mae_fast": ours, "reference": reference, "timm": timm_blocks}
    made: Any = makers[family](model, device, side)
    ratio = predict_ratio(name)
    if ratio < 1:  # the reference with a predict ratio, to check our step
        return lambda images, noise: made.predict_ratio_loss(images, mask_ratio, noise, ratio), made
    called = forward(made)
    return lambda images, noise: called(images, mask_ratio, noise)[0], made


def _inference(
    name: str, model: str, images: Tensor, task: str, noise: Tensor | None, mask_ratio: float
) -> Callable[[Tensor], Tensor]:
    """For ``infer``, a function that returns the class token [N, D], because the order of patches is random; else the
    loss."""
    if task == "reconstruct":
        loss, _ = _autoencoder(name, model, images, mask_ratio)
        return lambda images: loss(images, noise)
    side, device = images.shape[-1], images.device
    if name == "transformers":
        theirs: Any = transformers_mae(ours(model, device, side), 0.0).eval()
        return lambda images: theirs.vit(images, noise=noise).last_hidden_state[:, 0]
    if name == "timm vit":
        vit: Any = timm_vit(ours(model, device, side)).eval()
        return lambda images: vit.forward_features(images)[:, 0]
    made: Any = ours(model, device, side) if name == "mae_fast" else reference(model, device, side)
    called = torch.compile(made.forward_encoder) if name.endswith("compiled") else made.forward_encoder
    return lambda images: called(images, 0.0, noise)[0][:, 0]


# The meta device, on which FLOPs are counted, supports neither autocast nor fused AdamW.
def _fused_adamw(groups: Any, images: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=images.device.type != "meta", **ADAMW)


def _autocast(images: Tensor, bf16: bool) -> AbstractContextManager[object]:
    return torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext()


def _step(loss: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, bf16: bool) -> Step:
    """The step of the published loop: autocast, backward, update."""

    def step(keep_gradients: bool = False, exact: bool = False) -> Tensor:
        optimizer.zero_grad(set_to_none=not keep_gradients)
        with _autocast(images, bf16):
            value = loss(images)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not keep_gradients:
            optimizer.zero_grad()  # free the memory while other contenders run
        return value.detach()

    return step


def _call(f: Callable[[Tensor], Tensor], images: Tensor, bf16: bool) -> Step:
    def step(keep_gradients: bool = False, exact: bool = False) -> Tensor:
        with torch.no_grad(), _autocast(images, bf16):
            return f(images)

    return step


def _finetune_step(name: str, model: str, images: Tensor, bf16: bool) -> Step:
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    mine: Any = classifier(model, images.device, images.shape[-1])
    made: Any = mine if name == "mae_fast" else timm_vit(mine)
    groups = param_groups_layer_decay(made, 0.05, made.no_weight_decay(), layer_decay=0.65)
    if name == "mae_fast":  # as ``mae_fast.training.tasks.classify`` does
        disable_malloc_trim()
        optimizer: torch.optim.Optimizer = AdamW(groups, working_dtype=torch.bfloat16 if bf16 else None, **ADAMW)
    else:
        optimizer = _fused_adamw(groups, images)
    called = torch.compile(made) if name.endswith("compiled") else made
    shares = torch.rand(len(images), 1000, generator=torch.Generator().manual_seed(1)).softmax(1).to(images.device)
    logits = torch.empty(0)

    def loss(images: Tensor) -> Tensor:
        nonlocal logits
        found = called(images).float()
        logits = found.detach()
        return nn.functional.cross_entropy(found, shares)

    whole = _step(loss, optimizer, images, bf16)

    def step(keep_gradients: bool = False, exact: bool = False) -> Tensor:
        if made.training == exact:
            made.train(not exact)
        value = whole(keep_gradients)
        return logits if exact else value

    return step


def _train_step(
    model: Any, optimizer: AdamW, images: Tensor, noise: Tensor, bf16: bool, mask_ratio: float, execution: Any
) -> Step:
    """Our training step under torch.compile or as a CUDA graph. It raises an error instead of falling back to eager."""
    from mae_fast.training.distributed import DistContext, parallelize
    from mae_fast.training.step import TrainStep

    finite = torch.zeros((), dtype=torch.bool, device=images.device)

    def update() -> Tensor:
        optimizer.step()
        return finite

    def loss(model: Any, images: Tensor, noise: Tensor) -> Tensor:
        value: Tensor = model.loss(images, mask_ratio, noise)
        return value

    alone = parallelize(model, loss, "ddp", DistContext(images.device))
    training = TrainStep(model, alone, update, optimizer, bf16=bf16, execution=execution, fallback=False)

    def step(keep_gradients: bool = False, exact: bool = False) -> Tensor:
        loss = training.backward(images, noise)
        training.update()  # also frees the gradients, except with a CUDA graph
        return loss

    return step
