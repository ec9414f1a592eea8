"""Features and embeddings written for other tools."""

import time

from fastdisco import data
from fastdisco.commands.measure import Work, named, plain
from fastdisco.common.console import say
from fastdisco.data.folder import told
from fastdisco.data.lines import printable
from fastdisco.evals import embed, results
from fastdisco.evals.results import Result


def run(work: Work) -> Result:
    """Features and embeddings of the images that the settings name, or of the validation images."""
    begin = time.perf_counter()
    s = work.settings.embed
    embed.refuse_absent(s.format)
    if s.out:
        results.refuse_unwritable(s.out, "embed.out")
    listing = work.val
    if s.data:
        listing = data.listing(s.data, work.cfg.data.quarantine, True, work.cfg.data)
    if listing.passed_over:
        say(f"{listing.source}: passed over: {printable(told(listing.passed_over))}")
    protocol = {
        "network": work.network.about,
        "data": named(listing, listing.kept, "images"),
        "view": work.view._asdict(),
        "precision": work.cfg.engine.precision,
        "embed": {"format": s.format},
        "versions": work.versions,
    }
    kinds = work.pass_over(listing, listing.kept, work.view, work.with_embedding)
    # Like a result, what was written is not overwritten by another protocol.
    own = work.network.folder / f"embed-{results.short_hash(plain(protocol))}"
    out = s.out or own
    values = embed.run(kinds, listing, out, s.format)
    say(f"{out}: {', '.join(kinds)} of {len(listing.kept)} images")
    return work.save("embed", values, protocol, time.perf_counter() - begin)
