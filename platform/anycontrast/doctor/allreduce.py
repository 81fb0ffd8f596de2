"""A real all-reduce between processes, timed: what training does at every step.

`python -m anycontrast.doctor.allreduce BACKEND RANK RANKS ADDRESS TIMEOUT_S` is one rank; on a
cluster the same function runs in an actor on each node.
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

_NUMBERS = 4 << 20
_ROUNDS = 3


def all_reduce(backend: str, rank: int, ranks: int, address: str, timeout_s: float) -> float:
    """Sum 16 MiB over all ranks a few times; return seconds per sum, the fastest of them.

    Args:
        backend: `gloo` or `nccl`.
        rank: of this process.
        ranks: how many take part.
        address: HOST:PORT where rank 0 listens.
        timeout_s: how long to wait for the others.

    Raises:
        RuntimeError: the ranks do not reach each other, or the sum is wrong.
    """
    where = None
    if backend == "nccl":
        where = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    store_host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # exported without saying so
        store_host, int(port), ranks, is_master=rank == 0, timeout=timeout
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        seconds = []
        for _ in range(_ROUNDS):
            numbers = torch.full((_NUMBERS,), float(rank + 1), device=where)
            start_s = time.perf_counter()
            dist.all_reduce(numbers)
            found = float(numbers.max())
            seconds.append(time.perf_counter() - start_s)
            wanted = ranks * (ranks + 1) / 2
            if found != wanted:
                raise RuntimeError(f"the sum over {ranks} ranks is {found}, not {wanted}")
        # The listening rank leaves last, or the others lose the store while they shut down.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return min(seconds)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that is free on this node at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def on_this_machine(backend: str, ranks: int, timeout_s: float) -> float:
    """Run one process per rank here; return the slowest one's seconds.

    Raises:
        RuntimeError: what the first process that failed said last.
    """
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "anycontrast.doctor.allreduce", backend]
    env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), address, str(timeout_s)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=2 * timeout_s + 60))
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate())
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            raise RuntimeError((errors.strip().splitlines() or ["it was ended"])[-1])
    return max(float(json.loads(text)) for text, _ in outputs)


def main(words: list[str]) -> None:
    """Be one rank; the seconds go to standard output."""
    backend, rank, ranks, address, timeout_s = words
    seconds = all_reduce(backend, int(rank), int(ranks), address, float(timeout_s))
    with suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
