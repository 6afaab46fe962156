"""One message for a mistake that all processes of torchrun make."""

import os
import signal
from datetime import timedelta

from ..errors import LostProcess, UserError

WAIT = timedelta(seconds=10)  # for what the first process says


def is_said_by_first(error: UserError) -> bool:
    """Whether the first of several processes prints this error, so that the others need not.

    Each process looks in torchrun's store, which outlives them. The loss of another process needs no message of its own
    where the first one has said why it ended. If the first process says nothing in time, the others speak.
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
