"""The command line: one module for each group of `fastdisco`, and what they share.

data.py, doctor.py, train.py, teacher.py, evaluate.py
              a group: COMMANDS is its lines in the help, `add` its arguments, and one function runs
              each command
arguments.py  parsing

Level 4: may import everything, but the heavy parts only inside the function that runs a command: so
help, `--version` and mistyped arguments are answered before torch is imported."""
