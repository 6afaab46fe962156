"""A lower bound for the time of a step on a CPU: torch's time for its matrix products alone, in the fastest layouts."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .timing import interleave

Shape = tuple[int, int, int]  # m, k, n of [m, k] x [k, n]


def gemm_lower_bound(step: Callable[[], object], dtype: str) -> Callable[[], None]:
    """A function that computes the matrix products of ``step``, and nothing else."""
    step()  # the first step also copies weights
    with Products() as seen:
        step()
    return all_products(seen.products, dtype)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products by shape, without those of attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [arg.shape if isinstance(arg, Tensor) else () for arg in args]
        self.products.update(products_of(func._schema.name, shapes))
        return func(*args, **(kwargs or {}))


# Ops of this package whose kernels contain matrix products.
MULTIPLYING = ("linear_product", "linear_input_gradient", "linear_gradients", "mlp", "mlp_backward")


def products_of(op: str, shapes: Sequence[Sequence[int]]) -> list[Shape]:
    """The matrix products in a call of ``op``, from the shapes of its arguments. Attention counts as none."""
    name = op.removeprefix("mae_fast::")
    if op in ("aten::mm", "aten::addmm", "aten::addmm_"):
        (m, k), (_, n) = shapes[:2] if op == "aten::mm" else shapes[1:3]
        return [(m, k, n)]
    if name in MULTIPLYING[:3]:
        (m, k), b = shapes[:2]
        return [{"linear_product": (m, k, b[0]), "linear_input_gradient": (m, k, b[1])}.get(name, (k, m, b[1]))]
    if name == "mlp":  # x [M, D], weight1 [H, D], bias1, weight2 [O, H]
        (m, d), (h, _), _, (o, _) = shapes[:4]
        return [(m, d, h), (m, h, o)]
    if name == "mlp_backward":  # grad [M, O], x [M, D], h, weight1 [H, D]
        (m, o), _, _, (h, d) = shapes[:4]
        return [(m, o, h), (m, h, d), (h, m, d), (o, m, h)]
    return []


def all_products(products: Counter[Shape], dtype: str) -> Callable[[], None]:
    """A function that computes each product with torch.mm, as often as the step does."""
    operands = [(count, fastest_operands(shape, dtype)) for shape, count in products.items()]

    def compute() -> None:
        for count, (a, b) in operands:
            for _ in range(count):
                torch.mm(a, b)

    return compute


def fastest_operands(shape: Shape, dtype: str) -> tuple[Tensor, Tensor]:
    """Operands [m, k] and [k, n] in the layouts, by rows or by columns, for which torch.mm is fastest."""
    m, k, n = shape
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    lefts = (torch.randn(m, k, dtype=kind), torch.randn(k, m, dtype=kind).t())
    rights = (torch.randn(k, n, dtype=kind), torch.randn(n, k, dtype=kind).t())
    pairs = [(a, b) for a in lefts for b in rights]
    times = interleave({str(i): partial(torch.mm, *pair) for i, pair in enumerate(pairs)}, rounds=3, warmup=1)
    return min(enumerate(pairs), key=lambda pair: statistics.median(times[str(pair[0])]))[1]
