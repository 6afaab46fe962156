"""A pytest plugin (``-p gpu_proof.on_device``) that runs the ops on CPU tensors by the GPU kernels, on a GPU.

The ops' tests then test the CUDA and Triton kernels instead of the C++ kernels. Tensors are copied with their whole
storage, so that kernels get the same strides and the values between them. Tensors that an op writes in place are copied
back.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms

import random
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from mae_fast.ops.registry import ops

ops()  # each op registers its kernels when it is imported


def to_device(x: torch.Tensor) -> torch.Tensor:
    """The same values, strides and storage on the GPU."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def _answer_for_cpu(name: str) -> None:
    namespace, op = name.split("::")
    call = getattr(getattr(torch.ops, namespace), op).default

    def on_device(*args: Any) -> Any:
        moved = tree_map_only(torch.Tensor, to_device, args)
        result = call(*moved)
        torch.cuda.synchronize()  # reports accesses out of bounds
        for argument, here, there in zip(call._schema.arguments, args, moved, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x, y in zip(tree_leaves(here), tree_leaves(there), strict=True):
                    x.copy_(y)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, result)

    torch.library.impl(name, "CPU", on_device)


def _names() -> list[str]:
    names = [name for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if "mae_fast::" in name]
    assert len(names) >= 13, f"kernels for CUDA are missing, there are only {sorted(names)}"
    return sorted(names)


for _name in _names():
    _answer_for_cpu(_name)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: run every Nth test in random order, starting with the Ith")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Several processes share the tests. The order is random, so that all files are tested early."""
    first, count = map(int, config.getoption("shard").split("/"))
    random.Random(0).shuffle(items)
    items[:] = items[first::count]
