"""The lower bound of a step on a CPU: the time of its matrix products alone, each in its fastest layout, by torch."""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .timing import interleave

Shape = tuple[int, int, int]  # m, k, n of [m, k] x [k, n]


def gemm_lower_bound(step: Callable[[], object], dtype: str) -> Callable[[], None]:
    """A function that takes the matrix products that ``step`` takes, and nothing else."""
    step()  # the first one also makes copies of weights
    with Products() as seen:
        step()
    return all_products(seen.products, dtype)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products that are taken, of weights, activations and gradients; attention's are not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.products[a.shape[0], a.shape[1], b.shape[1]] += 1
        elif name in ("mae_fast::linear_gradients", "mae_fast::add_linear_gradients"):  # of grad [M, O] and x [M, K]
            grad, x = args[:2]
            self.products[grad.shape[1], x.shape[0], x.shape[1]] += 1
        return func(*args, **(kwargs or {}))


def all_products(products: Counter[Shape], dtype: str) -> Callable[[], None]:
    """Takes each product as often as the step does, by torch.mm."""
    operands = [(count, fastest_operands(shape, dtype)) for shape, count in products.items()]

    def take() -> None:
        for count, (a, b) in operands:
            for _ in range(count):
                torch.mm(a, b)

    return take


def fastest_operands(shape: Shape, dtype: str) -> tuple[Tensor, Tensor]:
    """[m, k] and [k, n], each stored by rows or by columns, whichever pair torch.mm is fastest with."""
    m, k, n = shape
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    lefts = (torch.randn(m, k, dtype=kind), torch.randn(k, m, dtype=kind).t())
    rights = (torch.randn(k, n, dtype=kind), torch.randn(n, k, dtype=kind).t())
    pairs = [(a, b) for a in lefts for b in rights]
    times = interleave({str(i): partial(torch.mm, *pair) for i, pair in enumerate(pairs)}, rounds=3, warmup=1)
    return min(enumerate(pairs), key=lambda pair: statistics.median(times[str(pair[0])]))[1]
