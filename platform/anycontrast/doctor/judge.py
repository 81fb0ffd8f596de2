"""From what nodes answered to findings: every threshold and every remedy of the doctor."""

from collections.abc import Iterator, Mapping, Sequence

from anycontrast.doctor.findings import Finding
from anycontrast.doctor.node import NodeAnswer, Space

OLDEST_RAY = (2, 60)
_WARN_SKEW_S, _FAIL_SKEW_S = 1.0, 30.0
_WARN_SHARED_BYTES, _FAIL_SHARED_BYTES = 1 << 30, 128 << 20
_FAIL_LOCKABLE_BYTES = 1 << 30
_WARN_FREE_BYTES, _FAIL_FREE_BYTES = 20 << 30, 1 << 30
# Ray places nothing on a node whose disk is fuller than this.
_RAY_FULL = 0.95


def judge_nodes(answers: Sequence[NodeAnswer], own: NodeAnswer) -> Iterator[Finding]:
    """Compare versions and code of all nodes with this process's, and look at their memory."""
    yield _ray_version(answers, own)
    yield _code(answers, own)
    yield _shared_memory(answers)
    if any(answer.uses_rdma for answer in answers):
        yield _locked_memory([answer for answer in answers if answer.uses_rdma])
    for use in sorted({use for answer in answers for use in answer.disks}):
        yield _disk(use, {answer.node: answer.disks[use] for answer in answers})


