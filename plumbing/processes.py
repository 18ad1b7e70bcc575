"""Several processes that torchrun started work as one."""

import contextlib
import datetime
import functools
import os
import signal

import torch
import torch.distributed as dist

from plumbing import Refused

PATIENCE = datetime.timedelta(minutes=10)  # how long to wait for a process that hangs
ENDED = "another process of this training ended, or torchrun; the same command goes on from what is saved"


@contextlib.contextmanager
def joined_processes():
    """Within this block the processes that torchrun started work as one. Only the first prints. When one ends
    badly, all end, and the first to do so says why. Raises Refused if they cannot be joined."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return

    def end(*_):  # torchrun sends it to all as soon as one has ended
        raise KeyboardInterrupt(ENDED)

    # Import this before there is a group, which its functions take as a default. transformers imports it
    # while it loads a model: the group would outlive its end, and its threads may abort a process that exits.
    import torch.distributed.nn.functional  # noqa: F401

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
    """Return the number of this process, and how many work together; (0, 1) if it is alone."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def sum_over_processes(*tensors):
    """Replace tensors of one type and device by their sums over all processes, the same bits in each. A
    process that is alone leaves them as they are. Raises Refused if another process has ended."""
    if rank_and_size()[1] == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    try:
        if flat.is_cuda:  # gloo notices a process that has ended; NCCL would wait for it
            dist.all_reduce(torch.zeros(1))
        else:
            flat = flat.cpu()
        dist.all_reduce(flat)
    except RuntimeError as e:
        raise Refused(ENDED) from e
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


def any_process(asks):
    """Return whether any of the processes asks for it."""
    count = torch.tensor([int(bool(asks))])
    sum_over_processes(count)
    return bool(count)


def first_alone(change):
    """Run a function that changes files only in the first process. It begins when all have come here, as they
    may still be reading, and the others wait until it is done."""

    @functools.wraps(change)
    def alone(*args, **kwargs):
        any_process(False)
        if rank_and_size()[0] == 0:
            change(*args, **kwargs)
        any_process(False)

    return alone
