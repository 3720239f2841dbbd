"""The table of a page: an image a row, with its certificate and heatmap, and a form to filter."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ibpcore.certification.formatting import certified_texts, unit_of
from ibpcore.errors import printable
from ibpcore.inspection.heatmap import peak
from ibpcore.visualization.heatmaps import colored, data_uri

PIXELATED_BELOW = 128
"""Images of fewer pixels a side are enlarged without smoothing."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the table.

    Attributes:
        name: of the image.
        label: the name of its class, None if unknown.
        prediction: the name of the predicted class.
        radius: certified, in pixel units.
        status: a name of `RadiusStatus`, in lower case.
        image: (C, H, W) uint8.
        heat: (H, W), made by `ibpcore.inspection.heatmap.heat`; None without a certificate.
        remark: appended to the status.
    """

    name: str
    label: str | None
    prediction: str
    radius: float
    status: str
    image: Tensor
    heat: Tensor | None
    remark: str = ""


FORM = """<form id="filter" hidden data-scale="{scale}" aria-label="Filter of the images">
<label>Text<input name="text" type="search" autocomplete="off"></label>
<label>Kind<select name="kind" autocomplete="off">
<option value="all">all images</option>
<option value="certified">certified</option>
<option value="none">not certified</option>
<option value="wrong">misclassified</option>
</select></label>
<label>Minimum radius ({unit})<input name="least" type="number" min="0" step="any"
inputmode="decimal" autocomplete="off"></label>
<output name="count" aria-live="polite"></output>
</form>"""


def escaped(text: str) -> str:
    """Plain text as HTML, for elements and attributes."""
    return html.escape(printable(text), quote=True)


def table_of_images(entries: Sequence[Entry], epsilon_max: float) -> str:
    """The form and the table as HTML; `page.js` sorts and filters by the data attributes.

    Args:
        entries: the rows.
        epsilon_max: the limit of the radii, in pixel units: the full length of their bars.
    """
    known = any(entry.label is not None for entry in entries)
    heads = ["Name", *["Label"] * known, "Prediction", "Radius", "Status"]
    columns = ['<th scope="col">Image</th>', '<th scope="col">Heatmap</th>']
    columns += [f'<th scope="col" data-sort>{head}</th>' for head in heads]
    rows = "\n".join(_row(entry, known, epsilon_max) for entry in entries)
    # Explicit roles: the layout for narrow screens would remove those of a table.
    table = f"""<table id="images" role="table" aria-labelledby="images-head">
<thead role="rowgroup"><tr role="row">{"".join(columns)}</tr></thead>
<tbody role="rowgroup">
{rows}
</tbody>
</table>""".replace('<th scope="col"', '<th scope="col" role="columnheader"')
    unit = unit_of(epsilon_max)
    return f"{FORM.format(scale=unit.scale, unit=unit.name)}\n{table}"


def _row(entry: Entry, known: bool, epsilon_max: float) -> str:
    wrong = entry.label is not None and entry.label != entry.prediction
    kinds = ["certified" if entry.radius > 0 else "none", *["wrong"] * wrong]
    status = entry.status.replace("_", " ")
    if entry.remark:
        status += f", {entry.remark}"
    words = " ".join([entry.name, entry.label or "", entry.prediction, status])
    prediction = escaped(entry.prediction)
    cells = [
        f'<td class="picture" role="cell">{_image(entry.image, f"image {entry.name}")}</td>',
        f'<td class="picture" role="cell">{_heatmap(entry)}</td>',
        f'<th scope="row" role="rowheader">{escaped(entry.name)}</th>',
        *[_cell("Label", "-" if entry.label is None else escaped(entry.label))] * known,
        _cell("Prediction", f'<b class="none">{prediction}</b>' if wrong else prediction),
        _radius(entry.radius, epsilon_max),
        _cell("Status", escaped(status)),
    ]
    return (
        f'<tr role="row" data-kind="{" ".join(kinds)}" data-radius="{entry.radius!r}"'
        f' data-text="{escaped(words)}">{"".join(cells)}</tr>'
    )


def _cell(head: str, content: str) -> str:
    return f'<td role="cell" data-head="{head}">{content}</td>'


def _radius(radius: float, epsilon_max: float) -> str:
    share = min(1.0, radius / epsilon_max)
    look = "full" if share == 1 else "none" if radius == 0 else ""
    text, *decimal = certified_texts(epsilon_max, radius)
    beside = "".join(f" <small>{number} in [0, 1]</small>" for number in decimal)
    return (
        f'<td class="radius" role="cell" data-head="Radius" data-value="{radius!r}">'
        f'<b class="{look}">{text}</b>{beside}'
        '<span class="bar" aria-hidden="true">'
        f'<i style="width: {100 * share:.1f}%"></i></span></td>'
    )


def _image(image: Tensor, alt: str) -> str:
    height, width = image.shape[-2:]
    small = ' class="small"' if max(height, width) < PIXELATED_BELOW else ""
    size = f'width="{width}" height="{height}"'
    return f'<img{small} {size} alt="{escaped(alt)}" src="{data_uri(image)}">'


def _heatmap(entry: Entry) -> str:
    if entry.heat is None:
        return '<span class="note">none: no certificate</span>'
    row, column, share = peak(entry.heat)
    where = f"most at row {row + 1}, column {column + 1}, {100 * share:.1f} % of the sum"
    return _image(colored(entry.heat), f"heatmap of {entry.name}: {where}")
