"""The doctor on a Ray cluster: every living node is asked, and all sum a tensor together."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anycontrast.doctor.allreduce import all_reduce, free_port
from anycontrast.doctor.findings import Finding
from anycontrast.doctor.judge import (
    judge_clocks,
    judge_gpus,
    judge_nodes,
    judge_room,
    judge_storage,
)
from anycontrast.doctor.node import (
    NodeAnswer,
    Question,
    clean_up,
    clock_s,
    confirm,
    examine,
    host,
)
from anycontrast.training.config import ClusterConfig

logger = logging.getLogger(__name__)

_ANSWER_S = 60.0
_ALL_REDUCE_S = 60.0
_CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    name: str
    """Its address, which is what messages call it."""
    resources: Mapping[str, float]


def examine_cluster(question: Question, cluster: ClusterConfig) -> Iterator[Finding]:
    """Ask every living node of the cluster this process is connected to.

    Args:
        question: folders to try.
        cluster: how many workers are to run.
    """
    import ray

    nodes, dead = _nodes(ray.nodes())
    yield _membership(nodes, dead)
    try:
        answers, silent = _ask_all(nodes, question)
        seen = _confirm_all([n for n in nodes if n.name not in silent], question, answers)
    finally:
        clean_up(question)
    for name, reason in silent.items():
        yield Finding(
            "fail",
            "node",
            f"{name} did not answer: {reason}",
            "install the same anycontrast[train] there (use one image on all nodes), and look at "
            "the node's raylet.err under /tmp/ray/session_latest/logs",
        )
    if not answers:
        return
    own = examine(Question(question.probe, ()), host())
    yield from judge_nodes(answers, own)
    yield judge_gpus(answers, {node.name: node.resources.get("GPU", 0) for node in nodes})
    have = ray.cluster_resources()
    use_gpu = have.get("GPU", 0) > 0 if cluster.use_gpu is None else cluster.use_gpu
    yield judge_room(
        have, workers=cluster.num_workers, cpus=cluster.cpus_per_worker, use_gpu=use_gpu
    )
    answered = [node for node in nodes if node.name not in silent]
    yield _clocks(answered)
    yield _reach("gloo", answered, num_gpus=0)
    with_gpus = [node for node in answered if node.resources.get("GPU", 0) > 0]
    if use_gpu and with_gpus:  # Without any, the finding about room says so.
        yield _reach("nccl", with_gpus, num_gpus=1)
    for folder in question.folders:
        of_folder = {name: found[folder] for name, found in seen.items()}
        yield judge_storage(folder, answers, of_folder)


def _nodes(listed: Sequence[Mapping[str, Any]]) -> tuple[list[Node], list[str]]:
    alive = [
        Node(one["NodeID"], one["NodeManagerAddress"], one["Resources"])
        for one in listed
        if one["Alive"]
    ]
    names = [node.name for node in alive]
    # Several nodes may share an address, on one machine.
    alive = [
        node
        if names.count(node.name) == 1
        else Node(node.id, f"{node.name}/{node.id[:6]}", node.resources)
        for node in alive
    ]
    return alive, [one["NodeManagerAddress"] for one in listed if not one["Alive"]]


def _membership(nodes: Sequence[Node], dead: Sequence[str]) -> Finding:
    names = ", ".join(sorted(node.name for node in nodes)[:8])
    more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    found = f"{len(nodes)} alive: {names}{more}"
    if dead:
        return Finding(
            "warn",
            "nodes",
            f"{found}; {len(dead)} died since the cluster started: {', '.join(sorted(set(dead)))}",
            "look at the events of these nodes if they were not taken away on purpose",
        )
    return Finding("ok", "nodes", found)


def _ask_all(nodes: Sequence[Node], question: Question) -> tuple[list[NodeAnswer], dict[str, str]]:
    """Return the answers, and by name why a node gave none."""
    asked = {node.name: _on(node, examine).remote(question, node.name) for node in nodes}
    answers: list[NodeAnswer] = []
    silent: dict[str, str] = {}
    for name, reference in asked.items():
        outcome = _wait(reference)
        if isinstance(outcome, Exception):
            silent[name] = _last_line(outcome)
        else:
            answers.append(outcome)
    return answers, silent


def _confirm_all(
    nodes: Sequence[Node], question: Question, answers: Sequence[NodeAnswer]
) -> dict[str, dict[str, str]]:
    writers = [one.node for one in answers]
    asked = {node.name: _on(node, confirm).remote(question, writers) for node in nodes}
    seen = {}
    for name, reference in asked.items():
        outcome = _wait(reference)
        failed = isinstance(outcome, Exception)
        seen[name] = dict.fromkeys(question.folders, _last_line(outcome)) if failed else outcome
    return seen


def _clocks(nodes: Sequence[Node]) -> Finding:
    import ray

    try:
        return judge_clocks(*_skews(nodes))
    except ray.exceptions.RayError as error:  # A node went between two questions, or hangs.
        return Finding(
            "fail",
            "clocks",
            f"a node did not say its time: {_last_line(error)}",
            "run the doctor again, and look at the nodes' events if it stays",
        )


def _skews(nodes: Sequence[Node]) -> tuple[dict[str, float], float]:
    """Seconds each node's clock is ahead of ours, by the quickest of a few round trips."""
    import ray

    skews, uncertain_s = {}, 0.0
    for node in nodes:
        clock = _actor(node, _Clock)
        rounds = []
        for _ in range(_CLOCK_ROUNDS):
            before_s = time.time()
            there_s = ray.get(clock.now.remote(), timeout=_ANSWER_S)
            after_s = time.time()
            rounds.append((after_s - before_s, there_s - (before_s + after_s) / 2))
        round_trip_s, skews[node.name] = min(rounds)
        uncertain_s = max(uncertain_s, round_trip_s / 2)
        ray.kill(clock)
    return skews, uncertain_s


