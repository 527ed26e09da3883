"""Find the parameter, group or bin that made a training step not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ilqr_vae.inference.elbo import Bound
from ilqr_vae.model.generative import Model
from ilqr_vae.model.likelihoods import Observed


def find_not_finite(
    model: Model,
    posterior: torch.nn.Module | None,
    index: Tensor,
    observed: Mapping[str, Observed],
    bound: Bound,
) -> str:
    """Describe what is not finite, the cause before its effects.

    Parameters come first, since they affect everything else; then the data, the state, the
    likelihood of each group, the divergence from the prior, and the gradients.

    Args:
        posterior: a posterior with parameters, or None.
        index: (B, chunk) bins of the training part, or (B,) trials, as drawn.
        observed: (B, chunk, channels) per group.
        bound: result of the step; its ``z`` is (B, chunk + 1, n).
    """
    parts = {"": model} if posterior is None else {"": model, "posterior.": posterior}
    named = [(prefix + n, p) for prefix, m in parts.items() for n, p in m.named_parameters()]
    for name, p in named:
        if not bool(p.isfinite().all()):
            return f"parameter {name}{_which(p)}"
    for group, seen in observed.items():
        values = seen.values * seen.mask
        if not bool(values.isfinite().all()):
            return f"data of group {group} at {_where(values.isfinite().all(-1), index)}"
    with torch.no_grad():
        if not bool(bound.z.isfinite().all()):
            return f"state before {_where(bound.z.isfinite().all(-1)[:, 1:], index)}"
        for group, score in model.log_likelihood(bound.z, observed).items():
            if not bool(score.isfinite().all()):
                return f"likelihood of group {group} at {_where(score.isfinite(), index)}"
    if not bool(bound.kl.isfinite().all()):
        return f"divergence from the prior of {_crop(bound.kl.isfinite(), index)}"
    for name, p in named:
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            return f"gradient of {name}{_which(p.grad)}"
    return "the bound"


def _which(values: Tensor) -> str:
    place = tuple(int(i) for i in (~values.isfinite()).nonzero()[0])
    return f"{list(place)}" if len(place) else ""


def _where(finite: Tensor, index: Tensor) -> str:
    """Name the first bad (member, bin) of (B, chunk), by bin or trial of the recording."""
    bad = (~finite).nonzero()
    if not len(bad):  # the state before the first bin
        return "the first bin of a crop"
    b, t = (int(i) for i in bad[0])
    if index.ndim == 2:
        return f"bin {int(index[b, t])} of the training part"
    return f"bin {t} of trial {int(index[b])}"


def _crop(finite: Tensor, index: Tensor) -> str:
    b = int((~finite).nonzero()[0])
    first = int(index[b].reshape(-1)[0])
    return f"the crop from bin {first}" if index.ndim == 2 else f"trial {first}"
