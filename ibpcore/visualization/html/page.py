"""A page about certificates as a single HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from torch import Tensor

from ibpcore.bounds.epsilons import rounded_up
from ibpcore.certification.certificates import MEANINGS
from ibpcore.certification.formatting import percent, quarters
from ibpcore.certification.metrics import certified_accuracy
from ibpcore.visualization.heatmaps import COLORS
from ibpcore.visualization.html.curve import curve_svg
from ibpcore.visualization.html.image_table import Entry, escaped, table_of_images

STATUSES = {
    "epsilon_max": "certified up to the limit that was asked for",
    "converged": "certified up to the radius, and not certified a little above it",
    "misclassified": "radius 0: the prediction is not the label, or not the only one",
    "iteration_limit": "certified up to the radius; the search stopped at its limit of iterations",
    "not_finite": "radius 0: the outputs of the network are not finite",
    "unproved": "radius 0: certified by bounds with rounding errors, but the proof failed",
}
"""Meanings of the names of `ibpcore.RadiusStatus`, in lower case."""

DIALOG = """<dialog id="enlarged" aria-label="Enlarged picture">
<figure></figure>
<button type="button">Close</button>
</dialog>"""
"""Shows an enlarged picture, see `page.js`."""

Facts = Sequence[tuple[str, str]]
"""Names and values, plain text."""


@dataclass(frozen=True, eq=False)
class Page:
    """Content of a page: what `ibpcore.visualization.html.contents` makes and `render` lays out.

    All texts are plain.

    Attributes:
        title: of the page.
        lead: a sentence below the title.
        measures: of all images, in few characters.
        facts: about the model and the certificates.
        claim: of the certificates, a key of `MEANINGS`.
        radii: (N,) of all images, including those without an entry.
        epsilon_max: the limit of the radii, in pixel units.
        accuracy: a fraction; None if some labels are unknown.
        entries: the rows of the table.
        note: which images the entries show.
    """

    title: str
    lead: str
    measures: Facts
    facts: Facts
    claim: str
    radii: Tensor
    epsilon_max: float
    accuracy: float | None
    entries: Sequence[Entry]
    note: str


def render(page: Page) -> str:
    """The page as HTML; all text is escaped, and the browser is forbidden to load anything."""
    style, script = (
        resources.files("ibpcore.visualization.html").joinpath(f"page.{kind}").read_text()
        for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'"  # no other script runs, even if one were injected
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(page.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#images">To the images</a>
<header>
<h1>{escaped(page.title)}</h1>
<p class="lead">{escaped(page.lead)}</p>
</header>
<main>
{_measure_tiles(page.measures)}
<div class="wide">
<section aria-labelledby="curve-head">
<h2 id="curve-head">{_kind(page)}</h2>
{_figure(page)}
</section>
<section aria-labelledby="facts-head">
<h2 id="facts-head">Model and settings</h2>
<dl class="facts">
{_pairs(page.facts)}
</dl>
</section>
</div>
<section aria-labelledby="images-head">
<h2 id="images-head">Images</h2>
{_explanation(page)}
{table_of_images(page.entries, page.epsilon_max)}
</section>
</main>
{DIALOG}
<script>{script}</script>
</body>
</html>
"""


def _pairs(facts: Facts) -> str:
    return "\n".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts)


def _measure_tiles(measures: Facts) -> str:
    tiles = "\n".join(f"<div>{_pairs([pair])}</div>" for pair in measures)
    return f'<dl class="measures">\n{tiles}\n</dl>'


def _explanation(page: Page) -> str:
    """How to read the table."""
    stops = ", ".join(f"rgb{color}" for color in COLORS)
    return f"""<p>No change of any pixel by at most the radius changes the prediction of an image.
The radius is rounded down, so the printed one is certified too. It is 0 if a labelled image is
misclassified. The claim is <i>{escaped(page.claim)}</i>: {escaped(MEANINGS[page.claim])}.</p>
<details><summary>Meaning of the status</summary>
<dl class="facts">
{_pairs([(status.replace("_", " "), says) for status, says in STATUSES.items()])}
</dl></details>
<p>The heatmap shows which pixels the certificate depends on: how fast the certified margin
worsens if this one pixel may change by more than the radius. If it may change by a small <i>d</i>
more, a radius below the limit shrinks by the pixel's share of <i>d</i>. Each map has its own
scale.</p>
<p class="scale"><span>0</span><i style="background: linear-gradient(to right, {stops})"></i>
<span>its maximum</span></p>
<p class="note">{escaped(page.note)}</p>"""


def _figure(page: Page) -> str:
    kind, accuracy = _kind(page), page.accuracy
    first = "" if accuracy is None else f" The dot is the accuracy, {_unbroken(accuracy)}."
    return f"""<figure>
{curve_svg(page.radii, page.epsilon_max, accuracy, kind.lower())}
<figcaption>{escaped(kind)}: {", ".join(_quoted(page))}.{first}</figcaption>
</figure>"""


def _kind(page: Page) -> str:
    """What the curve shows."""
    return "Certified images" if page.accuracy is None else "Certified accuracy"


def _quoted(page: Page) -> list[str]:
    """Certified accuracies at the quarters of the limit."""
    shares = [
        (at, certified_accuracy(page.radii, rounded_up(at))) for at in quarters(page.epsilon_max)
    ]
    return [f"{_unbroken(share)} at radius {at}" for at, share in shares]


def _unbroken(share: float) -> str:
    """In percent, without a line break before the sign."""
    return percent(share).replace(" ", "\N{NO-BREAK SPACE}")
