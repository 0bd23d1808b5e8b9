"""LAYERS: neural-network layers that are defined by an equation."""

from ._budget import FixedBudget as FixedBudget
from ._jacobian import (
    jacobian_frobenius_squared as jacobian_frobenius_squared,
    spectral_radius as spectral_radius,
)
from .deq import DEQ as DEQ