def _reach(backend: str, nodes: Sequence[Node], *, num_gpus: int) -> Finding:
    """Let one process per node sum a tensor together."""
    import ray

    actors = [_actor(node, _Rank, num_gpus=num_gpus) for node in nodes]
    try:
        address = ray.get(actors[0].address.remote(), timeout=_ANSWER_S)
        sums = [
            actor.all_reduce.remote(backend, rank, len(actors), address, _ALL_REDUCE_S)
            for rank, actor in enumerate(actors)
        ]
        seconds = max(ray.get(sums, timeout=2 * _ALL_REDUCE_S))
    except ray.exceptions.GetTimeoutError:
        reason = "no answer"
        if num_gpus and not _is_idle(nodes):
            return Finding(
                "warn",
                backend,
                "not tried: the GPUs are in use",
                "run the doctor again when no job runs",
            )
    except ray.exceptions.RayError as error:
        reason = _last_line(error)
    else:
        rate = 16 / 1024 / seconds
        return Finding("ok", backend, f"16 MiB summed over {len(nodes)} nodes, {rate:.2f} GiB/s")
    finally:
        for actor in actors:
            ray.kill(actor)
    return Finding(
        "fail",
        backend,
        f"{', '.join(node.name for node in nodes)} do not reach each other: {reason}",
        f"open all ports between the nodes, and set {backend.upper()}_SOCKET_IFNAME to the "
        "interface they share (chart: network.interface)",
    )


def _is_idle(nodes: Sequence[Node]) -> bool:
    import ray

    wanted = sum(node.resources.get("GPU", 0) for node in nodes)
    return bool(ray.available_resources().get("GPU", 0) >= wanted)


class _Clock:
    def now(self) -> float:
        return clock_s()


class _Rank:
    """One process of the all-reduce."""

    def address(self) -> str:
        import ray

        node = ray.util.get_node_ip_address()
        return f"{node}:{free_port(node)}"

    def all_reduce(self, backend: str, rank: int, ranks: int, address: str, wait_s: float) -> float:
        return all_reduce(backend, rank, ranks, address, wait_s)


def _on(node: Node, function: Any) -> Any:
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=_at(node))


def _actor(node: Node, kind: type, *, num_gpus: int = 0) -> Any:
    import ray

    made = ray.remote(num_cpus=0, num_gpus=num_gpus)(kind)
    return made.options(scheduling_strategy=_at(node)).remote()


def _at(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _wait(reference: Any) -> Any:
    """Return what a task returned, or the error that Ray gave instead."""
    import ray

    try:
        return ray.get(reference, timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        return error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
