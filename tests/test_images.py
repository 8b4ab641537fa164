"""Images from files as a viewer shows them, or refused in words."""

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

import minisd
from minisd.viewing.images import FORMATS, read_image
from minisd.viewing.profiles import from_srgb, to_srgb
from minisd.viewing.visualize import contact_sheet, has_letter, wrap


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


# colour profiles, written by hand (ICC.1:2004)

D50 = (0.9642, 1.0, 0.8249)
SRGB = np.array(  # linear sRGB -> XYZ, adapted to D50: the columns of its profile
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
P3 = np.array(  # Display P3, likewise
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space, tags, pcs=b"XYZ "):
    """A profile: header, table of tags, tags."""
    data, table = b"", b""
    start = 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"prtr", space, pcs)
    head += bytes(12) + b"acsp" + bytes(28) + fixed(*D50) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


TEXTS = {
    b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"a\0" + bytes(78),
    b"cprt": b"text" + bytes(4) + b"a\0",
    b"wtpt": b"XYZ " + bytes(4) + fixed(*D50),
}


def gamma(power):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * power))


def matrix_profile(columns, power):
    """linear = value ** power, XYZ = columns @ linear."""
    own = {
        name: b"XYZ " + bytes(4) + fixed(*columns[:, i])
        for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(power))
    return icc(b"RGB ", TEXTS | own | curves)


def grey_profile(power):
    return icc(b"GRAY", TEXTS | {b"kTRC": gamma(power)})


def cmyk_profile(lab):
    """A table with two points an ink: its 16 colours are lab[c, m, y, k], each of 8 bits."""
    line = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += 4 * line + lab.astype(np.uint8).tobytes() + 3 * line
    return icc(b"CMYK", TEXTS | {b"A2B0": table}, b"Lab ")


def encoded(linear):
    """sRGB's values 0 to 255 of linear light, cut to what it can show."""
    x = np.clip(linear, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("columns", "power"),
    [(P3, 2.2), (SRGB[:, ::-1], 2.2), (SRGB[:, [1, 2, 0]], 1.8), (SRGB, 1.0)],
    ids=["P3", "red and blue swapped", "rotated", "linear"],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "JPEG"])
def test_colours_of_a_profile_become_srgb(tmp_path, columns, power, mode):
    values_in = colours(40, 30)
    image = Image.fromarray(values_in)
    if mode == "P":
        image = image.quantize(64)
        values_in = np.asarray(image.convert("RGB"))
    elif mode == "JPEG":
        image = Image.fromarray(np.broadcast_to(colours(1, 1), (16, 16, 3)).copy())
        values_in = np.asarray(image)
    elif mode == "RGBA":
        image.putalpha(255)
    path = tmp_path / ("a.jpg" if mode == "JPEG" else "a.png")
    image.save(
        path,
        icc_profile=matrix_profile(columns, power),
        **({"quality": 100, "subsampling": 0} if mode == "JPEG" else {}),
    )
    linear = (values_in / 255.0) ** power
    expected = encoded(linear @ columns.T @ np.linalg.inv(SRGB).T)
    got = read_image(path)
    bar = 6 if mode == "JPEG" else 2
    assert got.mode == "RGB" and np.abs(values(got) - expected).max() <= bar
    assert np.abs(values(got) - values_in).max() > 9  # it is another image than without
    assert "icc_profile" not in got.info


def test_grey_of_a_profile(tmp_path):
    grey = colours(channels=1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png", icc_profile=grey_profile(1.8))
    expected = encoded((grey / 255.0) ** 1.8)[..., None]
    assert np.abs(values(read_image(tmp_path / "a.png")) - expected).max() <= 2
    alpha = np.stack([grey, np.full_like(grey, 255)], -1)
    Image.fromarray(alpha, "LA").save(tmp_path / "b.png", icc_profile=grey_profile(1.8))
    assert np.abs(values(read_image(tmp_path / "b.png")) - expected).max() <= 2


def test_inks_of_a_profile(tmp_path):
    """Pure inks and their overprints are points of the table; ink k is darker than none."""
    ink = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, 16).T
    lightness = np.prod(1 - 0.6 * ink, axis=1)
    lightness[ink[:, 3] == 1] = 0  # black is black: no black point is to be matched
    lab = np.stack([255 * lightness, 128 + 20 * (ink[:, 1] - ink[:, 0]), 128 + 20 * ink[:, 2]], -1)
    lab[lightness == 0, 1:] = 128
    image = Image.frombytes("CMYK", (16, 1), (255 * ink).astype(np.uint8).tobytes())
    image.save(tmp_path / "a.tif", icc_profile=cmyk_profile(lab.round()))
    L, a, b = (lab.round() * [100 / 255, 1, 1] - [0, 128, 128]).T
    f = np.stack([(L + 16) / 116 + a / 500, (L + 16) / 116, (L + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)).T * D50
    linear = xyz @ np.linalg.inv(SRGB).T
    got = values(read_image(tmp_path / "a.tif"))[0]
    inside = ((linear >= 0) & (linear <= 1)).all(1)
    assert inside.sum() >= 6 and np.abs(got - encoded(linear))[inside].max() <= 3
    plain = values(image.convert("RGB"))[0]
    assert np.abs(got - plain).max() > 50


def test_a_profile_that_says_srgb_changes_nothing_and_is_kept(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = colours()
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=profile)
    got = read_image(tmp_path / "a.png")
    assert (values(got) == rgb).all() and got.info["icc_profile"] == profile
    sd = minisd.load("shapes", device="cpu")
    big = got.resize((64, 64))
    big.info["icc_profile"] = profile
    [same] = sd.img2img(big, "a", strength=0.0)
    assert (values(same) == values(big)).all() and same.info["icc_profile"] == profile


@pytest.mark.parametrize(
    "profile", [b"none", grey_profile(2.0), matrix_profile(P3, 2)[:200], b"\0" * 200]
)
def test_profiles_that_cannot_be_used_are_told(tmp_path, profile):
    rgb = colours()
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match="colour profile cannot be used .* are taken as sRGB"):
        image = read_image(tmp_path / "a.png")
    assert (values(image) == rgb).all() and "icc_profile" not in image.info


