"""One HTML file about runs, from their folders.

collect.py     what a run's folder says: configuration, environment, metrics, evaluations
networks.py    the networks of runs and of their teacher, rebuilt for the figures that need them
curves.py      metrics over steps and over time;  differences.py  what sets two runs apart
pareto.py      accuracy against latency, size and MACs;  scale.py  ticks of an axis
maps.py        the t-SNEs of `fastdisco eval tsne`
neighbours.py  nearest images in each network, and classes behind the teacher
views.py       the augmented views of a step, drawn again
tiles.py       small pictures in one sheet
evaluations.py the table of results
page.py        the page;  templates/ its HTML, style and script, and uPlot (MIT)

Level 3: imports levels 0 to 2 and jinja2, which nobody else does.  A run is read by its files; each
thing that is missing becomes a sentence in its place."""

from fastdisco.report.collect import Run, read
from fastdisco.report.page import MARK, Wanted, write

__all__ = ["MARK", "Run", "Wanted", "read", "write"]
