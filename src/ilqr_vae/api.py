"""The library for notebooks: a trained model that takes numpy arrays and returns numpy arrays.

    >>> model = ilqr_vae.load("model.safetensors")
    >>> result = model.infer(counts)
    >>> result.latents.shape, result.rates.shape
    ((60, 4), (60, 7))

Notation: T bins, N units, n latents, m inputs, D kinematic channels, B trials. Results are float64.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ilqr_vae.arrays import Array, Inference, Samples, StreamAnswer, checked
from ilqr_vae.artifact import Artifact, load_artifact
from ilqr_vae.errors import ConfigError, ShapeError, number_of
from ilqr_vae.inference import prediction
from ilqr_vae.inference.problem import SolverConfig, Status
from ilqr_vae.model.intervals import stated
from ilqr_vae.model.likelihoods import Counts, Observed
from ilqr_vae.model.readout import read_window
from ilqr_vae.recordings import Recording
from ilqr_vae.streaming.state import Estimate, HorizonState

Trials = TypeVar("Trials", bound="Inference | Sequence[Inference]")

_SOLVER = SolverConfig(iterations=200, tolerance=1e-12)
_BINS_AT_ONCE = 1024  # bins whose windows are built at a time for the readout


class Stream:
    """A causal stream of bins through the estimator of the service; see ``TrainedModel.stream``.

    Attributes:
        index: index of the next bin.
    """

    def __init__(self, model: TrainedModel, artifact: Artifact, **settings: Any) -> None:
        self._model, self._estimator = model, artifact.estimator(**settings)
        self.reset()

    def reset(self) -> None:
        """Restart the stream."""
        self._state: HorizonState = self._estimator.init(1)
        self.index = 0

    def step(self, counts: ArrayLike | None, mask: ArrayLike | None = None) -> StreamAnswer:
        """Process one bin.

        Args:
            counts: (N,) spike counts and last the features, in the recording's units, NaN where
                missing; of any numeric dtype; None for a missing bin.
            mask: (N,), nonzero where a unit was observed; default: all units.

        Raises:
            ShapeError: counts or a mask that are not the model's.
        """
        if counts is None:
            counts = mask = np.zeros(len(self._model.unit_names))
        y, seen = self._model.checked(counts, mask, ndim=1)
        like = self._estimator.mean_rate
        y, seen = (torch.as_tensor(x[None]).to(like) for x in (y, seen))
        self._state, e = self._estimator.step(self._state, y, seen)
        self.index += 1
        return self._answer(e)

    def _answer(self, e: Estimate) -> StreamAnswer:
        names = ("rates", "kinematics", "kinematics_std")
        return StreamAnswer(
            index=self.index - 1,
            latents=_numpy(e.z[0]),
            covariance=_numpy(e.z_cov[0]),
            **{name: _numpy(getattr(e, name)[0]) for name in names},
            bits=float(e.bits[0]),
            iterations=int(e.iterations[0]),
            status=Status(int(e.status[0])).name.lower(),
        )


class TrainedModel:
    """A trained model; ``load`` and ``train`` return one.

    An ensemble has the latents, inputs and samples of its first member; rates and kinematics are
    means, whose deviations include the variance between members.

    Attributes:
        artifact: contents of the model file, for other parts of the library.
        members: members of an ensemble, each as a model; empty for a single model.
    """

    def __init__(self, artifact: Artifact, name: str = "") -> None:
        self.artifact, self._name = artifact, name
        self._spikes = artifact.model.group("spikes")
        self.members = tuple(TrainedModel(a) for a in artifact.members) if artifact.others else ()

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the N units, in the order of the counts, those of features last."""
        return self.artifact.manifest.unit_names

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The last F of ``unit_names``, which are continuous; none for a model of counts alone."""
        return self.artifact.manifest.features or ()

    @property
    def kinematic_names(self) -> tuple[str, ...]:
        """Names of the D kinematic channels; empty if the model decodes none."""
        return self.artifact.manifest.kinematic_names

    @property
    def kinematic_units(self) -> tuple[str, ...]:
        """Units of measure of the D kinematic channels."""
        return self.artifact.manifest.kinematic_units

    @property
    def bin_width(self) -> float:
        """Bin width in seconds."""
        return self.artifact.manifest.bin_width

    @property
    def latents(self) -> int:
        """Number of latents n."""
        return self.artifact.manifest.latents

    @property
    def inputs(self) -> int:
        """Number of inputs m."""
        return self.artifact.manifest.inputs

    @property
    def scores(self) -> dict[str, float]:
        """Causal scores on the validation part of the training recording, by name."""
        return dict(self.artifact.manifest.measured)

    def __repr__(self) -> str:
        m, spec = self.artifact.manifest, self.artifact.manifest.model
        decodes = ", ".join(
            f"{name} ({unit})"
            for name, unit in zip(m.kinematic_names, m.kinematic_units, strict=True)
        )
        measured = {k: v for k, v in m.measured.items() if k != "iterations"}
        of = f", {number_of(len(self.members), 'member')}" if self.members else ""
        scores = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        return (
            f"<TrainedModel {self._name or m.model_id}: {number_of(len(m.unit_names), 'unit')}, "
            f"{m.bin_width * 1e3:g} ms bins, {spec.dynamics} with {m.latents} latents and "
            f"{m.inputs} inputs{of}; decodes {decodes or 'nothing'}; {scores or 'no scores'}>"
        )

    def checked(
        self, counts: ArrayLike, mask: ArrayLike | None, *, ndim: int = 0, field: str = "counts"
    ) -> tuple[Array, Array]:
        """Return counts of this model's units and their mask as float64; see ``arrays.checked``."""
        whole, features = isinstance(self._spikes.parts[0], Counts), self._spikes.features
        about: dict[str, Any] = {"ndim": ndim, "field": field, "features": features}
        return checked(counts, mask, self.unit_names, whole=whole, **about)

    def _given(self, recording: Recording) -> tuple[Array, Array]:
        recording.require_bin_width(self.bin_width)
        ours = recording.select_units(self.unit_names)
        return ours.counts.astype(np.float64), ours.mask().astype(np.float64)

    @overload
    def infer(
        self, counts: Recording | NDArray[Any], mask: ArrayLike | None = None
    ) -> Inference: ...
    @overload
    def infer(
        self, counts: Sequence[ArrayLike], mask: Sequence[ArrayLike] | None = None
    ) -> list[Inference]: ...
    def infer(self, counts: Any, mask: Any = None) -> Inference | list[Inference]:
        """Infer the posterior of latents and inputs given whole trials (smoothed, not causal).

        Args:
            counts: counts and features, as for ``Stream.step``: (T, N); (B, T, N); a list of
                (T_b, N), trials of any lengths, solved together; or a recording.
            mask: zero where not observed; shape of the counts, or without the axis of units.

        Returns:
            An ``Inference``, or a list of them for a list.

        Raises:
            ShapeError: counts or a mask that are not the model's.
        """
        if isinstance(counts, Recording):
            y, seen = self._given(counts)
            return self._infer(y[None], seen[None]).trial(0)
        if isinstance(counts, list | tuple):
            masks = [None] * len(counts) if mask is None else list(mask)
            if not counts or len(masks) != len(counts):
                got = f"{len(counts)} trials, {len(masks)} masks"
                raise ShapeError("counts", expected="at least one trial, a mask each", got=got)
            pairs = enumerate(zip(counts, masks, strict=True))
            given = [self.checked(y, m, ndim=2, field=f"counts[{i}]") for i, (y, m) in pairs]
            return self._ragged(given)
        y, seen = self.checked(counts, mask)
        return self._infer(y, seen) if y.ndim == 3 else self._infer(y[None], seen[None]).trial(0)

    def _ragged(self, trials: list[tuple[Array, Array]]) -> list[Inference]:
        """Infer trials of different lengths as a masked batch, and cut off the padding."""
        lengths = [len(y) for y, _ in trials]
        shape = (len(trials), max(lengths), len(self.unit_names))
        counts, mask = np.zeros(shape), np.zeros(shape)
        for i, (y, seen) in enumerate(trials):
            counts[i, : len(y)], mask[i, : len(y)] = y, seen
        whole = self._infer(counts, mask)
        return [whole.trial(i).bins(slice(T)) for i, T in enumerate(lengths)]

    def _solve(
        self, counts: Array, mask: Array, start: tuple[Array, Array] | None, seed: int = 0
    ) -> prediction.Inferred:
        like = self.artifact.mean_rate
        y, seen = (torch.as_tensor(x).to(like) for x in (counts, mask))
        observed = {"spikes": Observed(self._spikes.standard(y), seen)}
        model = self.artifact.model
        generator = torch.Generator(like.device).manual_seed(seed)
        if start is not None:
            z0, u = (torch.as_tensor(x).to(like) for x in start)
            return prediction.infer(
                model, observed, solver=_SOLVER, start=(z0, u), generator=generator, check=False
            )
        chunk = self.artifact.manifest.config.get("training", {}).get("chunk", 40)
        return prediction.infer_long(
            model, observed, chunk=chunk, solver=_SOLVER, generator=generator, check=False
        )

    @torch.no_grad()
    def _infer(
        self, counts: Array, mask: Array, start: tuple[Array, Array] | None = None
    ) -> Inference:
        """Infer a batch (B, T, N) by this model; ``start`` is a warm start."""
        if self.members:
            return self._combined([member._infer(counts, mask) for member in self.members])
        found = self._solve(counts, mask, start)
        assert found.laplace is not None
        z, covariance = found.z[:, 1:], found.laplace.z_cov[:, 1:]
        a = (spikes := self._spikes).affine(z)
        spread = torch.einsum("ki,btij,kj->btk", spikes.C, covariance, spikes.C).clamp(min=0).sqrt()
        rates = torch.func.jvp(spikes.expected_values, (a,), (torch.ones_like(a),))
        kinematics, kinematics_std = self._decode(found, covariance, counts, mask)
        return Inference(
            latents=_numpy(z),
            covariance=_numpy(covariance),
            inputs=_numpy(found.u),
            inputs_std=_numpy(found.laplace.u_cov.diagonal(dim1=-2, dim2=-1).sqrt()),
            rates=_numpy(rates[0]),
            rates_std=_numpy(rates[1].abs() * spread),
            kinematics=kinematics,
            kinematics_std=kinematics_std,
            initial=_numpy(found.z[:, 0]),
            status=np.array([Status(int(s)).name.lower() for s in found.state.status]),
            counts=counts,
            mask=mask,
        )

    def _combined(self, members: list[Inference]) -> Inference:
        """Combine the posteriors of the members."""
        whole = Inference.of_members(members)
        std = stated(self.artifact.intervals, whole.kinematics, whole.kinematics_std)
        return replace(whole, kinematics_std=std)

    def _decode(
        self, found: prediction.Inferred, covariance: Tensor, counts: Array, mask: Array
    ) -> tuple[Array, Array]:
        """Apply the readout to smoothed latents; each bin reads the window that ends with it."""
        B, T, _ = counts.shape
        readout = self.artifact.readout
        if readout is None:
            return (none := np.zeros((B, T, 0))), none
        like, H = self.artifact.mean_rate, self.artifact.manifest.horizon.horizon
        y, seen = (torch.as_tensor(x).to(like) for x in (counts, mask))
        y, seen = self._spikes.standard(y), readout.believed(seen)
        expects = readout.expects(self._spikes)
        parts: list[tuple[Tensor, Tensor]] = []
        for a in range(0, T, _BINS_AT_ONCE):
            bins = torch.arange(a, min(T, a + _BINS_AT_ONCE), device=like.device)
            first = (bins + 1 - H).clamp(min=0)
            slots = first.unsqueeze(1) + torch.arange(H + 1, device=like.device)
            z, held = found.z[:, slots.clamp(max=T)], slots[:, :H].clamp(max=T - 1)
            x = read_window(
                readout.shape,
                (bins + 1 - first).repeat(B),
                z.flatten(0, 1),
                y[:, held].flatten(0, 1),
                seen[:, held].flatten(0, 1),
                expects.mean,
            )
            mean, std = readout(x.unflatten(0, (B, len(bins))), covariance[:, bins])
            parts.append((mean, stated(self.artifact.intervals, mean, std)))
        mean, std = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return _numpy(mean), _numpy(std)

    def forecast(self, inferred: Trials, bins: int) -> Trials:
        """Forecast the bins that follow a trial.

        Inputs are at the mean of their prior, whose covariance adds to that of the latents.

        Args:
            inferred: result of ``infer``; bins: number of bins.

        Returns:
            As ``infer``, for ``bins`` bins.

        Raises:
            ShapeError: fewer than one bin.
        """
        if bins < 1:
            raise ShapeError("bins", expected="at least 1", got=str(bins))
        if not isinstance(inferred, Inference):
            return [self.forecast(r, bins) for r in inferred]  # pyright: ignore[reportReturnType]
        if self.members:
            pairs = zip(self.members, inferred.members, strict=True)
            return self._combined([m.forecast(r, bins) for m, r in pairs])  # pyright: ignore[reportReturnType]
        r = inferred.batch()
        counts, mask, u = (
            np.concatenate([x, np.zeros((len(x), bins, x.shape[-1]))], 1)
            for x in (r.counts, r.mask, r.inputs)
        )
        after = self._infer(counts, mask, (r.initial, u)).bins(slice(-bins, None))
        return after if inferred.batched else after.trial(0)  # pyright: ignore[reportReturnType]

    @overload
    def sample(self, inferred: Inference, samples: int, seed: int = 0) -> Samples: ...
    @overload
    def sample(
        self, inferred: Sequence[Inference], samples: int, seed: int = 0
    ) -> list[Samples]: ...
    def sample(self, inferred: Any, samples: int, seed: int = 0) -> Samples | list[Samples]:
        """Draw from the posterior; for an ensemble, from that of the first member.

        Args:
            inferred: result of ``infer``; samples: K draws for each trial.
            seed: random seed.

        Raises:
            ShapeError: fewer than one sample.
        """
        if samples < 1:
            raise ShapeError("samples", expected="at least 1", got=str(samples))
        if not isinstance(inferred, Inference):
            return [self.sample(r, samples, seed + i) for i, r in enumerate(inferred)]
        if self.members:
            return self.members[0].sample(inferred, samples, seed)
        r = inferred.batch()
        found = self._solve(r.counts, r.mask, (r.initial, r.inputs), seed)
        generator = torch.Generator(found.z.device).manual_seed(seed + 1)
        drawn = found.sample(samples, generator)
        parts = map(self._spikes.restored, (drawn.rates["spikes"], drawn.observations["spikes"]))
        arrays = [_numpy(x) for x in (drawn.states[:, :, 1:], drawn.inputs, *parts)]
        return Samples(*(x if inferred.batched else x[:, 0] for x in arrays))

    def stream(self, *, iterations: int | None = None, horizon: int | None = None) -> Stream:
        """Start a causal stream, which gives the same answers as the service.

        Args:
            iterations, horizon: override those of the model file.

        Raises:
            ConfigError: see ``Artifact.estimator``.
        """
        return Stream(self, self.artifact, iterations=iterations, horizon=horizon)


def load(path: str | Path, *, device: str = "cpu") -> TrainedModel:
    """Load a model file. Raises ArtifactError, see ``load_artifact``."""
    return TrainedModel(load_artifact(path, device=device), Path(path).name)


def train(recording: str | Path | Recording, *, out: str | Path, **settings: Any) -> TrainedModel:
    """Train a model on a recording and write it to ``out``; see ``ilqr_training.api.train``.

    Raises:
        ConfigError: the trainer is not installed, or a setting is invalid.
    """
    try:
        # imported by name, as the verbs are: the trainer depends on this library
        trainer = importlib.import_module("ilqr_training.api")
    except ModuleNotFoundError as missing:
        raise ConfigError(
            "train",
            expected="the trainer, pip install '.[engine]'",
            got=f"no module {missing.name!r}",
        ) from missing
    trainer.train(recording, out=out, **settings)
    return load(out)


def _numpy(x: Tensor) -> Array:
    return x.detach().cpu().double().numpy().copy()
