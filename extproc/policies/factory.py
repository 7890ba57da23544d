"""From a policy's name in the configuration to an instance for one model."""

from random import Random

from extproc.config import PolicyName
from extproc.policies.base import Policy
from extproc.policies.least_load import LeastLoad
from extproc.policies.power_of_two import PowerOfTwo
from extproc.policies.random import RandomPolicy
from extproc.policies.round_robin import RoundRobin

__all__ = ["create_policy"]


def create_policy(name: PolicyName, random: Random) -> Policy:
    """A new policy; the configuration has already refused unknown names."""
    match name:
        case "round_robin":
            return RoundRobin()
        case "random":
            return RandomPolicy(random)
        case "power_of_two":
            return PowerOfTwo(random)
        case "least_load":
            return LeastLoad(random)
