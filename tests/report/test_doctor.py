"""mae-fast doctor: the kernels it names are the ones that the dispatcher has, with and without each compiler."""

import json
import subprocess
import sys

import pytest
import torch

from mae_fast.ops._native import cpu_isa, has_matrix_unit, has_native
from mae_fast.ops.attention.op import memory_efficient
from mae_fast.report.doctor import ON_GPUS, TORCHS, doctor, facts, rows


def rows_without(*modules):
    """``rows()`` of a process in which importing ``modules`` fails."""
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in modules)
    code = f"import json, sys; {hide}from mae_fast.report.doctor import rows; print(json.dumps(rows()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {(op, device): (name, why) for op, device, name, why in json.loads(output)}


def test_names_what_answers():
    answers = {(op, device): name for op, device, name, _ in rows()}
    assert len(answers) == len(rows()) == 18
    for (op, device), name in answers.items():
        if device == "CPU":
            assert name == (f"C++ ({cpu_isa()})" if op != "linear" or has_matrix_unit() else "torch's Linear")
        elif op == "attention":
            assert name == ("xformers" if memory_efficient()[0] else TORCHS[op])
        elif op in ON_GPUS:
            assert name == TORCHS[op]
        elif op != "random_masking":
            assert name == "Triton"
        else:
            assert name == ("CUDA C++" if has_native(op, "CUDA") else "eager torch")


def test_without_the_extension():
    for (op, device), (name, why) in rows_without("mae_fast._C", "xformers").items():
        if device == "CUDA" and op in (*ON_GPUS, "attention"):
            assert name == TORCHS[op]
            assert why == ON_GPUS.get(op, "xformers is not installed")
        elif device == "CUDA" and op != "random_masking":
            assert name == "Triton"
        else:
            assert name == TORCHS.get(op, "eager torch")
            assert why == "mae_fast._C is not built: no C++ compiler was found when mae_fast was installed"


def test_without_triton():
    for (op, device), (name, why) in rows_without("triton").items():
        if device == "CUDA" and op not in ("random_masking", "attention", *ON_GPUS):
            assert (name, why) == (TORCHS.get(op, "eager torch"), "triton is not installed")
        else:
            assert name != "eager torch" or not has_native(op, device)


def test_prints(capsys: pytest.CaptureFixture[str]):
    doctor()
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in dict(facts())["torch"]
    for word in ("masked_loss", "C++", "torch", *dict(facts())["CPU"].split(",")[:1]):
        assert word in printed
