"""The blocks of the configuration: every key, its default, and the checks that need no other block.

The block `method` is in methods.py, the crops (`view`, `views`) in crops.py, and the whole in
config.py.  null in a file is None here."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from fastdisco.common.urls import Url
from fastdisco.config.block import Block, Float, Int, Temperature, no_bool

_WORD = r"[\w.+-]+"


class Run(Block):
    """The run: its name and its length."""

    # The run's outputs go to the folder out/name/.
    name: str
    out: Path = Path("out")
    # An address in object storage, such as s3://bucket/folder: each checkpoint is copied there, to
    # name/, and another machine continues from there (docs/storage.md).
    mirror: Path | None = None
    # What all randomness comes from: initial weights, order of the images, views, shuffles.
    seed: Int = Field(0, ge=0, lt=2**32)
    # Length of the training.  The schedules of learning rate and weight decay end with it.
    epochs: Int = Field(200, ge=1)
    # Stop after so many steps.  The schedules stay those of all epochs.  null: train to the end.
    max_steps: Int | None = Field(None, ge=1)
    # Seconds without progress after which the run ends and says which rank waits for what; four times
    # as many in start-up, saves and evaluations.  null: it waits for ever.
    stall_seconds: Float | None = Field(300, ge=1, le=1e6)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        # Files beside the folder have longer names than it.
        if not re.fullmatch(_WORD, name) or name.startswith(".") or len(name.encode()) > 200:
            raise ValueError("one folder name of letters, digits and . _ + -, at most 200 bytes")
        return name

    @field_validator("mirror")
    @classmethod
    def _in_a_bucket(cls, mirror: Path | None) -> Path | None:
        if mirror is not None and not (isinstance(mirror, Url) and mirror.bucket):
            raise ValueError("an address in object storage, such as s3://bucket/folder")
        return mirror


class Data(Block):
    """The images, the batch, and where images are decoded and augmented (docs/data.md)."""

    # Training images: a folder of class folders, a list file, or tars.
    train: Path
    # Validation images, in the same forms; the kNN evaluation needs them.
    val: Path | None = None
    # A file that names images to leave out, as `fastdisco data check` writes it.  A relative name
    # is looked for in the folders of train and val.  null: leave nothing out.
    quarantine: Path | None = Path("quarantine.txt")
    # Of the training images, the share that may break while the run goes on (docs/data.md, Images
    # that break).  Others take their places.  0: the first one stops the run.
    bad_limit: Float = Field(0.001, ge=0, lt=1)
    # Where tars of object storage (s3://, gs://) are kept while they are read: a folder on a local
    # disk that all processes of a machine share (docs/storage.md).  null: FASTDISCO_CACHE, or
    # ~/.cache/fastdisco.
    cache: Path | None = None
    # What these tars may take there, in units of 10^9 bytes.
    cache_gb: Float = Field(100.0, gt=0)
    # Images per optimizer step, over all ranks and accumulated micro batches.
    batch: Int = Field(256, ge=1)
    # Micro batches per optimizer step: a rank's forward pass has
    # data.batch / (ranks x data.accumulate) images.
    accumulate: Int = Field(1, ge=1)
    # When a run goes on with another number of ranks: whether there are as many micro batches as it
    # takes for a forward of no more images than when it began (docs/runs.md).  false: `accumulate`
    # stays, and fewer ranks need more memory.
    accumulate_follows: bool = True
    # DALI's CPU threads on each rank.
    threads: Int = Field(4, ge=1, le=1024)
    # Where JPEGs are decoded; auto: where `augment` is.
    decode: Literal["auto", "gpu", "cpu"] = "auto"
    # Where crops, colours and blur are computed; auto: on the GPU where there is one.
    augment: Literal["auto", "gpu", "cpu"] = "auto"
    # With decode on a GPU that has a JPEG decoding engine (A100, H100 ...): the share of the images
    # that the engine decodes.  The GPU's cores decode the rest.
    hw_decoder_load: Float = Field(0.65, ge=0, le=1)
    # How many batches are made ahead of the step.
    prefetch: Int = Field(2, ge=1, le=128)
    # Whether views are copied out of DALI's memory at once, or used where DALI made them
    # (docs/data.md, On GPUs).
    copy_views: bool = False
    # Evaluation: images are resized so that the short side has so many pixels.
    eval_resize: Int = Field(256, ge=8)
    # Evaluation: side of the square that is then cut from the centre, pixels.
    eval_size: Int = Field(224, ge=8)
    # Evaluation: images per batch on each rank.
    eval_batch: Int = Field(128, ge=1)

    @model_validator(mode="after")
    def _nothing_goes_back(self) -> "Data":
        if self.decode == "gpu" and self.augment == "cpu":
            raise ValueError(
                "decode: gpu with data.augment: cpu would copy every image back; take cpu for "
                "both, or gpu for data.augment"
            )
        return self


class Student(Block):
    """The network that is trained: a backbone and a projection head."""

    # The backbone: any timm model, or resnet50w2, resnet50w4, resnet50w5.
    arch: str = "mobilenetv3_large_100"
    # mlp: two linear layers with a ReLU between them (MoCo-v2, SwAV); dino: three with GELUs.
    head: Literal["mlp", "dino"] = "mlp"
    # Batch norm after each hidden layer of the head, as in SwAV's.
    head_bn: bool = False
    # Width of the head's hidden layers.  0: the head is a single linear layer.
    hidden: Int = Field(2048, ge=0)
    # Width of the embedding, which is the head's output.  It must equal the teacher's.
    dim: Int = Field(128, ge=1)
    # Further arguments of timm.create_model for the backbone.
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)


class OneOfMany(Block):
    """An entry of `students`: what differs from the blocks student and optim.

    null, which is the default of every key, means: as in those blocks."""

    # The student's name in metrics, in checkpoints and for --student; null: the architecture's.
    name: str | None = None
    arch: str | None = None
    hidden: Int | None = Field(None, ge=0)
    # They replace student.kwargs as a whole.
    kwargs: dict[str, JsonValue] | None = None
    lr: Float | None = Field(None, gt=0)

    @field_validator("name")
    @classmethod
    def _one_word(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(_WORD, name):
            raise ValueError("a word of letters, digits and . _ + -")
        return name


class Teacher(Block):
    """The frozen network to distil (docs/teachers.md), and how it runs."""

    # A checkpoint as its training wrote it, or the folder of a fastdisco run.
    file: Path
    # SHA-256 of the file, as `fastdisco teacher show --sha256` prints it; of a run's folder that of
    # the checkpoint's state.pt.  Another file is refused.  null: not compared.
    sha256: str | None = None
    # The timm model of the file's backbone; null: found by the names and shapes in the file.
    arch: str | None = None
    # Further arguments of timm.create_model for the backbone.
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    # Which student teaches, where the fastdisco run has several.
    student: str | None = None
    # Of weights and activations; auto: fp16 on a GPU, engine.precision on a CPU.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # What its batch norms normalise with.  eval: the statistics in the file; batch: the statistics
    # of each `bn_group` images of a view, as in DisCo's official code.
    bn: Literal["eval", "batch"] = "eval"
    bn_group: Int = Field(32, ge=2)
    # Fold each batch norm into the layer before it, which is faster.  Only with bn: eval.
    fold: bool = True
    # On a GPU: run the forward as a CUDA graph, beside the student's forward.
    graph: bool = True
    # off: the teacher runs in each step.  replay: its recorded embeddings are read instead.
    # record: first record the embeddings that are missing, then replay (docs/teacher_cache.md).
    cache: Literal["off", "record", "replay"] = "off"
    cache_folder: Path = Path("out/teacher_cache")
    # Of how many epochs the views are recorded.  Epoch e then repeats the views of epoch
    # e mod cache_rounds.
    cache_rounds: Int = Field(10, ge=1)

    @field_validator("sha256")
    @classmethod
    def _hex_digits(cls, digest: str | None) -> str | None:
        if digest is not None and not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("64 digits of 0-9 and a-f")
        return digest

    @field_validator("cache", mode="before")
    @classmethod
    def _off_to_word(cls, value: object) -> object:
        # YAML 1.1 reads a bare off as false.
        return "off" if value is False else value

    @model_validator(mode="after")
    def _recordable(self) -> "Teacher":
        if self.cache != "off" and self.bn == "batch":
            raise ValueError(
                f"cache: {self.cache} needs bn: eval, for with batch an embedding depends on the "
                "other images of its batch; set teacher.cache=off or teacher.bn=eval"
            )
        return self


class Bn(Block):
    """The batch norms of student and mean student (EMA) in training (docs/method.md)."""

    # Compute statistics over 1/groups of a rank's micro batch, as if on `groups` GPUs.
    groups: Int = Field(1, ge=1)
    # How the key encoder (the mean student) gets a batch that is permuted over ranks and groups
    # (MoCo, section 3.3).  gather: ranks send each other images; load: each rank loads the images
    # of its share itself, and they are view B for all networks; off: no permutation.  true means
    # gather, false means off.
    shuffle: Literal["gather", "load", "off"] = "gather"
    # Compute statistics over all ranks.
    sync: bool = False

    @field_validator("shuffle", mode="before")
    @classmethod
    def _bool_to_word(cls, value: object) -> object:
        # YAML 1.1 reads a bare off as false.
        if isinstance(value, bool):
            return "gather" if value else "off"
        return value

    @model_validator(mode="after")
    def _groups_or_sync(self) -> "Bn":
        if self.sync and self.groups > 1:
            raise ValueError(
                f"bn.sync: statistics over all ranks and in {self.groups} parts of each "
                "(bn.groups) exclude each other; set one of them"
            )
        return self


class Optim(Block):
    """The optimizer, and the schedules of learning rate and weight decay."""

    # Any optimizer of timm.optim.  sgd is plain momentum SGD, nesterov its Nesterov form.
    name: str = "sgd"
    # The learning rate that the schedule starts from, before lr_scale.
    lr: Float = Field(0.03, gt=0)
    # What lr is multiplied by.  none: 1; linear: data.batch / 256; sqrt: the root of that.
    lr_scale: Literal["none", "linear", "sqrt"] = "none"
    # The learning rate at the end of the cosine.  It is not scaled.
    lr_min: Float = Field(0.0, ge=0)
    momentum: Float = Field(0.9, ge=0, lt=1)
    weight_decay: Float = Field(1e-4, ge=0)
    # Weight decay at the end of the training, reached by a cosine; null: it stays as it is.
    weight_decay_end: Float | None = Field(None, gt=0)
    # Whether biases and the weights of norms decay, too, as in MoCo and DisCo.
    decay_norm_and_bias: bool = True
    # The gradient is shortened to this norm where it is longer; 0: never.
    clip: Float = Field(0.0, ge=0)
    # Clip each weight tensor's gradient by itself, as DINO's code does, instead of all together.
    clip_each: bool = False
    # How the learning rate falls.  cosine: to lr_min; step: to a tenth at each milestone; constant:
    # not at all.
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    # How often the schedule changes the learning rate.
    per: Literal["step", "epoch"] = "step"
    # For so many epochs from the start the learning rate rises linearly, to lr as scaled.
    warmup_epochs: Float = Field(0.0, ge=0)
    # Where that rise begins.  zero: at 0; lr: at lr before lr_scale, as in SEED's code.
    warmup_from: Literal["zero", "lr"] = "zero"
    # Where the cosine is at its top.  warmup: at the end of the warm-up; start: at epoch 0, so that
    # the warm-up hides its beginning, as in SEED's code.
    cosine_from: Literal["warmup", "start"] = "warmup"
    # Epochs at which `schedule: step` multiplies the learning rate by 0.1.
    milestones: tuple[Annotated[Int, Field(gt=0)], ...] = (120, 160)

    def scaled(self, batch: int) -> float:
        """`lr` times what `lr_scale` says for this global batch."""
        share = batch / 256
        return self.lr * {"none": 1.0, "linear": share, "sqrt": math.sqrt(share)}[self.lr_scale]

    @model_validator(mode="after")
    def _schedules(self) -> "Optim":
        if self.lr_min and self.schedule != "cosine":
            raise ValueError(
                f"optim.lr_min: the schedule {self.schedule} does not end at {self.lr_min:g}; "
                "set optim.lr_min=0 or optim.schedule=cosine"
            )
        if self.weight_decay_end is not None and not self.weight_decay:
            raise ValueError(
                "optim.weight_decay_end: a schedule from 0 is not known; set optim.weight_decay to "
                "a small number"
            )
        return self


class Engine(Block):
    """How the student is trained on several devices: precision and DeepSpeed (docs/engine.md)."""

    # Of the forward passes, by autocast.  Weights and statistics stay fp32.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # On a GPU: fp32 convolutions and matrix products within the networks keep 10 bits of mantissa,
    # which is faster.  Losses and the kNN evaluation keep all 23.
    tf32: bool = True
    # ZeRO stage.  0: only gradients are exchanged, which is the fastest for students that fit, and
    # all do; 1 and above divide optimizer state, then gradients, then weights among the ranks.
    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_bool)] = 0
    # Exchange gradients while the backward still runs: at stage 0 by fastdisco, at 1 and 2 on GPUs
    # by DeepSpeed.
    overlap: bool = True
    # With overlap: how many gradients are sent at once, MiB.
    bucket_mb: Float = Field(8.0, gt=0)
    # DeepSpeed's own keys, laid over the settings that fastdisco makes.
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fp16_at_stage_0(self) -> "Engine":
        if self.precision == "fp16" and self.stage:
            raise ValueError(
                f"precision: fp16 works at stage 0 only, found {self.stage} (from stage 1 on "
                "DeepSpeed never lowers the loss scale after an overflow, and clips scaled "
                "gradients); take bf16"
            )
        return self


class Perf(Block):
    """Speed (docs/speed.md)."""

    # On a GPU: run the forwards of mean student and teacher as CUDA graphs.
    graphs: bool = True
    # Which backbones torch.compile compiles.  Its cost and its gain are measured and printed.
    compile: Literal[False, "student", "teacher", "both"] = False
    # torch.compile's backend.
    backend: str = "inductor"
    # cuDNN tries its algorithms and takes the fastest.  A resumed run on a GPU may then take others
    # and round differently.
    cudnn_benchmark: bool = True


class Eval(Block):
    """The kNN evaluation during the training, which needs data.val."""

    # Steps between evaluations.  0: only after the last step.
    every: Int = Field(0, ge=0)
    # How many neighbours vote.
    k: Int = Field(20, ge=1)
    # Temperature of the votes: a neighbour's weight is exp(cosine / temp).
    temp: Temperature = 0.07
    # How many training images neighbours are looked for in, drawn by run.seed; null: all.
    bank: Int | None = Field(None, ge=1)
    # Whether an evaluation that fails, of a damaged image for example, ends the run; else that is
    # said, and the training goes on.
    fatal: bool = False


class Log(Block):
    """The metrics."""

    # Steps between lines of metrics.  Only for these does the loop wait for the device.
    every: Int = Field(20, ge=1)
    # Where they go beside metrics.jsonl.  The last two are extras of the same names.
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(["tensorboard"])


class Checkpoint(Block):
    """The checkpoints."""

    # Steps between checkpoints.  There is one after the last step in any case.
    every: Int = Field(1000, ge=1)
    # How many of the newest are kept.
    keep: Int = Field(2, ge=1)
    # Whether the training goes on while a thread writes a checkpoint.  That takes host memory for a
    # copy of the state.  false: the training waits.
    background: bool = True
