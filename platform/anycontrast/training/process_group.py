"""The process group: adopt the one Ray or torchrun made, or be a group of one.

Ray Train initialises torch.distributed in its workers; torchrun sets the environment; a plain
process gets a one-rank group on an in-process store, which opens no port.
"""

import atexit
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

_SETTLE_S = 0.5


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of training processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def process_group(*, timeout_s: float = 1800.0) -> Iterator[None]:
    """Run the block in a process group: the one there is, or one made here.

    One made here stays until the process ends, also after the block: DeepSpeed keeps handles to
    groups derived from it, and a finetuning may follow the pretraining in the same process.
    """
    if not dist.is_initialized():
        _join(timeout_s)
    yield


def _join(timeout_s: float) -> None:
    is_launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if is_launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # exported without saying so
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    atexit.register(_leave)


def _leave() -> None:
    if not dist.is_initialized():
        return
    is_alone = dist.get_world_size() == 1
    dist.destroy_process_group()
    if not is_alone:
        # A gloo thread lets go of the tensors of the last collective a moment after `wait` has
        # returned, and takes the interpreter for it. If the interpreter is already going down, that
        # ends the process with "terminate called without an active exception". Let it finish.
        gc.collect()
        time.sleep(_SETTLE_S)


def reduce_sums(values: list[float], where: torch.device) -> list[float]:
    """Sum each value over ranks, in float64."""
    if world_size() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=where)
    dist.all_reduce(summed)
    result: list[float] = summed.tolist()
    return result


def gather_objects(value: _T) -> list[_T]:
    """Return every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_rank_0(make: Callable[[], _T]) -> _T:
    """Run `make` on rank 0 and return its result, or raise its error, on every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            if world_size() == 1:
                raise
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: _T = outcome[0]
    return result
