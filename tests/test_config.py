"""The training configuration: overrides only, and an error names what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ilqr_training.config import TrainConfig, check, load_config
from ilqr_vae.errors import ConfigError
from tiny import config, write_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("")
    assert load_config(path) == TrainConfig() == check(TrainConfig())


def test_overrides_replace_only_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[training]\nsteps = 7\n[data.split]\ntrain = 0.5\n")
    made = load_config(path)
    assert (made.training.steps, made.training.batch) == (7, TrainConfig().training.batch)
    assert (made.data.split.train, made.data.split.validation) == (0.5, 0.75)


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path / "c.toml", config())) == config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_training_configurations_shipped_are_valid(path: Path) -> None:
    if path.stem == "service":
        with pytest.raises(ConfigError, match="ingest"):
            load_config(path)  # the service's, not the trainer's
    else:
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latents = 3", r"config c\.toml: latents: expected one of the keys data, model, "),
        ("[model]\nlatentz = 3", r"model\.latentz: expected one of the keys .*latents, inputs, "),
        ("[data.mat]\nspike = 's'", r"data\.mat\.spike: expected one of the keys spikes, "),
        ("[trainnig]\nsteps = 3", r"config c\.toml: trainnig: expected one of the keys data, "),
        ("[estimator]\nH = 3", r"estimator\.H: expected one of the keys horizon, "),
    ],
)
def test_unknown_keys_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\nlatents = 3.5", r"model\.latents: expected int, got float"),
        ("[model]\nlatents = '3'", r"model\.latents: expected int, got str"),
        ("[model]\ndynamics = 'lstm'", r"model\.dynamics: expected one of .*mgu2.*, got 'lstm'"),
        ("[training]\nexact_gradient = 1", r"training\.exact_gradient: expected bool, got int"),
        (
            "[training]\ndtype = 'float16'",
            r"training\.dtype: expected one of float32, float64, got 'float16'",
        ),
        ("[readout]\nalphas = [1.0, 'x']", r"readout\.alphas: expected float, got str"),
        ("data = 3", r"data: expected object, got int"),
        ("[data.mat]\nspikes_axes = 'bins'", r"data\.mat\.spikes_axes: expected one of "),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{said}.*c\.toml"):
        load_config(path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("model", key, v) for key in ("latents", "inputs") for v in (0, -1)),
        ("model", "forget_bias", "nan"),
        *(("training", k, v) for k in ("steps", "batch", "chunk", "iterations") for v in (0, -2)),
        *(
            ("training", key, v)
            for key in ("learning_rate", "decay", "clip", "tolerance")
            for v in (0.0, -0.1, "nan", "inf")
        ),
        ("training", "kinematic_weight", -1.0),
        ("training", "kinematic_weight", "nan"),
        ("training", "kl_warmup", -1),
        ("training", "validate_every", -1),
        ("training", "patience", -1),
        ("training", "seed", -1),
        ("training", "seed", 2**63),
        *(("estimator", key, 0) for key in ("horizon", "iterations")),
        ("estimator", "tolerance", -1e-9),
        ("estimator", "tolerance", "nan"),
        ("readout", "lags", -1),
        ("readout", "alphas", []),
        ("readout", "alphas", [1.0, 0.0]),
        ("readout", "alphas", [1.0, -1.0]),
        *(("data", "bin_width", v) for v in (0.0, -0.05, "nan", "inf")),
        ("data", "min_rate", -0.1),
        ("data", "min_rate", "nan"),
        *(("data", "lag", v) for v in ("nan", "inf")),
        ("data.trials", "window", "[0.0, inf]"),
        *(("data.nwb", "rate", v) for v in (-1.0, "nan")),
    ],
)
def test_impossible_values_are_named(tmp_path: Path, section: str, key: str, value: object) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[{section}]\n{key} = {value}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.field == f"{section}.{key}"
    assert caught.value.expected
    assert str(caught.value.got)


@pytest.mark.parametrize(
    "split", ["train = 0.0", "train = 0.8", "validation = 1.5", "train = nan", "validation = 0.6"]
)
def test_an_impossible_split_is_named(tmp_path: Path, split: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[data.split]\n{split}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.field.startswith("data.split.")


@pytest.mark.parametrize("content", [b"[model", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config c.toml: expected a readable TOML file"):
        load_config(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match="a readable TOML file"):
            load_config(path)
