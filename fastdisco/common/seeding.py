"""Seeds of independent random streams."""


def mix(*words: int) -> int:
    """A 63-bit seed from several numbers (splitmix64 of each in turn): (seed, step) -> its own
    stream."""
    x = 0
    for w in words:
        x = (x ^ w) + 0x9E3779B97F4A7C15 & (1 << 64) - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        x ^= x >> 31
    return x >> 1
