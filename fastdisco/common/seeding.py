"""Seeds of independent random streams."""

_64_BITS = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 63-bit seed from several numbers, such as (seed, step): each combination has a random
    stream of its own.  It is splitmix64 of each number in turn."""
    x = 0
    for word in words:
        x = ((x ^ word) + 0x9E3779B97F4A7C15) & _64_BITS
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
        x ^= x >> 31
    return x >> 1
