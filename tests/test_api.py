"""The public API: numpy in, numpy out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ilqr_vae
from feeder import Feeder, bin_, open_
from ilqr_vae.api import TrainedModel
from ilqr_vae.artifact import Artifact, GroupSpec, Manifest, ModelSpec
from ilqr_vae.errors import ConfigError, ShapeError
from ilqr_vae.protocol import messages
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig
from rig import make_model, serving
from small import draw_data, kalman
from small import make_model as generative
from test_clients_import import ENGINE, run

UNITS = tuple(f"u{i}" for i in range(7))
DOCS = Path(__file__).parent.parent / "docs"


def drawn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).poisson(0.7, (*shape, 7))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("api") / "m.safetensors", n_units=7, names=UNITS)


@pytest.fixture(scope="module")
def model(path: Path) -> TrainedModel:
    return ilqr_vae.load(path)


def linear_gaussian() -> TrainedModel:
    made = generative("linear", n=3, m=2, units=5, spikes="gaussian")
    manifest = Manifest(
        bin_width=0.05,
        unit_names=tuple(f"u{i}" for i in range(5)),
        data=RecordingSpec(),
        horizon=HorizonConfig(horizon=4, iterations=6),
        model=ModelSpec(
            dynamics="linear",
            latents=3,
            inputs=2,
            groups={"spikes": GroupSpec(family="gaussian", channels=5)},
        ),
    )
    return TrainedModel(Artifact(manifest, made, None, torch.ones(5, dtype=torch.float64)))


# ---- what is exported ---------------------------------------------------------------------------


def test_the_names_exported() -> None:
    assert ilqr_vae.__all__ == [
        "IlqrVaeError",
        "Inference",
        "Recording",
        "Samples",
        "Stream",
        "StreamAnswer",
        "TrainedModel",
        "load",
        "load_recording",
        "plots",
        "train",
    ]
    for name in ilqr_vae.__all__:
        assert getattr(ilqr_vae, name).__name__.removeprefix("ilqr_vae.") == name
    assert set(ilqr_vae.__all__) <= set(dir(ilqr_vae))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ilqr_vae.lode  # pyright: ignore[reportAttributeAccessIssue]


def test_what_needs_no_torch_loads_without_it() -> None:
    done = run(ENGINE, "import ilqr_vae\nfrom ilqr_vae import Inference, load_recording, Recording")
    assert done.returncode == 0, done.stderr


def test_a_model_says_what_it_is(model: TrainedModel) -> None:
    assert (model.unit_names, model.bin_width, model.latents, model.inputs) == (UNITS, 0.05, 4, 2)
    assert (model.kinematic_names, model.kinematic_units) == (("vx", "vy"), ("m/s", "m/s"))
    said = "<TrainedModel m.safetensors: 7 units, 50 ms bins, mgu2 with 4 latents and 2 inputs; "
    assert repr(model) == said + "decodes vx (m/s), vy (m/s); no scores>"


# ---- inference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32, np.float64, bool])
def test_any_numeric_dtype(model: TrainedModel, dtype: Any) -> None:
    counts = np.minimum(drawn(9), 1)
    one, other = model.infer(counts), model.infer(counts.astype(dtype))
    for name in ("latents", "covariance", "inputs", "rates", "kinematics", "kinematics_std"):
        assert getattr(one, name).dtype == np.float64
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    a, b = model.stream().step(counts[0]), model.stream().step(counts[0].astype(dtype))
    assert np.array_equal(a.latents, b.latents)


def test_shapes_are_as_documented(model: TrainedModel) -> None:
    r = model.infer(drawn(2, 9))
    shapes = {
        "latents": (2, 9, 4),
        "latents_std": (2, 9, 4),
        "covariance": (2, 9, 4, 4),
        "inputs": (2, 9, 2),
        "inputs_std": (2, 9, 2),
        "rates": (2, 9, 7),
        "rates_std": (2, 9, 7),
        "kinematics": (2, 9, 2),
        "kinematics_std": (2, 9, 2),
        "initial": (2, 4),
        "counts": (2, 9, 7),
        "mask": (2, 9, 7),
    }
    assert {name: getattr(r, name).shape for name in shapes} == shapes
    assert r.status.tolist() == ["converged"] * 2
    assert repr(r).startswith("Inference(latents (2, 9, 4), covariance (2, 9, 4, 4), inputs (2, 9")
    one = model.infer(drawn(9))
    assert {name: getattr(one, name).shape for name in shapes} == {
        name: shape[1:] for name, shape in shapes.items()
    }
    assert (one.status, len(one)) == ("converged", 9)
    draws = model.sample(r, 5)
    assert draws.latents.shape == (5, 2, 9, 4)
    assert (draws.inputs.shape, draws.counts.shape) == ((5, 2, 9, 2), (5, 2, 9, 7))
    assert model.sample(one, 5).rates.shape == (5, 9, 7)
    assert model.forecast(r, bins=3).covariance.shape == (2, 3, 4, 4)
    assert model.forecast(one, bins=3).kinematics.shape == (3, 2)


def test_a_batch_is_a_loop(model: TrainedModel) -> None:
    trials = [drawn(T, seed=T) for T in (12, 5, 70)]  # longer than a chunk, too
    masks = [np.random.default_rng(T).random((T, 7)) > 0.2 for T in (12, 5, 70)]
    together = model.infer(trials, masks)
    assert [len(r) for r in together] == [12, 5, 70]
    for r, y, m in zip(together, trials, masks, strict=True):
        alone = model.infer(y, m)
        for name in ("latents", "covariance", "inputs", "rates", "kinematics", "rates_std"):
            mine, theirs = getattr(r, name), getattr(alone, name)
            assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-5), name
    batch = model.infer(np.stack([y[:5] for y in trials]))
    for i, y in enumerate(trials):
        assert np.allclose(batch.trial(i).latents, model.infer(y[:5]).latents, atol=1e-5)
    ahead = model.forecast(together, 4)
    assert [len(r) for r in ahead] == [4, 4, 4]
    assert np.allclose(ahead[1].latents, model.forecast(together[1], 4).latents)
    assert [s.latents.shape[1] for s in model.sample(together, 2)] == [12, 5, 70]


def test_linear_gaussian_inference_is_the_rts_smoother() -> None:
    model = linear_gaussian()
    generative_model = model.artifact.model
    data = draw_data(generative_model, 1, 30, missing=0.2)["spikes"]
    y, mask = data.values[0].numpy(), data.mask[0].numpy()
    exact = kalman(generative_model, data.values[0], data.mask[0])
    r = model.infer(np.where(mask > 0, y, np.nan), mask)
    np.testing.assert_allclose(r.latents, exact.smoothed[1:], atol=1e-8)
    np.testing.assert_allclose(r.initial, exact.smoothed[0], atol=1e-8)
    np.testing.assert_allclose(r.covariance, exact.smoothed_cov[1:], atol=1e-8)
    spikes = generative_model.group("spikes")
    C = spikes.C.detach().numpy()
    np.testing.assert_allclose(r.rates_std**2, np.einsum("ki,tij,kj->tk", C, r.covariance, C))

    stream, causal = model.stream(), []
    for t in range(30):
        causal.append(stream.step(np.where(mask[t] > 0, y[t], np.nan), mask[t]))
    np.testing.assert_allclose([a.latents for a in causal], exact.filtered, atol=1e-8)
    np.testing.assert_allclose([a.covariance for a in causal], exact.filtered_cov, atol=1e-8)

    # what comes after the trial: the filter's prediction
    A, B = (x.detach().numpy() for x in generative_model.dynamics.weights())
    noise = B @ np.diag(np.exp(2 * generative_model.prior.log_scale.detach().numpy())) @ B.T
    mean, cov = exact.filtered[-1].numpy(), exact.filtered_cov[-1].numpy()
    ahead = model.forecast(r, bins=5)
    for k in range(5):
        mean, cov = A @ mean, A @ cov @ A.T + noise
        np.testing.assert_allclose(ahead.latents[k], mean, atol=1e-8)
        np.testing.assert_allclose(ahead.covariance[k], cov, atol=1e-8)

    draws = model.sample(r, 4000, seed=1)
    error = draws.latents.mean(0) - r.latents
    assert float(np.abs(error / r.latents_std).max()) < 5 / np.sqrt(4000)
    assert np.array_equal(draws.latents, model.sample(r, 4000, seed=1).latents)
    assert not np.array_equal(draws.latents, model.sample(r, 4000, seed=2).latents)


def test_missing_bins_and_units_say_less(model: TrainedModel) -> None:
    counts = drawn(20)
    bins = np.ones(20, dtype=bool)
    bins[8:12] = False
    whole, gap = model.infer(counts), model.infer(counts, bins)
    assert (gap.latents_std[8:12] ** 2).sum() > (whole.latents_std[8:12] ** 2).sum()
    unreadable = counts.astype(float)
    unreadable[8:12] = np.nan  # where nothing was observed any number may stand
    assert np.array_equal(model.infer(unreadable, bins).latents, gap.latents)
    stream = model.stream()
    stream.step(counts[0])
    missing = stream.step(None)
    assert (missing.index, missing.bits, stream.index) == (1, 0.0, 2)


def test_a_stream_is_what_the_service_streams(model: TrainedModel, path: Path) -> None:
    counts = drawn(25)
    stream = model.stream()
    own = [stream.step(y) for y in counts]
    with serving(path) as service, Feeder(service.ingest, service.results) as feeder:
        feeder.subscribe("s")
        feeder.ask(open_("s", units=UNITS), messages.Opened)
        feeder.send(*(bin_("s", i, x) for i, x in enumerate(counts)))
        served = feeder.results(len(counts))
    for mine, theirs in zip(own, served, strict=True):
        assert mine.index == theirs.index
        for one, other in (
            (mine.latents, theirs.latent),
            (mine.latents_std, theirs.latent_std),
            (mine.rates, theirs.rates),
            (mine.kinematics, theirs.kinematics),
            (mine.kinematics_std, theirs.kinematics_std),
        ):
            assert one.tobytes() == messages.unpack(other, "result").tobytes()
        assert (mine.bits, mine.iterations) == (theirs.bits, theirs.iterations)
    stream.reset()
    assert np.array_equal(stream.step(counts[0]).latents, own[0].latents)


@pytest.mark.parametrize(
    ("counts", "mask", "said"),
    [
        (
            np.ones((7, 9)),
            None,
            r"counts: expected \(bins, 7\) or \(trials, bins, 7\), the model's",
        ),
        (np.ones(7), None, r"units being u0, u1, u2, \.\.\., got shape \(7,\)"),
        (np.ones((0, 7)), None, r"got shape \(0, 7\)"),
        ([np.ones((3, 7)), np.ones((3, 6))], None, r"counts\[1\]: expected \(bins, 7\)"),
        ([], None, "at least one trial"),
        (
            np.full((3, 7), -1),
            None,
            r"whole numbers from 0 to 65535.*got -1 of unit 'u0' at \(0, 0\)",
        ),
        (np.full((3, 7), 0.5), None, "got 0.5"),
        (np.full((3, 7), np.nan), None, "got nan"),
        (np.full((3, 7), 70_000), None, "got 70000"),
        (np.full((3, 7), "a"), None, "counts: expected an array of numbers, got dtype <U1"),
        (np.full((3, 7), 1j), None, "got dtype complex128"),
        (np.ones((3, 7)), np.ones((2, 7)), r"mask: expected shape \(3, 7\) or \(3,\), got shape"),
    ],
)
def test_wrong_counts_are_named(model: TrainedModel, counts: Any, mask: Any, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        model.infer(counts, mask)


def test_other_wrong_arguments_are_named(model: TrainedModel) -> None:
    r = model.infer(drawn(5))
    with pytest.raises(ShapeError, match="bins: expected at least 1"):
        model.forecast(r, 0)
    with pytest.raises(ShapeError, match="samples: expected at least 1"):
        model.sample(r, 0)
    with pytest.raises(ShapeError, match=r"counts: expected \(7\), the model's units"):
        model.stream().step(np.ones((1, 7)))
    with pytest.raises(ConfigError, match="horizon"):
        model.stream(horizon=0)
