"""Token proof: whether a worker's engine computes the same tokens as this service.

Begin with `prover`, which asks workers in the background for the tokens of the bodies in `probes`.
`comparison` names the first difference and its likely cause, `proofs` keeps what is known of each
worker, and `traits` says which requests a difference concerns. Routing reads `proofs` only.
"""

__all__ = ["asking", "proofs", "prover", "traits"]
