"""The configuration: merging, refusals that name the key, and rules across components."""

import subprocess
import sys
from pathlib import Path

import pytest

from anycontrast.training.config import (
    Config,
    ConfigError,
    config_from_dict,
    config_to_dict,
    config_to_record,
    load_config,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml", "name: run1\nmodel: {preset: tiny, patch_vox: [8, 8, 8]}\nseed: 7\n"
    )
    config = load_config(path, ["model.preset=small", "pretrain.stream.flip_axes=[0, 1]"])
    assert (config.name, config.seed, config.model.preset) == ("run1", 7, "small")
    assert config.model.patch_vox == (8, 8, 8)
    assert config.pretrain.stream.flip_axes == [0, 1]
    assert config.pretrain.log_every == Config().pretrain.log_every


def test_one_key_may_refer_to_another(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "pretrain: {steps: 5, log_every: '${pretrain.steps}'}\n")
    assert load_config(path).pretrain.log_every == 5


def test_paths_lie_in_one_run_folder() -> None:
    paths = load_config(None, ["root=/data/runs", "name=a-1"]).paths
    assert paths.run == Path("/data/runs/a-1")
    assert [getattr(paths, name) for name in ("shards", "pretrain", "release")] == [
        Path("/data/runs/a-1") / name for name in ("shards", "pretrain", "release")
    ]


def test_round_trip_through_json_values() -> None:
    import json

    config = load_config(None, ["pretrain.stream.crop_vox=[32, 32, 32]", "scan.contrasts=[FLAIR]"])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {preste: tiny}", ["model.preste", "did you mean 'model.preset'", "a.yaml"]),
        ("pretrain: {optim: {lrr: 1}}", ["pretrain.optim.lrr", "'pretrain.optim.lr'", "a.yaml"]),
        ("nmae: x", ["'nmae'", "did you mean 'name'", "a.yaml"]),
        ("zzzzzz: x", ["'zzzzzz'", "known keys", "a.yaml"]),
        ("pretrain: {steps: many}", ["pretrain.steps", "many", "a.yaml"]),
        ("model: {preset: enormous}", ["model.preset", "enormous", "tiny", "a.yaml"]),
        ("pretrain: {optim: {lr: -1}}", ["optim.lr", "-1", "a.yaml"]),
        ("name: ../elsewhere", ["name", "elsewhere", "a.yaml"]),
        ("name: ${oc.env:HOME}", ["name", "resolvers", "a.yaml"]),
        ("scan: {contrasts: ['${oc.env:HOME}']}", ["scan.contrasts", "resolvers", "a.yaml"]),
        ("scan: {root: '${oc.decode:${oc.env:HOME}}'}", ["scan.root", "resolvers"]),
        ("a: [1, 2", ["a.yaml", "not valid YAML"]),
        ("- 1\n- 2", ["a.yaml", "key: value"]),
        ("just words", ["a.yaml"]),
        ("name: !!python/object/apply:os.system ['true']", ["a.yaml", "not valid YAML"]),
        ("model: 3", ["a.yaml"]),
        ("seed: ${nothing}", ["seed"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_does_not_learn_where_anything_lies() -> None:
    import json

    words = ["root=/secret/runs", "scan.source=folder", "scan.root=/secret/data"]
    words += ["scan.table=/secret/t.csv", "scan.pseudonym_key_file=/secret/key"]
    words += ["cluster.address=ray://secret:1", "cluster.storage=s3://secret/x", "seed=7"]
    words += ["pull.cache=/secret/cache", "predict.table=/secret/t.csv", "scan.split_salt=secret"]
    record = config_to_record(load_config(None, words))
    assert "secret" not in json.dumps(record)
    assert (record["seed"], record["scan"]["source"]) == (7, "folder")


@pytest.mark.parametrize(
    "word",
    [
        "model.preste=tiny",
        "name=${oc.env:HOME}",
        "tiny",
        "seed=x",
        "model.patch_vox=[8,8",
        "evaluate.contrasts=[Flare]",
        "finetune.segmenter.contrasts=[Flare]",
    ],
)
def test_a_mistake_on_the_command_line_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match="command line") as caught:
        load_config(None, [word])
    key, _, value = word.partition("=")
    assert key in str(caught.value) or value.strip("[]") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["cluster.num_workers=2", "pretrain.stream.packs_per_step=1"], "packs_per_step"),
        (["pretrain.stream.crop_vox=[30, 32, 32]"], "crop_vox"),
        (["pretrain.stream.labels=true"], "labels"),
        (["masking.target_fraction=0.5"], "target_fraction"),
        (["scan.faces=allow"], r"shard\.faces=allow"),
        (["pretrain.steps=5", "pretrain.optim.warmup_steps=5"], r"pretrain\.optim\.warmup_steps"),
        (["finetune.steps=5", "finetune.optim.warmup_steps=5"], r"finetune\.optim\.warmup_steps"),
        (["finetune.steps=50"], r"finetune\.optim\.warmup_steps must be < finetune\.steps \(50\)"),
        (["cluster.mode=process", "cluster.num_workers=2"], "num_workers"),
        (["pretrain.engine.zero_stage=0", "pretrain.engine.offload_optimizer=true"], "offload"),
        (["pretrain.engine.zero_stage=4"], "zero_stage"),
        (["pretrain.steps=0", "pretrain.epochs=0"], "epochs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_contradictions_are_refused(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config(None, words)


def test_reading_a_configuration_loads_no_training_stack() -> None:
    code = (
        "import sys, anycontrast.training.config as c; c.load_config(None, []);"
        "heavy = {'ray', 'deepspeed', 'monai', 'webdataset', 'matplotlib', 'tensorboard'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
