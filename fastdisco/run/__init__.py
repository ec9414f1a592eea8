"""A run: its folder, checkpoints, log, plan, and the students in training.

Level 3: imports all of levels 0 to 2; train.py and the commands stand on it."""
