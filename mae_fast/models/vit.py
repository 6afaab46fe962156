"""Vision transformer (Dosovitskiy et al., ICLR 2021): the MAE's encoder and a head, for fine-tuning and probing.

Shapes: N images, C channels, L patches, D width.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops.patches import check_tensor
from .blocks import NormLayer, apply_linear, at_least
from .features import Encoder, Pool, decode_arguments, pool_tokens
from .sizes import VIT_CONFIGS


class VisionTransformer(Encoder):
    """Encoder and linear head, with the constructor, state-dict keys and initialization of the published model.

    With ``global_pool``, the features are ``fc_norm(mean of the patch tokens)``, and there is no ``norm``. Without it,
    they are the class token of ``norm(tokens)``. The position table is trained. Images may be raw pixels [N, H, W, C].
    Their sides may be any multiples of the patch size: the position table is resized. The defaults are ViT-B/16.

    Args:
        num_classes: outputs of the head. 0: no head.
        drop_path_rate: drop probability of the last block. Rates grow linearly from 0 (first block) to this value.
        pixel_mean, pixel_std, nodata, pixel_dtype: description of raw pixels, see ``Encoder``.
    """

    def __init__(
        self,
        global_pool: bool = False,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        nodata: float | None = None,
        pixel_dtype: str = "uint8",
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, norm_layer,
            drop_path_rate, pixel_mean, pixel_std, nodata, pixel_dtype,
        )  # fmt: skip
        at_least(0, num_classes=num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if global_pool:
            del self.norm
            self.fc_norm = norm_layer(embed_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Position table, class token and linear weights: ``trunc_normal_(std=0.02)``. Biases: 0."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @property
    def head_pool(self) -> Pool:
        """The pooling of the head's input."""
        return "mean" if self.global_pool else "cls"

    def no_weight_decay(self) -> set[str]:
        """Parameters with more than one dimension that the published optimiser does not decay."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: embedding, each block, everything after the blocks."""
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: bool | str | None = None) -> None:
        """Replace the head by a new one, with the initial weights of the published model.

        Args:
            num_classes: outputs of the head. 0: no head.
            global_pool: as in the constructor, or under timm's names, "avg" and "token". The last norm keeps its
                weights, as ``fc_norm`` or ``norm``.

        Raises:
            ValueError: on a negative number, or another pooling.
        """
        at_least(0, num_classes=num_classes)
        pools = {None: self.global_pool, "avg": True, "token": False, True: True, False: False}
        if global_pool not in pools:
            raise ValueError(f"global_pool must be a bool, 'avg' or 'token', got {global_pool!r}")
        pool, norm = pools[global_pool], self.get_submodule("fc_norm" if self.global_pool else "norm")
        del self.head, self._modules["fc_norm" if self.global_pool else "norm"]
        if not pool:  # in the order of the constructor
            self.norm = norm
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.to(self.cls_token).train(self.training)
        self._init_weights(self.head)
        if pool:
            self.fc_norm = norm
        self.num_classes, self.global_pool = num_classes, pool
        recorded: Any = getattr(self, "_hub_mixin_config", None)  # the arguments that save_pretrained writes
        if recorded is not None:
            self._hub_mixin_config = {**recorded, "num_classes": num_classes, "global_pool": pool}

    def forward_features(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        pool: Pool | None = None,
    ) -> Tensor | list[Tensor]:
        """As ``Encoder.forward_features``. By default, the input of the head [N, D]."""
        return super().forward_features(images, mask, layers, pool or self.head_pool)

    def norm_and_pool(self, x: Tensor, pool: Pool, grid: tuple[int, int]) -> Tensor:
        """Features of the tokens [N, 1+K, D] after the blocks."""
        if not self.global_pool:
            return super().norm_and_pool(x, pool, grid)
        if pool == "map":  # normalize before the channels move to dimension 1
            return pool_tokens(self.fc_norm(x), pool, grid)
        normed: Tensor = self.fc_norm(pool_tokens(x, pool, grid))
        return normed

    def forward_from(self, tokens: Tensor, first: int) -> Tensor:
        """Logits [N, num_classes] from tokens [N, 1+L, D]: run the blocks from number ``first`` on, then the head."""
        x = self.run_blocks(self.blocks[first:], tokens).materialize()
        return self.forward_head(self.norm_and_pool(x, self.head_pool, self.patch_embed.grid_size))

    def forward_head(self, features: Tensor) -> Tensor:
        """Features [N, D] -> logits [N, num_classes]."""
        check_tensor("features", features)
        return apply_linear(self.head, features)

    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits [N, num_classes]."""
        features = self.forward_features(images)
        assert isinstance(features, Tensor)
        return self.forward_head(features)


HEAD_EPS = 1e-6  # eps of the batch norm in a linear probe's head; state dicts do not contain it


def probing_head(head: nn.Module) -> nn.Sequential:
    """The head of the published linear probe: batch norm without affine parameters, then the linear layer."""
    assert isinstance(head, nn.Linear)
    return nn.Sequential(nn.BatchNorm1d(head.in_features, affine=False, eps=HEAD_EPS), head)


def build(name: str, **kwargs: Any) -> VisionTransformer:
    """The model called ``name`` in ``sizes.VIT_CONFIGS``. ``kwargs`` override constructor arguments.

    ``norm_layer`` may be JSON: {"eps": 1e-5}, as in ``Encoder.settings``.

    Raises:
        ValueError: on an unknown name, or sizes that do not fit each other.
    """
    if name not in VIT_CONFIGS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(VIT_CONFIGS))}")
    return VisionTransformer(**decode_arguments({**VIT_CONFIGS[name], **kwargs}))
