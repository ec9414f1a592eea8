"""The pictures of bench/scale.py: images/s by number of GPUs, as the model has them."""

from harness.pictures import figure

# The configurations that are drawn, of those in the result: one of each method.
DRAWN = ("mobv3", "disco/effb0_r152", "swav/mobv3_disco", "dino/vit_tiny_disco", "seed/r18_r50")
# The one whose changes are drawn.
CHANGED = "mobv3"
NAMES = {"a100": "DGX A100 nodes", "h100": "DGX H100 nodes"}


def drawings(result: dict) -> dict:
    """`shipped`: some configurations as they are; `changes`: what settings bring to one of them."""
    curves = result["curves"]
    if not curves:
        return {}
    shipped = {name: curves[name] for name in DRAWN if name in curves}
    machines = list(next(iter(curves.values())))
    of_shipped = {
        m: {f"{name} (batch {x[m]['batch']})": x[m] for name, x in shipped.items()}
        for m in machines
    }
    of_changes = {
        m: {"as shipped": curves[CHANGED][m], **curves[CHANGED][m]["changes"]} for m in machines
    }
    return {
        "shipped": _panels(of_shipped, "shipped configurations"),
        "changes": _panels(of_changes, f"{CHANGED}.yaml and what a user may change"),
    }


def _panels(lines: dict[str, dict[str, dict]], title: str):
    """A panel for each machine: images/s by GPUs, with a dot at the last count that pays."""
    made, axes = figure(1, len(lines), 12, 5, sharey=True)
    made.suptitle(f"A model, not measured: {title}")
    for axis, (machine, found) in zip(axes[0], lines.items()):
        for name, curve in found.items():
            counts = [int(n) for n in curve["ips"]]
            drawn = axis.plot(counts, curve["ips"].values(), label=name)[0]
            at = curve["ips"].get(str(curve["count"]), curve["ips"].get(curve["count"]))
            axis.plot([curve["count"]], [at], "o", color=drawn.get_color())
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=NAMES.get(machine, machine))
        axis.set_xticks([2**i for i in range(11)], [str(2**i) for i in range(11)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="dot: the last count that pays", title_fontsize=8)
    axes[0, 0].set_ylabel("images/s, all GPUs")
    return made
