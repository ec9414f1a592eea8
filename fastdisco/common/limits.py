"""Defaults of commands that their help shows and their code uses.  They are here because help must
not import the code."""

# Largest size of a packed tar, MiB.
SHARD_MB = 1024
# Largest width x height of an image, which is 300 MB decoded.  ImageNet's largest has 75 million.
MAX_PIXELS = 100_000_000
