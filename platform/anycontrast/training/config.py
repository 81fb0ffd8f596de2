"""The root configuration: composes every component's dataclass, loads YAML, checks across them.

`load_config` = schema <- YAML file <- `key=value` words, through OmegaConf; below this file nobody
sees a DictConfig. Unknown keys are refused with the nearest name. Interpolation between keys
(`${model.preset}`) works; resolvers (`${oc.env:HOME}`) are refused, since they would carry secrets
of the environment into run folders and checkpoints.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

from anycontrast.data_stages import CroissantConfig, ReportConfig
from anycontrast.evaluation.evaluate import EvaluateConfig
from anycontrast.models.amae import AMAEConfig
from anycontrast.models.masking import MaskingConfig
from anycontrast.planning import PlanConfig
from anycontrast.release.export import ExportConfig
from anycontrast.release.hub import PullConfig
from anycontrast.release.predict import PredictConfig
from anycontrast.shards import StoreConfig
from anycontrast.training.finetune import FinetuneConfig
from anycontrast.training.pretrain import PretrainConfig
from anycontrast.view import ViewConfig
from anycontrast_datasets.prepare import PrepareConfig
from anycontrast_datasets.scan import ScanConfig
from anycontrast_datasets.shard import ShardConfig
from anycontrast_datasets.store.zarr_config import ZarrConfig

_Options = TypeVar("_Options")

_WHEREABOUTS = (
    "root",
    "scan.root",
    "scan.table",
    "scan.pseudonym_key_file",
    "scan.split_salt",
    "cluster.address",
    "cluster.storage",
    "pull.cache",
    "predict.table",
    "store.location",
    "store.cache.folder",
    "report.out",
    "croissant.out",
    "view.out",
    "view.table",
)
"""Keys that say where things are, or what else must not travel with a checkpoint."""


class ConfigError(ValueError):
    """A configuration cannot be used: unknown key, wrong type or value, or a contradiction."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where training runs."""

    mode: Literal["auto", "ray", "process"] = "auto"
    """`process`: this process alone, without Ray. `ray`: always Ray. `auto`: Ray when a cluster
    address is given or more than one worker is asked for."""
    num_workers: int = 1
    """Training processes, one per GPU where there are GPUs."""
    address: str | None = None
    """Ray address; None uses a running cluster of this environment or starts a local one."""
    use_gpu: bool | None = None
    """None means: GPUs if the cluster has them."""
    cpus_per_worker: float = 1.0
    max_failures: int = 3
    """Restarts from the newest checkpoint before the run gives up; -1 means no limit."""
    storage: str | None = None
    """Shared folder or URI for Ray's own records; None means `<run>/pretrain/ray`."""
    timeout_s: float = 1800.0
    """Longest wait in a collective before a rank counts as lost."""
    start_timeout_s: float = 300.0
    """Longest wait for the workers to be placed."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"cluster.num_workers must be >= 1, got {self.num_workers}")
        if self.mode == "process" and self.num_workers > 1:
            raise ValueError(
                f"cluster.mode=process runs one worker, got num_workers {self.num_workers}; "
                "use mode=ray"
            )
        if self.max_failures < -1:
            raise ValueError(f"cluster.max_failures must be >= -1, got {self.max_failures}")
        for name in ("cpus_per_worker", "timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"cluster.{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunPaths:
    """Folders of one run, all under `<root>/<name>/`."""

    run: Path
    source: Path
    manifest: Path
    shards: Path
    zarr: Path
    pretrain: Path
    finetune: Path
    report: Path
    release: Path


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is decided by."""

    name: str = "demo"
    """Of the run folder: letters, digits, `.`, `_`, `-`."""
    root: str = "runs"
    """Folder that holds run folders."""
    seed: int = 0
    """Of weights, order, masks and augmentation."""
    scan: ScanConfig = field(default_factory=ScanConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    zarr: ZarrConfig = field(default_factory=ZarrConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    croissant: CroissantConfig = field(default_factory=CroissantConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    model: AMAEConfig = field(default_factory=AMAEConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    pull: PullConfig = field(default_factory=PullConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                "name must be letters, digits, '.', '_' or '-', starting with a letter or digit, "
                f"got {self.name!r}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    @property
    def paths(self) -> RunPaths:
        """Where this run keeps its files."""
        run = Path(self.root) / self.name
        return RunPaths(run, *(run / f.name for f in fields(RunPaths)[1:]))


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration: defaults, then the YAML file, then `key=value` words.

    Args:
        path: YAML file, or None for the defaults.
        overrides: e.g. `pretrain.steps=100`, `model.patch_vox=[8,8,8]`.

    Raises:
        ConfigError: naming the key, where it stands, what is wrong and what to write instead.
    """
    from omegaconf import OmegaConf

    merged = OmegaConf.structured(Config)
    if path is not None:
        merged = _merge(merged, _read_yaml(path), str(path))
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"command line: expected key=value, got {word!r}")
        merged = _merge(merged, _read_word(word), f"command line {word!r}")
    config: Config = _to_object(merged, str(path) if path is not None else "command line")
    check_compatible(config)
    return config


def load_options(kind: type[_Options], overrides: Sequence[str]) -> _Options:
    """Build one dataclass of options from `key=value` words, with the checks of `load_config`."""
    from omegaconf import OmegaConf

    merged = OmegaConf.structured(kind)
    for word in overrides:
        merged = _merge(merged, _read_word(word), f"command line {word!r}")
    options = _to_object(merged, "command line")
    assert isinstance(options, kind)
    return options


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain JSON values."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def config_to_record(config: Config) -> dict[str, Any]:
    """Return what a checkpoint keeps of the configuration: `config_to_dict` without whereabouts.

    Checkpoints travel; where the source, the pseudonym key and the cluster are stays behind.
    """
    values = config_to_dict(config)
    for key in _WHEREABOUTS:
        *sections, name = key.split(".")
        reduce(lambda part, section: part[section], sections, values)[name] = None
    return values


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Build a configuration from `config_to_dict`'s output, with the checks of `load_config`."""
    from omegaconf import OmegaConf

    where = "stored configuration"
    merged = _merge(OmegaConf.structured(Config), OmegaConf.create(dict(values)), where)
    config: Config = _to_object(merged, where)
    check_compatible(config)
    return config


def check_compatible(config: Config) -> None:
    """Check the rules that hold between components.

    Raises:
        ConfigError: two parts of the configuration contradict each other.
    """
    stream, model = config.pretrain.stream, config.model
    if stream.packs_per_step % config.cluster.num_workers:
        raise ConfigError(
            "pretrain.stream.packs_per_step must be a multiple of cluster.num_workers "
            f"({config.cluster.num_workers}), got {stream.packs_per_step}"
        )
    if stream.crop_vox is not None and any(
        size % patch for size, patch in zip(stream.crop_vox, model.patch_vox, strict=True)
    ):
        raise ConfigError(
            f"pretrain.stream.crop_vox must be whole patches of model.patch_vox {model.patch_vox}, "
            f"got {stream.crop_vox}"
        )
    if stream.labels:
        raise ConfigError("pretrain.stream.labels must be false: pretraining uses no labels")
    if config.scan.faces == "allow" and config.shard.faces == "refuse":
        raise ConfigError(
            "scan.faces=allow takes volumes with a face into the manifest and shard.faces=refuse "
            "leaves them out again; set shard.faces=allow too"
        )
    if config.masking.target_fraction < 1 and model.decoder == "joint":
        raise ConfigError(
            "masking.target_fraction below 1 needs model.decoder=cross, since the joint decoder "
            f"sees every hidden token; got target_fraction {config.masking.target_fraction}"
        )
    for section, loop in (("pretrain", config.pretrain), ("finetune", config.finetune)):
        if 0 < loop.steps <= loop.optim.warmup_steps:
            raise ConfigError(
                f"{section}.optim.warmup_steps must be < {section}.steps ({loop.steps}), "
                f"got {loop.optim.warmup_steps}"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read_yaml(path: Path) -> Any:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if not path.is_file():
        raise ConfigError(f"reading the configuration: no file {path}")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    return values


def _read_word(word: str) -> Any:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return OmegaConf.from_dotlist([word])
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"command line {word!r}: not a YAML value: {reason}; close brackets and quotes"
        ) from error


def _merge(base: Any, values: Any, where: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_resolvers(OmegaConf.to_container(values, resolve=False), where)
    try:
        return OmegaConf.merge(base, values)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, where)) from error


def _refuse_resolvers(value: Any, where: str, key: str = "") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_resolvers(item, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_resolvers(item, where, f"{key}[{index}]")
    elif isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
        raise ConfigError(
            f"{where}: {key}: resolvers such as ${{oc.env:NAME}} are not allowed, got {value!r}; "
            "write the value, or refer to another key as ${section.key}"
        )


def _to_object(merged: Any, where: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, where)) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _explain(error: Exception, where: str) -> str:
    """One line from an OmegaConf error: place, key, what is wrong, nearest name."""
    from omegaconf.errors import ConfigKeyError

    key = getattr(error, "full_key", None) or getattr(error, "key", None) or ""
    owner = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and is_dataclass(owner):
        names = [f.name for f in fields(owner)]
        prefix, _, last = str(key).rpartition(".")
        near = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
        dotted = f"{prefix}.{near[0]}" if near and prefix else (near[0] if near else "")
        hint = f"did you mean {dotted!r}?" if near else f"known keys: {', '.join(names)}"
        return f"{where}: unknown key {str(key)!r}; {hint}"
    reason = str(error).splitlines()[0]
    return f"{where}: {key}: {reason}" if key else f"{where}: {reason}"
