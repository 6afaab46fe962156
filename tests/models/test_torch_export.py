"""``torch.export.export`` and ``torch.onnx.export`` of the models themselves, with any number of images."""

import warnings

import pytest
import torch
from support import inputs, one_thread, pictures, tiny, tiny_vit  # noqa: F401
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Features(nn.Module):
    """Wraps a model for export, with ``forward_features`` as ``forward``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.forward_features(images)


class Reconstruction(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, noise):
        return self.model(images, 0.75, noise)


def case(name):
    """A module in evaluation mode, and its inputs for n images."""
    model = (tiny() if name.startswith("mae") else tiny_vit(global_pool=True)).eval()
    if name == "mae, forward":
        return Reconstruction(model), lambda n: inputs(model, n)
    if name == "classifier of bytes":
        return model, lambda n: (torch.arange(n * 24 * 24 * 3).reshape(n, 24, 24, 3).mul(7).remainder(256).byte(),)
    if name.startswith("classifier"):
        return model, lambda n: (pictures(model, n),)
    return Features(model), lambda n: (pictures(model, n),)


cases = pytest.mark.parametrize("name", ["classifier", "classifier of bytes", "mae, features", "mae, forward"])


def any_batch(given):
    return tuple({0: torch.export.Dim("N", min=1)} for _ in given)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@cases
def test_an_exported_program_has_only_torchs_ops_and_equals_the_model(name):
    module, batch = case(name)
    strict = name == "classifier"  # strict export traces with torch.compile's frontend
    program = torch.export.export(module, batch(2), dynamic_shapes=any_batch(batch(2)), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "mae_fast" in target]
    for n in (1, 5):
        torch.testing.assert_close(as_tuple(program.module()(*batch(n))), as_tuple(module(*batch(n))))


@pytest.mark.parametrize("dynamo", [True, False], ids=["", "traced"])
@cases
def test_onnxruntime_computes_the_exported_model(name, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, batch = case(name)
    names, path = ["images", "noise"][: len(batch(2))], tmp_path / "model.onnx"
    shapes = {"dynamic_shapes": any_batch(names)} if dynamo else {"dynamic_axes": {x: {0: "N"} for x in names}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about deprecated functions and traced sizes
        torch.onnx.export(module, batch(2), path, input_names=names, dynamo=dynamo, verbose=False, **shapes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        found = session.run(None, {name: x.numpy() for name, x in zip(names, batch(n), strict=True)})
        expected = as_tuple(module(*batch(n)))
        torch.testing.assert_close(tuple(map(torch.from_numpy, found)), expected, rtol=1e-4, atol=1e-5)


def test_a_traced_model_has_only_torchs_ops():
    model = tiny_vit().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, pictures(model, 2))
    assert "mae_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(pictures(model, 5)), model(pictures(model, 5)))