# formats


def test_the_formats_are_a_short_list():
    Image.init()
    assert set(FORMATS) - {"AVIF"} <= set(Image.OPEN) and not {"EPS", "PSD", "WMF"} & set(FORMATS)
    if features.check("avif"):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 7), "red").save(buffer, "AVIF")
        assert "AVIF" in FORMATS


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\nshowpage\n"


def test_a_program_is_no_image(tmp_path, monkeypatch):
    """EPS, under any name, never reaches Ghostscript."""

    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    for name in ("a.eps", "a.png", "a.jpg"):
        (tmp_path / name).write_bytes(EPS)
        with pytest.raises(ValueError, match="cannot identify image file"):
            read_image(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_pipes_and_devices_do_not_hang(tmp_path):
    for name in ("a.png", "a.safetensors", "model_index.json"):
        os.mkfifo(tmp_path / name)
    code = "import minisd; from minisd.viewing.images import read_image as r"
    code += "\nfrom minisd.editing.blended import read_mask as mask"
    code += "\nfrom pathlib import Path\nfrom minisd.batch.rows import read_row"
    code += "\nsd = minisd.load('shapes', device='cpu')"
    row = json.dumps({"method": "img2img", "image": str(tmp_path / "a.png"), "prompt": "a"})
    calls = [
        f"r({str(tmp_path / 'a.png')!r})",
        f"mask({str(tmp_path / 'a.png')!r})",
        f"minisd.Inversion.load({str(tmp_path / 'a.safetensors')!r})",
        f"minisd.load({str(tmp_path / 'a.safetensors')!r})",
        "r('/dev/zero')",
        f"minisd.load({str(tmp_path)!r})",
        f"minisd.recipe({str(tmp_path / 'a.png')!r})",
        f"minisd.recipes.fingerprint(Path({str(tmp_path / 'a.png')!r}))",
        f"sd.add_embedding({str(tmp_path / 'a.safetensors')!r})",
        f"sd.merge({str(tmp_path / 'a.safetensors')!r})",
        "raise ValueError(read_row(1, " + repr(row) + ", {}).error)",
    ]
    lines = [f"try: {call}\nexcept ValueError as e: print(e)" for call in calls]
    run = [sys.executable, "-c", "\n".join([code, *lines])]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    told = done.stdout.splitlines()
    assert len(told) == len(calls) and done.returncode == 0, done.stderr
    assert all("is a pipe or a device, expected a f" in line for line in told), told


# labels


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle", ["a red circle"]),
        ("a \u200b circle", [r"a \u200b circle"]),
        ("雪 dog", [r"\u96ea dog"]),
        ("🎨", [r"\U0001f3a8"]),
        ("日本", [r"\u65e5\u672c"]),
        ("a\x1bb\u202e", [r"a\x1bb\u202e"]),
        ("", []),
    ],
)
def test_labels_show_each_letter_or_its_escape(text, shown):
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    assert wrap(text, font, 200) == shown
    assert all(has_letter(font, letter) for line in shown for letter in line if letter != " ")


def test_long_labels_stay_in_their_column():
    from PIL import ImageFont

    font = ImageFont.load_default(13)
    lines = wrap("雪" * 40 + " " + "n" * 200, font, 128)
    assert max(map(font.getlength, lines)) <= 128
    assert "".join(lines) == r"\u96ea" * 40 + "n" * 200
    page = contact_sheet([Image.new("RGB", (128, 128))] * 2, ["雪" * 20, "n"])
    assert (values(page)[134:, 140:][:, 30:] == 255).all()  # nothing reaches into the next column


