"""Pages: well-formed, self-contained, hostile names escaped; and tried in a browser."""

import base64
import hashlib
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from helpers import run_ibp, snapshot
from PIL import Image

from ibpcore import RadiusStatus
from ibpcore.certification.certificates import MEANINGS, UNCHECKED
from ibpcore.certification.formatting import certified_texts
from ibpcore.certification.metrics import acr
from ibpcore.certification.soundness.network import CLAIMS as PROVED
from ibpcore.visualization.html import contents
from ibpcore.visualization.html.curve import BOTTOM, LEFT, RIGHT, SVG_HEIGHT, SVG_WIDTH, TOP, ticks
from ibpcore.visualization.html.image_table import Entry
from ibpcore.visualization.html.page import STATUSES, Page, render

HOSTILE = "\"><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
VOID = {"meta", "link", "img", "input", "path", "circle", "br"}
RADII = [0.1, 0.0, 0.02, 0.05, 0.0, 0.1, 0.031]


def entry(number, radius, label="cat", prediction="cat", name=None, status="converged"):
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8, generator=generator)
    heat = torch.rand(6, 5, generator=generator) if radius > 0 else None
    status = status if radius > 0 else "misclassified"
    return Entry(name or f"{number}.png", label, prediction, radius, status, image, heat)


def small_page(**changes):
    """Seven images, two of them wrong, one named to do harm."""
    entries = [
        entry(0, RADII[0], status="epsilon_max", name="zebra.png"),
        entry(1, RADII[1], prediction="dog"),
        entry(2, RADII[2], label=None, prediction="dog", name="img10.png"),
        entry(3, RADII[3], label="dog", prediction="dog", name="img9.png"),
        entry(4, RADII[4], label=HOSTILE, prediction="cat"),
        entry(5, RADII[5], name=HOSTILE, status="epsilon_max"),
        entry(6, RADII[6], label=HOSTILE, prediction=HOSTILE),
    ]
    given = {
        "title": f"Certificates of {HOSTILE}",
        "lead": "By hand",
        "measures": [("images", "7"), ("accuracy", "71.43 %")],
        "facts": [("model", f"/tmp/{HOSTILE}"), ("fingerprint", 64 * "f")],
        "claim": "real",
        "radii": torch.tensor(RADII).double(),
        "epsilon_max": 0.1,
        "accuracy": 5 / 7,
        "entries": entries,
        "note": "All 7 images are shown.",
    }
    return Page(**given | changes)


