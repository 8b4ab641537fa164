"""Images from files as a viewer shows them, or refused in words."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from minisd.viewing.images import read_image


def values(image):
    return np.asarray(image).astype(int)


def colours(width=7, height=5, channels=3, dtype=np.uint8):
    high = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(
        0, high, (height, width, channels), dtype=dtype, endpoint=True
    )


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour_type, rows=b""):
    """A PNG file written by hand. colour_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "jpg", "ppm"])
def test_rgb_of_the_common_formats(tmp_path, suffix):
    flat = np.broadcast_to(colours(1, 1), (8, 8, 3)).copy()
    Image.fromarray(flat).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB" and np.abs(values(image) - flat).max() <= (
        6 if suffix in ("webp", "jpg") else 0
    )


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_become_eight(tmp_path, colour_type, channels):
    deep = colours(channels=channels, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(
        png(7, 5, 16, colour_type, [row.astype(">u2").tobytes() for row in deep])
    )
    level = deep / 257
    if channels in (2, 4):  # transparency on white
        level = 255 + (level[..., :-1] - 255) * deep[..., -1:] / 65535
    got = values(read_image(tmp_path / "a.png"))
    assert got.shape == (5, 7, 3) and np.abs(got - np.broadcast_to(level, got.shape)).max() <= 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_of_a_tiff_or_a_pgm(tmp_path, order):
    deep = colours(channels=1, dtype=np.uint16)[..., 0]
    image = Image.frombytes(
        "I;16" if order == "<" else "I;16B", (7, 5), deep.astype(f"{order}u2").tobytes()
    )
    image.save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 7 5 65535\n" + deep.astype(">u2").tobytes())
    for name in ("a.tif", "a.pgm"):
        got = values(read_image(tmp_path / name))
        assert (got == (deep / 257).round()[..., None]).all()


def test_transparency_is_laid_on_white(tmp_path):
    rgba = colours(channels=4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    assert np.abs(values(read_image(tmp_path / "rgba.png")) - expected).max() <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "hole.png", transparency=1)
    palette.save(tmp_path / "hole.gif", transparency=1)
    assert values(read_image(tmp_path / "opaque.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    for name in ("hole.png", "hole.gif"):
        assert values(read_image(tmp_path / name)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_it_upright(tmp_path, orientation):
    """Tag 274 says where the stored first row and column belong (Exif 2.32, 4.6.4)."""
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # the upper left quarter
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert (values(read_image(tmp_path / "a.png")) == upright).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_picture(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(values(read_image(tmp_path / f"a.{suffix}")) - [255, 0, 0]).max() <= 3


def test_one_pixel(tmp_path):
    Image.new("L", (1, 1), 7).save(tmp_path / "a.png")
    assert values(read_image(tmp_path / "a.png")).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.png", b"", "cannot identify image file"),
        ("text.png", b"not a picture", "cannot identify image file"),
        (
            "cut.png",
            png(64, 64, 8, 2, [os.urandom(192) for _ in range(64)])[:9000],
            "cannot be read as an image",
        ),
        ("no pixels.png", png(9, 9, 8, 2), "cannot be read as an image"),
        ("cut.jpg", None, "cannot be read as an image"),
        ("cut.webp", None, "cannot be read as an image"),
        ("cut.gif", None, "cannot be read as an image"),
        ("float.tif", None, "mode F has no known white"),
        ("deep.tif", None, "mode I has no known white"),
        ("huge.png", png(20000, 20000, 1, 0), "is too large: expected at most 89,478,485 pixels"),
        ("large.png", png(13000, 13000, 1, 0), "is too large: expected at most 89,478,485 pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, name, data, message):
    path = tmp_path / name
    if data is None and name.startswith("cut"):
        Image.fromarray(colours(64, 64)).save(path)
        data = path.read_bytes()[: path.stat().st_size // 2]
    if data is None:
        Image.new({"float.tif": "F", "deep.tif": "I"}[name], (4, 4), 70000).save(path)
    else:
        path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert (
        str(caught.value).startswith(str(path))
        and message in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(tmp_path)
