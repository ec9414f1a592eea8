"""What bench/accuracy.py compares: its arms as real training commands (arms), their length (plan),
and linear accuracy (scores)."""