class Outline(HTMLParser):
    """Every start tag with its attributes; fails where tags do not nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), "an attribute twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def rows(self):
        """Radius and alternative texts of the pictures in each row of the table."""
        found = []
        for tag, attributes in self.tags:
            if "data-radius" in attributes:
                found.append((float(attributes["data-radius"]), []))
            elif tag == "img":
                found[-1][1].append(attributes["alt"])
        return found

    def text(self):
        return " ".join(" ".join(self.words).split())


def test_tags_nest_and_names_are_text():
    found = Outline(render(small_page()))
    assert len(found.all("script")) == 1
    assert len(found.all("img")) == 2 * 7 - 2
    # Title and heading, the model, three labels and predictions, and a name.
    assert found.text().count(HOSTILE) == 2 + 1 + 3 + 1
    attributes = {name for _, attributes in found.tags for name in attributes}
    assert not any(name.startswith("on") for name in attributes)


def test_nothing_is_loaded_from_elsewhere():
    page = render(small_page())
    for tag, attributes in Outline(page).tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name, "#")
            assert value.startswith(("data:", "#")), (tag, name, value[:50])
    style = re.search("<style>(.*)</style>", page, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    rest = re.sub(r"data:[\w/;,+=]*", "", page)
    assert not re.search(r"https?:|//[a-z]", rest.replace("// Sorts", ""))


def test_only_this_script_may_run():
    page = render(small_page())
    script = re.search("<script>(.*)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in Outline(page).all("meta") if "http-equiv" in m]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'"
    )


def test_it_can_be_read_without_eyes_or_mouse():
    """Names for everything that is no text, headings in order, heads of rows and columns."""
    page = render(small_page())
    found = Outline(page)
    assert found.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all(
        "meta"
    )
    assert all(image["alt"] for image in found.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in found.all("svg"))
    heads = found.all("th")
    assert [head["scope"] for head in heads] == ["col"] * 7 + ["row"] * 7
    assert [tag for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * 3
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        target = attributes.get("aria-labelledby") or attributes.get("href", "#images")[1:]
        assert target in ids or target == "ata:,"
    # Each control within its label.
    assert len(re.findall(r"<label>[^<]+<(input|select)", page)) == 3


def test_rows_say_what_is_certified():
    found = Outline(render(small_page()))
    rows = [row for row in found.all("tr") if "data-kind" in row]
    assert [float(row["data-radius"]) for row in rows] == RADII
    kinds = ["certified", "none wrong", *["certified"] * 2, "none wrong", *["certified"] * 2]
    assert [row["data-kind"] for row in rows] == kinds
    for radius in RADII:
        assert certified_texts(0.1, radius)[0] in found.text()
    assert found.text().count("none: no certificate") == 2
    texts = " ".join(image["alt"] for image in found.all("img"))
    assert "heatmap of img9.png: most at row " in texts


def test_images_are_in_it_byte_by_byte():
    page = small_page()
    images = [image for image in Outline(render(page)).all("img") if "heatmap" not in image["alt"]]
    for image, given in zip(images, page.entries, strict=True):
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert (pixels == given.image.permute(1, 2, 0).numpy()).all()
        assert (image["width"], image["height"]) == ("5", "6")


def test_unlabelled_images_have_no_column_of_labels():
    entries = [entry(0, 0.05, label=None)]
    page = render(small_page(entries=entries, accuracy=None, radii=torch.tensor([0.05])))
    assert len([h for h in Outline(page).all("th") if h["scope"] == "col"]) == 6
    assert "<circle" not in page
    assert "Certified images: " in page


def test_every_claim_and_status_has_its_words():
    assert MEANINGS.keys() == {UNCHECKED, *PROVED}
    assert STATUSES.keys() == {status.name.lower() for status in RadiusStatus}
    for claim in MEANINGS:
        assert MEANINGS[claim] in Outline(render(small_page(claim=claim))).text()


# The curve


def drawn(page):
    """Ends and percent of the steps, off the path."""
    path = re.search('class="line" d="([^"]*)"', page)[1]
    moves = [(m[0], float(m[1:])) for m in re.findall("[VH][0-9.]+", path)]
    assert [kind for kind, _ in moves] == ["V", "H"] * (len(moves) // 2)
    heights = [100 * (SVG_HEIGHT - BOTTOM - y) / (SVG_HEIGHT - BOTTOM - TOP) for _, y in moves[::2]]
    ends = [(x - LEFT) / (SVG_WIDTH - LEFT - RIGHT) for _, x in moves[1::2]]
    return ends, heights


def area(page):
    ends, heights = drawn(page)
    return sum(h * (b - a) for a, b, h in zip([0, *ends], ends, heights, strict=False)) / 100


@pytest.mark.parametrize("count", [7, 20_000])
def test_the_area_under_the_curve_is_the_acr(count):
    """Ends that lie closer than the eye can see are drawn as one."""
    radii = torch.tensor(RADII).double()
    if count > 7:
        radii = (torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.2).double()
        radii = (radii - 0.05).clamp(0, 0.1)
    page = render(small_page(radii=radii))
    assert area(page) == pytest.approx(acr(radii, 0.1), abs=1e-3)
    ends, heights = drawn(page)
    assert ends == sorted(set(ends))
    assert heights == sorted(heights, reverse=True)
    assert len(ends) < 4000


def test_the_curve_by_hand():
    ends, heights = drawn(render(small_page()))
    assert ends == pytest.approx([0.2, 0.31, 0.5, 1], abs=1e-3)
    assert heights == pytest.approx([500 / 7, 400 / 7, 300 / 7, 200 / 7], abs=0.1)
    shares = {"0.025": 57.14, "0.05": 42.86, "0.075": 28.57, "0.1": 28.57}
    said = ", ".join(f"{share} % at radius {radius}" for radius, share in shares.items())
    text = Outline(render(small_page())).text()
    assert f"Certified accuracy: {said}. The dot is the accuracy, 71.43 %." in text


def test_radii_have_one_unit():
    """255ths with the decimal beside, or decimals: in curve, table, form and caption."""
    page = render(small_page())
    assert "255" not in Outline(page).text()
    assert "radius (pixels in [0, 1])</text>" in page
    levels = render(small_page(epsilon_max=26 / 255))
    text = Outline(levels).text()
    assert "radius (255ths)</text>" in levels
    assert "28.57 % at radius 13/255" in text
    assert "Minimum radius (255ths)" in text
    assert "12.750/255 0.050000 in [0, 1]" in text


@pytest.mark.parametrize("limit", [1e-6, 0.02, 1, 2, 8.8, 25.5, 102, 255])
def test_ticks_are_round(limit):
    found = ticks(limit)
    assert found[0] == 0
    assert limit * 0.7 < found[-1] <= limit
    assert 5 <= len(found) - 1 <= 12
    assert found[1] == pytest.approx(float(f"{found[1]:.0e}"))


# From the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    tiny = ("--epochs", 2, "--limit-train", 320, "--limit-test", 30, "--width", 2, "--hidden", 8)
    assert run_ibp("train", *tiny, "--device", "cpu", "--out", folder)[::2] == (0, "")
    return folder


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_certificates_have_heatmaps(found):
    certified = [radius > 0 for radius, _ in found.rows()]
    assert any(certified)
    assert [len(alts) == 2 for _, alts in found.rows()] == certified


@pytest.mark.usefixtures("_elsewhere")
def test_a_page_of_a_test_set(run, monkeypatch):
    monkeypatch.setattr(contents, "SHOWN", 20)
    given = ("--html", "page.html", "--out", "out", "--bound", "crown-ibp", "--no-clip")
    code, _, err = run_ibp("certify", run, *given)
    assert (code, err) == (0, "")
    found = Outline(Path("page.html").read_text())
    assert len(found.rows()) == 20
    assert_certificates_have_heatmaps(found)
    text = found.text()
    assert "20 of 30 images are shown, spread over all; figures are of all" in text
    assert "certified by crown-ibp" in text
    assert "pixels may leave [0, 1]" in text
    assert "certificates.csv lists all" in text
    assert "trained on UCI optical digits" in text
    assert re.search("fingerprint [0-9a-f]{64} ", text)


@pytest.mark.usefixtures("_elsewhere")
def test_a_page_of_certificates_that_are_there(run):
    """The same as if it had been asked for at once, and nothing else is written."""
    code, _, err = run_ibp("certify", run, "--html", "first.html", "--out", "out")
    assert (code, err) == (0, "")
    before = snapshot(Path("out"))
    code, _, err = run_ibp("certify", "--resume", "out", "--html", "second.html")
    assert (code, err) == (0, "")
    assert Path("first.html").read_text() == Path("second.html").read_text()
    assert snapshot(Path("out")) == before


@pytest.mark.usefixtures("_elsewhere")
def test_a_page_of_pictures(run, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("3/<b>bold&.png", "pics/plain.png", "pics/" + os.fsdecode(b"\xff.png")):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(name)
    code, _, err = run_ibp("predict", ".", "--model", run, "--html", "page.html")
    assert (code, err) == (0, "")
    found = Outline(Path("page.html").read_text())
    text = found.text()
    assert_certificates_have_heatmaps(found)
    assert "3/<b>bold&.png" in text
    assert r"pics/\udcff.png" in text
    assert "All 3 images are shown." in text
    assert "labelled 1" in text
    assert not any("old&" in name for _, attributes in found.tags for name in attributes)


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(tab, tmp_path):
    """The tab with the small page in it; at the end it must not have complained."""
    (tmp_path / "page.html").write_text(render(small_page()))
    tab.complaints.clear()
    tab.loaded.clear()
    tab.open(tmp_path / "page.html", 1200)
    yield tab
    assert tab.complaints == []
    own = (tmp_path / "page.html").as_uri()
    assert [url for url in tab.loaded if not url.startswith("data:") and url != own] == []


VISIBLE = "[...document.querySelectorAll('tbody tr')].filter(r => r.checkVisibility())"
BUTTONS = "[...document.querySelectorAll('thead button')]"
FOCUS = "document.activeElement.name || document.activeElement.textContent"
NAMES = f"{VISIBLE}.map(r => r.querySelector('th').textContent)"


def test_hostile_names_stay_names(page):
    assert page.evaluate("document.title") == f"Certificates of {HOSTILE}"
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert page.evaluate(NAMES)[5] == HOSTILE
    assert page.evaluate("[...document.images].every(i => i.naturalWidth === 5)")


def test_a_click_sorts_and_another_turns_it_round(page):
    def click(head):
        page.evaluate(f"{BUTTONS}.find(b => b.textContent === '{head}').click()")
        return page.evaluate("[...document.querySelectorAll('[aria-sort]')].map(h => h.ariaSort)")

    radii = f"{VISIBLE}.map(r => Number(r.dataset.radius))"
    assert click("Radius") == ["ascending"]
    assert page.evaluate(radii) == sorted(RADII)
    assert click("Radius") == ["descending"]
    assert page.evaluate(radii) == sorted(RADII, reverse=True)
    assert click("Name") == ["ascending"]
    names = page.evaluate(NAMES)
    assert names.index("img9.png") < names.index("img10.png"), "numbers in names count"
    assert names[-1] == "zebra.png"
    heads = page.evaluate(f"{BUTTONS}.map(b => b.textContent)")
    assert heads == ["Name", "Label", "Prediction", "Radius", "Status"]


@pytest.mark.parametrize("width", [375, 1200])
def test_filters(page, tmp_path, width):
    page.open(tmp_path / "page.html", width)

    def only(**values):
        for name in ("text", "kind", "least"):
            value = values.get(name, "all" if name == "kind" else "")
            page.evaluate(f"document.forms[0].elements.{name}.value = {value!r}")
        page.evaluate("document.forms[0].dispatchEvent(new Event('input', {bubbles: true}))")
        said = page.evaluate("document.querySelector('output').value")
        return page.evaluate(f"{VISIBLE}.length"), said

    assert only() == (7, "7 of 7 images")
    assert only(text="IMG") == (2 + 3, "5 of 7 images")  # the hostile ones hold it too
    assert only(text="img9") == (1, "1 of 7 images")
    assert only(text="no such") == (0, "0 of 7 images")
    assert only(kind="certified")[0] == 5
    assert only(kind="none")[0] == only(kind="wrong")[0] == 2
    assert only(least="0.02")[0] == 5
    assert only(least="0.05")[0] == 3
    assert only(least="0.05", text="zebra", kind="certified")[0] == 1
    (tmp_path / "page.html").write_text(render(small_page(epsilon_max=26 / 255)))
    page.open(tmp_path / "page.html", width)
    assert only(least="12.75")[0] == 3, "0.05 is 12.75/255"
    assert only(least="12.76")[0] == 2


def test_without_javascript_the_table_stands(page, tmp_path):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(tmp_path / "page.html", 1200)
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.evaluate(f"{VISIBLE}.length") == 7
    assert not page.evaluate("document.forms[0].checkVisibility()")
    assert page.evaluate(f"{BUTTONS}.length") == 0
    assert page.evaluate("document.querySelector('thead').textContent").startswith("ImageHeatmap")


def test_by_keyboard(page):
    """From the top: to the images, the filter, then the heads of the table."""
    seen = []
    for _ in range(9):
        page.press("Tab")
        seen.append(page.evaluate(FOCUS))
        if seen[-1] == "text":
            page.type("cat")
    assert seen[0] == "To the images"
    assert seen[2:] == ["text", "kind", "least", "Name", "Label", "Prediction", "Radius"]
    assert page.evaluate(f"{VISIBLE}.length") == 4
    page.press("Enter", "\r")
    assert page.evaluate("document.querySelector('[aria-sort]').textContent") == "Radius"
    radii = page.evaluate(f"{VISIBLE}.map(r => Number(r.dataset.radius))")
    assert radii == sorted(radii)
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


ENLARGED = "document.querySelector('dialog[open]')"


@pytest.mark.parametrize("width", [320, 1200])
def test_pictures_are_enlarged(page, tmp_path, width):
    """By a click; the next one anywhere ends it. So does the key Escape, after Enter."""
    page.open(tmp_path / "page.html", width)
    picture = "document.querySelector('td button')"
    alt = page.evaluate(f"{picture}.firstChild.alt")
    small = page.evaluate(f"{picture}.getBoundingClientRect().width")
    for key in ("", "Enter"):
        page.evaluate(f"{picture}.focus()")
        if key:
            page.press(key, "\r")
        else:
            page.evaluate(f"{picture}.click()")
        assert page.evaluate(f"{ENLARGED}.querySelector('figcaption').textContent") == alt
        box = "querySelector('img').getBoundingClientRect()"
        assert page.evaluate(f"{ENLARGED}.{box}.width") > 1.5 * small
        assert page.evaluate(f"{ENLARGED}.{box}.right") <= width
        assert page.evaluate("document.activeElement.textContent") == "Close"
        if key:
            page.press("Escape")
        else:
            page.evaluate(f"{ENLARGED}.click()")
        assert page.evaluate(ENLARGED) is None
        assert page.evaluate(f"document.activeElement === {picture}")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_it_fits_and_can_be_read(page, tmp_path, width, dark):
    """Nothing sticks out, letters are large enough, and stand out from what is behind them."""
    page.open(tmp_path / "page.html", width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('td, th, dd, p, h1, input')].every("
        f"e => e.getBoundingClientRect().right <= {width})"
    )
    assert page.evaluate(SMALLEST) >= 12
    assert page.evaluate(CONTRAST) >= 4.5, "as WCAG 2 asks for text"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


TEXTS = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && !e.closest('svg, .skip') && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))"""
SMALLEST = f"Math.min(...{TEXTS}.map(e => parseFloat(getComputedStyle(e).fontSize)))"
CONTRAST = f"""(() => {{
  const light = (color) => {{
    const [r, g, b] = color.match(/[0-9.]+/g).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }};
  const behind = (e) => {{
    const color = e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)";
    return color === "rgba(0, 0, 0, 0)" ? behind(e.parentElement) : color;
  }};
  return Math.min(...{TEXTS}.map((e) => {{
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }}));
}})()"""


def test_the_accessibility_tree_has_the_table(page, tmp_path):
    """On a phone too, where it is no longer laid out as one."""
    for width in (375, 1200):
        page.open(tmp_path / "page.html", width)
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        page.call("Accessibility.disable")
        seen = [node for node in nodes if not node["ignored"]]
        roles = [node["role"]["value"] for node in seen]
        assert roles.count("table") == 1
        assert roles.count("row") == 8
        assert roles.count("rowheader") == 7
        assert roles.count("cell") == 7 * 6
        assert roles.count("columnheader") >= 5
        pictures = [node for node in seen if node["role"]["value"] in ("image", "img", "button")]
        # The curve, those that are buttons, the heads and the images in these.
        assert len(pictures) >= 12 + 1
        assert all(node["name"]["value"] for node in pictures)
