"""Several processes that torchrun started work as one."""

import contextlib
import datetime
import functools
import os
import signal

import torch
import torch.distributed as dist

from plumbing import Refused

PATIENCE = datetime.timedelta(minutes=10)  # one that ended is noticed at once: this is for one that hangs
ENDED = "another process of this training ended, or torchrun; the same command goes on from what is saved"


@contextlib.contextmanager
def joined_processes():
    """Within this block the processes that torchrun started work as one. The first alone prints. But what
    ends one ends all: whichever ends badly before the others says why. Refused: they cannot be joined."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return

    def end(*_):  # torchrun sends it to all as soon as one has ended
        raise KeyboardInterrupt(ENDED)

    signal.signal(signal.SIGTERM, end)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        # No backend is named: tensors on the CPU take gloo, those on a GPU NCCL.
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise Refused(f"the processes cannot be joined ({e})") from e
    with contextlib.ExitStack() as stack:
        if rank:
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        try:
            yield
        except (Exception, KeyboardInterrupt):
            for s in (signal.SIGINT, signal.SIGTERM):
                signal.signal(s, signal.SIG_IGN)
            with contextlib.suppress(RuntimeError):  # the store ended, too
                if store.add("ended", 1) > 1:
                    raise SystemExit(1) from None
            raise
    dist.destroy_process_group()


def rank_and_size():
    """The number of this process, and how many work together; (0, 1) where it is the only one."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def sum_over_processes(*tensors):
    """Replace tensors of one type and device by their sums over all processes, the same bits in each. One
    process leaves them as they are. Refused: another process has ended."""
    if rank_and_size()[1] == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    try:
        if flat.is_cuda:  # NCCL would wait for one that has ended, gloo does not
            dist.all_reduce(torch.zeros(1))
        else:
            flat = flat.cpu()
        dist.all_reduce(flat)
    except RuntimeError as e:
        raise Refused(ENDED) from e
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


def any_process(asks):
    """Does any of the processes ask for it?"""
    count = torch.tensor([int(bool(asks))])
    sum_over_processes(count)
    return bool(count)


def first_alone(change):
    """Decorates what changes files: of several processes the first does it. It waits until all have come
    here, as they may still be reading; then they wait for it."""

    @functools.wraps(change)
    def alone(*args, **kwargs):
        sum_over_processes(torch.zeros(1))
        if rank_and_size()[0] == 0:
            change(*args, **kwargs)
        sum_over_processes(torch.zeros(1))

    return alone
