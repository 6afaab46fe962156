"""``python -m benchmarks.profile_step``: profiles a training step on a CPU, and measures a lower bound of its time.

The lower bound is the time of all matrix products of the step, in their fastest layouts, plus torch's fused AdamW on
the same parameters. It is measured in turns with the step.
"""

import argparse
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mae_fast.bench.contenders import BASELINES, MODELS, OURS, build, images, ours
from mae_fast.bench.gemm_lower_bound import MULTIPLYING, all_products, products_of
from mae_fast.bench.timing import interleave, machine
from mae_fast.memory import raise_mmap_threshold

GEMM = ("GEMM forward", "GEMM of data gradients", "GEMM of weight gradients")
MLP = ("MLP forward", "MLP backward")  # the mlp op, which includes its matrix products and GELU
OPTIMIZER, REST = "optimizer", "other"
GROUPS = {  # an event belongs to the first group whose pattern matches its name
    "attention": r"^(?!.*backward).*(attention|dot_?product|softmax|aten::bmm)",
    "attention backward": r"attention|dot_?product",
    "LayerNorm, forward and backward": r"layer_?norm",
    "GELU, forward and backward": r"gelu",
    "embed, tokens, loss": r"gather|scatter|index|patches|positions|decoder_tokens|masked_loss|random_masking"
    r"|convolution|::cat$|sort|aten::rand",
    "casts and copies": r"copy|aten::(clone|contiguous|to)$",
    "adds and sums": r"aten::(add_?|sum|sub|mul_?|div_?|fill_|zero_)$",
}
BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "bool": 1, "c10::BFloat16": 2, "c10::Half": 2}
BF16 = 15  # ScalarType in the output of the profiler


@dataclass
class Group:
    """The time of a group of events in microseconds, with its FLOPs and bytes.

    Attributes:
        unknown_us: time of events without known FLOPs or bytes.
    """

    us: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    unknown_us: float = 0.0

    def rate(self) -> str:
        if self.unknown_us > 0.1 * self.us or not self.us:  # the rate would only cover a part of the group
            return ""
        if self.flops:
            return f"{self.flops / self.us / 1e3:.0f} GFLOP/s"
        return f"{self.bytes / self.us / 1e3:.1f} GB/s" if self.bytes else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--contender", choices=(*OURS, *BASELINES), default="mae_fast")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of the step and its lower bound")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    args = parser.parse_args()

    raise_mmap_threshold()
    step = build(args.contender, args.model, images(args.model, args.batch), args.dtype == "bf16")
    parameters = [p for p in ours(args.model).parameters() if p.requires_grad]
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, record_function("step"):
        step()
    groups, products, others = sort_events(
        profiler.events(), {tuple(p.flatten(1).shape) for p in parameters if p.ndim > 1}
    )
    for name in groups.keys() & {OPTIMIZER}:  # the profiler does not record shapes of lists of tensors
        values = sum(p.numel() for p in parameters)
        groups[name].bytes = groups[name].bytes or 4 * 7 * values  # p, g, m, v read; p, m, v written
        groups[name].unknown_us = 0.0
    del profiler
    contenders = {"step": step, "products": all_products(products, args.dtype), "AdamW": fused_adamw(parameters)}
    times = interleave(contenders, args.rounds, warmup=1)
    step_ms, gemm_ms, adamw_ms = (statistics.median(times[name]) * 1e3 for name in contenders)
    floor_share = statistics.median(
        (a + b) / c for a, b, c in zip(times["products"], times["AdamW"], times["step"], strict=True)
    )

    total = sum(group.us for group in groups.values())
    print(f"{args.contender}, {args.model} batch {args.batch} {args.dtype}\n{'':32}{'share':>7}{'self time':>13}")
    for name in (*GEMM, *MLP, *GROUPS, OPTIMIZER, REST):
        group = groups[name]
        print(f"{name:32}{group.us / total:7.1%}{group.us / 1e3:10.1f} ms   {group.rate()}")
    print("largest of the others: " + ", ".join(f"{name} {us / 1e3:.1f} ms" for name, us in others.most_common(4)))
    print(f"{'step with profiler':39}{total / 1e3:10.1f} ms\n{'step without profiler':39}{step_ms:10.1f} ms")
    print(f"{'matrix products alone':39}{gemm_ms:10.1f} ms   {len(products)} shapes, {products.total()} calls")
    print(f"{'fused AdamW alone':39}{adamw_ms:10.1f} ms\n{machine()}")
    print(f"lower bound / step: {floor_share:.1%}")
    if args.output:
        case = f"{args.contender} {args.model} batch {args.batch} {args.dtype}"
        floor = {"products ms": gemm_ms, "AdamW ms": adamw_ms, "floor / step": floor_share}
        rows = {name: {"ms": g.us / 1e3, "share": g.us / total, "rate": g.rate()} for name, g in groups.items()}
        result = {"case": case, "machine": machine(), "step ms": step_ms, "profiled ms": total / 1e3, **floor}
        args.output.write_text(json.dumps(result | {"groups": rows}, indent=1) + "\n")


