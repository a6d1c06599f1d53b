"""Work shared by several processes that torchrun started.

Without torchrun there is one process, for which these functions do nothing or call directly.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; only the first of them prints.

    Tensors on CPUs are exchanged by gloo, those on GPUs by nccl.

    Raises:
        ValueError: if there are GPUs, but fewer than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node must be at most {torch.cuda.device_count()}, one process per "
                "GPU; set CUDA_VISIBLE_DEVICES to nothing to use the CPU."
            )
        # In this process "cuda" now means this GPU.
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(_attempt(), store)
    # A long timeout: the first process may certify for hours after the others. If one of them
    # dies, torchrun ends the others at once.
    options = {"store": store, "rank": number, "world_size": count, "timeout": timedelta(days=7)}
    dist.init_process_group(backend, **options)
    try:
        with ExitStack() as stack:
            if not is_main():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
            yield
    finally:
        dist.destroy_process_group()
        # Left for the end of Python, remains of the group aborted 1 of 24 finished runs on a busy
        # machine; with this, 0 of 18.
        gc.collect()


def _attempt() -> str:
    """A prefix of the store's keys, the same in all processes of one attempt.

    torchrun may keep its store when it starts the processes again, which would then find the
    addresses of those that died. Each machine counts its own restarts, so several machines cannot
    use that number; they rely on torchrun's own keys.
    """
    one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {_restart_count()}" if one_machine else "attempt"


def _restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints, draws and saves."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun started the processes again after one of them had died.

    All processes must call this together, since the count on another machine may stay at 0.
    """
    count = torch.tensor(_restart_count())
    if process_count() > 1:
        dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count) > 0


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if process_count() > 1:
        dist.barrier()


def own_seed(seed: int) -> int:
    """`seed` in the first process, and an unrelated seed in each of the others."""
    if is_main():
        return seed
    return int(np.random.SeedSequence((seed, rank())).generate_state(1)[0])


def from_main(compute: Callable[[], object]) -> object:
    """The result of `compute()` in the first process, sent to all. The others do not call it."""
    if process_count() == 1:
        return compute()
    results = [compute() if is_main() else None]
    dist.broadcast_object_list(results, src=0)
    return results[0]


def share_weights(model: nn.Module) -> None:
    """Give every process the weights of the first."""
    if process_count() > 1:
        weights = from_main(lambda: {k: v.cpu() for k, v in model.state_dict().items()})
        model.load_state_dict(weights)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange for all of them."""
    if process_count() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.div_(process_count()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def report_failure(message: str) -> None:
    """Exit with status 1 and an error message, which names the process unless it is the first."""
    number = os.environ.get("RANK", "0")
    sys.exit(f"error: {message}" if number == "0" else f"error in process {number}: {message}")
