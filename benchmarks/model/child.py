"""One contender, in a process of its own."""

from argparse import Namespace
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from benchmarks.model.contenders import build, images
from mae_fast.bench import peak_memory


class Child:
    """A contender in a process of its own, which takes one step a call.

    No contender then runs on the heap, the settings or the pages of another, and memory is what it alone takes.

    Attributes:
        result: what its first step returned.
        memory: ``peak_memory`` of it, empty under ``--no-memory``.
    """

    def __init__(self, name: str, args: Namespace) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, args), daemon=True)
        self.process.start()
        theirs.close()  # so that a child that dies is an EOFError here
        self.result, self.memory = self.pipe.recv()

    def __call__(self) -> None:
        self.pipe.send("step")
        self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, name: str, args: Namespace) -> None:
    """The child's side: the first step and the memory, then a step per message until the parent is gone."""
    step = build(name, args.model, images(args.model, args.batch), args.dtype == "bf16", args.task)
    torch.manual_seed(0)
    result = step().float().numpy()
    pipe.send((result, {} if args.no_memory else peak_memory(step, lambda: step(keep_gradients=True))))
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        step()
        pipe.send(None)
