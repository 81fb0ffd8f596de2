"""The doctor on this machine: what a run without Ray, or with one of its own, would meet."""

import os
from collections.abc import Iterator

from anycontrast.doctor.allreduce import on_this_machine
from anycontrast.doctor.findings import Finding
from anycontrast.doctor.judge import judge_gpus, judge_nodes, judge_room, judge_storage
from anycontrast.doctor.node import Question, clean_up, confirm, examine, host
from anycontrast.training.config import ClusterConfig

_ALL_REDUCE_S = 60.0


def examine_machine(question: Question, cluster: ClusterConfig) -> Iterator[Finding]:
    """Look at everything a run on this machine needs.

    Args:
        question: folders to try.
        cluster: how many workers are to run.
    """
    try:
        answer = examine(question, host())
        seen = confirm(question, [host()])
    finally:
        clean_up(question)
    yield from judge_nodes([answer], answer)
    found = len(answer.gpus)
    yield judge_gpus([answer], {answer.node: float(found)})
    have = {"CPU": float(os.cpu_count() or 1), "GPU": float(found)}
    yield judge_room(
        have, workers=cluster.num_workers, cpus=cluster.cpus_per_worker, use_gpu=found > 0
    )
    yield _reach("gloo", max(2, min(cluster.num_workers, 4)))
    if found > 1:
        yield _reach("nccl", found)
    for folder in question.folders:
        yield judge_storage(folder, [answer], {answer.node: seen[folder]})


def _reach(backend: str, ranks: int) -> Finding:
    try:
        seconds = on_this_machine(backend, ranks, _ALL_REDUCE_S)
    except (RuntimeError, OSError) as error:
        return Finding(
            "fail",
            backend,
            f"{ranks} processes of this machine do not reach each other: {error}",
            "unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or name an interface that is up",
        )
    rate = 16 / 1024 / seconds
    return Finding("ok", backend, f"16 MiB summed over {ranks} processes, {rate:.2f} GiB/s")
