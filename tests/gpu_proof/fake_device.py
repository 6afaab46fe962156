"""FakeTensors with gradients on a CUDA device that does not exist. Use it in a separate process, which it modifies.

Shapes, dtypes, strides, devices and the dispatcher's choices are those of a GPU. Values and times are not simulated.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

PROPERTIES = {  # data sheets of A100 80GB and H100 SXM
    80: {"name": "NVIDIA A100-SXM4-80GB", "multi_processor_count": 108, "L2_cache_size": 40 << 20},
    90: {"name": "NVIDIA H100 80GB HBM3", "multi_processor_count": 132, "L2_cache_size": 50 << 20},
}


def _flash(q, k, v, *args, **options):
    """F.scaled_dot_product_attention on sm_80 and newer in 16 bits. The original queries the driver to choose it."""
    assert not args
    assert not options
    assert q.dtype.itemsize == 2
    assert q.shape[-1] % 8 == 0
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _load() -> None:
    root = Path(torch.__file__).parent
    torch.ones(
        1, requires_grad=True
    ).sum().backward()  # before the device exists, so that autograd starts no thread for it
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_device.so"
        source = Path(__file__).with_suffix(".cpp")
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run([os.environ.get("CXX", "c++"), source, "-o", library, *flags], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


@contextmanager
def fake_device(arch: int) -> Iterator[None]:
    """Context in which ``device="cuda"`` creates FakeTensors of an sm_``arch`` GPU."""
    _load()
    properties = SimpleNamespace(
        **PROPERTIES[arch],
        major=arch // 10,
        minor=arch % 10,
        total_memory=80 << 30,
        warp_size=32,
        gcnArchName="",
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": divmod(arch, 10),
        "get_device_properties": properties,
        "_get_device_properties": properties,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer, **__: a, create=True))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # Although torch.cuda is patched to report a device.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(FakeTensorMode())
        yield
