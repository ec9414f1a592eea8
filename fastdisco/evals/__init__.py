"""Evaluations of networks: each module has `run(...)`, which returns a dict of named numbers.

knn.py         accuracy by nearest neighbours during training
neighbours.py  the same for several k and temperatures from one search
retrieve.py    recall and mean average precision
ridge.py       ridge regression, all penalties from one eigendecomposition
logistic.py    logistic regression by L-BFGS
linear.py      classifiers trained by SGD, a grid of rates at once; protocols.py has the published
               settings, steps.py where the training steps come from
finetune.py    the whole network trained on some of the labels
health.py      spread, effective rank, nearness to the teacher
tsne.py        maps in two dimensions, aligned to each other; scatter.py has their picture
embed.py       features and embeddings written for other tools
probe.py       whether a teacher has learned anything

What they share: features.py (features of images, of all ranks), passes.py (one pass of a network
over a split), splits.py (parts of a training set), choice.py (which setting is reported),
intervals.py, results.py (files and tables), settings.py (what a command can be told).

Level 2: may import levels 0 and 1, but neither methods nor teacher."""
