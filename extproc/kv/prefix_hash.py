"""Hashes prefixes of token sequences: one running sum instead of a hash per page.

A prefix of n tokens t_0 … t_{n-1} hashes to seed + Σ (t_j + 1) · B_j mod 2^64 with secret random
odd keys B_j, a multilinear hash. The next page continues from the sum after a page, so that an
event continues from its parent, and a prompt of 32k tokens takes one pass of numpy. Without the
`+ 1`, token 0 would add nothing. Keys are drawn per process: hashes are never exchanged, and
without the keys two colliding prompts cannot be constructed.

Two prefixes of one length with ids below 2^18 collide with probability 2^-46 at most over
the keys. A bigram page of n units (t_j, t_{j+1}) from position p covers the tokens up to
t_{p+n}, so its hash is that of the p + n + 1 tokens: the same sums, one token further.
"""

import secrets
from hashlib import blake2b
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["POSITION_MAX_TOKENS", "PrefixHasher", "TokenIds"]

TokenIds = NDArray[np.uint64]

# Longer than any context window. Keys for this length take 64 MiB, drawn when first needed.
POSITION_MAX_TOKENS: Final = 1 << 22
_FIRST_KEYS: Final = 1 << 16
_MASK: Final = (1 << 64) - 1


class PrefixHasher:
    """The keys of one process, drawn from `secret`.

    Tests pass a secret to get the same hashes twice.
    """

    def __init__(self, secret: int | None = None) -> None:
        self._secret = secrets.randbits(128) if secret is None else secret
        self._random = np.random.Generator(np.random.PCG64(self._secret))
        self._keys: TokenIds = np.empty(0, np.uint64)
        # At n, the sum of the first n keys: what the `+ 1` contributes.
        self._key_sums: TokenIds = np.zeros(1, np.uint64)
        self._grow(_FIRST_KEYS)

    def seed(self, cache_salt: str | None = None, lora: str | int | None = None) -> int:
        """The start value of a namespace's sums; 0 for the one without salt and adapter."""
        if cache_salt is None and lora is None:
            return 0
        text = repr((cache_salt, lora)).encode("utf-8", "surrogatepass")
        key = self._secret.to_bytes(16, "big")
        return int.from_bytes(blake2b(text, digest_size=8, key=key).digest(), "big")

    def extend(self, start: int, position: int, tokens: TokenIds) -> int:
        """The sum after `tokens` (uint64, any length) that follow `position` tokens.

        Raises ValueError beyond POSITION_MAX_TOKENS.
        """
        end = position + len(tokens)
        if end > len(self._keys):
            self._grow(end)
        dot = int(np.dot(tokens, self._keys[position:end]))
        ones = int(self._key_sums[end]) - int(self._key_sums[position])
        return (start + dot + ones) & _MASK

    def page_sums(self, start: int, position: int, tokens: TokenIds, page_size: int) -> TokenIds:
        """The sums after each whole page of `tokens`; uint64, one for each page.

        `start` is the sum of the `position` tokens before `tokens`. Raises ValueError beyond
        POSITION_MAX_TOKENS.
        """
        count = len(tokens) // page_size * page_size
        end = position + count
        if end > len(self._keys):
            self._grow(end)
        sums = tokens[:count] * self._keys[position:end]
        if page_size > 1:
            sums = sums.reshape(-1, page_size).sum(axis=1)
        np.cumsum(sums, out=sums)
        sums += self._key_sums[position + page_size : end + 1 : page_size]
        # Arrays wrap around silently, as needed here; scalars would warn.
        sums += np.uint64((start - int(self._key_sums[position])) & _MASK)
        return sums

    def _grow(self, count: int) -> None:
        if count > POSITION_MAX_TOKENS:
            raise ValueError(f"a prefix of more than {POSITION_MAX_TOKENS} tokens")
        wanted = min(max(count, 2 * len(self._keys)), POSITION_MAX_TOKENS)
        more = self._random.integers(
            0, _MASK, size=wanted - len(self._keys), dtype=np.uint64, endpoint=True
        )
        self._keys = np.concatenate((self._keys, more | np.uint64(1)))
        self._key_sums = np.concatenate(
            (np.zeros(1, np.uint64), np.cumsum(self._keys, dtype=np.uint64))
        )
