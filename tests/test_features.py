"""Continuous features beside counts: read, trained on, streamed, and what must not disturb them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from scipy import io

import ilqr_vae
from feeder import Feeder, open_
from ilqr_clients.sdk import ServiceClient, model_of
from ilqr_service.journal.verify import Comparison, verify
from ilqr_service.sessions.checks import check_bin
from ilqr_service.solving.run import pack_work, unpack_work
from ilqr_service.work import EngineInfo, Solve
from ilqr_training.evaluation.cosmoothing import held_out_units
from ilqr_training.fit.crops import prepare
from ilqr_training.readout.causal import causal_pass
from ilqr_vae.artifact import SCHEMA, load_artifact
from ilqr_vae.cli import main
from ilqr_vae.errors import ProtocolError, RecordingError, ShapeError
from ilqr_vae.model.likelihoods import CountsAndFeatures, Gaussian, Observed, Poisson
from ilqr_vae.protocol import messages
from ilqr_vae.recordings import Recording, load_recording
from ilqr_vae.recordings.nwb.write import BehaviourSeries, TrialTable, write_nwb
from ilqr_vae.streaming.horizon import MovingHorizon
from rig import N_BINS, serving, spec, write_recording
from tiny import config, fit

UNITS, FEATURES = 5, 2
SCALE = np.array([3e-6, 40.0])
CENTRE = np.array([2e-5, -1000.0])


def _write(path: Path) -> Path:
    """``rig.write_recording`` with two features of the velocity, a stretch of one missing."""
    write_recording(path, n_units=UNITS)
    content = {k: v for k, v in io.loadmat(path).items() if not k.startswith("__")}
    noise = np.random.default_rng(1).normal(size=(FEATURES, N_BINS))
    sbp = CENTRE[:, None] + SCALE[:, None] * (5 * content["velocity"] + 0.2 * noise)
    sbp[1, 40:60] = np.nan
    io.savemat(path, content | {"sbp": sbp})
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("features") / "day.mat")


@pytest.fixture(scope="module")
def model_path(recording: Path) -> Path:
    settings = config(data=msgspec.structs.replace(spec(), features=("sbp",)))
    fit(recording, out := recording.with_name("model.safetensors"), settings)
    return out


@pytest.fixture(scope="module")
def read(recording: Path) -> Recording:
    return load_recording(recording, spec(), features=("sbp",))


def test_features_are_read_as_the_last_channels_and_missing_ones_are_not_observed(
    read: Recording,
) -> None:
    assert read.unit_names[-FEATURES:] == ("sbp0", "sbp1")
    assert (read.features, read.n_units) == (FEATURES, UNITS + FEATURES)
    assert read.mask()[:, -1].tolist() == [not 40 <= t < 60 for t in range(N_BINS)]
    assert read.counts[0, -1] == pytest.approx(CENTRE[1], abs=10 * SCALE[1])
    counted = read.without_features()
    assert (counted.features, counted.counts.dtype) == (0, np.uint16)
    with pytest.raises(RecordingError, match="features after all units"):
        read.select_units(("sbp0", "unit0"))


def test_series_of_an_nwb_file_are_averaged_in_bins_and_in_trials(tmp_path: Path) -> None:
    t = np.arange(0, 20, 0.01)
    sbp = np.stack([np.cos(t), 5 + t], axis=1)
    sbp[500:520] = np.nan
    kinds = {"hand_velocity": np.stack([np.cos(t), np.sin(t)], axis=1), "sbp": sbp}
    series = [
        BehaviourSeries(name=name, values=values, unit="n.a.", rate=100.0, channels=(name[0], "c"))
        for name, values in kinds.items()
    ]
    spikes = [np.sort(np.random.default_rng(0).uniform(0, 20, 400))]
    trials = TrialTable([1.0, 5.0, 9.0], [3.0, 7.0, 11.0])
    path = write_nwb(tmp_path / "f.nwb", spikes, series=series[1:], trials=trials)
    read = load_recording(path, features=("sbp",))
    assert (read.unit_names, read.features, read.kinematics) == (("unit0", "s", "c"), 2, None)
    assert read.counts[2, 1:] == pytest.approx(sbp[10:15].mean(0))
    assert np.flatnonzero(~read.mask()[:, 1]).tolist() == [100, 101, 102, 103]
    cut = load_recording(path, features=("sbp",), mode="trials")
    assert cut.counts[39, 1:] == pytest.approx(sbp[295:300].mean(0))  # the last of the first trial
    assert np.flatnonzero(~cut.mask()[:, 2]).tolist() == [40, 41, 42, 43]
    with pytest.raises(RecordingError, match=r"a sample in each bin of 0.005 s"):
        load_recording(path, features=("sbp",), bin_width=0.005)
    path = write_nwb(tmp_path / "g.nwb", spikes, series=series)
    assert load_recording(path, features=("sbp",)).kinematic_names == ("h", "c")
    with pytest.raises(RecordingError, match=r"features.*'s' twice"):
        load_recording(path, features=("sbp", "sbp"))


def test_a_feature_that_never_varies_is_left_out(read: Recording) -> None:
    counts = read.counts.copy()
    counts[:, -1] = 5.0
    still = Recording(
        counts=counts, bin_width=read.bin_width, unit_names=read.unit_names, features=FEATURES
    )
    kept = prepare(still, spec(), chunk=10).recording
    assert (kept.features, kept.unit_names[-1]) == (1, "sbp0")


def test_the_likelihood_is_that_of_its_parts() -> None:
    torch.manual_seed(0)
    mixed = CountsAndFeatures(Poisson(3, 4), Gaussian(3, 2)).double()
    z, values = torch.randn(2, 6, 3).double(), torch.poisson(torch.ones(2, 6, 6)).double()
    o = Observed(values, (torch.rand(2, 6, 6) > 0.2).double())
    total = torch.zeros(())
    for part, own in ((mixed.counts, slice(0, 4)), (mixed.gaussian, slice(4, 6))):
        total = total + part.log_prob(z, Observed(o.values[..., own], o.mask[..., own]))
    assert torch.allclose(mixed.log_prob(z, o), total)
    z.requires_grad_(True)
    (slope,) = torch.autograd.grad(-mixed.log_prob(z, o).sum(), z)
    assert torch.allclose(mixed.quadratise(z.detach(), o)[0], slope)


def test_a_trained_model_states_its_features_and_knows_their_scale(model_path: Path) -> None:
    artifact = load_artifact(model_path)
    assert (artifact.manifest.schema, artifact.manifest.features) == (SCHEMA, ("sbp0", "sbp1"))
    spikes = artifact.model.group("spikes")
    assert isinstance(spikes, CountsAndFeatures)
    assert spikes.centre.numpy() == pytest.approx(CENTRE, rel=0.1)
    assert artifact.manifest.scores["r2"] > 0.8  # 0.41 from the counts alone


def test_compiled_and_torch_stream_the_same(model_path: Path, read: Recording) -> None:
    estimator = load_artifact(model_path).estimator()
    assert isinstance(estimator, MovingHorizon)
    counts = torch.as_tensor(read.counts[:60]).unsqueeze(1)
    mask = torch.as_tensor(read.mask()[:60].astype(np.float64)).unsqueeze(1)
    assert estimator.compiled(estimator.mean_rate) is not None
    one = other = estimator.init(1)
    for y, m in zip(counts, mask, strict=True):
        one, fast = estimator.step(one, y, m)
        other, slow = estimator.step_reference(other, y, m)
        for name in ("z", "rates", "kinematics", "kinematics_std", "bits", "spikes"):
            a, b = getattr(fast, name), getattr(slow, name)
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert float(fast.spikes[0]) == float(y[0, :UNITS].sum())


def test_streaming_is_the_pass_that_scores_it_and_nan_is_a_mask(
    model_path: Path, read: Recording
) -> None:
    model = ilqr_vae.load(model_path)
    passed = causal_pass(model.artifact.estimator(), read, 0, 70)
    one, other = model.stream(), model.stream()
    answer = None
    for t in range(70):
        row = np.where(read.mask()[t], read.counts[t], np.nan)
        answer, same = one.step(row), other.step(read.counts[t], read.mask()[t])
        assert np.array_equal(answer.kinematics, passed.kinematics[t])
        assert np.array_equal(same.latents, answer.latents)
    smoothed, whole = model.infer(read.counts, read.mask()), model.infer(read)
    assert np.array_equal(smoothed.latents, whole.latents)
    assert smoothed.rates[:, -1] == pytest.approx(CENTRE[1], abs=30 * SCALE[1])
    # what it expects of a feature is in the recording's units
    assert answer is not None
    assert answer.rates[-1] == pytest.approx(CENTRE[1], abs=30 * SCALE[1])


@pytest.mark.parametrize("absurd", [0.0, 1e300, -1e300])
def test_an_absurd_feature_is_not_used_and_the_estimate_goes_on(
    model_path: Path, read: Recording, absurd: float
) -> None:
    estimator = load_artifact(model_path).estimator()
    one = other = estimator.init(1)
    for t in range(20):
        counts = torch.as_tensor(read.counts[t : t + 1])
        mask = torch.as_tensor(read.mask()[t : t + 1].astype(np.float64))
        changed, without = counts.clone(), mask.clone()
        if t in (8, 9):
            changed[0, -1], without[0, -1] = absurd, 0.0  # the feature lies around -1000
        one, answer = estimator.step(one, changed, mask)
        other, expected = estimator.step(other, counts, without)
        assert int(answer.ignored[0]) == (t in (8, 9))
        assert torch.equal(answer.z, expected.z)
        assert torch.equal(answer.kinematics, expected.kinematics)


def test_what_is_no_feature_is_refused(model_path: Path, recording: Path, read: Recording) -> None:
    stream, row = ilqr_vae.load(model_path).stream(), read.counts[0].copy()
    with pytest.raises(ShapeError, match=r"expected \(7\)"):
        stream.step(row[:UNITS])
    row[-1] = np.inf
    with pytest.raises(ShapeError, match=r"finite numbers.* of unit 'sbp1'"):
        stream.step(row)
    with pytest.raises(ShapeError, match=r"whole numbers.* of unit 'unit0'"):
        stream.step(read.counts[0] + 0.5)
    with pytest.raises(RecordingError, match=r"data.features\[0\]"):
        load_recording(recording, spec(), features=("spb",))
    with pytest.raises(RecordingError, match=r"features.*none for co-smoothing"):
        held_out_units(read, 0.2, 0)


# ---- through the service -----------------------------------------------------------------------


def test_the_service_answers_what_the_library_does_and_its_journal_gives_the_same_bits(
    model_path: Path, read: Recording, tmp_path: Path
) -> None:
    stream = ilqr_vae.load(model_path).stream()
    counts, mask = read.counts[:50].copy(), read.mask()[:50]
    counts[30, -1] = 1e6  # absurd
    with (
        serving(model_path, journal=str(tmp_path), snapshot_every=8, keep_warm_ms=0) as service,
        ServiceClient(service.ingest) as client,
    ):
        model = model_of(client.describe())
        assert (model.features, len(model.counted)) == (("sbp0", "sbp1"), UNITS)
        options: dict[str, Any] = {"units": model.unit_names, "bin_width": model.bin_width}
        with client.open("s", deadline=60.0, hear_details=True, watch_units=True, **options) as s:
            assert s.opened.features == model.features
            for t, (y, m) in enumerate(zip(counts, mask, strict=True)):
                features: NDArray[Any] | None = np.where(m, y, np.nan)[UNITS:]
                if t == 20:
                    features = None
                    m[UNITS:] = False
                answer = s.step(t, y[:UNITS], features=features, timeout=60.0)
                same = stream.step(y, m)
                assert np.array_equal(answer.latent, same.latents), t
                assert np.array_equal(answer.kinematics, same.kinematics), t
                assert np.array_equal(answer.rates, same.rates), t
                assert (answer.bits, answer.spikes) == (same.bits, y[:UNITS].sum()), t
                assert answer.ignored == (("sbp1",) if t == 30 else ()), t
                detail = s.details[-1]
                assert detail.counts is not None
                assert detail.features is not None
                assert messages.unpack(detail.counts, "counts").tolist() == y[:UNITS].tolist()
                kept = np.where(m, y, 0.0)[UNITS:] if t != 20 else np.zeros(FEATURES)
                assert messages.unpack(detail.features, "features").tolist() == kept.tolist()
            assert any(n.startswith("feature sbp1 ignored from bin 30") for n in s.notices)
            # of a row of both, as a recording has them
            assert s.step(50, read.counts[50], mask=read.mask()[50], timeout=60.0).status == "ok"
            for wrong in ([1.0], [1.0, np.inf], ["1", "2"]):
                with pytest.raises(ShapeError, match="features"):
                    s.send(51, counts[0, :UNITS], features=wrong)
            with pytest.raises(ShapeError, match="counts"):
                s.send(51, counts[0, :UNITS] + 0.5)
            s.step(52, read.counts[52], mask=read.mask()[52], timeout=60.0)
            s.send(51, read.counts[51], mask=read.mask()[51])  # late
            last = s.step(53, read.counts[53], mask=read.mask()[53], timeout=60.0)
            stream.step(read.counts[50], read.mask()[50])
            for t in (51, 52):
                stream.step(read.counts[t], read.mask()[t])
            same = stream.step(read.counts[53], read.mask()[53])
            assert np.allclose(last.latent, same.latents, rtol=0.0, atol=0.05)
    assert verify(tmp_path, [model_path]) == Comparison(1, 54, 54)


def test_it_is_replayed_and_bins_that_are_not_the_models_are_refused(
    model_path: Path, recording: Path, read: Recording, tmp_path: Path
) -> None:
    counts = messages.pack(read.counts[0, :UNITS], "<u2")
    about = {"units": read.unit_names, "bin_width_ns": 50_000_000}

    def bin_of(index: int, **changes: Any) -> messages.Bin:
        return messages.Bin(session="w", index=index, source_ns=index, counts=counts, **changes)

    def pack(*values: float) -> messages.Array:
        return messages.pack(np.array(values), "<f8")

    with (
        serving(model_path, keep_warm_ms=0) as service,
        Feeder(service.ingest, service.results) as feeder,
    ):
        out = tmp_path / "replay.json"
        to = ["--to", service.ingest, "--speed", "max", "--json", str(out)]
        assert main(["replay", str(recording), *to]) == 0
        scores = json.loads(out.read_text())["scores"]
        assert scores["iLQR-VAE"]["r2"] > 0.8 > scores["Wiener filter"]["r2"]  # of the counts alone
        refused = feeder.ask(open_("e", origin_ns=0, **about), messages.Refused)
        assert refused.field == "origin_ns"
        feeder.subscribe("w")
        assert feeder.ask(open_("w", **about), messages.Opened).features == ("sbp0", "sbp1")
        for wrong, field in (
            (bin_of(0, features=pack(1.0)), "features.shape"),
            (bin_of(0, features=pack(1.0, -np.inf)), "features"),
            (bin_of(0, mask=messages.pack(np.ones(UNITS), "u1")), "mask.shape"),
        ):
            assert feeder.ask(wrong, messages.Refused).field == field
        for k, dtype in enumerate(("<f4", "<u4")):
            features = messages.pack(np.array([0.0, 7.0]), dtype)
            feeder.send(bin_of(k, features=features))
        feeder.send(bin_of(2, features=pack(np.nan, -1000.0)), bin_of(3))
        assert [r.index for r in feeder.results(4)] == [0, 1, 2, 3]


def test_a_model_of_counts_refuses_features(read: Recording) -> None:
    about = EngineInfo("m", ("a", "b"), 50_000_000, 2, (), (), 4, 2)
    counts = messages.pack(np.array([1, 2]), "<u2")
    one = messages.Bin(session="s", index=0, source_ns=0, counts=counts)
    assert check_bin(one, about)[1] is None
    with pytest.raises(ProtocolError, match=r"features.*no features"):
        check_bin(replace(one, features=messages.pack(np.ones(1), "<f8")), about)
    # journals hold counts as before, and what is not whole as it is
    work = Solve(run=0, index=0, counts=np.array([1.0, 2.0]))
    packed = pack_work(work).counts
    assert packed is not None
    assert packed.dtype == "<u4"
    numbers = np.array([1.0, -2.5e-6, 3.0])
    again = unpack_work(pack_work(replace(work, counts=numbers)))
    assert isinstance(again, Solve)
    assert again.counts is not None
    assert np.array_equal(again.counts, numbers)
