"""Several processes started by torchrun, each with a part of the work; or one, which is its own.

Without torchrun every function here is the plain case of one process and costs nothing.
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
                f"--nproc-per-node must be at most {torch.cuda.device_count()}, a process a GPU; "
                "set CUDA_VISIBLE_DEVICES to nothing to use the CPU."
            )
        # What "cuda" without a number means in this process.
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Long: the first process may certify for hours after the others. If one of them dies,
    # torchrun ends the others at once.
    store, number, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(_attempt(), store),
        rank=number,
        world_size=world,
        timeout=timedelta(days=7),
    )
    try:
        with ExitStack() as stack:
            if not is_main():
                silent = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(silent))
            yield
    finally:
        dist.destroy_process_group()
        # What is left of the group, if it is met only when Python ends, aborted one of 24 runs on a
        # busy machine after its work was done; none of 18 with this.
        gc.collect()


def _attempt() -> str:
    """A prefix of the store's keys, the same in all processes of one attempt.

    torchrun may keep its store when it starts the processes again; they would then find the
    addresses of those that died. Machines count restarts each for itself, so with several of
    them the numbers differ and torchrun's own keys have to do.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}" if alone else "attempt"


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

    All have to ask at the same time: on another machine the count of restarts stays at 0.
    """
    count = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    if process_count() > 1:
        dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count) > 0


def wait_for_all() -> None:
    """Return once every process has come here."""
    if process_count() > 1:
        dist.barrier()


def own_seed(seed: int) -> int:
    """A seed for this process: `seed` itself in the first one, unrelated ones in the others."""
    if is_main():
        return seed
    return int(np.random.SeedSequence((seed, rank())).generate_state(1)[0])


def from_main(compute: Callable[[], object]) -> object:
    """What `compute` returns in the first process, given to all; the others do not call it."""
    if process_count() == 1:
        return compute()
    box = [compute() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_weights(model: nn.Module) -> None:
    """Give every process the weights of the first."""
    if process_count() > 1:
        weights = from_main(lambda: {k: v.cpu() for k, v in model.state_dict().items()})
        model.load_state_dict(weights)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, all in one exchange."""
    if process_count() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.div_(process_count()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def report_failure(message: str) -> None:
    """End with an error of one sentence and exit status 1, saying which process if several."""
    number = os.environ.get("RANK", "0")
    sys.exit(f"error: {message}" if number == "0" else f"error in process {number}: {message}")
