"""Importing any module of the package changes nothing outside the package."""

import json
import subprocess
import sys

import pytest

MODULES = """
import importlib, json, pkgutil, sys
import mae_fast

def modules():
    found = pkgutil.walk_packages(mae_fast.__path__, "mae_fast.")
    # _cuda13.abi3.so is a library, not a module.
    return [module.name for module in found if not module.name.endswith(".__main__") and "._cuda" not in module.name]
"""
LOADED = """
for name in modules():
    importlib.import_module(name)
print(json.dumps([name for name in sys.modules if name.split(".")[0] not in ("mae_fast", "__main__")]))
"""
CHANGES = """
import ctypes, gc, json, locale, logging, multiprocessing, os, random, signal, sys, warnings
for name in json.load(sys.stdin):  # what other packages do at import is not ours
    importlib.import_module(name)
import numpy, torch
from PIL import Image, ImageFile

class Info(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

def mapped():
    # Tensors from 1 to 31 MiB that get pages of their own: this tells the thresholds of malloc.
    info = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if info is None:
        return None
    info.restype = Info
    before, held = info().hblks, []
    for size in range(1, 32):
        held.append(ctypes.CDLL(None).valloc(size << 20))
    return info().hblks - before

forks = []
os.register_at_fork = lambda **hooks: forks.append(hooks)
sys_hooks = ("excepthook", "unraisablehook", "displayhook", "breakpointhook", "stdout", "stderr", "stdin")

def settings():
    loggers = (logging.getLogger(), logging.getLogger("mae_fast"))
    backends = torch.backends
    return {
        "environment": dict(os.environ),
        "directory and umask": (os.getcwd(), os.umask(os.umask(0o22))),
        "signal handlers": [(str(s), str(signal.getsignal(s))) for s in sorted(signal.valid_signals())],
        "blocked signals": sorted(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "hooks at a fork": list(map(str, forks)),
        "hooks of sys": [str(getattr(sys, name)) for name in sys_hooks],
        "search path": list(sys.path),
        "warnings": list(map(str, warnings.filters)),
        "logging": [(x.level, x.disabled, x.propagate, str(x.handlers), str(x.filters)) for x in loggers],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "locale": locale.setlocale(locale.LC_ALL),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "recursion limit": sys.getrecursionlimit(),
        "Pillow": (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS),
        "random state of Python": str(random.getstate()),
        "random state of NumPy": str(numpy.random.get_state()),
        "random state of torch": torch.get_rng_state().tolist(),
        "torch": str((
            torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.get_default_device(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cpu"), torch.multiprocessing.get_sharing_strategy(), torch.cuda.is_initialized(),
        )),
        "torch.backends": str((
            backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32,
            backends.cuda.matmul.allow_tf32, backends.mkldnn.enabled,
            backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled(),
        )),
        "malloc": mapped(),
    }

before = settings()
{do}
after = settings()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""
IMPORT_ALL = "for name in modules(): importlib.import_module(name)"


def run(code: str, given: object = None) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", MODULES + code], input=json.dumps(given), capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def others():
    """The modules of other packages that the package imports."""
    return run(LOADED)


def test_imports_do_not_change_global_state(others):
    assert run(CHANGES.replace("{do}", IMPORT_ALL), others) == []


CHANGE = {
    "environment": "os.environ['X'] = '1'",
    "signal handlers": "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    "hooks at a fork": "os.register_at_fork(before=print)",
    "warnings": "warnings.simplefilter('ignore')",
    "logging": "logging.getLogger('mae_fast').addHandler(logging.NullHandler())",
    "start method": "multiprocessing.set_start_method('spawn')",
    "random state of torch": "torch.manual_seed(1)",
    "torch": "torch.set_num_threads(7)",
    "torch.backends": "torch.backends.mkldnn.enabled = False",
    "malloc": "import mae_fast.memory; mae_fast.memory.raise_mmap_threshold()",
}


def test_changes_of_global_state_are_detected():
    assert run(CHANGES.replace("{do}", "\n".join(CHANGE.values())), ["torch"]) == list(CHANGE)
