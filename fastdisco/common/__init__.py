"""What every other package builds on: ranks, the user's errors, files, the terminal, precisions,
seeds.

Level 0: imports nothing else of fastdisco.  Only dist, store and precision import torch, so that a
command can print its help or refuse its arguments without waiting for it."""