def _ray_version(answers: Sequence[NodeAnswer], own: NodeAnswer) -> Finding:
    if not own.ray:
        return Finding(
            "fail", "ray", "Ray is not installed", "install `pip install 'anycontrast[train]'`"
        )
    oldest = ".".join(map(str, OLDEST_RAY))
    if _numbers(own.ray) < OLDEST_RAY:
        return Finding("fail", "ray", f"Ray {own.ray} here", f"use Ray {oldest} or newer")
    others = [f"{one.node}: {one.ray or 'none'}" for one in answers if one.ray != own.ray]
    if others:
        return Finding(
            "fail",
            "ray",
            f"Ray {own.ray} here, but {', '.join(others)}",
            "use one image on all nodes",
        )
    return Finding("ok", "ray", f"Ray {own.ray} on {_all(answers)}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def _code(answers: Sequence[NodeAnswer], own: NodeAnswer) -> Finding:
    others = [f"{one.node} runs {one.code}" for one in answers if one.code.differs_from(own.code)]
    if others:
        return Finding(
            "fail",
            "code",
            f"this process runs {own.code}, but {'; '.join(others)}",
            "use one image on all nodes, or submit with --runtime-env recipes/runtime_env.yaml",
        )
    return Finding("ok", "code", f"{own.code} on {_all(answers)}")


def _shared_memory(answers: Sequence[NodeAnswer]) -> Finding:
    sizes = {one.node: one.shared_memory.total_bytes if one.shared_memory else 0 for one in answers}
    node, least = min(sizes.items(), key=lambda item: item[1])
    found = f"{_bytes(least)} of /dev/shm on {node}"
    remedy = (
        "mount a memory volume of 2 GiB or more at /dev/shm (chart: the worker group's "
        "sharedMemory), or start the container with --shm-size=2g"
    )
    if least < _FAIL_SHARED_BYTES:
        return Finding("fail", "shared memory", found, remedy)
    if least < _WARN_SHARED_BYTES:
        return Finding("warn", "shared memory", f"{found}: Ray's objects go to disk", remedy)
    return Finding("ok", "shared memory", found)


def _locked_memory(answers: Sequence[NodeAnswer]) -> Finding:
    short = [
        f"{one.node} may lock {_bytes(one.lockable_bytes)}"
        for one in answers
        if one.lockable_bytes is not None and one.lockable_bytes < _FAIL_LOCKABLE_BYTES
    ]
    if short:
        return Finding(
            "fail",
            "locked memory",
            f"{', '.join(short)}: NCCL cannot register its buffers for RDMA",
            "set LimitMEMLOCK=infinity for the nodes' container runtime (the capability IPC_LOCK "
            "reaches root alone), or `ulimit -l unlimited` where Ray is started by hand",
        )
    return Finding("ok", "locked memory", f"enough for RDMA on {_all(answers)}")


def _disk(use: str, spaces: Mapping[str, Space]) -> Finding:
    """Judge the worst of the nodes' disks."""
    severity = ("fail", "warn", "ok")
    found = [_one_disk(use, node, space) for node, space in spaces.items()]
    return min(found, key=lambda one: severity.index(one.state))


def _one_disk(use: str, node: str, space: Space) -> Finding:
    check, found = f"disk of {use}", f"{_bytes(space.free_bytes)} free on {node}"
    remedy = f"free space there, or give {use} a larger volume"
    if space.free_bytes < _FAIL_FREE_BYTES:
        return Finding("fail", check, found, remedy)
    share = 1 - space.free_bytes / max(space.total_bytes, 1)
    if use == "Ray" and share > _RAY_FULL:
        full = f"{found}, {share:.0%} full: Ray places no work on it"
        return Finding("fail", check, full, remedy)
    if space.free_bytes < _WARN_FREE_BYTES:
        return Finding("warn", check, found, remedy)
    return Finding("ok", check, found)


def judge_gpus(answers: Sequence[NodeAnswer], placed: Mapping[str, float]) -> Finding:
    """Compare what the drivers see with what Ray hands out.

    Args:
        answers: of the nodes.
        placed: GPUs by node as Ray counts them.
    """
    wrong = [
        f"{one.node}: the driver sees {len(one.gpus)}, Ray hands out {placed.get(one.node, 0):.0f}"
        for one in answers
        if len(one.gpus) != placed.get(one.node, 0)
    ]
    lacking = [one for one in answers if len(one.gpus) < placed.get(one.node, 0)]
    if lacking:
        return Finding(
            "fail",
            "GPUs",
            "; ".join(wrong),
            "check the NVIDIA driver and the device plugin of these nodes, and num-gpus of "
            "`ray start`",
        )
    if wrong:
        return Finding(
            "warn", "GPUs", "; ".join(wrong), "request all GPUs of a node for its Ray worker"
        )
    kinds = sorted({f"{gpu.name} {_bytes(gpu.total_bytes)}" for one in answers for gpu in one.gpus})
    total = sum(len(one.gpus) for one in answers)
    return Finding("ok", "GPUs", f"{total}: {', '.join(kinds)}" if total else "none: CPUs and gloo")


def judge_room(have: Mapping[str, float], *, workers: int, cpus: float, use_gpu: bool) -> Finding:
    """Whether `cluster.num_workers` fit at all, on an empty cluster."""
    wanted = {"CPU": workers * cpus, **({"GPU": float(workers)} if use_gpu else {})}
    short = [
        f"{number:g} {kind}s wanted, {have.get(kind, 0):g} there"
        for kind, number in wanted.items()
        if have.get(kind, 0) < number
    ]
    if short:
        return Finding(
            "fail",
            "room",
            f"{workers} workers do not fit: {', '.join(short)}",
            "add nodes, or lower cluster.num_workers or cluster.cpus_per_worker",
        )
    return Finding("ok", "room", f"for {workers} workers of cluster.num_workers")


def judge_clocks(skews_s: Mapping[str, float], uncertain_s: float) -> Finding:
    """Judge how far the clocks of nodes are from this process's.

    Args:
        skews_s: by node.
        uncertain_s: half of the longest round trip.
    """
    node, worst = max(skews_s.items(), key=lambda item: abs(item[1]))
    found = f"{worst:+.3f} s at most ({node}), known to {uncertain_s * 1e3:.0f} ms"
    if abs(worst) - uncertain_s > _WARN_SKEW_S:
        state = "fail" if abs(worst) - uncertain_s > _FAIL_SKEW_S else "warn"
        remedy = "run chrony or another NTP client on the hosts"
        return Finding("fail" if state == "fail" else "warn", "clocks", found, remedy)
    return Finding("ok", "clocks", found)


def judge_storage(folder: str, answers: Sequence[NodeAnswer], seen: Mapping[str, str]) -> Finding:
    """Judge what nodes could do in a folder, and whether each sees what the others wrote.

    Args:
        folder: that all nodes use.
        answers: of the nodes.
        seen: by node, what it could not read of the others; empty where all is there.
    """
    failed = [f"{one.node}: {one.storage[folder]}" for one in answers if one.storage[folder]]
    if failed:
        return Finding(
            "fail",
            "storage",
            f"{folder}: {'; '.join(failed)}",
            "make it writable for the user of the Ray processes (uid 1000, gid 100 in our image), "
            "on a volume with free space that renames atomically, or set `root` to another folder",
        )
    apart = [f"{node} {problem}" for node, problem in seen.items() if problem]
    if apart:
        return Finding(
            "fail",
            "storage",
            f"{folder}: {'; '.join(apart)}",
            "set `root` to a folder on storage that all nodes mount at one path (ReadWriteMany)",
        )
    return Finding("ok", "storage", f"{folder}: written, renamed and seen by {_all(answers)}")


def _all(answers: Sequence[NodeAnswer]) -> str:
    return "1 node" if len(answers) == 1 else f"{len(answers)} nodes"


def _bytes(value: float) -> str:
    return f"{value / (1 << 30):.1f} GiB" if value >= 1 << 30 else f"{value / (1 << 20):.0f} MiB"
