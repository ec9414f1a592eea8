"""A run: its folder, its checkpoints, its metrics, its plan, and the students in training.

students.py     a student with engine, EMA, method and optimizer; compilation and CUDA graphs
checkpoint.py   everything an exact resume needs;  fit.py  what fits
saver.py        saves again and again, beside the training;  snapshot.py  the copy that is written
saving.py       how a checkpoint is written
folder.py       the run's folder, and whether a command may continue the run in it;  lock.py  its lock
agreement.py    what all ranks must have in common; when one refuses, all end
mirror.py       copies of checkpoints in object storage
meter.py        what is measured between two log points;  log.py  where it is written and shown
progress.py     how it is shown;  seen.py  what a run's folder tells from outside, without torch
appended.py     a file that may fail for a while
loggers.py      where metrics go beside metrics.jsonl;  board.py  TensorBoard's file
evaluation.py   the evaluation on the way;  online.py  what it says of the features
remarks.py      what is said before the first step
plan.py         what a run would be and lack: `train.py --dry-run`
environment.py  versions, commit and hardware;  signals.py  SIGTERM, SIGUSR1, Ctrl-C
watchdog.py     ends a run that gets no further, and says which rank waits for what
supervisor.py   starts a training again that crashed;  launching.py  by which command;  goodput.py

Level 3: may import everything of levels 0 to 2.  Only train.py and the commands import it."""
