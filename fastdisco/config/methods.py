"""The method blocks: one for each file in fastdisco/methods/."""

from typing import Literal

from pydantic import Field, model_validator

from fastdisco.config.block import Block


class Rkd(Block):
    """Relational distillation on view A (arXiv:1904.05068); the paper's comparison has both at 1
    and method.distill at 0."""

    distance: float = Field(0.0, ge=0)
    angle: float = Field(0.0, ge=0)


class Moco(Block):
    name: Literal["moco"] = "moco"
    temp: float = Field(0.2, gt=0)
    queue: int = Field(65536, ge=1)  # keys
    # Bf16 on a GPU, whose tensor cores want it, else fp32.
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    momentum: float = Field(0.999, ge=0, le=1)  # of the mean student (EMA)
    contrast: float = Field(1.0, ge=0)  # weight of the InfoNCE term
    # Weight of ||s-t||^2, mean over images, sum over views: the paper's, see docs/method.md.
    distill: float = Field(32.0, ge=0)
    rkd: Rkd = Rkd()  # weights of the relational terms


class Swav(Block):
    name: Literal["swav"] = "swav"
    temp: float = Field(0.1, gt=0)
    prototypes: int = Field(3000, ge=2)
    freeze_steps: int = Field(5005, ge=0)  # for which the prototypes stay as drawn
    epsilon: float = Field(0.05, gt=0)  # smoothness of the codes
    iterations: int = Field(3, ge=1)  # of Sinkhorn and Knopp
    # Embeddings of each of the first two views that share in the codes; a multiple of data.batch.
    # 0: none.
    queue: int = Field(3584, ge=0)
    # At which they begin to be kept; used once there are that many.
    queue_epoch: int = Field(15, ge=0)
    # Weight of ||s-t||^2, mean over images, sum over views: 1/2 the mean over 8 x 128 elements.
    distill: float = Field(1 / 2048, ge=0)


class Dino(Block):
    name: Literal["dino"] = "dino"
    temp: float = Field(0.1, gt=0)
    temp_mean: float = Field(0.04, gt=0)  # of the mean student, which is DINO's teacher
    temp_mean_start: float = Field(0.04, gt=0)
    temp_warmup_epochs: int = Field(0, ge=0)  # from temp_mean_start to temp_mean, once an epoch
    prototypes: int = Field(65536, ge=2)  # outputs of the last layer
    norm_last_layer: bool = True  # their lengths stay 1
    freeze_epochs: int = Field(1, ge=0)  # for which the last layer stays as drawn
    # Of the mean student at the start; 1 at the end, by a cosine.
    momentum: float = Field(0.996, ge=0, le=1)
    centre: float = Field(0.9, ge=0, lt=1)  # momentum of the centre
    # Weight of ||s-t||^2 of the bottlenecks, mean over images, sum over two views: ours, see
    # docs/method.md.
    distill: float = Field(1.0, ge=0)


class Seed(Block):
    name: Literal["seed"] = "seed"
    temp: float = Field(0.2, gt=0)
    temp_teacher: float = Field(0.01, gt=0)  # the paper's; its code's 1e-4 needs the queue in fp32
    # Embeddings of the teacher; with contrast as many keys of the mean student.
    queue: int = Field(65536, ge=1)
    # Bf16 on a GPU where temp_teacher allows, else fp32.
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    distill: float = Field(1.0, ge=0)  # weight of SEED's term
    contrast: float = Field(0.0, ge=0)  # weight of MoCo's term beside it
    momentum: float = Field(0.999, ge=0, le=1)  # of the mean student, which only contrast needs

    @model_validator(mode="after")
    def _queue_is_fine_enough(self):
        if self.temp_teacher < 0.01 and self.queue_dtype in ("bf16", "fp16"):
            raise ValueError(
                f"method.queue_dtype: {self.queue_dtype} is too coarse for method.temp_teacher "
                f"{self.temp_teacher:g}; set fp32"
            )
        return self
