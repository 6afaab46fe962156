"""``python -m benchmarks.ops.once [OP...] [--full]``: runs ops once in bf16, forward and backward.

This is for compute-sanitizer and ncu. The default is all ops, on two images; ``--full`` uses the batch of a training
step.
"""

import sys

import torch

from benchmarks.ops.problems import problems

if __name__ == "__main__":
    full = "--full" in sys.argv
    wanted = {name for name in sys.argv[1:] if name != "--full"}
    for problem in problems() if full else problems(n=2, in_blocks=2):
        if (not wanted or problem.op in wanted) and (problem.dtype == "bf16" or problem.op == "random_masking"):
            print(problem, flush=True)
            problem.call(problem.ours)()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
