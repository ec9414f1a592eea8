"""Images on disk into batches of views on the network's device.

Level 1: imports fastdisco.common and fastdisco.config.  Only this package imports DALI, in graph.py
and decoder.py, and boto3, in objects.py, at the first use.  From outside, import the names below; the commands also use
pack.py, check.py and demo.py, and the plan of a run shards.py.

  source.py      opens a data set by its path: folder.py class folders and list files, shards.py
                 tars with their index (tar_index.py, tar_samples.py), manifest (manifest.py) and
                 the classes in names (name_classes.py); lines.py reads lists and quarantines
  remote.py      tars of object storage: objects.py the S3 interface, cache.py the cache on local
                 disk, pack_remote.py packing to it
  loader.py      which image of a training comes when; each.py passes over a data set, as for
                 evaluations; pipelines.py runs DALI, graph.py defines its graphs, draws.py draws
                 the views, placement.py says on which device each step runs
  pack.py        writes tars, also from CIFAR's archives (cifar.py)
  operators.py   what the graphs use of DALI
  check.py       finds bad images, with the decoder of the training (decoder.py)
  demo.py        writes the demo's images"""

from fastdisco.data.each import Batch, EvalLoader
from fastdisco.data.folder import Listing
from fastdisco.data.loader import TrainLoader
from fastdisco.data.operators import missing_operators
from fastdisco.data.placement import place
from fastdisco.data.shards import reading_order
from fastdisco.data.source import apart, listing, no_copies, same_classes

__all__ = [
    "Batch",
    "EvalLoader",
    "Listing",
    "TrainLoader",
    "apart",
    "listing",
    "missing_operators",
    "no_copies",
    "place",
    "reading_order",
    "same_classes",
]
