"""The block `method`: one class for each file in fastdisco/methods/, with its keys, defaults and
checks.

"Mean student" is the exponential moving average (EMA) of the student's weights.  The weights of
losses are explained in docs/method.md."""

from typing import Literal

from pydantic import Field, model_validator

from fastdisco.config.block import Block, Float, Int, Temperature


class Rkd(Block):
    """Weights of relational distillation's two losses, on the first view (arXiv:1904.05068).

    For the comparison in DisCo's paper set both to 1, and method.distill to 0."""

    distance: Float = Field(0.0, ge=0)
    angle: Float = Field(0.0, ge=0)


class Moco(Block):
    """MoCo-v2 (arXiv:2003.04297), and DisCo (arXiv:2104.09124) on it where there is a teacher."""

    name: Literal["moco"] = "moco"
    # Temperature of the contrastive loss: cosines are divided by it.
    temp: Temperature = 0.2
    # How many past keys the queue holds; at least data.batch.
    queue: Int = Field(65536, ge=1)
    # Precision of the queue; auto: bf16 on a GPU, whose tensor cores want it, otherwise fp32.
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Of the mean student (EMA): how much of it each step keeps.
    momentum: Float = Field(0.999, ge=0, le=1)
    # Weight of the contrastive loss (InfoNCE).
    contrast: Float = Field(1.0, ge=0)
    # Weight of DisCo's distillation loss |student - teacher|^2, a mean over images and a sum over
    # views.  32 is the paper's.
    distill: Float = Field(32.0, ge=0)
    # Weights of the relational losses.
    rkd: Rkd = Rkd()


class Swav(Block):
    """SwAV (arXiv:2006.09882), and DisCo on it where there is a teacher."""

    name: Literal["swav"] = "swav"
    # Temperature of the student's predictions.
    temp: Temperature = 0.1
    # How many prototypes there are.
    prototypes: Int = Field(3000, ge=2)
    # For so many steps from the start the prototypes are not trained.
    freeze_steps: Int = Field(5005, ge=0)
    # Smoothness of the codes: similarities are divided by it.
    epsilon: Temperature = 0.05
    # Rounds of Sinkhorn-Knopp that balance the codes.
    iterations: Int = Field(3, ge=1, le=1000)
    # How many past embeddings of each of the first two views share in computing the codes; a
    # multiple of data.batch, or 0 for none.
    queue: Int = Field(3584, ge=0)
    # The epoch (from 0) from which embeddings are put into the queue.  It is used once it is full.
    queue_epoch: Int = Field(15, ge=0)
    # Weight of the distillation loss |student - teacher|^2, a mean over images and a sum over
    # views.  1/2048 is half of a mean over 8 views and 128 dimensions.
    distill: Float = Field(1 / 2048, ge=0)
    # The teacher's embedding t in that loss.  normalised: t/|t|; published: t as it is, as in
    # DisCo's code, which pulls |t| times as hard (docs/method.md).
    target: Literal["normalised", "published"] = "normalised"


class Dino(Block):
    """DINO (arXiv:2104.14294), and DisCo on it where there is a teacher.

    What DINO's paper calls the teacher is the mean student here."""

    name: Literal["dino"] = "dino"
    # Temperature of the student's softmax.
    temp: Temperature = 0.1
    # Temperature of the mean student's softmax, after the warm-up.
    temp_mean: Temperature = 0.04
    # The same at the beginning of the warm-up.
    temp_mean_start: Temperature = 0.04
    # Length of the warm-up, in which the temperature changes once an epoch.  0: no warm-up.
    temp_warmup_epochs: Int = Field(0, ge=0)
    # How many outputs the last layer has.
    prototypes: Int = Field(65536, ge=2)
    # true: the last layer's weight rows have length 1; false: their lengths are trained.
    norm_last_layer: bool = True
    # For so many epochs from the start the last layer is not trained.
    freeze_epochs: Int = Field(1, ge=0)
    # Of the mean student: how much of it each step keeps at the start.  It rises to 1 by a cosine.
    momentum: Float = Field(0.996, ge=0, le=1)
    # How much of the centre (the running mean of the mean student's outputs) each step keeps.
    centre: Float = Field(0.9, ge=0, lt=1)
    # Weight of the distillation loss |student - teacher|^2 between bottlenecks, a mean over images
    # and a sum over the first two views.  The paper gives no number; 1 is our choice.
    distill: Float = Field(1.0, ge=0)


class Seed(Block):
    """SEED (arXiv:2101.04731): the teacher's similarities to a queue, learned by the student."""

    name: Literal["seed"] = "seed"
    # Temperature of the student's similarities.
    temp: Temperature = 0.2
    # Temperature of the teacher's similarities.  0.01 is the paper's; the 1e-4 of its code needs a
    # queue in fp32.
    temp_teacher: Temperature = 0.01
    # How many past embeddings of the teacher the queue holds; at least data.batch.  With `contrast`
    # there is a second queue, of as many keys of the mean student.
    queue: Int = Field(65536, ge=1)
    # Precision of the queue; auto: bf16 on a GPU where temp_teacher allows it, otherwise fp32.
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Weight of SEED's loss.
    distill: Float = Field(1.0, ge=0)
    # Weight of MoCo's contrastive loss beside it.  Above 0 it needs two views and a mean student.
    contrast: Float = Field(0.0, ge=0)
    # Of that mean student: how much of it each step keeps.
    momentum: Float = Field(0.999, ge=0, le=1)

    @model_validator(mode="after")
    def _queue_is_fine_enough(self) -> "Seed":
        if self.temp_teacher < 0.01 and self.queue_dtype in ("bf16", "fp16"):
            raise ValueError(
                f"method.queue_dtype: {self.queue_dtype} is too coarse for method.temp_teacher "
                f"{self.temp_teacher:g}; set fp32"
            )
        return self
