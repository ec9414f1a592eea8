"""The picture of bench/accuracy.py: kNN and linear accuracy of each arm beside the network that it
began with."""

import statistics

from harness.pictures import figure

# Arm -> how a reader sees it called, in the order of tables and bars.
TITLES = {
    "teacher": "teacher, MoCo-v2",
    "alone": "student alone, MoCo-v2",
    "alone_equal_time": "student alone, DisCo's time",
    "disco": "student with DisCo",
    "seed": "student with SEED",
}


def draw(result: dict):
    """Bars of the mean over seeds, a dot for each seed, a dashed line for the untrained network."""
    scores = result["samples"]
    names = [name for name in TITLES if name in scores]
    made, axes = figure(1, 2, 11, 1.6 + 0.42 * len(names), sharey=True)
    for axis, key in zip(axes[0], ("knn", "linear")):
        for y, name in enumerate(names):
            arm(axis, y, scores[name], key, "tab:gray" if name == "teacher" else "tab:blue")
        axis.set(
            title=f"{'kNN' if key == 'knn' else key} top-1, % of the test split",
            yticks=range(len(names)),
            yticklabels=[TITLES[name] for name in names],
        )
    axes[0, 0].invert_yaxis()
    axes[0, 1].plot([], [], "r--", label="untrained network, mean over seeds")
    axes[0, 1].plot([], [], "k.", label="a seed")
    made.legend(loc="outside lower center", ncols=2, fontsize=9)
    return made


def arm(axis, y: int, seeds: list[dict], key: str, colour: str) -> None:
    """An arm's bar at height y."""
    values = [100 * s[key] for s in seeds]
    before = 100 * statistics.mean(s[f"untrained_{key}"] for s in seeds)
    axis.barh(y, statistics.mean(values), color=colour, alpha=0.7)
    axis.plot(values, [y] * len(values), "k.", markersize=5)
    axis.plot([before, before], [y - 0.4, y + 0.4], "r--")
