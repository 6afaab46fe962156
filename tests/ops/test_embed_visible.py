"""embed_visible: values and gradients against the eager chain, exact gathers, bounds, dispatcher contracts."""

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
from torch.nn import functional as F

from mae_fast.ops.embed_visible import embed_visible
from mae_fast.ops.embed_visible import reference as spec
from mae_fast.ops.patches import RAW_DTYPES


@dataclass(frozen=True)
class Case(ImageCase):
    k: int
    d: int

    def __str__(self) -> str:
        return f"{super().__str__()}-K{self.k}-D{self.d}"

    def inputs(self, dtype: torch.dtype, layout: str = "contiguous") -> dict[str, torch.Tensor]:
        (h, w), (p, q) = self.grid, self.patch
        made = {
            "images": randn(self.n, self.c, h * p, w * q, seed=1),
            "weight": randn(self.d, self.c, p, q, seed=2),
            "bias": randn(self.d, seed=3),
            "pos": randn(1, 1 + self.num_patches, self.d, seed=4),
            "cls": randn(1, 1, self.d, seed=5),
        }
        made = {name: laid_out(x.to(dtype), layout) for name, x in made.items()}
        return made | {"ids_keep": laid_out(permutations(self.n, self.num_patches, 6)[:, : self.k], layout)}


CASES = [
    Case(2, 3, (4, 4), (4, 4), 4, 16),
    Case(3, 3, (3, 5), (2, 3), 7, 10),  # non-square sizes, odd numbers
    Case(1, 1, (1, 1), (3, 3), 1, 5),  # L = 1
    Case(2, 5, (2, 3), (1, 1), 6, 7),  # K = L, one-pixel patches
    Case(2, 2, (3, 3), (2, 2), 0, 4),  # K = 0
    Case(0, 3, (2, 2), (4, 4), 1, 8),  # N = 0
    Case(1, 3, (2, 2), (16, 16), 1, 64),
    Case(5, 4, (2, 7), (5, 3), 3, 33),
    Case(2, 3, (2, 2), (14, 14), 2, 20),
    Case(9, 1, (6, 2), (2, 8), 11, 3),
]
ALL = {"images", "weight", "bias", "pos", "cls"}


def eager(images, ids_keep, weight, bias, pos, cls):
    """As in the paper: embed all patches, add positions, select the visible ones, prepend the class token."""
    x = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos[:, 1:]
    x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([(cls + pos[:, :1]).expand(len(x), -1, -1), x], dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype, layout):
    compare(embed_visible, eager, case.inputs(dtype, layout), ALL, dtype)


