from .auto import AutoLinearSolver as AutoLinearSolver, Selection as Selection
from .checked import Checked as Checked
from .dense import DirectLU as DirectLU, DirectSymmetric as DirectSymmetric
from .krylov import HybridKrylov as HybridKrylov
from .sparse import (
    detect_structure as detect_structure,
    SparseDirect as SparseDirect,
    Structure as Structure,
)
