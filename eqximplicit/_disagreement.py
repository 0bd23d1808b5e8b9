"""What it means where the derivatives of a layer differ from each other."""

from typing import Any

import numpy as np

from ._derivatives import Derivatives, deviation, Differences
from ._finding import Finding, number

Vector = np.ndarray[Any, np.dtype[Any]]

# A relative deviation that no truncation or solver tolerance explains.
_WRONG = 1e-2
# What an equation solved with a slack of 1e-8 leaves of the differences.
_NOISE = 5.0
# Smaller ones are worth a word where the differences are this much better.
_CLEAR = 100.0


def disagreements(found: Derivatives, eps: float) -> list[Finding]:
    """Findings where the implicit derivative differs from the others."""
    implicit = found.implicit
    if not np.isfinite(implicit).all():
        return [_not_finite(found)]
    noise = found.relative_noise
    findings = _against_differences(implicit, found.differences, noise, eps)
    if found.unrolled is not None:
        error = deviation(implicit, found.unrolled)
        if error > max(_WRONG, eps**0.25):
            findings.append(_against_unrolled(error))
    if found.transposition is not None and not found.transposition <= eps**0.5:
        findings.append(_against_transpose(found.transposition))
    return findings


def _not_finite(found: Derivatives) -> Finding:
    entries = int(np.sum(~np.isfinite(found.implicit)))
    return Finding(
        "error",
        "The implicit derivative is not finite.",
        "`∂y/∂θ` in a random direction",
        f"{entries} of {found.implicit.size} entries",
        "See the findings on the forward solve and on the Jacobian for the cause.",
    )


def _against_differences(
    implicit: Vector, fd: Differences, noise: float, eps: float
) -> list[Finding]:
    where = "`∂y/∂θ` in a random direction"
    scale = max(float(np.linalg.norm(implicit)), float(np.linalg.norm(fd.value)))
    error = deviation(implicit, fd.value)
    figures = f"relative deviation {number(error)}, noise of the differences "
    figures += number(noise)
    kink = fd.one_sided > 0.1 * scale and fd.one_sided > 0.5 * fd.wide
    if kink and not fd.failed and noise < 0.1:
        return [
            Finding(
                "error",
                "The solution has a kink here: its left and right derivatives differ, "
                "and the implicit derivative is that of one side.",
                where,
                f"they differ by {number(fd.one_sided / (scale or 1.0))} of the larger",
                "Smooth the function, or move the parameters off the kink.",
            )
        ]
    if error <= max(_WRONG, _NOISE * noise):
        visible = error > max(2 * eps ** (1 / 3), _CLEAR * noise) and not fd.failed
        return [_slightly_off(where, figures)] if visible else []
    if fd.failed or noise > 0.1:
        return [
            Finding(
                "warning",
                "The implicit derivative could not be confirmed: the solver does not "
                "answer small changes of its parameters smoothly"
                + (", and some of its perturbed solves failed." if fd.failed else "."),
                where,
                figures,
                "Tighten the solver's tolerance; look for a bifurcation, or several "
                "solutions between which the solver jumps.",
            )
        ]
    return [
        Finding(
            "error",
            "The implicit derivative is not that of what the solver computes.",
            where,
            figures,
            "Check that the condition is what the solver solves, that it holds every "
            "parameter that the solver uses, that the solver converges, and that the "
            "linear solver of the adjoint is exact (`eqi.gradient_report`).",
        )
    ]


def _slightly_off(where: str, figures: str) -> Finding:
    return Finding(
        "warning",
        "The implicit derivative is a little off that of what the solver computes, by "
        "far more than the noise of the differences.",
        where,
        figures,
        "Tighten the solver's tolerance; check that the condition is the very equation "
        "that the solver solves (a constant, a regularisation), and that the linear "
        "solver of the adjoint is exact.",
    )


def _against_unrolled(error: float) -> Finding:
    return Finding(
        "warning",
        "The implicit derivative differs from that of the solver's own steps, which "
        "have not converged as far, or went to another solution.",
        "`eqi.UnrolledAdjoint()` against the layer's adjoint",
        f"relative deviation {number(error)}",
        "Where the differences agree with the implicit derivative, ignore this; "
        "otherwise take more steps or a tighter tolerance.",
    )


def _against_transpose(gap: float) -> Finding:
    return Finding(
        "error",
        "Forward and reverse mode give different derivatives.",
        "`<ȳ, ẏ>` against `<θ̄, θ̇>` for a random cotangent",
        f"relative deviation {number(gap)}",
        "Look for an inexact or asymmetric linear solver, a false tag, a "
        "preconditioner that is not transposed, or a custom derivative rule in the "
        "function.",
    )
