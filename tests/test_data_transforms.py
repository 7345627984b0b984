"""Reading files and the geometry from a picture to the network's input."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ppap.data import images
from ppap.data.images import find_images, read_image, read_label, verify_image
from ppap.data.transforms import Geometry, denormalise, normalise, resized_size, to_uint8
from ppap.errors import DataError


def picture(width=20, height=12, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# Geometry


@pytest.mark.parametrize(
    "size, side, expected",
    [((640, 427), 224, (335, 224)), ((640, 427), 320, (479, 320)), ((1024, 512), 224, (448, 224))],
)
def test_resized_size_truncates_the_long_side(size, side, expected):
    assert resized_size(*size, side) == expected
    assert resized_size(*size[::-1], side) == expected[::-1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([16, 31, 48]),
    st.sampled_from(["nearest", "bilinear"]),
)
def test_image_and_label_equal_torchvision(width, height, side, interpolation):
    modes = {"nearest": tv.InterpolationMode.NEAREST, "bilinear": tv.InterpolationMode.BILINEAR}
    image = picture(width, height, seed=width * 100 + height)
    label = np.array(image)[..., 0]
    geometry = Geometry(side, interpolation)
    ours = tv.Compose([tv.Resize(side, modes[interpolation]), tv.CenterCrop(side)])
    for_labels = tv.Compose([tv.Resize(side, modes["nearest"]), tv.CenterCrop(side)])
    assert np.array_equal(geometry.image(image), np.array(ours(image)))
    assert np.array_equal(geometry.label(label), np.array(for_labels(Image.fromarray(label))))


def test_label_keeps_ignored_and_large_ids():
    label = np.array([[-1, 1000], [3, -1]])
    out = Geometry(16).label(label)
    assert out.dtype == np.int64 and out.shape == (16, 16)
    assert [out[0, 0], out[0, 15], out[15, 0], out[15, 15]] == [-1, 1000, 3, -1]


def test_a_hopelessly_narrow_image_is_refused():
    with pytest.raises(DataError, match="too narrow"):
        Geometry(224).image(Image.new("RGB", (60000, 1)))


# Values


def test_normalise_equals_torchvision():
    pixels = np.array(picture())
    reference = tv.Compose([tv.ToTensor(), tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(
        pixels
    )
    ours = normalise(pixels)
    assert ours.dtype == torch.float32 and ours.shape == (3, 12, 20) and ours.is_contiguous()
    assert torch.equal(ours, reference)


def test_round_trip_is_exact_unless_truncated():
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    values = denormalise(normalise(pixels.numpy()))
    assert torch.equal(to_uint8(values), pixels)
    low = pixels.int() - to_uint8(values, truncate=True).int()
    assert set(low.unique().tolist()) == {0, 1}
    assert to_uint8(values[None]).shape == (1, 16, 16, 3)


# Reading pictures


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (20, 12)
    assert verify_image(path) == (20, 12)


def test_palette_with_transparency_reads_without_warning(tmp_path):
    image = picture().convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").mode == "RGB"


def test_sixteen_bits_keep_the_high_byte(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array(read_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_tiff_is_refused(tmp_path):
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "a.tif")
    for read in (read_image, verify_image):
        with pytest.raises(DataError, match="32-bit"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_rotation_is_honoured(tmp_path, suffix, orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # bright where the file begins
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    shown = np.array(read_image(path))[..., 0] > 128
    height, width = shown.shape
    quarters = shown.reshape(2, height // 2, 2, width // 2).mean((1, 3)) > 0.5
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    assert quarters.sum() == 1 and quarters[corner[orientation]]
    assert (width, height) == ((16, 32) if orientation >= 5 else (32, 16)) == verify_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    whole = io.BytesIO()
    picture(64, 48).save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    for share in (0.3, 0.6, 0.95):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
        for read in (read_image, verify_image):
            with pytest.raises(DataError, match="cut"):
                read(path)


def test_a_png_with_a_flipped_bit_is_found(tmp_path):
    picture(64, 48).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match="a.png"):
        verify_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content, message", [(b"", "empty"), (b"no picture" * 30, "supported format"), (None, "no such file")]
)
def test_other_bad_files(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_image(path)


def test_a_format_outside_the_list_is_not_decoded(tmp_path):
    picture().save(tmp_path / "a.png", format="PCX")
    with pytest.raises(DataError, match="supported format"):
        read_image(tmp_path / "a.png")


def test_the_limit_on_pixels_stays(tmp_path, monkeypatch):
    picture(64, 48).save(tmp_path / "a.png")
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="more than 2000 pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about damaged metadata
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mutated_files_never_raise_anything_else(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP"]))
    whole = io.BytesIO()
    picture(24, 16).save(whole, kind)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.img"
    path.write_bytes(content)
    for read in (read_image, verify_image, read_label):
        try:
            read(path)
        except DataError as error:
            assert str(path) in str(error)


# Reading labels


IDS = np.array([[0, 1, 2], [7, 254, 255]], np.uint8)


def test_labels_from_greyscale_palette_and_sixteen_bits(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "grey.png")
    palette = Image.fromarray(IDS).convert("L")
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    palette.save(tmp_path / "palette.png")
    Image.fromarray(IDS.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("grey", "palette", "deep"):
        ids = read_label(tmp_path / f"{name}.png")
        assert ids.dtype == np.uint8 and np.array_equal(ids, IDS), name


def test_a_one_bit_label_gives_zero_and_one(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_label(tmp_path / "a.png").tolist() == [[1, 0]]


def test_labels_that_are_refused(tmp_path):
    picture().save(tmp_path / "rgb.png")
    Image.fromarray(np.array([[300]], np.uint16)).save(tmp_path / "deep.png")
    picture().save(tmp_path / "jpeg.png", format="JPEG")
    for name, message in (("rgb", "must be index images"), ("deep", "id 300"), ("jpeg", "PNG label")):
        with pytest.raises(DataError, match=message):
            read_label(tmp_path / f"{name}.png")


def test_a_four_bit_grey_label_is_refused(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00\x12"))
    (tmp_path / "a.png").write_bytes(data + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="4-bit"):
        read_label(tmp_path / "a.png")


def test_find_images_is_sorted_and_skips_hidden(tmp_path):
    for name in ("b/2.JPG", "b/10.png", "a.jpeg", ".x/1.png", "b/._2.jpg", "note.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert list(find_images(tmp_path)) == ["a", "b/10", "b/2"]
