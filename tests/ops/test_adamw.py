"""AdamW ops: written tensors against torch's eager step, the norm of the gradients, dispatcher contracts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import KERNEL_ERROR, randn
from support import assert_no_worse_than_eager

from mae_fast.ops.adamw import adamw_step, adamw_steps, gradient_norm
from mae_fast.ops.adamw import reference as spec

DTYPES = (torch.float64, torch.float32)
# Empty, below one vector of any instruction set, one value more and less, more than one block
COUNTS = [0, 1, 3, 15, 16, 17, 1000, 16384, 16385, 100003]
OPTIONS = {"lr": 1.5e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.05}
WRITTEN = ("param", "exp_avg", "exp_avg_sq")


def inputs(shape, dtype, seed=0):
    shape = shape if isinstance(shape, tuple) else (shape,)
    made = {name: randn(*shape, seed=seed + i) for i, name in enumerate(("param", "grad", *WRITTEN[1:]))}
    made["exp_avg_sq"].square_()
    return {name: x.to(dtype) for name, x in made.items()}


def cloned(made):
    return {name: x.clone() for name, x in made.items()}


def torch_step(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay, **how):
    """One step of torch.optim.AdamW, in place on the given tensors."""
    param.grad = grad
    how = how or {"foreach": False}
    optimizer = torch.optim.AdamW([param], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **how)
    optimizer.state[param] = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.step()
    param.grad = None


def judge(made, dtype, step=3, **options):
    options = {**OPTIONS, **options}
    truth, eager, found = ({n: x.to(t, copy=True) for n, x in made.items()} for t in (torch.float64, dtype, dtype))
    torch_step(**truth, step=step, **options)
    torch_step(**eager, step=step, **options)
    copy = torch.empty(found["param"].shape, dtype=torch.bfloat16)
    squares = adamw_step(**found, copy=copy, step=step, **options)
    assert torch.equal(found["grad"], made["grad"])
    assert torch.equal(copy.view(torch.int16), found["param"].bfloat16().view(torch.int16))
    assert squares.dtype == torch.float64
    assert squares.shape == ()
    torch.testing.assert_close(squares, made["grad"].double().square().sum(), rtol=1e-13, atol=0)
    if found["param"].numel():
        found, eager, truth = ({name: x[name] for name in WRITTEN} for x in (found, eager, truth))
        assert_no_worse_than_eager(found, eager, truth, dtype)
        without = cloned(made)  # the copy does not affect the other results
        adamw_step(**without, step=step, **options)
        assert all(torch.equal(without[name], found[name]) for name in WRITTEN)


@pytest.mark.parametrize("step", [1, 3, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_values_and_gradients_contiguous(count, dtype, step):  # test_isa.py selects this name
    judge(inputs(count, dtype), dtype, step)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"beta1": 0.0},
        {"beta1": 0.3},
        {"beta1": 0.5},
        {"beta2": 0.0},
        {"beta2": 0.999},
        {"eps": 0.1},
        {"eps": 0.0},
        {"lr": 0.0},
        {"lr": 3.0, "weight_decay": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_equal_torch(dtype, options):
    judge(inputs((7, 53), dtype), dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_step(dtype):
    """With zero averages the first step is lr * sign(grad), whatever the betas."""
    made = inputs(257, dtype)
    made |= {"exp_avg": torch.zeros(257, dtype=dtype), "exp_avg_sq": torch.zeros(257, dtype=dtype)}
    judge(made, dtype, 1)
    before = made["param"].clone()
    adamw_step(**made, step=1, **{**OPTIONS, "weight_decay": 0.0, "eps": 0.0})
    torch.testing.assert_close(before - made["param"], OPTIONS["lr"] * made["grad"].sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_momentum_the_average_is_the_gradient(dtype):
    """They are exactly equal, however large the average was."""
    made = inputs(37, dtype)
    made["exp_avg"] *= 1e9
    adamw_step(**made, step=1, **{**OPTIONS, "beta1": 0.0})
    assert torch.equal(made["exp_avg"], made["grad"])


@given(count=st.integers(1, 70), seed=st.integers(0, 999), step=st.integers(1, 5000), beta1=st.floats(0, 0.99))
def test_random_inputs_equal_the_reference(count, seed, step, beta1):
    made, options = inputs(count, torch.float64, seed), {**OPTIONS, "beta1": beta1}
    expected = cloned(made)
    squares = spec.adamw_step_reference(*expected.values(), None, *options.values(), step)
    torch.testing.assert_close(adamw_step(**made, step=step, **options), squares, rtol=1e-13, atol=0)
    for name in WRITTEN:
        torch.testing.assert_close(made[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_special_values(dtype, fused):
    """Two steps with NaN, infinity and values whose squares overflow have the same results as torch."""
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, nan, inf, -inf, 1e30, -2e19, 1e-40, 1.0], dtype=dtype)
    made = inputs(50, dtype)
    made["grad"][:9] = special
    made["param"][20:29] = special
    made["exp_avg"][30:39] = special
    made["exp_avg_sq"][40:49] = special.abs()  # a mean of squares
    expected, copy = cloned(made), torch.empty(50, dtype=torch.bfloat16)
    for step in (1, 2):
        adamw_step(**made, copy=copy, step=step, **OPTIONS)
        torch_step(**expected, step=step, **OPTIONS, fused=fused, foreach=False)
        made["grad"], expected["grad"] = (x["grad"].flip(0) for x in (made, expected))
        for name in WRITTEN:
            torch.testing.assert_close(made[name], expected[name], equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(copy, made["param"].bfloat16(), equal_nan=True, rtol=0, atol=0)


def test_sum_of_squares_does_not_overflow():
    made = inputs(40, torch.float32)
    made["grad"] = torch.full((40,), 1e30)
    squares = adamw_step(**made, step=1, **OPTIONS)
    torch.testing.assert_close(squares, made["grad"].double().square().sum())
    for value in (float("nan"), float("inf")):
        made["grad"][17] = value
        found = adamw_step(**made, step=1, **OPTIONS)
        torch.testing.assert_close(found, torch.tensor(value, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            made, copy = inputs((3, 50021), dtype), torch.empty(3, 50021, dtype=torch.bfloat16)
            squares = adamw_step(**made, copy=copy, step=3, **OPTIONS)
            found.append([squares, copy, *made.values()])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_written_tensors_get_a_new_version():
    made, copy = inputs(5, torch.float32), torch.empty(5, dtype=torch.bfloat16)
    made["param"].requires_grad_()
    before = {name: x._version for name, x in made.items()} | {"copy": copy._version}
    squares = adamw_step(**made, copy=copy, step=1, **OPTIONS)
    for name, x in {**made, "copy": copy}.items():
        assert (x._version > before[name]) == (name != "grad"), name
    assert made["param"].is_leaf
    assert not squares.requires_grad


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(shape, dtype, copied):
    copy = torch.zeros(shape, dtype=torch.bfloat16) if copied else None
    arguments = (*inputs(shape, dtype).values(), copy, *OPTIONS.values(), 2)
    torch.library.opcheck(torch.ops.mae_fast.adamw_step.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_equals_torch(dtype):
    made = inputs((6, 11), dtype)
    expected, copy = cloned(made), torch.empty(6, 11, dtype=torch.bfloat16)
    squares = spec.adamw_step_reference(*made.values(), copy, *OPTIONS.values(), 3)
    torch_step(**expected, step=3, **OPTIONS)
    torch.testing.assert_close(made, expected)
    assert torch.equal(copy, made["param"].bfloat16())
    torch.testing.assert_close(squares, made["grad"].double().square().sum())


WRONG = {
    "param must be float32 or float64": {"param": torch.zeros(2, 4, dtype=torch.bfloat16)},
    "param must be contiguous": {"param": torch.zeros(4, 2).t()},
    "grad must be contiguous": {"grad": torch.zeros(4, 2).t()},
    "exp_avg must be contiguous": {"exp_avg": torch.zeros(8)},
    "exp_avg_sq must be contiguous": {"exp_avg_sq": torch.zeros(2, 4, dtype=torch.float64)},
    "copy must be contiguous": {"copy": torch.zeros(2, 4)},
    "step must be at least 1, got 0": {"step": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments_raise_value_errors(message):
    arguments = {**inputs((2, 4), torch.float32), "step": 1, **OPTIONS, **WRONG[message]}
    with pytest.raises(ValueError, match=f"adamw_step: {message}"):
        adamw_step(**arguments)


@pytest.mark.native
@pytest.mark.parametrize("message", list(WRONG)[1:])
def test_kernel_checks_its_own_arguments(message):
    arguments = {**inputs((2, 4), torch.float32), "copy": None, **OPTIONS, "step": 1, **WRONG[message]}
    with pytest.raises(KERNEL_ERROR, match=f"adamw_step: {message}"):
        torch.ops.mae_fast.adamw_step(*arguments.values())
    bf16 = [torch.zeros(2, 4, dtype=torch.bfloat16)] * 4
    with pytest.raises(KERNEL_ERROR, match="adamw_step: dtype BFloat16 is not supported"):
        torch.ops.mae_fast.adamw_step(*bf16, None, *OPTIONS.values(), 1)


# Parameters: a scalar, an empty one, less than a block, whole chunks, and two chunks plus a value.
SHAPES = [(), (0, 4), (7, 33), (64, 128), (16385,), (2, 8192)]
BETAS = [0.9, 0.0, 0.3, 0.5, 0.95, 0.9]  # beta1 of each parameter


def many(seed=0, shapes=SHAPES):
    """The lists of tensors for ``adamw_steps``, after some steps, and the options of each parameter."""
    made = [inputs(shape, torch.float32, seed + 10 * i) for i, shape in enumerate(shapes)]
    lists = {f"{name}s": [x[name] for x in made] for name in made[0]}
    lists["copies"] = [torch.full(shape, 7.0, dtype=torch.bfloat16) for shape in shapes]
    lists["steps"] = [torch.tensor(float(3 * i)) for i in range(len(shapes))]
    options = {"lr": 1.5e-3, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.05}
    options = {name: [value * (1 + i / 100) for i in range(len(shapes))] for name, value in options.items()}
    return lists, options | {"beta1": BETAS[: len(shapes)]}


def each_torch_step(lists, options, dtype, scale=1.0):
    """The tensors that torch.optim.AdamW writes in ``dtype``, one parameter after the other."""
    found = {}
    for i, (step, *tensors) in enumerate(zip(*(lists[name] for name in ("steps", *TENSORS)), strict=True)):
        param, grad, exp_avg, exp_avg_sq = (x.to(dtype, copy=True) for x in tensors)
        of_one = {name: values[i] for name, values in options.items()}
        torch_step(param, grad / scale, exp_avg, exp_avg_sq, step=int(step) + 1, **of_one)
        found |= {f"param {i}": param, f"exp_avg {i}": exp_avg, f"exp_avg_sq {i}": exp_avg_sq}
    return {name: x for name, x in found.items() if x.numel()}


TENSORS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def written(lists):
    found = {f"{name[:-1]} {i}": x for name in TENSORS if name != "grads" for i, x in enumerate(lists[name])}
    return {name: x for name, x in found.items() if x.numel()}


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("copied", [False, True])
def test_values_and_gradients_contiguous_of_many_parameters(copied, scale):  # test_triton.py selects this name
    lists, options = many()
    expected, grads = ([each_torch_step(lists, options, t, scale or 1.0) for t in (torch.float32, torch.float64)], [])
    grads = [x.clone() for x in lists["grads"]]
    if not copied:
        lists["copies"] = []
    adamw_steps(**lists, **options, grad_scale=None if scale is None else torch.tensor(scale))
    assert_no_worse_than_eager(written(lists), *expected, torch.float32)
    assert all(map(torch.equal, lists["grads"], grads))
    assert [float(x) for x in lists["steps"]] == [3.0 * i + 1 for i in range(len(SHAPES))]
    for param, copy in zip(lists["params"], lists["copies"], strict=copied):
        assert torch.equal(copy, param.bfloat16())


def test_values_and_gradients_contiguous_of_a_skipped_step():
    """Only the copies change, as they were of other weights. NaN gradients reach no tensor."""
    lists, options = many()
    lists["grads"][3][0] = float("nan")
    before = {name: [x.clone() for x in of_all] for name, of_all in lists.items()}
    adamw_steps(**lists, **options, found_inf=torch.tensor(1.0), grad_scale=torch.tensor(1.0))
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert all(map(torch.equal, lists[name], before[name])), name
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(lists["copies"], lists["params"], strict=True))
    adamw_steps(**lists | {"grads": before["exp_avgs"]}, **options, found_inf=torch.tensor(0.0))
    assert [float(x) for x in lists["steps"]] == [3.0 * i + 1 for i in range(len(SHAPES))]


@pytest.mark.parametrize("step", [0, 1, 10**6])
def test_values_and_gradients_contiguous_of_step_numbers(step):
    """The bias corrections are accurate in the first steps, where they cancel, and 1 after many steps."""
    lists, options = many(shapes=[(300,), (5,)])
    lists["steps"] = [torch.tensor(float(step)) for _ in range(2)]
    options |= {"beta1": [0.9999, 0.9], "beta2": [0.999, 0.0]}
    expected = [each_torch_step(lists, options, t) for t in (torch.float32, torch.float64)]
    adamw_steps(**lists, **options)
    assert_no_worse_than_eager(written(lists), *expected, torch.float32)


def test_values_and_gradients_contiguous_of_unaligned_tensors():
    """Each tensor in turn is not aligned to 16 bytes."""
    for odd in (*TENSORS, "copies"):
        lists, options = many(shapes=[(8192 + 5,)])
        x = lists[odd][0]
        lists[odd][0] = torch.cat([x[:1], x])[1:]
        assert lists[odd][0].data_ptr() % 16
        expected = [each_torch_step(lists, options, t) for t in (torch.float32, torch.float64)]
        norm, _, _ = gradient_norm(lists["grads"])
        torch.testing.assert_close(norm, lists["grads"][0].norm())
        adamw_steps(**lists, **options)
        assert_no_worse_than_eager(written(lists), *expected, torch.float32)
        assert torch.equal(lists["copies"][0], lists["params"][0].bfloat16())


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e4])
def test_values_and_gradients_contiguous_of_the_norm(max_norm):
    grads = many()[0]["grads"]
    expected = torch.cat([x.double().flatten() for x in grads]).norm()
    norm, found_inf, grad_scale = gradient_norm(grads, max_norm)
    torch.testing.assert_close(norm.double(), expected, rtol=3e-7, atol=0)
    assert (norm.dtype, found_inf.dtype, grad_scale.dtype) == (torch.float32,) * 3
    assert found_inf == 0
    clipped = [x.clone() for x in grads]
    for x, y in zip(grads, clipped, strict=True):
        x.grad, y.grad = x.clone(), y.clone()
    if max_norm:
        torch.nn.utils.clip_grad_norm_(clipped, max_norm)
    for x, y in zip(grads, clipped, strict=True):
        torch.testing.assert_close(x.grad / grad_scale, y.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, ()), (3, (0, 0)), (4, (16384,)), (5, (1, 8191))])
def test_values_and_gradients_contiguous_of_a_nonfinite_norm(value, place):
    grads = many()[0]["grads"]
    grads[place[0]][place[1]] = value
    norm, found_inf, _ = gradient_norm(grads, 1.0)
    assert not norm.isfinite()
    assert found_inf == 1


def test_bad_lists_and_tensors_raise_value_errors():
    lists, options = many()
    with pytest.raises(ValueError, match="adamw_steps: all lists must be as long as params, 6"):
        adamw_steps(**lists | {"steps": lists["steps"][1:]}, **options)
    for name in (*TENSORS, "copies", "steps"):
        wrong = [*lists[name][:-1], torch.zeros(2, 3, dtype=torch.float64)]
        with pytest.raises(ValueError, match=f"adamw_steps: {name} must be contiguous"):
            adamw_steps(**lists | {name: wrong}, **options)
    with pytest.raises(ValueError, match=r"gradient_norm: .*at least one"):
        gradient_norm([])
    with pytest.raises(ValueError, match="gradient_norm: grads must be contiguous"):
        gradient_norm([torch.zeros(2, 3).t()])
    with pytest.raises(ValueError, match="found_inf and grad_scale must be contiguous"):
        adamw_steps(**lists, **options, found_inf=torch.tensor(True))
    with pytest.raises(ValueError, match="adamw_steps: all tensors must be on one device, got cpu, meta"):
        adamw_steps(**lists, **options, grad_scale=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="gradient_norm: all tensors must be on one device, got cpu, meta"):
        gradient_norm([torch.zeros(3), torch.zeros(3, device="meta")])
    adamw_steps([], [], [], [], [], [], **{name: [] for name in options})


def test_written_lists_get_new_versions():
    lists, options = many()
    adamw_steps(**lists, **options)
    for name, tensors in lists.items():
        assert all((x._version > 0) == (name != "grads") for x in tensors), name


def test_opcheck_of_lists():
    lists, options = many(shapes=[(2, 3), (5,)])
    order = ("params", "grads", "exp_avgs", "exp_avg_sqs", "copies", "steps")
    numbers = [options[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")]
    arguments = (*(lists[name] for name in order), *numbers, torch.tensor(0.0), None)
    torch.library.opcheck(torch.ops.mae_fast.adamw_steps.default, arguments)
    torch.library.opcheck(torch.ops.mae_fast.gradient_norm.default, (lists["grads"], 1.0))
