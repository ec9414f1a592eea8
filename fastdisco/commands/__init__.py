"""The command line: one module for each group of `fastdisco`, and its start.

Level 4: imports everything, but only inside the function that runs a command, so that help,
`--version` and
mistyped arguments are answered before torch is imported."""
