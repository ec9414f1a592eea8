"""What every other package stands on: ranks, errors, files, the terminal, precisions, seeds.

Level 0: imports nothing else of fastdisco.  errors, launch, files and console import no torch."""
