"""What bench/throughput.py times: a training's step, whole and in parts (ours, arms), the official
recipe (bench/official.py), what the machine would allow (roofline), and what bounds a run
(verdict)."""
