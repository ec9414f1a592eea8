"""Evaluations of networks: each module has `run(...)`, which returns a dict of named numbers.

knn.py    accuracy of frozen features by their nearest neighbours
probe.py  whether a teacher has learned anything

Level 2: may import levels 0 and 1, but neither methods nor teacher."""
