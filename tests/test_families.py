"""Every family: densities, curvatures, files, and the exact gradient of the bound."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor

from ilqr_vae.artifact import GroupSpec, Manifest, ModelSpec, build, load_artifact, save_artifact
from ilqr_vae.errors import ArtifactError, ConfigError, ShapeError
from ilqr_vae.inference import elbo, ilqr, implicit
from ilqr_vae.inference.posterior import Kronecker, laplace_at
from ilqr_vae.lqr import LQRProblem, solve_lqr
from ilqr_vae.model.dynamics import FAMILIES, MGU2, DynamicsOptions, Linear
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import LIKELIHOODS, Gaussian, Observed, Poisson, SoftplusPoisson
from ilqr_vae.model.priors import INPUT_PRIORS, DiagonalGaussian, StudentPrior
from ilqr_vae.recordings import RecordingSpec
from ilqr_vae.streaming.horizon import HorizonConfig

DTYPE = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=rng(seed), dtype=DTYPE)


def make(
    dynamics: str, prior: str, groups: dict[str, str], *, n: int = 3, m: int = 2, seed: int = 0
) -> Model:
    """A small model in general position; group name -> likelihood family, four channels each."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = ModelSpec(
            dynamics=dynamics,
            prior=prior,
            latents=n,
            inputs=m,
            groups={k: GroupSpec(family=f, channels=4) for k, f in groups.items()},
            options=DynamicsOptions(normalise_input=True, activation="silu", expansion=2),
        )
        model = build(spec).double()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.15 * torch.randn_like(p))
            for name in groups:
                model.group(name).C.mul_(1.5)
    return model


def observations(
    model: Model, batch: int = 2, steps: int = 4, seed: int = 1
) -> dict[str, Observed]:
    """Drawn from the model, with some entries missing."""
    g = rng(seed)
    with torch.no_grad():
        z, _, _ = model.sample(batch, steps, g)
        out: dict[str, Observed] = {}
        for name in model.groups:
            values = model.group(name).sample(z[:, 1:], g)
            mask = (torch.rand(values.shape, generator=g) > 0.15).to(DTYPE)
            out[name] = Observed(values * mask, mask)
    return out


