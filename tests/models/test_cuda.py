"""The model on a GPU equals the eager reference, compiles, and does not synchronise with the host."""

import copy

import pytest
import torch
from support import assert_no_worse_than_eager, gradients, inputs, run, run_loss, tiny

from mae_fast.models.reference import ReferenceMAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cuda_and_reference(dtype=torch.float32, **options):
    """The model, its eager reference in the same dtype, both on the GPU, and the reference in float64."""
    model = tiny(**options)
    reference = ReferenceMAE.of(model)
    return model.to("cuda", dtype), copy.deepcopy(reference).to("cuda", dtype), reference.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"norm_pix_loss": True, "in_chans": 5}], ids=["raw", "norm"])
def test_model_on_a_gpu_equals_the_reference(options, dtype):
    model, reference, exact = cuda_and_reference(dtype, **options)
    images, noise = inputs(model)
    images, noise = images.cuda(), noise.cuda()
    ours, eager = (run(m, images, noise=noise) for m in (model, reference))
    truth = run(exact.cuda(), images.double(), noise=noise)
    assert torch.equal(ours.pop("mask"), eager.pop("mask"))
    del truth["mask"]
    assert_no_worse_than_eager(ours, eager, truth, dtype)
    training, eager_loss, exact_loss = run_loss(model, images, noise=noise), eager, truth
    del eager_loss["pred"], exact_loss["pred"]
    assert_no_worse_than_eager(training, eager_loss, exact_loss, dtype)


def test_model_on_a_gpu_under_autocast_equals_the_reference():
    model, reference, exact = cuda_and_reference(norm_pix_loss=True)
    images, noise = inputs(model)
    images, noise = images.cuda(), noise.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        ours, eager = (run(m, images, noise=noise) for m in (model, reference))
    truth = run(exact.cuda(), images.double(), noise=noise)
    for results in (ours, eager, truth):
        del results["mask"]
    ours["pred"], ours["loss"] = ours["pred"].to(eager["pred"].dtype), ours["loss"].to(eager["loss"].dtype)
    assert_no_worse_than_eager(ours, eager, truth, torch.bfloat16)


def test_uint8_images_on_a_gpu_equal_standardised_ones():
    model = tiny(norm_pix_loss=True).cuda()
    pixels = torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8, device="cuda")
    noise = torch.rand(3, 36, device="cuda")
    standardised = (pixels.float() / 255 - model.pixel_mean) / model.pixel_std
    ours = run_loss(model, pixels, noise=noise)
    theirs = run_loss(model, standardised.permute(0, 3, 1, 2), noise=noise)
    exact = run_loss(copy.deepcopy(model).double(), standardised.permute(0, 3, 1, 2).double(), noise=noise)
    assert_no_worse_than_eager(ours, theirs, exact, torch.float32)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
def test_a_step_can_be_captured_as_a_cuda_graph(amp):
    """Forward and backward do not synchronise. A CUDA graph of them gives the same numbers when it is replayed."""
    model = tiny(norm_pix_loss=True).cuda()
    images, noise = torch.randn(8, 3, 24, 24, device="cuda"), torch.rand(8, 36, device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
            loss = model.loss(images, noise=noise)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    images.copy_(torch.randn_like(images))
    noise.copy_(torch.rand_like(noise))
    graph.replay()
    replayed = {"loss": captured, **gradients(model)}
    replayed = {name: x.clone() for name, x in replayed.items()}
    expected = {"loss": step(), **gradients(model)}
    for name, value in expected.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_loss_compiles_as_one_graph_on_a_gpu():
    model, reference, exact = cuda_and_reference(norm_pix_loss=True)
    images, noise = (x.cuda() for x in inputs(model))
    compiled = torch.compile(model.loss, fullgraph=True)
    compiled(images, 0.75, noise).backward()
    ours = {"loss": compiled(images, 0.75, noise).detach()}
    ours |= gradients(model)
    eager, truth = run(reference, images, noise=noise), run(exact.cuda(), images.double(), noise=noise)
    for results in (eager, truth):
        del results["mask"], results["pred"]
    assert_no_worse_than_eager(ours, eager, truth, torch.float32)
