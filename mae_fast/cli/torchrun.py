"""Prints an error once if all processes of torchrun raise it."""

import os
import signal
from datetime import timedelta

from ..errors import LostProcess, UserError

WAIT = timedelta(seconds=10)  # for the error message of rank 0


def is_reported_by_rank_0(error: UserError) -> bool:
    """Whether the process of rank 0 prints this error, so that this process stays silent.

    Rank 0 writes its error to the store of torchrun, which outlives the processes; the other ranks read it there. They
    also stay silent about a lost process if rank 0 has reported an error. Without an answer in time, they print theirs.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if "TORCHELASTIC_RUN_ID" not in os.environ or world == 1:
        return False
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistError

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another process has ended
    key = f"mae_fast/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT)
        if rank == 0:
            store.set(key, str(error))
            return False
        return store.get(key).decode() == str(error) or isinstance(error, LostProcess)
    except (DistError, RuntimeError, KeyError, ValueError):  # no store, or no answer in time
        return False
