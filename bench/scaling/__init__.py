"""The model of bench/scale.py: seconds of a training step on n devices.

links       what a collective takes: all-reduce by ring and tree, all-gather
overlap     gradients exchanged while the backward runs
stragglers  the slowest of n ranks
networks    layers of a network with their work, found without running it
work        what a step of a configuration computes, sends, reads and writes
devices     seconds of the parts on one device, measured or from published peaks (hardware.yaml)
predict     all that put together;  curve  where it stops paying, and what to change
ranks       the CPU ranks that the model is compared with; worker  one of them"""
