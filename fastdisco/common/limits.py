"""Defaults that a command's help shows and that its code uses, here so that help imports nothing
heavy."""

# MiB of a packed tar at most.
SHARD_MB = 1024
# Width x height of an image at most: 300 MB decoded.  ImageNet's largest has 75 million.
MAX_PIXELS = 100_000_000
