"""Evaluations that run a backbone: linear evaluation on random crops, and all that share one
pass."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

from harness import interleaved, synthetic

from costs.cached import features
from costs.sizes import Sizes, Times, timed

# Of ImageNet, training images for each validation image.
TRAIN_TO_VAL = 25.6
# What runs no backbone of its own on random crops.
CACHED = "knn,retrieve,health,probe"
# A value of each.
MEASURED = ("knn_top1", "map", "rankme", "ridge_strength", "logistic_c", "sgd_diverged_heads")


def linear(folder: Path, sizes: Sizes, rounds: int) -> dict[str, dict[str, list[Times]]]:
    """{student: {number of heads: times}}"""
    synthetic.jpegs(folder, sizes.linear_images)
    found = {}
    for arch in sizes.students:
        run = evaluation(arch, folder, sizes)
        arms = {str(n): lambda n=n, run=run: timed(lambda: run(n)) for n in (1, sizes.heads)}
        found[arch] = interleaved(arms, rounds, warm_up=1)
    return found


def evaluation(arch: str, images: Path, sizes: Sizes) -> Callable[[int], object]:
    """Number of heads -> an epoch of linear evaluation with as many: crops, backbone, steps and the
    accuracies at its end."""
    import torch

    from fastdisco import config, data, models
    from fastdisco.evals import frozen, protocols, steps
    from fastdisco.evals import linear as heads

    listing, cpu, seed = data.listing(images), torch.device("cpu"), 0
    own = dict(epochs=1, size=sizes.pixels, resize=sizes.pixels)
    protocol = protocols.preset("disco").model_copy(update=own)
    net = models.create(arch, lambda width: torch.nn.Identity(), sizes=(sizes.pixels,)).eval()
    encode = frozen.encoder(net.features, "fp32", cpu)
    usual, crop = config.Data(train=images), protocols.crop(protocol)
    at_a_time = min(len(listing.kept), steps.chunk(protocol.batch, usual.eval_batch))
    loader = data.TrainLoader(listing, [crop], at_a_time, seed, 1, 1, usual.threads, cpu)
    width = encode(torch.zeros(1, 3, sizes.pixels, sizes.pixels)).shape[1]
    val = features(max(2, round(sizes.linear_images / TRAIN_TO_VAL)), width, 10, seed)
    rates = [heads.Rate(0.1 * (i + 1), 0.0) for i in range(sizes.heads)]

    def run(several: int) -> None:
        source = steps.crops(loader, listing.kept, encode, protocol.batch, seed)
        heads.run(source, val, None, sizes.linear_classes, protocol, rates[:several])

    return run


def whole(folder: Path, sizes: Sizes, rounds: int) -> dict[str, list[Times]]:
    """{"all": times, "pass": times}"""
    import torch

    from fastdisco.models import heads

    for part, n, seed in (("train", sizes.all_train, 0), ("val", sizes.all_val, 1)):
        synthetic.zones(folder / part, n, sizes.all_classes, seed, 0.75)
    # A student's weights where it can be measured without one being trained.
    net, arch = folder / "student.pth", sizes.students[0]
    synthetic.random_teacher(net, arch, lambda width: heads.mlp(width, width, 128))
    command = [
        *("eval", "all", str(net), "--arch", arch, "--only", CACHED),
        *("--out", str(folder / "eval")),
        *(f"data.{part}={folder / part}" for part in ("train", "val")),
        *(f"data.eval_size={sizes.pixels}", f"data.eval_resize={sizes.pixels * 8 // 7}"),
    ]
    arms = {"all": lambda: said(command), "pass": bare(command)}
    torch.manual_seed(0)
    return interleaved({k: lambda v=v: timed(v) for k, v in arms.items()}, rounds)


def said(command: list[str]) -> str:
    """What the command prints on stdout; it must end well, and may leave nothing out."""
    from fastdisco import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(command)
    values = json.loads(out.getvalue().splitlines()[-1])
    assert code == 0 and all(f"eval/{x}" in values for x in MEASURED), (code, command, values)
    return out.getvalue()


def bare(command: list[str]) -> Callable[[], object]:
    """A pass of the command's network over its images, and nothing else."""
    import torch

    from fastdisco import cli
    from fastdisco.commands import arguments, measure, networks
    from fastdisco.evals import passes, settings

    args = arguments.parse(cli._parser(command), command)
    theirs, ours = settings.split(args.overrides)
    network = networks.read(args, theirs)
    work = measure.Work(network, settings.load(ours), torch.device("cpu"))
    listings = work.train, work.val

    def run() -> None:
        for listing in listings:
            encode = lambda x: {"features": work.encode(x)}
            passes.features(encode, listing, listing.kept, work.view, work.cfg.data, work.device)

    return run
