"""masked_loss: value and every gradient against the eager chain, bounds, dispatcher contracts."""

import math
from dataclasses import dataclass

import pytest
import torch
from op_cases import (
    FLOATING,
    LAYOUTS,
    ImageCase,
    compare,
    laid_out,
    names,
    permutations,
    randn,
    raw_pixels,
    raw_stats,
    standardised,
)

from mae_fast.ops.masked_loss import masked_loss
from mae_fast.ops.patches import RAW_DTYPES, patchify


@dataclass(frozen=True)
class Case(ImageCase):
    removed: int

    def __str__(self) -> str:
        return f"{super().__str__()}-M{self.removed}"

    def inputs(self, dtype: torch.dtype, layout: str = "contiguous", subset: bool = False) -> dict[str, torch.Tensor]:
        """With ``subset``, predictions of the removed patches only."""
        (h, w), (p, q) = self.grid, self.patch
        order = permutations(self.n, self.num_patches, 3)
        mask = torch.zeros(self.n, self.num_patches)
        mask.scatter_(1, order[:, : self.removed], 1.0)
        made = {
            "images": randn(self.n, self.c, h * p, w * q, seed=1),
            "pred": randn(self.n, self.removed if subset else self.num_patches, p * q * self.c, seed=2),
        }
        made = {name: laid_out(x.to(dtype), layout) for name, x in made.items()}
        if subset:
            ids = laid_out(order[:, : self.removed], layout)
            return made | {"mask": torch.ones(self.n, self.removed), "ids": ids}
        return made | {"mask": laid_out(mask, layout)}


CASES = [
    Case(2, 3, (4, 4), (4, 4), 12),
    Case(3, 3, (3, 5), (2, 3), 8),
    Case(1, 1, (1, 1), (3, 3), 1),  # L = 1
    Case(2, 2, (3, 3), (2, 2), 9),  # all removed
    Case(5, 4, (2, 7), (5, 3), 11),
    Case(1, 3, (2, 2), (16, 16), 3),
    Case(2, 3, (2, 2), (14, 14), 3),
    Case(9, 1, (6, 2), (2, 8), 10),
    Case(4, 13, (2, 3), (3, 2), 4),
]
EMPTY = [Case(2, 3, (2, 2), (4, 4), 0), Case(0, 3, (2, 2), (4, 4), 3)]  # 0 / 0 = NaN


def eager(patch, norm_pix):
    """The loss of the paper, in eager torch."""

    def call(images, pred, mask, ids=None):
        target = patchify(images, patch)
        if ids is not None:
            target = target.gather(1, ids[:, :, None].expand(-1, -1, target.shape[2]))
        if norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()

    return call


def ours(patch, norm_pix):
    def call(images, pred, mask, ids=None):
        return masked_loss(images, pred, mask, patch=patch, norm_pix=norm_pix, ids=ids)

    return call


