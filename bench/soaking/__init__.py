"""The soak's parts (bench/soak.py).

shim       a library in front of libc: clock, errors, death at the n-th change of a file
processes  of an attempt;  ranks: forked from this process, or started by a real launcher
chain      a run with everything that happens to it, compared with the run that nothing happened to
compare    losses, checkpoints and digests
faults     what is done to a running training;  damage: to its files between two attempts
others     data that break while a run goes on, and attempts by the real launchers
saves      a save that is killed at each of its changes of files
places     mounts and network namespaces, which need root
table      the rows and the table of all faults"""
