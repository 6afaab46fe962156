"""``python -m benchmarks.ops.once``: each op once, forward and backward, on few images: for compute-sanitizer."""

import torch

from benchmarks.ops.problems import problems

if __name__ == "__main__":
    for problem in problems(n=2, in_blocks=2):
        print(problem, flush=True)
        problem.call(problem.ours)()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
