"""Solutions of equations as differentiable building blocks of Equinox models."""

from . import linear_solvers as linear_solvers, nn as nn, solvers as solvers
from ._adjoint import (
    AbstractAdjoint as AbstractAdjoint,
    ImplicitAdjoint as ImplicitAdjoint,
    UnrolledAdjoint as UnrolledAdjoint,
)
from ._check import check_implicit as check_implicit, ImplicitReport as ImplicitReport
from ._condition import (
    AbstractCondition as AbstractCondition,
    FixedPoint as FixedPoint,
    LeastSquares as LeastSquares,
    Minimum as Minimum,
    Root as Root,
)
from ._decorators import (
    custom_fixed_point as custom_fixed_point,
    custom_root as custom_root,
)
from ._failure import solve_errors as solve_errors, SolveError as SolveError
from ._find import (
    fixed_point as fixed_point,
    least_squares as least_squares,
    minimise as minimise,
    root_find as root_find,
)
from ._finding import Finding as Finding
from ._function import ImplicitFunction as ImplicitFunction
from ._implicit import (
    implicit_solution as implicit_solution,
    root_jvp as root_jvp,
    root_vjp as root_vjp,
)
from ._module import AbstractImplicitModule as AbstractImplicitModule
from ._monitor import Monitor as Monitor, plot_convergence as plot_convergence
from ._report import (
    gradient_report as gradient_report,
    GradientReport as GradientReport,
)
from ._solution import RESULTS as RESULTS, Solution as Solution
from .linear_solvers import (
    AutoLinearSolver as AutoLinearSolver,
    DirectLU as DirectLU,
    DirectSymmetric as DirectSymmetric,
    HybridKrylov as HybridKrylov,
    LeastNorm as LeastNorm,
    Neumann as Neumann,
    NormalCG as NormalCG,
    Nystrom as Nystrom,
    SparseDirect as SparseDirect,
    Tikhonov as Tikhonov,
)
from .solvers import (
    AbstractHostSolver as AbstractHostSolver,
    Anderson as Anderson,
    AutoFixedPoint as AutoFixedPoint,
    AutoLeastSquares as AutoLeastSquares,
    AutoMinimiser as AutoMinimiser,
    AutoRootFinder as AutoRootFinder,
    Broyden as Broyden,
    FIRE as FIRE,
    HostSolver as HostSolver,
    ScipyFixedPoint as ScipyFixedPoint,
    ScipyMinimize as ScipyMinimize,
    ScipyRoot as ScipyRoot,
)

__version__ = "0.1.0"