# ---- dynamics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    "options",
    [
        DynamicsOptions(),
        DynamicsOptions(normalise_input=True, forget_bias=-1.0, activation="silu"),
        DynamicsOptions(learn_forget_bias=False, activation="relu", expansion=2, step=0.5),
        DynamicsOptions(activation="soft-relu", input="outside", normalise_input=True),
    ],
)
def test_jacobians_equal_autodiff(family: str, options: DynamicsOptions) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        d = FAMILIES[family].from_options(4, 3, options).double()
    w = d.weights()
    z, u = normal(5, 4), normal(5, 3, seed=1)
    A, B = d.jacobians(w, z, u)
    auto = torch.func.vmap(torch.func.jacrev(lambda z, u: d.step(w, z, u), (0, 1)))(z, u)
    torch.testing.assert_close(A, auto[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(B, auto[1], rtol=0, atol=1e-12)
    dz, du = normal(5, 4, seed=2), normal(5, 3, seed=3)
    along = (A @ dz.unsqueeze(-1) + B @ du.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        d.tangent(w, z, u, dz, du), (d.step(w, z, u), along), rtol=0, atol=1e-12
    )


def test_options_do_what_they_say() -> None:
    plain = MGU2(4, 2, forget_bias=-2.0, normalise_input=True)
    torch.testing.assert_close(plain.weights()[4].norm(dim=0), torch.ones(2))
    assert plain.gate_bias.requires_grad
    assert float(plain.gate_bias.detach()[0]) == -2.0
    assert not MGU2(4, 2, learn_forget_bias=False).gate_bias.requires_grad
    with pytest.raises(ConfigError, match=r"dynamics.activation: expected one of tanh, relu, silu"):
        FAMILIES["rnn"].from_options(2, 1, DynamicsOptions(activation="cube"))
    with pytest.raises(ConfigError, match="expansion"):
        FAMILIES["mlp"].from_options(2, 1, DynamicsOptions(expansion=0))


def test_linear_is_stable_for_any_parameters() -> None:
    d = Linear(5, 2)
    with torch.no_grad():
        for p in d.parameters():
            p.mul_(5.0)
    assert float(torch.linalg.matrix_norm(d.weights()[0].detach(), 2)) < 1.0


# ---- priors -------------------------------------------------------------------------------------


def student(m: int = 3) -> StudentPrior:
    prior = StudentPrior(m, scale=0.7, nu=4.0).double()
    with torch.no_grad():
        prior.log_scale.add_(normal(m, scale=0.2))
        prior.raw_nu.add_(0.3)
    return prior


def test_student_density_is_scipys() -> None:
    prior, u = student(), normal(20, 3, scale=2.0)
    nu = float(prior.nu.detach())
    shape = torch.diag((2 * prior.log_scale).exp() * (nu - 2) / nu).detach().numpy()
    expected = stats.multivariate_t(shape=shape, df=nu).logpdf(u.numpy())
    torch.testing.assert_close(prior.log_prob(u).detach(), torch.as_tensor(expected))


def test_student_derivatives_and_positive_curvature() -> None:
    prior, u = student(), normal(50, 3, scale=3.0)
    cost = lambda x: -prior.log_prob(x)  # noqa: E731 (a name for the two lines below)
    gradient = torch.func.vmap(torch.func.grad(cost))(u)
    hessian = torch.func.vmap(torch.func.hessian(cost))(u)
    r, R = prior.quadratise(u)
    torch.testing.assert_close(r, gradient)
    torch.testing.assert_close(prior.hessian(u), hessian)
    assert float(torch.linalg.eigvalsh((R).detach()).min()) > 0
    assert (
        float(torch.linalg.eigvalsh((hessian).detach()).min()) < 0
    )  # which is why a term is dropped
    # what is dropped is negative: R majorises the Hessian
    assert float(torch.linalg.eigvalsh((R - hessian).detach()).min()) > -1e-12


def test_student_samples_share_a_scale_and_keep_their_variance() -> None:
    prior = StudentPrior(2, scale=0.5, nu=6.0).double()
    u = prior.draw((200_000,), rng()).detach()
    torch.testing.assert_close(u.std(0), torch.full((2,), 0.5, dtype=DTYPE), rtol=0.02, atol=0)
    energy = (u / 0.5) ** 2
    together = torch.corrcoef(energy.clamp(max=9).T)[0, 1]
    assert 0.1 < float(together) < 0.4  # independent channels would have none
    assert abs(float(torch.corrcoef(u.T)[0, 1])) < 0.02


def test_student_becomes_gaussian() -> None:
    prior = StudentPrior(2, scale=0.5, nu=1e6).double()
    gauss = DiagonalGaussian(2, scale=0.5).double()
    u = normal(9, 2, scale=0.5)
    torch.testing.assert_close(prior.log_prob(u), gauss.log_prob(u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nu", [2.0, 1.0])
def test_nu_must_exceed_two(nu: float) -> None:
    groups = {"x": GroupSpec(family="gaussian", channels=1)}
    spec = ModelSpec(dynamics="linear", prior="student", latents=2, inputs=1, groups=groups, nu=nu)
    with pytest.raises(ArtifactError, match=r"model.nu: expected above 2"):
        build(spec)


def test_surrogate_bins_equal_a_free_initial_state() -> None:
    """ceil(n/m) bins that write blocks of z before the first, as one LQR problem, against z_0 free:
    same optimum, same covariance of everything after."""
    n, m, T = 4, 2, 5
    model = make("linear", "gaussian", {"x": "gaussian"}, n=n, m=m)
    with torch.no_grad():
        model.initial.mean.zero_()
        scale = (2 * model.initial.log_scale).exp()
    observed = observations(model, 1, T)
    w = model.dynamics.weights()
    z0, u = torch.zeros(1, n, dtype=DTYPE), torch.zeros(1, T, m, dtype=DTYPE)
    with torch.no_grad():
        z = model.rollout(w, z0, u)
        free = model.lqr_problem(w, z, u, observed, model.initial.cost(1))
        sol = solve_lqr(free, free_initial=True)
        blocks = torch.eye(n, dtype=DTYPE).view(n, n // m, m).unbind(1)  # B_k writes block k
        lead = n // m
        pinned = LQRProblem(
            A=torch.cat([torch.eye(n, dtype=DTYPE).expand(1, lead, n, n), free.A], 1),
            B=torch.cat([torch.stack(blocks)[None], free.B], 1),
            Q=torch.cat([torch.zeros(1, lead + 1, n, n, dtype=DTYPE), free.Q[:, 1:]], 1),
            q=torch.cat([torch.zeros(1, lead + 1, n, dtype=DTYPE), free.q[:, 1:]], 1),
            R=torch.cat([torch.diag_embed((1 / scale).view(1, lead, m)), free.R], 1),
            r=torch.cat([torch.zeros(1, lead, m, dtype=DTYPE), free.r], 1),
            c=None,
            S=None,
        )
        bins = solve_lqr(pinned, free_initial=False)
    torch.testing.assert_close(bins.dz[:, lead:], sol.dz)
    torch.testing.assert_close(bins.du[:, lead:], sol.du)
    torch.testing.assert_close(bins.du[:, :lead].reshape(1, n), sol.dz0)
    torch.testing.assert_close(bins.V[:, lead + 1 :], sol.V[:, 1:])
    torch.testing.assert_close(bins.decrease, sol.decrease)


# ---- likelihoods --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(LIKELIHOODS))
def test_likelihood_derivatives(family: str) -> None:
    member = LIKELIHOODS[family](3, 4).double()
    a = torch.linspace(-30, 9, 60, dtype=DTYPE).unsqueeze(-1).expand(60, 4)
    y = torch.arange(4.0, dtype=DTYPE).expand(60, 4)
    one = LIKELIHOODS[family](1, 1).double()
    with torch.no_grad():
        one.C.fill_(1.0)
        if isinstance(member, Gaussian) and isinstance(one, Gaussian):
            member.log_scale.fill_(0.3)
            one.log_scale.fill_(0.3)

    def cost(x: Tensor, value: Tensor) -> Tensor:
        return -one.log_prob(x.view(1), Observed(value.view(1), torch.ones(1, dtype=DTYPE)))

    flat_a, flat_y = a.reshape(-1), y.reshape(-1)
    first = torch.func.vmap(torch.func.grad(cost))(flat_a, flat_y).view_as(a)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(cost)))(flat_a, flat_y).view_as(a)
    d, w = member.derivatives(a, y)
    torch.testing.assert_close(d, first, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(member.curvature(a, y), second, rtol=1e-6, atol=1e-7)
    assert float(w.detach().min()) >= 0


def test_softplus_density_and_start() -> None:
    member = SoftplusPoisson(2, 3).double()
    z = normal(6, 2)
    counts = torch.poisson(member.mean(z).detach(), generator=rng())
    rate = member.mean(z).detach().numpy()
    expected = stats.poisson(rate).logpmf(counts.numpy()).sum(-1)
    got = member.log_prob(z, Observed(counts, torch.ones_like(counts))).detach()
    torch.testing.assert_close(got, torch.as_tensor(expected))
    for family in (member, Poisson(2, 3).double(), Gaussian(2, 3).double()):
        mean = torch.tensor([0.2, 1.0, 4.0], dtype=DTYPE)
        family.start_at(mean)
        torch.testing.assert_close(family.mean(torch.zeros(2, dtype=DTYPE)).detach(), mean)


def test_bad_observations_are_named() -> None:
    model = make("mgu2", "gaussian", {"spikes": "poisson", "hand": "gaussian"})
    good = torch.ones(2, 3, 4, dtype=DTYPE)
    hand = Observed(good, good)

    def refused(values: Tensor, mask: Tensor, match: str) -> None:
        with pytest.raises(ShapeError, match=match):
            model.check({"spikes": Observed(values, mask), "hand": hand})

    model.check({"spikes": Observed(good, good), "hand": hand})
    model.check({"spikes": Observed(good, good)})
    refused(good[..., :3], good[..., :3], r"observed.spikes.values: expected \(trials, bins, 4\)")
    refused(good[:, :0], good[:, :0], "at least one of each")
    refused(good - 2, good, "whole numbers of spikes, zero or more, got -1")
    refused(good + 0.5, good, "got 1.5")
    refused(good * math.nan, good, "finite numbers, those not observed masked, got 24")
    refused(good, good[:1], "observed.spikes.mask: expected the values' shape")
    refused(good, good * 0.5, "zeros and ones")
    refused(good[:1], good[:1], "the same trials and bins")
    silent = good.clone()
    silent[..., 2] = 0
    refused(silent, good, "unit 2 silent throughout")
    for wrong in ({}, {"lfp": hand}):
        with pytest.raises(ShapeError, match="observed"):
            model.check(wrong)


# ---- posterior and bound ------------------------------------------------------------------------


def solved(
    model: Model, observed: dict[str, Observed], start: ilqr.State | None = None
) -> tuple[ilqr.Problem, ilqr.State]:
    first = next(iter(observed.values())).values
    B, T = first.shape[:2]
    w = tuple(t.detach() for t in model.dynamics.weights())
    problem = ilqr.Problem(model, w, observed, model.initial.cost(B))
    z0 = first.new_zeros(B, model.n) if start is None else start.z[:, 0]
    u = first.new_zeros(B, T, model.m) if start is None else start.u
    config = ilqr.SolverConfig(iterations=400, tolerance=1e-24, exact=True)
    return problem, ilqr.solve(problem, z0, u, config)[0]


def bound_value(
    model: Model,
    observed: dict[str, Observed],
    posterior: Kronecker | None,
    start: ilqr.State | None = None,
) -> tuple[Tensor, ilqr.State]:
    problem, state = solved(model, observed, start)
    w = model.dynamics.weights()
    z0, u = implicit.attach_gradient(problem, state, exact=True)
    if posterior is not None:
        draw = posterior.draw(z0.shape[0], rng(7))
    else:
        draw = laplace_at(model, w, z0, u, observed).draw(rng(7))
    return elbo.bound(model, w, z0, u, draw, observed).value().sum(), state


def worst_gradient_error(model: Model, posterior: Kronecker | None) -> dict[str, float]:
    """Relative error per parameter of the exact gradient along a random direction."""
    observed = observations(model)
    value, state = bound_value(model, observed, posterior)
    named = dict(model.named_parameters())
    if posterior is not None:
        named |= {f"q.{k}": v for k, v in posterior.named_parameters()}
    named = {k: v for k, v in named.items() if v.requires_grad}
    grads = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))
    errors: dict[str, float] = {}
    for i, (name, p) in enumerate(named.items()):
        direction = normal(*p.shape, seed=100 + i)
        direction /= direction.norm() + 1e-300
        exact = float((grads[name] * direction).sum())
        h, ends = 1e-4, []
        for sign in (-1, 1):
            with torch.no_grad():
                p.add_(sign * h * direction)
                ends.append(float(bound_value(model, observed, posterior, state)[0]))
                p.sub_(sign * h * direction)
        numeric = (ends[1] - ends[0]) / (2 * h)
        errors[name] = abs(exact - numeric) / max(1e-3, abs(numeric))
    return errors


COMBINATIONS = list(product(sorted(FAMILIES), sorted(INPUT_PRIORS), sorted(LIKELIHOODS)))


@pytest.mark.parametrize(("dynamics", "prior", "likelihood"), COMBINATIONS)
def test_exact_gradient_of_every_combination(dynamics: str, prior: str, likelihood: str) -> None:
    model = make(dynamics, prior, {"o": likelihood})
    errors = worst_gradient_error(model, Kronecker(3, 2, 4).double())
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("dynamics", ["linear", "mgu2", "mlp"])
def test_exact_gradient_through_the_laplace_covariance(dynamics: str) -> None:
    model = make(dynamics, "student", {"o": "gaussian", "spikes": "poisson"})
    errors = worst_gradient_error(model, None)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("dynamics", "prior", "likelihood"), COMBINATIONS[::5])
def test_every_family_goes_through_a_model_file(
    dynamics: str, prior: str, likelihood: str, tmp_path: Path
) -> None:
    spec = ModelSpec(
        dynamics=dynamics,
        prior=prior,
        latents=4,
        inputs=2,
        groups={
            "spikes": GroupSpec(family="poisson", channels=3),
            "other": GroupSpec(family=likelihood, channels=2),
        },
        options=DynamicsOptions(normalise_input=True, activation="silu", expansion=3, step=0.2),
        initial_mean=False,
    )
    model = build(spec).double()
    assert not model.initial.mean.requires_grad
    manifest = Manifest(
        bin_width=0.01,
        unit_names=("a", "b", "c"),
        data=RecordingSpec(),
        horizon=HorizonConfig(),
        model=spec,
    )
    path = tmp_path / "model.safetensors"
    save_artifact(path, manifest, model, None, torch.ones(3, dtype=DTYPE))
    loaded = load_artifact(path)
    assert loaded.manifest.model == spec
    z, u = normal(5, 4), normal(5, 2, seed=1)
    before, after = model.dynamics, loaded.model.dynamics
    got = after.step(after.weights(), z, u)
    torch.testing.assert_close(got, before.step(before.weights(), z, u), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loaded.model.prior.log_prob(u), model.prior.log_prob(u))
