"""Optimizers, weight averages and learning rate schedules, based on torch and timm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from ..console import quieted
from ..ops.adamw import adamw_step, adamw_steps
from ..ops.bf16_weight_cache import keep_copy
from ..ops.native import has_kernel, has_native

# torch's check that ``capturable`` is set in a CUDA graph. torch 2.10 has the second name.
_NAMES = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
_CHECK_GRAPH_CAPTURE = next(name for name in _NAMES if hasattr(torch.optim.AdamW, name))


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019) in one pass over memory:

        p = (1 - lr * weight_decay) * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    It is a drop-in replacement for ``torch.optim.AdamW`` with the same state and state dict. fp32 and fp64 parameters
    on a CPU use the op ``mae_fast::adamw_step``, if it is compiled. All fp32 parameters on a GPU use one call of
    ``mae_fast::adamw_steps``, also under a ``GradScaler``. torch's step (fused unless ``fused`` or ``foreach`` is set)
    updates all others: FSDP shards on a GPU, steps inside a CUDA graph, and parameter groups with ``amsgrad``,
    ``maximize`` or ``differentiable``.

    Args:
        working_dtype: if torch.bfloat16, each step also writes bf16 copies of the parameters, for matrix products in
            bf16. On a CPU, only our kernel writes them, for parameters of two or more dimensions. The copies are not
            part of the state.

    Attributes:
        grad_norm: the L2 norm of all gradients of the last step, fp64 scalar. None on a GPU, if torch's step updated
            some parameters, or if this process has only shards of the gradients.
    """

    grad_norm: Tensor | None = None
    working_dtype: torch.dtype | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        fused: bool | None = None,
        working_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if working_dtype not in (None, torch.bfloat16):
            raise ValueError(f"AdamW: working_dtype must be torch.bfloat16 or None, got {working_dtype}")
        if fused is None:
            fused = not (options.get("foreach") or options.get("differentiable"))
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, fused=fused, **options)
        self.working_dtype = working_dtype
        self._copies: dict[Tensor, Tensor] = {}  # parameter -> its copy, overwritten by each step

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "working_dtype": self.working_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_copies", {})  # missing if the object was not created by __init__

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        getattr(self, _CHECK_GRAPH_CAPTURE)()
        squares: list[Tensor] = []
        left: list[Tensor] = []  # gradients that the CPU kernel has not used
        sharded = False
        on_gpu, device = _OnGpu([], []), self.param_groups[0]["params"][0].device
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[], [], [], [], [], []]
            has_complex = self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            if self._may_use_kernel(group):
                sharded |= any(isinstance(p, DTensor) for p in lists[0])
                copied = None if sharded else self.working_dtype  # products use whole weights, gathered in each step
                own = [[_own(x) for x in tensors] for tensors in lists[:4]]
                fits = [_fits(*tensors) for tensors in zip(*own, strict=True)]
                squares += self._native_step(group, copied, *(_where(x, fits, True) for x in (*own, lists[5])))
                lists = [_where(x, fits, False) if x else x for x in lists]
            if self._may_use_gpu_kernel(group, lists[0]):
                tensors = [*zip(*lists[:4], lists[5], strict=True)]
                fits = [_fits_gpu(device, *each) for each in tensors]
                on_gpu.add(group, [each for each, flag in zip(tensors, fits, strict=True) if flag])
                left += _where(lists[1], fits, True)
                lists = [_where(x, fits, False) if x else x for x in lists]
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                adam(  # type: ignore[misc]
                    *lists,  # type: ignore[arg-type]
                    **{name: group[name] for name in _OPTIONS},
                    has_complex=has_complex,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                )
            left += lists[1]
            if self.working_dtype and lists[0] and lists[0][0].is_cuda:
                self._copy_on_gpu(lists[0])
        self._gpu_step(on_gpu)
        whole = squares and not left and not sharded
        self.grad_norm = torch.stack(squares).sum().sqrt() if whole else None
        return loss

    def _gpu_step(self, on_gpu: "_OnGpu") -> None:
        """Update the parameters of all groups by the GPU kernel."""
        if not on_gpu.tensors:
            return
        params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*on_gpu.tensors, strict=True))
        copies = [self._copy_of(p) for p in params] if self.working_dtype else []
        lr, beta1, beta2, eps, weight_decay = zip(*on_gpu.options, strict=True)
        adamw_steps(
            params, grads, exp_avgs, exp_avg_sqs, copies, steps,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            found_inf=getattr(self, "found_inf", None), grad_scale=getattr(self, "grad_scale", None),
        )  # fmt: skip
        for p, copy in zip(params, copies, strict=bool(copies)):
            keep_copy(p, copy)

    def _copy_on_gpu(self, params: list[Tensor]) -> None:
        """Write the copies of parameters that torch's step has updated, including biases, in few launches."""
        params = [p for p in params if not isinstance(p, DTensor)]
        copies = [self._copy_of(p) for p in params]
        if copies:
            torch._foreach_copy_(copies, params)
        for p, copy in zip(params, copies, strict=True):
            keep_copy(p, copy)

    def _copy_of(self, p: Tensor) -> Tensor:
        copy = self._copies.get(p)
        if copy is None or copy.shape != p.shape or copy.device != p.device:
            copy = self._copies[p] = torch.empty_like(p, dtype=self.working_dtype)
        return copy

    def _may_use_kernel(self, group: dict[str, Any]) -> bool:
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        other = any(group[name] for name in ("amsgrad", "maximize", "capturable", "differentiable"))
        return has_native("adamw_step", "CPU") and not (scaled or other or torch.compiler.is_compiling())

    def _may_use_gpu_kernel(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        if not (params and params[0].is_cuda and has_kernel("adamw_steps", "cuda")):
            return False
        numbers = (group["lr"], *group["betas"])
        # Reading a tensor on a GPU would wait for it.
        on_device = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in numbers)
        other = any(group[name] for name in ("amsgrad", "maximize", "differentiable"))
        # The kernel copies a table of addresses from the host. A replayed graph would copy the old addresses.
        capturing = torch.cuda.is_current_stream_capturing()
        return not (on_device or other or capturing or torch.compiler.is_compiling())

    def _native_step(
        self,
        group: dict[str, Any],
        copied: torch.dtype | None,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> list[Tensor]:
        """Update each parameter by the CPU kernel. Returns the sums of squares of the gradients."""
        options = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
        options |= {"beta1": float(group["betas"][0]), "beta2": float(group["betas"][1])}
        squares = []
        for p, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
            copy = self._copy_of(p) if copied and p.ndim > 1 else None
            step += 1
            squares.append(adamw_step(p, grad, exp_avg, exp_avg_sq, copy, step=int(step), **options))
            if copy is not None:
                keep_copy(p, copy)
        return squares


@dataclass
class _OnGpu:
    """The tensors and options of all groups for the GPU kernel."""

    tensors: list[tuple[Tensor, ...]]  # param, grad, exp_avg, exp_avg_sq, step
    options: list[tuple[float, ...]]  # lr, beta1, beta2, eps, weight_decay

    def add(self, group: dict[str, Any], tensors: list[tuple[Tensor, ...]]) -> None:
        numbers = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
        self.options += [tuple(map(float, numbers))] * len(tensors)
        self.tensors += tensors


_OPTIONS = (
    "lr", "weight_decay", "eps", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
    "decoupled_weight_decay",
)  # fmt: skip


def _own(x: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, which is enough for an elementwise step."""
    return x._local_tensor if isinstance(x, DTensor) else x


def _fits(p: Tensor, *others: Tensor) -> bool:
    """Whether the CPU kernel supports this parameter with its gradient and its two averages."""
    return (
        type(p) in (Tensor, nn.Parameter)
        and p.dtype in (torch.float32, torch.float64)
        and p.device.type == "cpu"
        and p.is_contiguous()
        and all(
            type(x) is Tensor
            and x.dtype == p.dtype
            and x.device == p.device
            and x.shape == p.shape
            and x.is_contiguous()
            for x in others
        )
    )


def _fits_gpu(device: torch.device, p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> bool:
    """Whether the GPU kernel, launched on ``device``, supports this parameter with its gradient and its state."""
    return (
        type(p) in (Tensor, nn.Parameter)
        and all(type(x) is Tensor and x.shape == p.shape for x in (grad, exp_avg, exp_avg_sq))
        and all(x.is_contiguous() for x in (p, grad, exp_avg, exp_avg_sq))
        and all(x.device == device and x.dtype == torch.float32 for x in (p, grad, exp_avg, exp_avg_sq, step))
    )


def _where(tensors: list[Tensor], flags: list[bool], wanted: bool) -> list[Tensor]:
    return [x for x, flag in zip(tensors, flags, strict=True) if flag == wanted]


def adamw(model: nn.Module, lr: float, weight_decay: float, working_dtype: torch.dtype | None = None) -> AdamW:
    """AdamW for pre-training, betas (0.9, 0.95). As in the official implementation, 1-D parameters and biases are not
    decayed, but 3-D tokens are."""
    from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

    groups = param_groups_weight_decay(model, weight_decay)
    return AdamW(groups, lr=lr, betas=(0.9, 0.95), working_dtype=working_dtype)


def layer_decayed_adamw(
    model: Any,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    beta2: float = 0.999,
    working_dtype: torch.dtype | None = None,
) -> AdamW:
    """AdamW with layer-wise learning rate decay: the rate falls by ``layer_decay`` from each block to the previous one.

    BEiT and MAE are fine-tuned this way. ``model`` follows timm's protocol: ``group_matcher`` defines its layers, and
    ``no_weight_decay`` the parameters without weight decay.
    """
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    return AdamW(groups, lr=lr, betas=(0.9, beta2), working_dtype=working_dtype)


class Ema:
    """Exponential moving average of a model's trained weights: after each step, e = decay * e + (1 - decay) * p.

    Attributes:
        averages: name of the weight -> its average, sharded like the weight. The initial value is the weight.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}
        self.average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Update the averages after a step."""
        averages, weights = ([_own(x.detach()) for x in d.values()] for d in (self.averages, self.weights))
        self.average(averages, weights, None)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context in which the model has the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            kept = weight.detach().clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)


class Schedule:
    """Learning rate schedule: linear warm-up from 0 to the optimizer's rates, then a decay.

    The learning rate is a function of the optimizer step only.

    Args:
        kind: "cosine": half a cosine to ``min_lr``. "linear": a line to ``min_lr``. "step": 1/10 from 8/9 of all steps
            on and 1/100 from 26/27 on, as in ViTDet.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        kind: Literal["cosine", "linear", "step"] = "cosine",
        warmup_steps: int,
        total_steps: int,
        min_lr: float = 0.0,
    ) -> None:
        from timm.scheduler import (  # type: ignore[attr-defined]
            CosineLRScheduler,
            MultiStepLRScheduler,
            PolyLRScheduler,
        )

        self.optimizer = optimizer
        if kind == "step":
            # Our steps are counted from 0, timm's milestones from 1.
            milestones = [round(total_steps * share) + 1 for share in (8 / 9, 26 / 27)]
            self.schedule: Any = MultiStepLRScheduler(
                optimizer, milestones, 0.1, warmup_t=warmup_steps, warmup_prefix=False, t_in_epochs=False
            )
            return
        made: Any = CosineLRScheduler if kind == "cosine" else partial(PolyLRScheduler, power=1.0)
        with quieted("timm.scheduler"):  # it warns about schedules of one step
            self.schedule = made(
                optimizer,
                t_initial=total_steps - warmup_steps,
                lr_min=min_lr,
                warmup_t=warmup_steps,
                warmup_prefix=True,
                t_in_epochs=False,
            )

    def set(self, step: float) -> float:
        """Set the learning rate of step number ``step``, from 0. Returns the largest of the layers' rates."""
        self.schedule.step_update(step)
        return max(float(group["lr"]) for group in self.optimizer.param_groups)
