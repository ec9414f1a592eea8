"""Checks of a machine, or of several, before a training: `fastdisco doctor`.

finding.py   what a check returns, and how findings are told
versions.py  libraries: which there are, and whether they fit each other
gpu.py       GPUs and their driver
machine.py   shared memory, limits of the process, cores, names;  cgroup.py  limits of a container
disk.py      space, and speed of writing and reading
network.py   what the ranks find of each other;  meeting.py  how they come together within a time
nodes.py     the nodes of a hostfile: their ranks, started by ssh
training.py  what the plan, the teacher's check and some real steps say

Each check is one small function that returns a Finding.  It gets what it judges as arguments, so
that a test can make it fail.

Level 3: may import levels 0 to 2.  What it needs of run/ its command passes on."""

from fastdisco.doctor.finding import Finding, code, looked

__all__ = ["Finding", "code", "looked"]