@pytest.mark.parametrize("wanted", [{"images"}, {"weight"}, {"bias"}, {"pos"}, {"cls"}, {"weight", "pos"}], ids=names)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_only_requested_gradients(case, wanted):
    compare(embed_visible, eager, case.inputs(torch.float32), wanted, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_autocast(case):
    """As in training: fp32 weights and position table, a bf16 product, an fp32 result."""

    def cast(f):
        def call(**tensors):
            with torch.autocast("cpu", torch.bfloat16, enabled=tensors["images"].dtype != torch.float64):
                return f(**tensors)

        return call

    compare(cast(embed_visible), cast(eager), case.inputs(torch.float32), ALL - {"images"}, torch.bfloat16)


@pytest.mark.parametrize("out", FLOATING, ids=str)
@pytest.mark.parametrize("source", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_is_exact(case, layout, source, out):
    made = case.inputs(torch.float64)
    images = laid_out(made["images"].to(source), layout)
    arguments = (images, laid_out(made["ids_keep"], layout), *case.patch, None, None, None, out)
    assert torch.equal(torch.ops.mae_fast.gather_patches(*arguments), spec.gather_patches_reference(*arguments))


@pytest.mark.parametrize("out", FLOATING, ids=str)
@pytest.mark.parametrize("source", RAW_DTYPES, ids=str)
@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_of_raw_pixels_is_exact(case, layout, missing, source, out):
    made = case.inputs(torch.float64)
    images, nodata = raw_pixels(made["images"], source, missing)
    mean, std = (x.to(torch.promote_types(out, torch.float32)) for x in raw_stats(case.c, source))
    ids = laid_out(made["ids_keep"], layout)
    rows = torch.ops.mae_fast.gather_patches(laid_out(images, layout), ids, *case.patch, mean, std, nodata, out)
    standard = standardised(images, mean, std, nodata).nan_to_num(nan=0.0)
    assert torch.equal(rows, spec.gather_patches_reference(standard, ids, *case.patch, None, None, None, out))
    assert torch.equal(rows, spec.gather_patches_reference(images, ids, *case.patch, mean, std, nodata, out))


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATING for b in FLOATING], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_add_positions_is_exact(case, dtypes):
    made = case.inputs(torch.float64)
    x = randn(case.n, case.k, case.d, seed=7, dtype=dtypes[0])
    arguments = (x, made["ids_keep"], made["pos"].to(dtypes[1]), made["cls"].to(dtypes[1]))
    ours = torch.ops.mae_fast.add_positions(*arguments)
    assert torch.equal(ours, spec.add_positions_reference(*arguments))
    assert ours.dtype == torch.promote_types(*dtypes)


def test_repeated_patches_add_their_gradients():
    inputs = CASES[0].inputs(torch.float64)
    inputs["ids_keep"] = torch.tensor([[3, 3, 3, 0], [1, 2, 2, 1]])
    compare(embed_visible, eager, inputs, ALL, torch.float64)


@pytest.mark.parametrize("bad", [-1, 16, 2**31, -(2**63)])
def test_out_of_range_index_is_named(bad):
    inputs = CASES[0].inputs(torch.float32)
    inputs["ids_keep"][1, 2] = bad
    with pytest.raises(IndexError, match=rf"gather_patches: ids_keep must be in 0\.\.15, got {bad}"):
        embed_visible(**inputs)
    x = randn(2, 4, 16, seed=1, dtype=torch.float32)
    with pytest.raises(IndexError, match=rf"add_positions: ids_keep must be in 0\.\.15, got {bad}"):
        torch.ops.mae_fast.add_positions(x, inputs["ids_keep"], inputs["pos"], inputs["cls"])


@pytest.mark.parametrize("case", CASES[:5], ids=str)
@pytest.mark.parametrize("dtype", FLOATING[:3], ids=str)
def test_opcheck(case, dtype):
    made = case.inputs(dtype)
    ids, size = made["ids_keep"], made["images"].shape
    images = made["images"].requires_grad_()
    torch.library.opcheck(
        torch.ops.mae_fast.gather_patches.default, (images, ids, *case.patch, None, None, None, dtype)
    )
    pixels = torch.randint(0, 256, (size[0], *size[2:], size[1]), dtype=torch.uint8)
    stats = torch.rand(case.c) + 0.1
    torch.library.opcheck(
        torch.ops.mae_fast.gather_patches.default, (pixels, ids, *case.patch, stats, stats, None, dtype)
    )
    rows = torch.zeros(case.n, case.k, case.c * case.patch[0] * case.patch[1], dtype=dtype)
    torch.library.opcheck(
        torch.ops.mae_fast.gather_patches_backward.default, (rows, ids, list(size), *case.patch, dtype)
    )
    x = randn(case.n, case.k, case.d, seed=1, dtype=dtype).requires_grad_()
    tables = (made["pos"].requires_grad_(), made["cls"].requires_grad_())
    torch.library.opcheck(torch.ops.mae_fast.add_positions.default, (x, ids, *tables))
    grad = randn(case.n, 1 + case.k, case.d, seed=2, dtype=dtype)
    detached = [table.detach() for table in tables]
    for needs_pos in (False, True):
        torch.library.opcheck(
            torch.ops.mae_fast.add_positions_backward.default, (grad, ids, *detached, dtype, needs_pos)
        )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c.n * c.k and c.d < 20], ids=str)
def test_gradcheck(case, fast):
    made = case.inputs(torch.float64)
    names = [name for name in made if name != "ids_keep"]
    if not fast and sum(made[name].numel() for name in names) > 600:
        names = names[2:]  # the full Jacobian of images and weight takes minutes there
    for name in names:
        made[name].requires_grad_()

    def f(*values):
        return embed_visible(**made | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(f, [made[name] for name in names], fast_mode=fast)


def test_double_backward_is_refused():
    made = CASES[0].inputs(torch.float64)
    made["images"].requires_grad_()
    (grad,) = torch.autograd.grad(embed_visible(**made).square().sum(), made["images"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), made["images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 16, 15)}, "must divide the image size, got 16 x 15"),
        ({"images": torch.zeros(2, 4, 16, 16)}, "needs 3 channels, images have 4"),
        ({"images": torch.zeros(3, 16, 16)}, "images must be standardised"),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.int32)}, "images must be standardised"),
        ({"images": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}, r"need mean and std of shape \[3\]"),
        ({"std": torch.ones(3)}, "std and nodata must be None"),
        ({"nodata": 0.0}, "std and nodata must be None"),
        ({"images": torch.zeros(2, 16, 16, 3, dtype=torch.int16)}, r"need mean and std of shape \[3\]"),
        (
            {"images": torch.zeros(2, 16, 16, 3).double(), "mean": torch.zeros(3), "std": torch.ones(3)},
            "of uint8, uint16",
        ),
        ({"ids_keep": torch.zeros(3, 4, dtype=torch.int64)}, r"int64 \[N, K\] with N = 2"),
        ({"ids_keep": torch.zeros(2, 4)}, "got torch.float32"),
        ({"pos": torch.zeros(1, 16, 16)}, r"pos must be \[1, 17, 16\]"),
        ({"cls": torch.zeros(1, 1, 8)}, r"cls \[1, 1, 16\]"),
    ],
)
def test_bad_arguments_raise_value_errors(change, message):
    with pytest.raises(ValueError, match=message):
        embed_visible(**CASES[0].inputs(torch.float32) | change)
