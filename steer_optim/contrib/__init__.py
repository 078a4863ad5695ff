"""Rules that nobody is known to use yet. They conform like all others, but may change or go in any version.

A rule moves to :mod:`steer_optim.rules` when a project outside this one trains with it, or the evidence recommends it.
"""

from steer_optim.contrib.agem import AGEM

__all__ = ["AGEM"]
