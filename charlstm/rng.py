"""Named random keys: a draw depends on the seed and on what it is for, never on how many draws came before."""

import hashlib

import jax


def named(key: jax.Array, name: str) -> jax.Array:
    """The key for the purpose `name`, derived from `key`.  Adding a purpose leaves all the others as they were."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "little"))