def sort_events(
    events: Any, weights: set[tuple[int, ...]]
) -> tuple[dict[str, Group], Counter[tuple[int, int, int]], Counter[str]]:
    """The groups of events, the number of products [m, k] x [k, n] by shape, and the events in no group."""
    groups: dict[str, Group] = defaultdict(Group)
    products: Counter[tuple[int, int, int]] = Counter()
    others: Counter[str] = Counter()
    for event in events:
        above = list(ancestors(event))
        name = plain_name(event.name)
        taken = products_of(event.name, event.input_shapes)
        us = event.self_cpu_time_total
        if "Optimizer." in event.name or "adamw" in name or any("Optimizer." in parent for parent in above):
            group = OPTIMIZER
        elif taken or "linear_gradients" in name or name.startswith("mae_fast::mlp"):
            group = gemm_group(name, taken, above, weights)
        else:
            group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), REST)
        if group == REST:
            others[event.name] += us
        found = groups[group]
        found.us += us
        if taken and not inside(MULTIPLYING, above):  # products inside these ops are counted with the op
            products.update(taken)
            found.flops += 2 * sum(map(math.prod, taken))
        elif group.startswith("attention") and (flops := attention_flops(event)):
            found.flops += flops
        elif moved := bytes_moved(event):
            found.bytes += moved
        elif "::" in event.name and not event.name.startswith(("autograd::", "torch::autograd")):
            found.unknown_us += us  # except wrappers, which may contain the time of an inner op
    return groups, products, others


def ancestors(event: Any) -> Iterator[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def plain_name(name: str) -> str:
    """The name of an op without its autograd wrapper, to which the profiler assigns the time of the op."""
    return name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("GeneratedBackwardFor_")


def inside(ops: tuple[str, ...], above: list[str]) -> bool:
    return any(plain_name(name).removeprefix("mae_fast::") in ops for name in above)


def gemm_group(name: str, products: list[tuple[int, int, int]], above: list[str], weights: set[tuple[int, ...]]) -> str:
    """The group of an event with matrix products.

    In the backward pass, a product with the shape of a weight, or of its transpose, is the gradient of that weight.
    """
    if "mlp" in name:
        return MLP["backward" in name]
    if not products:
        return GEMM[2]
    if not any(parent.startswith("autograd::engine") for parent in above):
        return GEMM[0]
    m, _, n = products[0]
    return GEMM[2] if (m, n) in weights or (n, m) in weights else GEMM[1]


def attention_flops(event: Any) -> int:
    """Two products with T x T scores per head in the forward pass; four in the backward pass, plus the scores again."""
    shapes, backward = event.input_shapes, "backward" in event.name
    if event.name in ("mae_fast::attention", "mae_fast::attention_backward"):
        n, tokens, thrice = shapes[1] if backward else shapes[0]
        width = thrice // 3
    elif event.name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        n, heads, tokens, dim = shapes[0]
        width = heads * dim
    else:
        return 0
    return (10 if backward else 4) * n * tokens**2 * width


def bytes_moved(event: Any) -> int:
    """The minimum of bytes that an element-wise op or a layer norm reads and writes; 0 if it is unknown.

    torch 2.10 does not record dtypes, so it is unknown there.
    """
    sizes = [
        math.prod(shape) * BYTES.get(dtype, 0) if shape else 0
        for shape, dtype in zip(event.input_shapes, getattr(event, "input_dtypes", ()), strict=False)
        if not shape or isinstance(shape[0], int)
    ]
    if not any(sizes):
        return 0
    largest, every = max(sizes), sum(sizes)
    if event.name in ("aten::copy_", "aten::sum"):  # the output of copy_ is an input, that of sum is small
        return every
    if event.name == "mae_fast::adamw_step":  # writes the inputs param, exp_avg, exp_avg_sq and copy; reads the others
        return every + 3 * sizes[0]
    if event.name in ("mae_fast::add_layer_norm", "mae_fast::add_layer_norm_backward"):
        backward = event.name.endswith("backward")
        x = 2 if backward else 0  # the position of the sum among the inputs; fp32 in a bf16 step
        low = sizes[x] // 2 if event.concrete_inputs[5] == BF16 else 0
        if backward:  # outputs: the gradient, and its bf16 copy for the residual
            return every + sizes[x] + low
        return every + (sizes[x] if sizes[1] else 0) + (low or sizes[x])  # outputs: sum (with a residual), normalised
    name = r"(aten|mae_fast)::(native_layer_norm|gelu|bias_gelu)(_backward)?|aten::(add_?|sub|mul_?|div_?)"
    return every + largest if re.fullmatch(name, event.name) else 0


def fused_adamw(parameters: list[torch.nn.Parameter]) -> Callable[[], object]:
    """The step of torch's fused AdamW on these parameters."""
    for p in parameters:
        p.grad = torch.randn_like(p)
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True).step


if __name__ == "__main__":
    main()
