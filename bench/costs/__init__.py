"""What bench/evals.py times: evaluations that run a backbone (backbone) and those that have their
features already (cached), on so much (sizes)."""
