"""Pixels of image files: one rule for 16 bits a channel, and a word for each change."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibpcore import UserError
from ibpcore.data.decoding import read_image
from ibpcore.data.png import read_deep_png

COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
STARTS = {1: (0, 0), 2: (0, 4), 3: (4, 0), 4: (0, 2), 5: (2, 0), 6: (0, 1), 7: (1, 0)}
STEPS = {1: (8, 8), 2: (8, 8), 3: (8, 4), 4: (4, 4), 5: (4, 2), 6: (2, 2), 7: (2, 1)}


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def nearest(left, up, corner):
    """The Paeth predictor of the specification."""
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))


def scanlines(levels, rng):
    """Filtered lines of big-endian 16-bit levels, byte by byte, each with a random filter."""
    height, _, channels = levels.shape
    size = 2 * channels
    raw = [levels[y].astype(">u2").tobytes() for y in range(height)]
    for y in range(height):
        kind = int(rng.integers(5))
        line = bytearray([kind])
        for i, value in enumerate(raw[y]):
            left = raw[y][i - size] if i >= size else 0
            up = raw[y - 1][i] if y else 0
            corner = raw[y - 1][i - size] if y and i >= size else 0
            guess = (0, left, up, (left + up) // 2, nearest(left, up, corner))[kind]
            line.append((value - guess) % 256)
        yield bytes(line)


def png(levels, interlaced=False, extra=b"", seed=0):
    """(H, W, C) levels of 16 bits as the bytes of a PNG file."""
    rng = np.random.default_rng(seed)
    height, width, channels = levels.shape
    parts = [levels]
    if interlaced:
        places = [(STARTS[n], STEPS[n]) for n in range(1, 8)]
        parts = [levels[y::dy, x::dx] for (y, x), (dy, dx) in places]
        parts = [part for part in parts if part.size]
    pixels = zlib.compress(b"".join(line for part in parts for line in scanlines(part, rng)))
    head = struct.pack(">2I5B", width, height, 16, COLOR_TYPES[channels], 0, 0, int(interlaced))
    body = [chunk(b"IDAT", pixels[:50]), chunk(b"IDAT", pixels[50:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + b"".join(body)


def random_levels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)


def eight_bits(levels):
    """Nearest of the 256 levels, in fractions."""
    return np.array([round(int(v) * 255 / 65535) for v in levels.flat]).reshape(levels.shape)


# 16 bits


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(9, 13), (1, 1), (1, 7), (7, 1), (3, 2), (8, 8)])
def test_every_bit_is_read(tmp_path, channels, interlaced, size):
    """Pillow is the judge of the upper eight bits, and of the lower ones the writer above."""
    levels = random_levels((*size, channels), seed=channels)
    content = png(levels, interlaced, seed=channels)
    assert np.array_equal(read_deep_png(content), levels)
    (tmp_path / "a.png").write_bytes(content)
    if channels >= 3:
        with Image.open(tmp_path / "a.png") as file:
            assert np.array_equal(np.asarray(file), levels >> 8)


@pytest.mark.parametrize("network", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_one_rule_for_all_deep_images(tmp_path, channels, network):
    """Grey and colour, with and without transparency, are rounded to the nearest level."""
    levels = random_levels((11, 7, channels))
    steps = [0, 1, 127, 128, 129, 255, 256, 257, 385, 386, 0x80FF, 0x81FF, 0xFF7F, 0xFF80, 65535]
    levels[0, :7, 0], levels[1, :7, 0], levels[2, 0, 0] = steps[:7], steps[7:14], steps[14]
    colors = levels[..., : 3 if channels >= 3 else 1]
    if network == 1 and channels >= 3:
        colors[:] = colors[..., :1]
    (tmp_path / "a.png").write_bytes(png(levels))
    pixels, changes = read_image(tmp_path / "a.png", None, network)
    expected = np.broadcast_to(eight_bits(colors), (11, 7, 3))
    assert np.array_equal(pixels, expected if network == 3 else expected[..., 0])
    dropped = ("transparency dropped",) if channels in (2, 4) else ()
    assert changes == ("16 bits to 8", *dropped)


def test_deep_grey_of_pillow(tmp_path):
    levels = random_levels((31, 17))
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", None, 1).pixels, eight_bits(levels))


@pytest.mark.parametrize(
    ("channels", "body"),
    [
        *((1, struct.pack(">H", 7)), (3, struct.pack(">3H", 7, 8, 9))),
        *((1, struct.pack(">H", 0x80FF)), (3, struct.pack(">3H", 0x80FF, 0xFFFF, 0))),
    ],
)
def test_a_transparent_colour(tmp_path, channels, body):
    levels = random_levels((4, 4, channels))
    levels[0, 0] = struct.unpack(f">{channels}H", body)
    (tmp_path / "a.png").write_bytes(png(levels, extra=chunk(b"tRNS", body)))
    pixels, changes = read_image(tmp_path / "a.png", None)
    assert np.array_equal(pixels, np.broadcast_to(eight_bits(levels), (4, 4, 3)))
    assert changes == ("16 bits to 8", "transparency dropped")


def test_deep_images_are_resized_after_rounding(tmp_path):
    levels = np.full((20, 10, 3), 0x81FF, np.uint16)
    (tmp_path / "a.png").write_bytes(png(levels))
    pixels, changes = read_image(tmp_path / "a.png", 5)
    assert (pixels == 129).all()
    assert changes == ("16 bits to 8", "resized")


def ppm(kind, largest):
    return f"{kind} 2 2 {largest}\n".encode() + bytes(24)


@pytest.mark.parametrize("name", ["grey.tif", "rgb.tif", "int.tif", "float.tif", "5.ppm", "6.ppm"])
def test_deep_images_of_other_formats_are_refused(tmp_path, name):
    """Pillow would cut them, or make white of all above 255, without a word."""
    path = tmp_path / name
    modes = {"grey.tif": "I;16", "int.tif": "I", "float.tif": "F"}
    if name in modes:
        Image.new(modes[name], (6, 5), 4000).save(path)
    elif name == "rgb.tif":
        path.write_bytes(deep_tiff())
        with Image.open(path) as file:
            assert file.mode == "RGB", "and not a word of its depth"
    else:
        path.write_bytes(ppm(f"P{name[0]}", 65535))
    with pytest.raises(UserError, match=rf"cannot read the image .*{name}: .* more than 8 bits"):
        read_image(path, None)


def deep_tiff():
    """2 x 1 pixels of RGB with 16 bits a channel."""
    pixels, bits = bytes(12), struct.pack("<3H", 16, 16, 16)
    entries = [
        *((256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8 + len(pixels)), (259, 3, 1, 1)),
        *((262, 3, 1, 2), (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, 1)),
        (279, 4, 1, len(pixels)),
    ]
    table = b"".join(struct.pack("<2H2I", *entry) for entry in entries)
    start = 8 + len(pixels) + len(bits)
    head = b"II*\0" + struct.pack("<I", start)
    return head + pixels + bits + struct.pack("<H", len(entries)) + table + bytes(4)


def test_levels_with_a_sign_are_refused(tmp_path):
    """Pillow would read -1 as 255 without a word."""
    path = tmp_path / "signed.tif"
    for sample_format in (1, 2):
        Image.new("L", (6, 5), 255).save(path, tiffinfo={339: sample_format})
        with Image.open(path) as file:
            assert (file.mode, file.tag_v2[339]) == ("L", (sample_format,))
        if sample_format == 1:
            assert read_image(path, None).changes == ()
    with pytest.raises(UserError, match=r"cannot read the image .*signed.tif: .* have a sign"):
        read_image(path, None)


@pytest.mark.parametrize("largest", [1, 15, 255])
def test_few_levels_are_read(tmp_path, largest):
    (tmp_path / "a.ppm").write_bytes(ppm("P6", largest))
    assert read_image(tmp_path / "a.ppm", None).changes == ()


def test_the_depth_of_avif(tmp_path):
    """Pillow reads 8 bits of any."""
    path = tmp_path / "a.avif"
    Image.new("RGB", (16, 16), (9, 9, 9)).save(path)
    assert read_image(path, None).changes == ()
    content = bytearray(path.read_bytes())
    content[content.index(b"av1C") + 6] |= 0x40
    levels = content.index(b"pixi") + 9  # the depth of each channel
    content[levels : levels + 3] = [10, 10, 10]
    path.write_bytes(content)
    with pytest.raises(UserError, match="more than 8 bits a channel, which is read from PNG only"):
        read_image(path, None)


def test_a_format_of_unknown_depth_is_refused(tmp_path):
    """Whatever the name says."""
    Image.new("RGB", (6, 5)).save(tmp_path / "a.png", format="SGI")
    with pytest.raises(UserError, match=r"a\.png: its format SGI is none of AVIF, BMP, .*PNG"):
        read_image(tmp_path / "a.png", None)


# Damage


WHOLE = png(random_levels((6, 5, 3)))
START = WHOLE.index(b"IDAT") - 4


def with_pixels(data):
    return WHOLE[:START] + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (WHOLE[:40], ""),
        (WHOLE[: START + 30], ""),
        (WHOLE[:-17] + bytes([WHOLE[-17] ^ 1]) + WHOLE[-16:], "checksum is wrong"),
        (with_pixels(bytes(6 * 31 - 1)), "pixels of the PNG file are cut"),
        (with_pixels(b"\x05" + bytes(6 * 31 - 1)), "unknown filter"),
        (WHOLE[:START] + chunk(b"IEND", b""), ""),
    ],
)
def test_damaged_deep_images(tmp_path, content, says):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read the image .*a\.png: .*{says}"):
        read_image(tmp_path / "a.png", None)


def test_what_is_no_deep_png():
    for content, says in ((b"GIF89a", "not a PNG file"), (shallow(), "not .* of 16 bits")):
        with pytest.raises(ValueError, match=says):
            read_deep_png(content)


def shallow():
    head = chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0))
    return WHOLE[:8] + head + chunk(b"IEND", b"")


# Other changes


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "changes"),
    [
        ("L", 7, ".png", ()),
        ("1", 1, ".png", ()),
        ("RGB", (1, 1, 1), ".png", ()),
        ("RGB", (1, 2, 3), ".png", ("colour to grey",)),
        ("RGBA", (1, 1, 1, 255), ".png", ()),
        ("RGBA", (1, 1, 1, 254), ".png", ("transparency dropped",)),
        ("LA", (1, 254), ".png", ("transparency dropped",)),
        ("RGBA", (9, 9, 9, 9), ".webp", ("transparency dropped",)),
        ("CMYK", (9, 9, 9, 9), ".tif", ("CMYK to RGB",)),
    ],
)
def test_changes_are_named(tmp_path, mode, color, suffix, changes):
    Image.new(mode, (6, 5), color).save(tmp_path / f"a{suffix}", lossless=True)
    assert read_image(tmp_path / f"a{suffix}", None, 1).changes == changes


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 255])])
def test_palettes(tmp_path, transparency):
    """Their colours have 8 bits, whatever else the file says."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    known = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **known)
    pixels, changes = read_image(tmp_path / "a.png", None)
    assert pixels.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert changes == (("transparency dropped",) if known else ())


@pytest.mark.parametrize("suffix", [".gif", ".tiff", ".png", ".webp"])
def test_frames_that_are_left_out(tmp_path, suffix):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200, 90)]
    path: Path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    pixels, changes = read_image(path, None)
    assert (pixels == 10).all()
    assert changes == ("first of 3 frames",)
