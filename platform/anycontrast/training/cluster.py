"""Placement: the pretraining loop on Ray workers, or in this process. The only user of Ray here.

Ray Train places one worker per GPU (or CPU share), joins them into a process group and restarts
the group when one dies; each restart resumes from the newest checkpoint of the run folder, which
must lie on a filesystem that all nodes share. When a node is drained the run saves at once, so that
nothing is lost when it goes. Checkpoints are ours, so nothing waits for Ray to commit them. What no
restart can mend (bad configuration, corrupt shard, missing checkpoint file) is written to
`failure-ATTEMPT.json`, ends the run at once, and is raised again in the driver as it was. Files
between driver and workers carry the attempt's name: a second job that is started on the same folder
by mistake ends itself and nothing else.
"""

import json
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from anycontrast.log import progress, setup_logging
from anycontrast.training.checkpoint import CheckpointError, latest
from anycontrast.training.config import Config, ConfigError, config_from_dict, config_to_dict
from anycontrast.training.loop import TrainingError
from anycontrast.training.pretrain import PretrainTask, pretrain_worker, run_pretrain
from anycontrast.training.provenance import Provenance, provenance
from anycontrast.training.ray_metrics import RayMetrics
from anycontrast_datasets.study import ShardError, StudyError

logger = logging.getLogger(__name__)

# Errors that a restart would only repeat.
_FINAL: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ConfigError, CheckpointError, TrainingError, ShardError, StudyError)
}


def launch(config: Config) -> dict[str, Any]:
    """Pretrain where `config.cluster` says and return the run's result.

    Raises:
        ConfigError: contradictory placement, or code that differs between nodes.
        TrainingError: the workers failed more than `cluster.max_failures` times.
    """
    if not _on_ray(config) or _is_done(config):
        return run_pretrain(config)
    config.paths.pretrain.mkdir(parents=True, exist_ok=True)
    with _ray(config):
        return _fit(config)


def _is_done(config: Config) -> bool:
    """Whether there is nothing left to train, so that no cluster need be started to say so."""
    pretrain = config.pretrain
    if not (pretrain.resume and pretrain.steps):
        return False
    folder = config.paths.pretrain / "checkpoints"
    if not (folder / f"step-{pretrain.steps:08d}").is_dir():
        # Every start comes this way: hash whole checkpoints only where the last step is there.
        return False
    newest = latest(folder)
    return newest is not None and newest.step >= pretrain.steps


