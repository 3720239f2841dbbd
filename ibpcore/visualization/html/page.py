"""A page about certificates for a browser: one file, with nothing outside it."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from torch import Tensor

from ibpcore.certification.certificates import MEANINGS
from ibpcore.certification.formatting import in_digits, rounded_down
from ibpcore.certification.metrics import certified_accuracy
from ibpcore.errors import printable
from ibpcore.inspection.heatmap import peak
from ibpcore.visualization.heatmaps import COLORS, colored, data_uri
from ibpcore.visualization.html.curve import curve
from ibpcore.visualization.plots.curves import steps

SHOWN = 200
"""Images on a page: a browser on a phone can hold these."""
SMALL = 128
"""Images of fewer pixels a side are enlarged as squares, not smoothly."""
STATUSES = {
    "epsilon_max": "certified up to the limit that was asked for",
    "converged": "certified up to the radius, and a little above it no more",
    "misclassified": "radius 0: the prediction is not the label, or not the only one",
    "iteration_limit": "certified up to the radius; the search for more was cut short",
    "not_finite": "radius 0: the network gives no finite numbers",
    "unproved": "radius 0: found by bounds that may err by rounding, and not proved",
}
"""By the names of `ibpcore.RadiusStatus`, in lower case."""

Facts = Sequence[tuple[str, str]]
"""Names and values, plain text."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the page.

    Attributes:
        name: of the image.
        label: the name of its class, None where nobody says.
        prediction: likewise.
        radius: certified, in pixel units.
        status: a name of `RadiusStatus`, in lower case.
        image: (C, H, W) bytes.
        heat: (H, W) of `ibpcore.inspection.heatmap.heat`, None where nothing is certified.
        remark: what else there is to say of it.
    """

    name: str
    label: str | None
    prediction: str
    radius: float
    status: str
    image: Tensor
    heat: Tensor | None
    remark: str = ""


@dataclass(frozen=True, eq=False)
class Page:
    """What a page shows, all as plain text.

    Attributes:
        title: of the page.
        lead: a sentence below it.
        measures: of all images, in few characters.
        facts: of the model and the certificates.
        claim: of the certificates.
        radii: (N,) of all images, also of those that have no entry.
        epsilon_max: the limit that they were found under.
        accuracy: share of images that are classified correctly, None where nobody knows.
        entries: at most `SHOWN`.
        note: which images the entries are of.
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
    """The page as HTML, all text escaped; the browser is told to load nothing."""
    style, script = (
        resources.files("ibpcore.visualization.html").joinpath(f"page.{kind}").read_text()
        for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'"  # whatever else might slip in does not run
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(page.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#images">To the images</a>
<header>
<h1>{text(page.title)}</h1>
<p class="lead">{text(page.lead)}</p>
</header>
<main>
{_measures(page.measures)}
<div class="wide">
<section aria-labelledby="curve-head">
<h2 id="curve-head">How many, how far</h2>
{_figure(page)}
</section>
<section aria-labelledby="facts-head">
<h2 id="facts-head">The model and its certificates</h2>
<dl class="facts">
{_pairs(page.facts)}
</dl>
</section>
</div>
<section aria-labelledby="images-head">
<h2 id="images-head">Images</h2>
{_reading(page)}
{FORM}
{_table(page)}
</section>
</main>
<script>{script}</script>
</body>
</html>
"""


def text(plain: str) -> str:
    """`plain` as HTML, fit for attributes too."""
    return html.escape(printable(plain), quote=True)


def _pairs(facts: Facts) -> str:
    return "\n".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts)


def _measures(measures: Facts) -> str:
    tiles = "\n".join(f"<div>{_pairs([pair])}</div>" for pair in measures)
    return f'<dl class="measures">\n{tiles}\n</dl>'


def _reading(page: Page) -> str:
    stops = ", ".join(f"rgb{color}" for color in COLORS)
    return f"""<p>No change of any pixel by at most the radius changes the prediction of an image.
The radius is rounded down, so what stands here is certified too. It is 0 where a labelled image
is misclassified. The claim is <i>{text(page.claim)}</i>: {text(MEANINGS[page.claim])}.</p>
<details><summary>What the status says</summary>
<dl class="facts">
{_pairs([(status.replace("_", " "), says) for status, says in STATUSES.items()])}
</dl></details>
<p>The heatmap shows which pixels the certificate hangs on: how fast the certified margin worsens
if this one pixel may change by more than the radius. If it may change by a little <i>d</i> more,
a radius below the limit shrinks by its share of <i>d</i>. Each map has a scale of its own.</p>
<p class="scale"><span>0</span><i style="background: linear-gradient(to right, {stops})"></i>
<span>its largest</span></p>
<p class="note">{text(page.note)}</p>"""


FORM = """<form id="filter" hidden aria-label="Filter of the images">
<label>Text<input name="text" type="search" autocomplete="off"></label>
<label>Kind<select name="kind" autocomplete="off">
<option value="all">all images</option>
<option value="certified">certified</option>
<option value="none">not certified</option>
<option value="wrong">misclassified</option>
</select></label>
<label>Least radius, in 255ths<input name="least" type="number" min="0" step="any"
inputmode="decimal" autocomplete="off"></label>
<output name="count" aria-live="polite"></output>
</form>"""


def _table(page: Page) -> str:
    known = any(entry.label is not None for entry in page.entries)
    heads = ["Image", "Name", *["Label"] * known, "Prediction", "Radius", "Status"]
    columns = ['<th scope="col">Image</th>', '<th scope="col">Heatmap</th>']
    columns += [f'<th scope="col" data-sort>{head}</th>' for head in heads[1:]]
    rows = "\n".join(_row(entry, known, page.epsilon_max) for entry in page.entries)
    # The roles of a table: a narrow screen lays it out as something else, and they would be lost.
    return f"""<table id="images" role="table" aria-labelledby="images-head">
<thead role="rowgroup"><tr role="row">{"".join(columns)}</tr></thead>
<tbody role="rowgroup">
{rows}
</tbody>
</table>""".replace('<th scope="col"', '<th scope="col" role="columnheader"')


def _row(entry: Entry, known: bool, epsilon_max: float) -> str:
    wrong = entry.label is not None and entry.label != entry.prediction
    kinds = ["certified" if entry.radius > 0 else "none", *["wrong"] * wrong]
    status = entry.status.replace("_", " ")
    if entry.remark:
        status += f", {entry.remark}"
    words = " ".join([entry.name, entry.label or "", entry.prediction, status])
    cells = [
        f'<td class="picture" role="cell">{_image(entry.image, f"image {entry.name}")}</td>',
        f'<td class="picture" role="cell">{_heatmap(entry)}</td>',
        f'<th scope="row" role="rowheader">{text(entry.name)}</th>',
    ]
    if known:
        cells.append(_cell("Label", "-" if entry.label is None else text(entry.label)))
    prediction = text(entry.prediction)
    cells.append(_cell("Prediction", f'<b class="none">{prediction}</b>' if wrong else prediction))
    cells.append(_radius(entry.radius, epsilon_max))
    cells.append(_cell("Status", text(status)))
    return (
        f'<tr role="row" data-kind="{" ".join(kinds)}" data-radius="{entry.radius!r}"'
        f' data-text="{text(words)}">{"".join(cells)}</tr>'
    )


def _cell(head: str, content: str) -> str:
    return f'<td role="cell" data-head="{head}">{content}</td>'


def _radius(radius: float, epsilon_max: float) -> str:
    share = min(1.0, radius / epsilon_max)
    look = "full" if share == 1 else "none" if radius == 0 else ""
    return (
        f'<td class="radius" role="cell" data-head="Radius" data-value="{radius!r}">'
        f'<b class="{look}">{rounded_down(radius, 255, 3)}/255</b>'
        f" <small>{rounded_down(radius)} of [0, 1]</small>"
        '<span class="bar" aria-hidden="true">'
        f'<i style="width: {100 * share:.1f}%"></i></span></td>'
    )


def _image(image: Tensor, alt: str) -> str:
    height, width = image.shape[-2:]
    small = ' class="small"' if max(height, width) < SMALL else ""
    return (
        f'<img{small} width="{width}" height="{height}" alt="{text(alt)}" src="{data_uri(image)}">'
    )


def _heatmap(entry: Entry) -> str:
    if entry.heat is None:
        return '<span class="note">none: no certificate</span>'
    row, column, share = peak(entry.heat)
    where = f"most at row {row + 1}, column {column + 1}, {100 * share:.1f} % of the whole"
    return _image(colored(entry.heat), f"heatmap of {entry.name}: {where}")


def _figure(page: Page) -> str:
    ends, heights = steps(page.radii, page.epsilon_max)
    kind = "share of images certified" if page.accuracy is None else "certified accuracy"
    first = "" if page.accuracy is None else f" The dot is the accuracy, {percent(page.accuracy)}."
    return f"""<figure>
{curve(ends, heights, page.epsilon_max, page.accuracy, kind)}
<figcaption>{text(kind.capitalize())}: {", ".join(_quoted(page))}.{first}</figcaption>
</figure>"""


def _quoted(page: Page) -> list[str]:
    """Shares at three radii of few digits, and at the limit."""
    limit = 255 * page.epsilon_max
    inner = [float(f"{limit * part:.3g}") for part in (0.25, 0.5, 0.75)]
    radii = {f"{number:g}": number / 255 for number in inner} | {
        in_digits(page.epsilon_max, 255, 4): page.epsilon_max
    }
    return [
        f"{percent(certified_accuracy(page.radii, radius))} at {name}/255"
        for name, radius in radii.items()
    ]


def percent(share: float) -> str:
    """As everywhere: 62.21 %."""
    return f"{100 * share:.2f} %"
