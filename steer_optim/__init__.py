"""Steer the update of any torch optimizer towards the loss component that matters most."""

from steer_optim.gramian import Geometry, measure
from steer_optim.optimizer import SteeredOptimizer
from steer_optim.rules import PCD, VGS, GradVac, PCGrad, Steer, Sum, Weighting
from steer_optim.steering import Steering

__all__ = [
    "PCD",
    "VGS",
    "Geometry",
    "GradVac",
    "PCGrad",
    "Steer",
    "SteeredOptimizer",
    "Steering",
    "Sum",
    "Weighting",
    "measure",
]
__version__ = "0.2.0"
