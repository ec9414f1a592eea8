"""The picture of bench/throughput.py: where the time of a step goes, for each batch."""

from harness.pictures import figure
from step.verdict import PARTS

# Bars below that of the parts -> the arm.
WHOLE = {
    "loader alone": "loader",
    "full step": "full",
    "teacher replayed": "cached",
    "official recipe": "official",
}


def draw(result: dict):
    """A stacked bar of the parts alone above loader, full step and the official recipe."""
    batches = {int(batch): found for batch, found in result["details"].items()}
    made, axes = figure(len(batches), 1, 10, 3.4 * len(batches))
    kind = result["device"].split("-")[0]
    for axis, (batch, found) in zip(axes[:, 0], batches.items()):
        # From images a second of all ranks.
        ms = {k: 1e3 * batch * result["ranks"] / rate for k, rate in found["rates"].items()}
        left = 0.0
        for part in (p for p in PARTS if p in ms):
            axis.barh("parts alone", ms[part], left=left, label=part)
            left += ms[part]
        for name, key in WHOLE.items():
            if key in ms:
                axis.barh(name, ms[key], color="0.7")
        axis.invert_yaxis()
        axis.set(
            xlabel="ms a step",
            title=f"{found['teacher']} to {found['student']}, {found['size']} px, "
            f"batch {batch} a rank, {kind}",
        )
        axis.legend(loc="upper right", fontsize=8, title="parts alone", title_fontsize=8)
    return made
