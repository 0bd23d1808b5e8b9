"""How a solution is found: the default solvers, others by name, and those of a host.

Each is an optimistix solver, or runs Python code (SciPy's, yours) on the host; any
solver of optimistix itself can stand in its place.
"""

from ._on_host import AbstractHostSolver as AbstractHostSolver
from .anderson import Anderson as Anderson
from .auto_fixed_point import AutoFixedPoint as AutoFixedPoint
from .auto_least_squares import AutoLeastSquares as AutoLeastSquares
from .auto_minimiser import AutoMinimiser as AutoMinimiser
from .auto_root_finder import AutoRootFinder as AutoRootFinder
from .broyden import Broyden as Broyden
from .fire import FIRE as FIRE
from .host import HostSolver as HostSolver
from .scipy_solvers import (
    ScipyFixedPoint as ScipyFixedPoint,
    ScipyMinimize as ScipyMinimize,
    ScipyRoot as ScipyRoot,
)