@pytest.mark.parametrize("subset", [False, True], ids=["all", "removed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_values_and_gradients(case, dtype, norm_pix, layout, subset):
    wanted = {"images", "pred"} if case in EMPTY else {"images", "pred", "mask"}
    if case in EMPTY:  # gradients of 0 / 0 are NaN, if the inputs are not empty
        made = case.inputs(dtype, layout, subset)
        assert math.isnan(ours(case.patch, norm_pix)(**made))
        return
    compare(ours(case.patch, norm_pix), eager(case.patch, norm_pix), case.inputs(dtype, layout, subset), wanted, dtype)


@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATING for b in FLOATING if a != b], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixed_dtypes(case, dtypes, norm_pix):
    """Images and predictions have different dtypes, as under autocast."""
    made = case.inputs(torch.float64)
    made |= {"images": made["images"].to(dtypes[0]), "pred": made["pred"].to(dtypes[1])}
    coarse = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    compare(ours(case.patch, norm_pix), eager(case.patch, norm_pix), made, {"images", "pred"}, coarse)


@pytest.mark.parametrize("wanted", [{"images"}, {"pred"}, {"mask"}, {"pred", "mask"}], ids=names)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_requested_gradients(case, wanted):
    compare(ours(case.patch, True), eager(case.patch, True), case.inputs(torch.float32), wanted, torch.float32)


def known_values_only(patch, norm_pix):
    """The loss of the paper over the known values of each patch, without its NaN values."""

    def call(images, pred, mask, ids=None):
        target = patchify(images, patch)
        if ids is not None:
            target = target.gather(1, ids[:, :, None].expand(-1, -1, target.shape[2]))
        losses, weights = [], []
        for values, predicted, weight in zip(target.flatten(0, 1), pred.flatten(0, 1), mask.flatten(), strict=True):
            known = ~values.isnan()
            if not known.any():
                continue
            values = values[known]
            if norm_pix:
                variance = values.var() if len(values) > 1 else values.new_zeros(())
                values = (values - values.mean()) / (variance + 1e-6) ** 0.5
            losses.append(((predicted[known] - values) ** 2).mean())
            weights.append(weight)
        losses, weights = torch.stack(losses), torch.stack(weights)
        return (losses * weights).sum() / weights.sum()

    return call


@pytest.mark.parametrize("subset", [False, True], ids=["all", "removed"])
@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
@pytest.mark.parametrize("pixels", RAW_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_raw_images(case, dtype, pixels, missing, norm_pix, subset):
    made = case.inputs(dtype, subset=subset)
    images, nodata = raw_pixels(made.pop("images"), pixels, missing)
    mean, std = raw_stats(case.c, pixels)

    def fused(**tensors):
        wide = torch.promote_types(dtype, torch.float32)
        stats = {"mean": mean.to(wide), "std": std.to(wide), "nodata": nodata}
        return masked_loss(images, patch=case.patch, norm_pix=norm_pix, **stats, **tensors)

    def chain(**tensors):
        wide = torch.promote_types(tensors["pred"].dtype, torch.float32)
        standard = standardised(images, mean.to(wide), std.to(wide), nodata)
        loss = known_values_only if missing else eager
        return loss(case.patch, norm_pix)(standard, **tensors)

    compare(fused, chain, made, {"pred", "mask"} if subset else {"pred"}, dtype)


@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm"])
def test_nan_predictions_of_missing_pixels_are_ignored(norm_pix):
    images, pred = torch.randn(1, 8, 8, 3), torch.randn(1, 4, 48)
    images[0, 1, 2, 0] = images[0, 4:, 4:] = float("nan")
    stats = {"mean": torch.zeros(3), "std": torch.ones(3)}
    expected = masked_loss(images, pred, torch.ones(1, 4), patch=4, norm_pix=norm_pix, **stats)
    unknown = patchify(images.permute(0, 3, 1, 2), 4).isnan()
    assert unknown.sum() == 1 + 48
    pred = pred.masked_fill(unknown, float("nan")).requires_grad_()
    loss = masked_loss(images, pred, torch.ones(1, 4), patch=4, norm_pix=norm_pix, **stats)
    loss.backward()
    assert torch.equal(loss, expected)
    assert pred.grad[unknown].eq(0).all()
    assert pred.grad[~unknown].ne(0).all()


def test_raw_images_that_require_a_gradient_raise_a_value_error():
    images, pred, stats = torch.randn(1, 8, 8, 3, requires_grad=True), torch.randn(1, 4, 48), torch.ones(3)
    with pytest.raises(ValueError, match="raw images cannot require a gradient"):
        masked_loss(images, pred, torch.ones(1, 4), patch=4, mean=stats, std=stats)


def test_masks_may_hold_any_weights():
    made = CASES[0].inputs(torch.float64) | {"mask": randn(2, 16, seed=8).abs() + 0.1}
    compare(ours((4, 4), True), eager((4, 4), True), made, {"images", "pred", "mask"}, torch.float64)


def test_repeated_patches_add_their_gradients():
    made = CASES[0].inputs(torch.float64, subset=True)
    made["ids"][:, 1] = made["ids"][:, 0]
    compare(ours((4, 4), True), eager((4, 4), True), made, {"images", "pred"}, torch.float64)


def test_constant_patches_are_finite():
    images, pred = torch.full((1, 3, 4, 4), 0.3), torch.zeros(1, 1, 48)
    loss = masked_loss(images, pred, torch.ones(1, 1), patch=4, norm_pix=True)
    assert loss.item() < 1e-6


@pytest.mark.parametrize("bad", [-1, 16, 2**31, -(2**63)])
def test_out_of_range_index_is_named(bad):
    made = CASES[0].inputs(torch.float32, subset=True)
    made["ids"][1, 2] = bad
    with pytest.raises(IndexError, match=rf"masked_loss: ids must be in 0\.\.15, got {bad}"):
        ours((4, 4), False)(**made)


@pytest.mark.parametrize("dtype", FLOATING[:3], ids=str)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_opcheck(case, dtype):
    for subset in (False, True):
        made = case.inputs(dtype, subset=subset)
        images, pred, mask = made["images"].requires_grad_(), made["pred"].requires_grad_(), made["mask"]
        fixed = (*case.patch, True, None, None, None)
        arguments = (images, pred, mask, made.get("ids"), *fixed)
        torch.library.opcheck(torch.ops.mae_fast.masked_loss.default, arguments)
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        loss, stats = torch.ops.mae_fast.masked_loss(*plain)
        for needs_images in (False, True):
            backward = (torch.ones_like(loss), *plain[:4], loss, stats, *fixed, needs_images)
            torch.library.opcheck(torch.ops.mae_fast.masked_loss_backward.default, backward)


@pytest.mark.parametrize("norm_pix", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c.n * c.num_patches * c.c * c.patch[0] < 250], ids=str)
def test_gradcheck(case, fast, norm_pix):
    made = case.inputs(torch.float64)
    floats = [made["images"].requires_grad_(), made["pred"].requires_grad_()]

    def f(images, pred):
        return ours(case.patch, norm_pix)(images, pred, made["mask"])

    assert torch.autograd.gradcheck(f, floats, fast_mode=fast)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(2, 15, 48)}, r"pred must be \[N, R, P\] = \[2, 16, 48\]"),
        ({"mask": torch.zeros(2, 49)}, r"mask \[2, 16\], got .* \[2, 49\]"),
        ({"images": torch.zeros(2, 3, 16, 17)}, "must divide the image size, got 16 x 17"),
        (
            {"images": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)},
            r"raw images torch.uint8 \[N, H, W, C\] need mean and std",
        ),
        ({"ids": torch.zeros(3, 16, dtype=torch.int64)}, r"ids must be int64 \[2, R\]"),
        ({"ids": torch.zeros(2, 16)}, "got torch.float32"),
    ],
)
def test_bad_arguments_raise_value_errors(change, message):
    with pytest.raises(ValueError, match=message):
        ours((4, 4), True)(**CASES[0].inputs(torch.float32) | change)
