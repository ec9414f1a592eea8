"""What bench/kernels.py and bench/tune.py time: the queue losses and whatever else computes them
(contenders), their data, float64 reference and floors (exact), the measurements (on_gpu, on_cpu),
the rows of the summary (rows), and launch configurations under the clock (launches)."""
