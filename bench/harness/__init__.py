"""What every bench shares, so that a bench is its arms and little else.

results    rows with aims, and the JSON file with what is needed to repeat and to doubt it
rounds     interleaved rounds, and the clocks
tables     tables for the terminal, for README.md and for docs/;  readers  what README.md tells
pictures   the picture of a result, drawn from its JSON file by the bench's module in bench/pictures/
command    what the commands have in common: the parser of options, and how a bench ends
runs       the real training command, and what a finished run scores
synthetic  images like photographs from the web, and teachers with random weights

A bench times its arms with `interleaved`, turns the times into rows with `row` and
`row_of_rounds`, and ends with `finish`.  Modules import torch and fastdisco inside the functions
that need them: the tables and pictures are made without either."""

import sys

from harness.command import finish, parser
from harness.results import ROOT, row, row_of_rounds, write
from harness.rounds import elapsed_ms, interleaved, now, seconds

# A bench runs from a checkout, whether or not the package is installed.
sys.path.insert(0, str(ROOT))

__all__ = [
    "ROOT",
    "elapsed_ms",
    "finish",
    "interleaved",
    "now",
    "parser",
    "row",
    "row_of_rounds",
    "seconds",
    "write",
]