def test_an_image_that_is_not_redrawn_is_said_to_be(tmp_path):
    sd = minisd.load("shapes", device="cpu")
    image = Image.fromarray(colours(64, 64))
    with pytest.warns(UserWarning, match="3 steps at strength 0.3 are less than one step: the im"):
        [same] = sd.img2img(image, "a", 0.3, steps=3)
    assert (values(same) == values(image)).all()
    mask = np.ones((64, 64), bool)
    with pytest.warns(UserWarning, match="are less than one step"):
        minisd.blend(sd, image, mask, "a", 0.1, steps=5)
    with pytest.warns(UserWarning, match="are less than one step"):
        [same] = minisd.diffedit(sd, image, "a", "b", strength=0.1, steps=5)
    assert (values(same) == values(image)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.img2img(image, "a", 0.0, steps=3)
        minisd.diffedit(sd, image, "a", "b", strength=0.0, steps=5)


# profiles where pixels are kept


@pytest.fixture(scope="module")
def shapes():
    return minisd.load("shapes", device="cpu")


def inverse(values, columns, power):
    """sRGB's values as those of a matrix profile, cut to what it can show."""
    x = values / 255.0
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return 255 * np.clip(linear @ SRGB.T @ np.linalg.inv(columns).T, 0, 1) ** (1 / power)


def test_pixels_that_are_kept_are_in_their_own_colours(tmp_path, shapes):
    """Half of a mask: on one side the file's own numbers, on the other what is drawn, in the
    file's colours; with its profile."""
    path, profile, how = tmp_path / "a.png", matrix_profile(P3, 2.2), {"steps": 2}
    own = colours(64, 64)
    Image.fromarray(own).save(path, icc_profile=profile)
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    for image in (path, path.read_bytes(), Image.open(path)):
        [pasted] = minisd.blend(shapes, image, mask, "a red circle", **how, progress=False)
        assert pasted.info["icc_profile"] == profile
        assert (values(pasted)[:, :32] == own[:, :32]).all()
    [drawn] = minisd.blend(
        shapes, path, mask, "a red circle", **how, paste_back=False, progress=False
    )
    assert "icc_profile" not in drawn.info
    expected = inverse(values(drawn), P3, 2.2)
    off = np.abs(values(pasted) - expected)[:, 32:]
    light = (values(drawn) > 40)[:, 32:].all(-1)  # in the dark one step of 255 is many
    assert light.mean() > 0.3 and off[light].max() <= 3
    for method in (shapes.img2img, lambda *a, **o: minisd.erase_concepts(shapes, *a, "a", **o)):
        [same] = method(path, "a", strength=0.0, progress=False)
        assert (values(same) == own).all() and same.info["icc_profile"] == profile
        [resized] = method(path, "a", strength=0.0, height=32, width=32, progress=False)
        assert "icc_profile" not in resized.info
    [drawn] = shapes.img2img(path, "a", strength=0.5, **how, progress=False)
    assert "icc_profile" not in drawn.info


def test_a_profile_leads_there_and_back():
    """Of colours that both can show: those in the middle."""
    inner = colours(40, 40) // 2 + 64
    for columns, power in ((P3, 2.2), (SRGB, 1.8)):
        profile = matrix_profile(columns, power)
        there = from_srgb(Image.fromarray(inner), profile)
        assert there.info["icc_profile"] == profile
        assert np.abs(values(there) - inverse(inner, columns, power)).max() <= 2
        assert np.abs(values(to_srgb(there, profile)) - inner).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = from_srgb(Image.fromarray(inner), srgb)
    assert (values(same) == inner).all() and same.info["icc_profile"] == srgb
    for profile in (b"none", grey_profile(2.0)):
        with pytest.raises(ValueError, match="the colour profile leads to no colours"):
            from_srgb(same, profile)


def test_what_cannot_be_kept_is_pasted_into_as_it_shows(tmp_path, shapes):
    """Inks, transparency, palettes, a profile that says nothing: sRGB, and no profile."""
    mask = np.zeros((64, 64), bool)
    mask[:, 32:] = True
    rgb = Image.fromarray(colours(64, 64))
    clear = rgb.copy()
    clear.putalpha(128)
    lab = np.full((16, 3), 128)
    for image, profile in (
        (rgb.convert("CMYK"), cmyk_profile(lab)),
        (clear, matrix_profile(P3, 2.2)),
        (rgb.quantize(16), matrix_profile(P3, 2.2)),
        (rgb, b"damaged"),
        (rgb, grey_profile(2.0)),
    ):
        path = tmp_path / ("a.tif" if image.mode == "CMYK" else "a.png")
        image.save(path, icc_profile=profile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shown = values(read_image(path))
            [pasted] = minisd.blend(shapes, path, mask, "a", steps=2, progress=False)
        assert "icc_profile" not in pasted.info
        assert (values(pasted)[:, :32] == shown[:, :32]).all()


def test_images_of_a_sheet_are_in_one_space_of_colours():
    image = Image.new("RGB", (128, 128), (200, 40, 40))
    image.info["icc_profile"] = matrix_profile(P3, 2.2)
    page = contact_sheet([image, Image.new("RGB", (128, 128))])
    expected = encoded((np.array([200, 40, 40]) / 255.0) ** 2.2 @ P3.T @ np.linalg.inv(SRGB).T)
    assert "icc_profile" not in page.info
    assert np.abs(values(page)[64, 64] - expected).max() <= 2
