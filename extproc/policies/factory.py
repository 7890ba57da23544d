"""Makes the policy that a model's configuration names."""

from random import Random

from extproc.config.models import ModelConfig, PolicyName
from extproc.policies.base import KvPolicy, Policy
from extproc.policies.cache_aware_zmq import CacheAwareZmq
from extproc.policies.least_load import LeastLoad
from extproc.policies.min_ttft import MinTtft
from extproc.policies.power_of_two import PowerOfTwo
from extproc.policies.random import RandomPolicy
from extproc.policies.round_robin import RoundRobin

__all__ = ["create_kv_policy", "create_policy"]


def create_policy(name: PolicyName, random: Random) -> Policy:
    """A new policy that chooses workers; raises ValueError for one that chooses ranks."""
    match name:
        case "round_robin":
            return RoundRobin()
        case "random":
            return RandomPolicy(random)
        case "power_of_two":
            return PowerOfTwo(random)
        case "least_load":
            return LeastLoad(random)
        case _:
            raise ValueError(f"{name} chooses ranks")


def create_kv_policy(model: ModelConfig, random: Random) -> KvPolicy:
    """A new policy that chooses ranks; raises ValueError for one that chooses workers."""
    match model.policy:
        case "cache_aware_zmq":
            settings = model.cache_aware
            return CacheAwareZmq(
                random,
                cache_threshold=settings.cache_threshold,
                balance_abs_threshold=settings.balance_abs_threshold,
                balance_rel_threshold=settings.balance_rel_threshold,
            )
        case "min_ttft":
            return MinTtft(random)
        case _:
            raise ValueError(f"{model.policy} does not look at tokens")
