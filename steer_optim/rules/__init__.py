"""One file per rule, named after its paper or its effect. Every rule maps a Gramian to weights."""

from steer_optim.rules.base import Rule, State
from steer_optim.rules.gradvac import GradVac
from steer_optim.rules.pcd import PCD
from steer_optim.rules.pcgrad import PCGrad
from steer_optim.rules.steer import Steer
from steer_optim.rules.sum import Sum
from steer_optim.rules.vgs import VGS
from steer_optim.rules.weighting import Weighting

__all__ = ["PCD", "VGS", "GradVac", "PCGrad", "Rule", "State", "Steer", "Sum", "Weighting"]