def _on_ray(config: Config) -> bool:
    cluster = config.cluster
    if cluster.mode != "auto":
        return cluster.mode == "ray"
    return cluster.num_workers > 1 or bool(cluster.address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Join the cluster at hand, or start one on this machine for the length of the block."""
    # The version 2 API is what this file is written against; it must be chosen before the import.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        from anycontrast_datasets.shard_ray import protect_own_cluster

        protect_own_cluster()
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if address is None:
            _start_local(config)
        else:
            ray.init(address=address, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"joining the Ray cluster at {address or 'this machine'} failed: {error}; check the "
            "address, or set cluster.mode=process to train without Ray"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(config: Config) -> None:
    import ray

    wanted = config.cluster.num_workers * config.cluster.cpus_per_worker
    cores = os.cpu_count() or 1
    if wanted > cores:
        logger.warning("%.0f workers' CPUs on %d cores: the workers share cores", wanted, cores)
    logger.info("no Ray cluster given: starting one on this machine")
    ray.init(
        address="local",
        # One more than the workers need: Ray Train's controller holds a share of its own.
        num_cpus=max(cores, int(wanted) + 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        # Without a dashboard Ray Train's own watchers warn every second that they cannot ask it.
        logging_config=ray.LoggingConfig(log_level="ERROR"),
        log_to_driver=True,
    )


def _fit(config: Config) -> dict[str, Any]:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = config.cluster
    pretrain = config.paths.pretrain.resolve()
    attempt = secrets.token_hex(8)
    (pretrain / f".launch-{attempt}").touch()
    use_gpu = cluster.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(int(cluster.start_timeout_s))
    )
    values = config_to_dict(_from_anywhere(config))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": values,
            "attempt": attempt,
            "driver": asdict(provenance()),
            "is_local": _is_single_node(),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(use_gpu)},
        ),
        run_config=ray.train.RunConfig(
            name=f"{config.name}-{attempt}",
            storage_path=cluster.storage or str(pretrain / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(cluster.timeout_s)
        ),
    )
    logger.info(
        "placing %d workers, %s; the driver runs %s",
        cluster.num_workers,
        "GPU" if use_gpu else "CPU",
        provenance(),
    )
    try:
        with _bar(config), RayMetrics(config.name, PretrainTask.kind, rank=0) as metrics:
            metrics.working()
            trainer.fit()
        _raise_recorded(pretrain, attempt)
        result: dict[str, Any] = json.loads((pretrain / f"result-{attempt}.json").read_text())
        return result
    except tuple(_FINAL.values()):
        raise
    except SystemExit as error:
        raise KeyboardInterrupt from error  # Ray's own answer to the keyboard.
    except Exception as error:
        _raise_recorded(pretrain, attempt)
        raise TrainingError(
            f"training failed after {cluster.max_failures} restarts: {error}; the newest "
            f"checkpoint is in {pretrain / 'checkpoints'}, run the same command to go on from it"
        ) from error
    finally:
        for name in (".launch-{}", "failure-{}.json", "result-{}.json"):
            (pretrain / name.format(attempt)).unlink(missing_ok=True)


def _from_anywhere(config: Config) -> Config:
    """Make paths absolute: a worker may start in another folder than the driver."""
    start = config.pretrain.init_from
    pretrain = replace(config.pretrain, init_from=start and str(Path(start).resolve()))
    location = config.store.location
    if location is not None and "://" not in location:
        location = str(Path(location).expanduser().resolve())
    return replace(
        config,
        root=str(Path(config.root).resolve()),
        pretrain=pretrain,
        store=replace(config.store, location=location),
    )


@contextmanager
def _bar(config: Config) -> Iterator[None]:
    """Show a progress bar in the driver's terminal; elsewhere the workers' lines are enough."""
    if not (sys.stderr.isatty() and config.pretrain.steps):
        yield
        return
    metrics, done = config.paths.pretrain / "metrics.jsonl", threading.Event()
    with progress("pretraining", "steps") as show:

        def follow() -> None:
            while not done.wait(1.0):
                if metrics.is_file() and (lines := metrics.read_text().splitlines()):
                    with suppress(ValueError):  # A line that is being written.
                        show(json.loads(lines[-1])["step"], config.pretrain.steps)

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _is_single_node() -> bool:
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes()) == 1


def _raise_recorded(pretrain: Path, attempt: str) -> None:
    """Raise the error that a worker of this attempt recorded as final, if there is one."""
    path = pretrain / f"failure-{attempt}.json"
    if path.is_file():
        failure = json.loads(path.read_text())
        raise _FINAL[failure["kind"]](failure["message"])


def _worker(arguments: dict[str, Any]) -> None:
    """Run the loop on one Ray worker; every worker runs this."""
    import ray.train

    context = ray.train.get_context()
    rank = context.get_world_rank()
    # Ray's own handlers would print every line of ours a second time.
    logging.getLogger().handlers.clear()
    setup_logging(rank=rank)
    config = config_from_dict(arguments["config"])
    pretrain = config.paths.pretrain
    attempt = arguments["attempt"]
    if (pretrain / f"failure-{attempt}.json").is_file():
        # A final error ended the attempt before this restart; nothing to try again.
        return
    try:
        _check_node(pretrain, arguments)
        if arguments["is_local"] and "GLOO_SOCKET_IFNAME" not in os.environ:
            # All workers are on this machine; its host name may resolve to nothing reachable.
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        with RayMetrics(config.name, PretrainTask.kind, rank=rank) as metrics:
            if rank == 0:
                metrics.restarted(_count_start(pretrain / f".launch-{attempt}") - 1)
            result = pretrain_worker(config, save_requested=_new_preemption())
    except Exception as error:
        kind = next((k for k, known in _FINAL.items() if isinstance(error, known)), None)
        if kind is not None:
            failure = {"kind": kind, "message": str(error), "rank": rank}
            _record(pretrain / f"failure-{attempt}.json", failure)
        raise
    if rank == 0:
        _record(pretrain / f"result-{attempt}.json", result)
    ray.train.report({"step": result.get("step", 0)})


def _new_preemption() -> Callable[[], bool]:
    """Return a question: has a node of the run been told, since last asked, that it will go?

    Training then saves and goes on; Ray Train ends the group when the node goes, and starts another
    from that checkpoint. Ray's own `get_preemption_info` would make every step wait for all ranks,
    who agree on the answer anyway when they sum it.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    known: list[Any] = [None]

    def is_new() -> bool:
        notice = get_train_context().preemption_context.preemption_info
        if notice is None or notice == known[0]:
            return False
        known[0] = notice
        logger.warning(
            "node(s) %s of this run will go: saving now",
            ", ".join(notice.preempted_node_ids),
        )
        return True

    return is_new


def _check_node(pretrain: Path, arguments: dict[str, Any]) -> None:
    """Refuse a node with other code, or one that does not share the run folder."""
    node, own, driver = socket.gethostname(), provenance(), Provenance(**arguments["driver"])
    if own.differs_from(driver):
        raise ConfigError(
            f"node {node} runs {own}; the driver runs {driver}; use one image on all nodes, or "
            "submit with --runtime-env recipes/runtime_env.yaml, which gives every node your code"
        )
    if not (pretrain / f".launch-{arguments['attempt']}").is_file():
        raise ConfigError(
            f"node {node} does not see the driver's run folder {pretrain}; set root to a folder on "
            "storage that all nodes share"
        )


def _count_start(launch: Path) -> int:
    """Note another start of the workers of an attempt; return how many there were."""
    with launch.open("ab") as starts:
        starts.write(b".")
    return launch.stat().st_size


def _record(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(values, default=str))
    temporary.replace(path)
