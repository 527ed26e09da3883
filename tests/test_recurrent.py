"""The readout's recurrent layer: its recursion, what it reads of a window, and how it is fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ilqr_training.config import ReadoutConfig
from ilqr_training.readout.fit import ReadoutBins, fit_readout
from ilqr_training.readout.recurrent import Recurrent, Windows, fit_recurrent
from ilqr_vae.model.readout import Cell, ReadoutShape, read_window, run, split_recurrent
from ilqr_vae.scoring.metrics import r2

n, N, G, L, D = 3, 4, 5, 6, 2


def cell(seed: int) -> tuple[Cell, torch.nn.GRU]:
    """Made-up weights, and torch's own layer with the same."""
    g = torch.Generator().manual_seed(seed)
    layer = torch.nn.GRU(N, G, batch_first=True).double()
    names = ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0")
    weights = [layer.get_parameter(name) for name in names]
    for p in weights:
        p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
    A, a = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((G, n), (G,)))
    return Cell(A, a, *(p.detach() for p in weights)), layer


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), held=st.lists(st.integers(0, L), min_size=1, max_size=4))
def test_it_is_torchs_gru_over_the_bins_held(seed: int, held: list[int]) -> None:
    made, layer = cell(seed)
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(len(held), L, N, generator=g, dtype=torch.float64)
    z = torch.randn(len(held), n, generator=g, dtype=torch.float64)
    h = run(made, z, x, torch.tensor(held))
    for i, count in enumerate(held):
        truth = (z[i] @ made.A.mT + made.a).tanh()
        if count:
            oldest_first = x[i, :count].flip(0)[None]
            truth = layer(oldest_first, truth.view(1, 1, -1))[1].detach()[0, 0]
        torch.testing.assert_close(h[i], truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("residuals", [0, 2, 8])
def test_a_window_is_read_with_what_is_missing_filled_by_the_latents(residuals: int) -> None:
    g = torch.Generator().manual_seed(3)
    S, H, shape = 3, 8, ReadoutShape(lags=L, residuals=residuals, recurrent=G)
    age = torch.tensor([2, 6, 8])
    z = torch.randn(S, H + 1, n, generator=g, dtype=torch.float64)
    counts = torch.poisson(torch.full((S, H, N), 2.0), generator=g).double()
    mask = (torch.rand(S, H, N, generator=g) < 0.6).double()
    C = torch.randn(N, n, generator=g, dtype=torch.float64)
    x = read_window(shape, age, z, counts, mask, lambda z: (z @ C.mT).exp())
    assert x.shape == (S, shape.features(n, N))
    start, held, filled = split_recurrent(x, n, shape)
    assert held.tolist() == [2, 6, 6]
    for s in range(S):
        newest = int(age[s])
        torch.testing.assert_close(start[s], z[s, max(newest - L, 0)])
        for k in range(int(held[s])):
            expected = (C @ z[s, newest - k]).exp()
            there = mask[s, newest - k - 1] > 0
            truth = torch.where(there, counts[s, newest - k - 1], expected)
            torch.testing.assert_close(filled[s, k], truth)


def made_up(rng: np.random.Generator, T: int) -> tuple[Windows, NDArray[np.float64]]:
    """Windows, and targets that depend on the order of what they hold."""
    counts = rng.poisson(1.0, size=(T, L, N)).astype(np.float32)
    held = rng.integers(1, L + 1, size=T)
    z = rng.normal(size=(T, n))
    counts[np.arange(L) >= held[:, None]] = 0
    weight = 0.5 ** np.arange(L)
    first = np.tanh((counts[..., 0] - counts[..., 1]) @ weight)
    return Windows(z, held, counts), np.stack([first, np.tanh(z[:, 0] * (held < 3))], 1)


def test_fitting_finds_what_depends_on_order_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    (train, y), (fresh, truth) = made_up(rng, 4000), made_up(rng, 1000)
    config = ReadoutConfig(lags=L, recurrent=24, recurrent_steps=300, dropout=0.05)
    fits = [dict(fit_recurrent(train, y, config, seed)) for seed in (1, 1, 2)]
    assert [list(f) for f in fits] == [[100, 200, 300]] * 3
    scores = [r2(truth, layer(fresh)) for layer in fits[0].values()]
    assert scores[-1] > max(0.7, scores[0])

    def weights(layer: Recurrent) -> list[torch.Tensor]:
        return [*layer.cell, torch.as_tensor(layer.C), torch.as_tensor(layer.d)]

    pairs = list(zip(*(weights(f[300]) for f in fits), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def bins(rng: np.random.Generator, T: int, *, bent: bool) -> ReadoutBins:
    windows, y = made_up(rng, T)
    x = rng.normal(size=(T, (L + 1) * n))
    x[:, L * n :] = windows.z
    recalled = np.concatenate([windows.held[:, None], windows.counts.reshape(T, -1)], 1)
    y = y if bent else x[:, :D] + 0.1 * rng.normal(size=(T, D))
    covariance = np.tile(np.eye(n), (T, 1, 1))
    return ReadoutBins(x, y, covariance, recalled.astype(np.float32))


@pytest.mark.parametrize("bent", [True, False])
def test_the_layer_is_taken_where_it_decodes_better(bent: bool) -> None:
    rng = np.random.default_rng(5)
    train, more, held, fresh = (bins(rng, T, bent=bent) for T in (3000, 1000, 600, 600))
    config = ReadoutConfig(
        lags=L, residuals=0, hidden=0, recurrent=24, recurrent_steps=240, dropout=0.05
    )
    fit = fit_readout([train, more], [held], n, N, config)
    assert (fit.readout.shape.recurrent > 0) == bent
    seen = torch.as_tensor(fresh.everything((L + 1) * n, bent))
    mean, _ = fit.readout(seen, torch.as_tensor(fresh.covariance))
    plain = fit_readout([train, more], [held], n, N, config, quick=True)
    assert r2(fresh.y, mean.numpy()) == pytest.approx(fit.score, abs=0.1)
    assert fit.score > plain.score + 0.3 if bent else fit.score == plain.score
