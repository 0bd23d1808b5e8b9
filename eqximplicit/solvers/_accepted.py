"""Solvers that promise nothing of where they end."""

import equinox as eqx


class AbstractAccepted(eqx.Module):
    """A solver whose last state is accepted wherever it is: its success claims nothing.

    As with a callable, the derivative is that of the theorem there, and the state is
    held against nothing.
    """
