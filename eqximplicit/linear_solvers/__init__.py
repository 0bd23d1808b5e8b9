"""How a derivative's linear system is solved: `ImplicitAdjoint(linear_solver=...)`.

`AutoLinearSolver` is the default; any lineax solver can stand in its place.
"""

from .auto import AutoLinearSolver as AutoLinearSolver, Selection as Selection
from .checked import Checked as Checked
from .direct_lu import DirectLU as DirectLU
from .direct_symmetric import DirectSymmetric as DirectSymmetric
from .krylov import HybridKrylov as HybridKrylov
from .least_norm import LeastNorm as LeastNorm
from .neumann import Neumann as Neumann
from .normal_cg import NormalCG as NormalCG
from .nystrom import Nystrom as Nystrom
from .sparse import (
    detect_structure as detect_structure,
    SparseDirect as SparseDirect,
    Structure as Structure,
)
from .tikhonov import Tikhonov as Tikhonov
