"""Maps of networks side by side: the same images, colours and seed, aligned to the first."""

import time
from pathlib import Path
from typing import Any

import torch

from fastdisco.commands.measure import Work, plain
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.evals import features, results, scatter, tsne
from fastdisco.evals.results import Result
from fastdisco.evals.tsne import Chosen, Map


def run(work: Work) -> list[Result]:
    """A result for each network, in its own folder; the picture and the coordinates of all stand in
    the folder of `work`."""
    s = work.settings.tsne
    tsne.refuse_absent(s.method)
    if len(s.titles) > len(work.shown):
        raise UserError(
            f"tsne.titles: {len(s.titles)} titles for {len(work.shown)} networks; give one for each"
        )
    chosen = tsne.choose(work.val, s)
    for remark in chosen.remarks:
        say(remark)
    found, maps = [], []
    with work.bar(f"maps by {s.method}", len(work.shown), shared=False) as tick:
        for shown in work.shown:
            begin = time.perf_counter()
            made, protocol = _map(shown, chosen, maps)
            maps.append(made)
            seconds = time.perf_counter() - begin
            found.append(shown.save("tsne", made.values, protocol, seconds))
            tick(1)
    path = work.network.folder / f"tsne-{_hash(found)}"
    if dist.rank() == 0:
        _write(path, work, chosen, maps, found)
    dist.barrier()
    say(f"{path}.png, .svg and .coordinates.json: {len(maps)} maps of {len(chosen.indices)} images")
    return found


def _map(work: Work, chosen: Chosen, before: list[Map]) -> tuple[Map, dict[str, Any]]:
    """The map of one network, aligned to the first before it, and the protocol of its numbers."""
    s = work.settings.tsne
    own = work.part_of(work.val, chosen.indices)
    features.refuse_useless(own, f"{work.network.name}, {work.val.source}")
    whole = features.gathered(own)
    # One rank makes the map; the sum with the others' zeros hands it on.
    points = torch.zeros(len(chosen.indices), 2, dtype=torch.float64, device=work.device)
    x = whole.x.cpu().numpy()
    if dist.rank() == 0:
        points += torch.from_numpy(tsne.fit(x, s)).to(work.device)
    y = dist.all_sum(points).cpu().numpy()
    values = tsne.run(x, y, s.k)
    disparity = 0.0
    if before:
        y, disparity = tsne.aligned(y, before[0].points)
    else:
        y = tsne.standard(y)
    protocol = work.protocol("tsne", _own(work, chosen), val=chosen.indices)
    package = tsne.PACKAGES[s.method]
    protocol["versions"] = protocol["versions"] | {package: tsne.version(s.method)}
    return Map(work.network.name, work.network.about, y, values, disparity), protocol


def _own(work: Work, chosen: Chosen) -> dict[str, Any]:
    """What of the settings can change a number of the map; the images say which classes."""
    s = work.settings.tsne
    found: dict[str, Any] = {"method": s.method, "seed": s.seed, "k": s.k}
    if s.method == "umap":
        return found | {"neighbours": s.neighbours}
    return found | {"perplexity": tsne.perplexity(s, len(chosen.indices))}


def _hash(found: list[Result]) -> str:
    """Of one network that of its result; of several that of all."""
    return found[0].hash if len(found) == 1 else results.short_hash(_protocol(found))


def _protocol(found: list[Result]) -> dict[str, Any]:
    shared = {k: v for k, v in found[0].protocol.items() if k != "network"}
    return {"networks": [r.protocol["network"] for r in found]} | shared


def _write(path: Path, work: Work, chosen: Chosen, maps: list[Map], found: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = work.settings.tsne.titles
    named = [m._replace(name=t) for m, t in zip(maps, titles)] + maps[len(titles) :]
    shades = scatter.colours(len(chosen.classes))
    names = {c: work.val.classes[c] for c in chosen.classes}
    scatter.draw(path, named, work.val.labels[chosen.indices], names, shades)
    tsne.write(
        path.with_name(f"{path.name}.coordinates.json"),
        work.val,
        chosen,
        named,
        shades,
        plain(work.settings.tsne.model_dump()),
        _protocol(found),
        _hash(found),
    )
