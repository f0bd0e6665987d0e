"""Decoding of every supported format, and rejection of damaged files."""

import contextlib
import io
import logging
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from dino_ssl.data import decode as module
from dino_ssl.data.dataset import USED, BadImage, Skipped
from dino_ssl.data.decode import decode
from dino_ssl.data.folder import Folder
from dino_ssl.data.image_header import MAX_PIXELS, probe
from dino_ssl.data.loader import read_or_none
from dino_ssl.data.shard_writer import pack


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    """Return a smooth gradient, which lossy formats keep to a few gray levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 // width, y * 200 // height, (x + y) * 100 // (width + height)], -1).astype(np.uint8)


def saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.jpg", "RGB", 6),
        ("a.jpg", "L", 6),
        ("a.jpg", "CMYK", 10),
        ("a.png", "RGB", 0),
        ("a.png", "L", 0),
        ("a.png", "P", 0),
        ("a.png", "1", 0),
        ("a.png", "LA", 0),
        ("a.webp", "RGB", 12),
        ("a.bmp", "RGB", 0),
        ("a.bmp", "P", 0),
        ("a.gif", "P", 0),
        ("a.tif", "RGB", 0),
        ("a.tif", "CMYK", 0),
        ("a.tif", "P", 0),
    ],
)
def test_formats_decode_as_by_pillow(tmp_path, name, mode, tolerance):
    image = Image.fromarray(gradient()).convert(mode)
    path = saved(tmp_path, image, f"ä 写真 {name}", **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    with Image.open(path) as again:
        expected = np.asarray(again.convert("RGB")).astype(int)
    decoded = decode(path)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).max() <= tolerance
    assert np.abs(decoded.astype(int) - np.asarray(image.convert("RGB"))).mean() <= tolerance
    assert probe(path) == (decoded.shape[1], decoded.shape[0]) == image.size


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparent_images_are_composited_on_white(tmp_path, name):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (255, 0, 0, 255)
    rgba[:, 4:] = (9, 9, 9, 0)
    decoded = decode(saved(tmp_path, Image.fromarray(rgba), name, **({"lossless": True} if "webp" in name else {})))
    np.testing.assert_array_equal(decoded[0, :4], [[255, 0, 0]] * 4)
    np.testing.assert_array_equal(decoded[0, 4:], [[255, 255, 255]] * 4)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_not_clipped(tmp_path, name, channels):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    path = tmp_path / name
    cv2.imwrite(str(path), np.repeat(ramp[None, :, None], channels, 2).repeat(4, 0))
    decoded = decode(path).astype(int)
    assert np.abs(decoded[0, :, 0] - np.arange(256)).max() <= 1
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_float_tiff_is_scaled_by_its_range(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.linspace(-2, 3, 256, dtype=np.float32)[None].repeat(2, 0)), "a.tif")
    assert np.abs(decode(path)[0, :, 0].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("size", [20, 100])
@pytest.mark.parametrize("value", [-9999, 3.4e38, np.inf, -np.inf, np.nan])
def test_float_tiff_is_scaled_without_outliers_and_missing_values(tmp_path, value, size):
    values = np.linspace(100, 600, size * size, dtype=np.float32).reshape(size, size)
    broken = values.copy()
    broken[0, 0] = value
    names = (saved(tmp_path, Image.fromarray(array), f"{i}.tif") for i, array in enumerate((values, broken)))
    expected, decoded = (decode(name).astype(int) for name in names)
    assert np.abs(decoded - expected)[0, 1:].max() <= 2  # the range may lack half a percent of the values
    assert np.abs(decoded - expected)[1:].max() <= 2


def test_pixels_without_data_are_black(tmp_path):
    values = np.linspace(100, 600, 10_000, dtype=np.float32).reshape(100, 100)
    values[:20, :20] = -9999
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path, tiffinfo={42113: "-9999"})
    decoded = decode(path)[..., 0].astype(int)
    assert (decoded[:20, :20] == 0).all()
    expected = (values - values[0, 20]) * 255 / (600 - values[0, 20])
    assert np.abs(decoded - expected)[20:].max() <= 1


@pytest.mark.parametrize(("extra_samples", "is_alpha"), [(None, False), (0, False), (1, True), (2, True)])
def test_a_fourth_band_is_alpha_only_if_the_file_says_so(extra_samples, is_alpha):
    bands = np.random.default_rng(0).integers(0, 128, (8, 8, 4), dtype=np.uint8)  # R, G, B, infrared
    decoded = decode("a.tif", tiff(bands, extra_samples))
    if not is_alpha:
        np.testing.assert_array_equal(decoded, bands[..., :3])
    else:
        assert decoded.mean() > bands[..., :3].mean() + 50, "composited on white"


def test_bigtiff_is_read(tmp_path):
    image = Image.fromarray(gradient())
    image.save(tmp_path / "a.tif", big_tiff=True)
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    assert probe(tmp_path / "a.tif") == image.size
    np.testing.assert_array_equal(decode(tmp_path / "a.tif"), gradient())


def test_avif_is_read(tmp_path):
    image = Image.fromarray(gradient())
    image.save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    assert probe(tmp_path / "a.avif") == image.size
    assert np.abs(decode(tmp_path / "a.avif").astype(int) - gradient()).mean() < 3
    (tmp_path / "cut.avif").write_bytes((tmp_path / "a.avif").read_bytes()[:-100])
    with pytest.raises(BadImage):
        probe(tmp_path / "cut.avif")


def test_heic_names_the_package_that_reads_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadImage, match="HEIC needs the package pillow-heif"):
        decode("a.heic", b"\0\0\0\x18ftypheic" + bytes(100))


def tiff(bands: np.ndarray, extra_samples: int | None) -> bytes:
    """Return an uncompressed TIFF of uint8 [height, width, bands]; Pillow cannot write ExtraSamples of its own."""
    height, width, count = bands.shape
    tags = {256: width, 257: height, 259: 1, 262: 2, 277: count, 278: height, 279: bands.nbytes}
    tags |= {} if extra_samples is None else {338: extra_samples}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4  # of the bits of each band, then of the pixels
    entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {273: start + 2 * count}).items()}
    entries[258] = struct.pack("<HHII", 258, 3, count, start)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack(f"<{count}H", *[8] * count) + bands.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_orientation(tmp_path, name, orientation):
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, image, name, exif=exif, **({} if name.endswith(("png", "tif")) else {"quality": 95}))
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
    decoded = decode(path)
    assert probe(path) == (decoded.shape[1], decoded.shape[0])
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).mean() < 3


def test_first_frame_of_animations(tmp_path):
    frames = [Image.new("RGB", (9, 7), color) for color in ("red", "blue", "green")]
    for name in ("a.gif", "a.webp"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        red, green, blue = decode(path)[3, 4]
        assert red > 240
        assert green < 10
        assert blue < 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif"])
def test_tiny(tmp_path, name, shape):
    path = saved(tmp_path, Image.new("RGB", shape, (200, 200, 200)), name)
    assert probe(path) == shape
    assert np.abs(decode(path).astype(int) - 200).max() <= 3


def encoded(kind: str) -> bytes:
    noisy = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    out = io.BytesIO()
    options = {"progressive": {"progressive": True}, "TIFF with LZW": {"compression": "tiff_lzw"}}.get(kind, {})
    Image.fromarray(noisy).save(out, "JPEG" if kind == "progressive" else kind.split()[0], **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("part", [0.999, 0.9, 0.5, 0.1, 0.003])
def test_truncated_files_are_rejected_by_probe_and_decode(tmp_path, kind, part, capfd):
    data = encoded(kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data)
    decode(path)
    path.write_bytes(data[: int(len(data) * part) - 1])
    for function in (probe, decode):
        with pytest.raises(BadImage):
            function(path)
    out, err = capfd.readouterr()
    assert out + err == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_one_missing_byte_is_detected(tmp_path, kind):
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(kind)[:-1])
    with pytest.raises(BadImage, match="truncated"):
        probe(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_that_end_in_zeros_are_rejected(tmp_path, kind):
    data = encoded(kind)
    path = tmp_path / "zeros.jpg"
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(BadImage):
        decode(path)


def damaged_jpegs() -> dict[str, bytes]:
    """Files in which libjpeg notices the damage: it fills the rest with gray or noise, and warns on the terminal."""
    rng, data = np.random.default_rng(0), encoded("JPEG")
    half, noise, zeros = len(data) // 2, bytearray(data), bytearray(data)
    noise[half : half + 60] = rng.bytes(60)
    zeros[half : half + 800] = bytes(800)
    return {
        "cut, with an end": data[:half] + b"\xff\xd9",
        "zeros": bytes(zeros),
        "noise": bytes(noise),
        "another file after the first half": data[:half] + encoded("JPEG"),
        "cut progressive, with an end": encoded("progressive")[:half] + b"\xff\xd9",
    }


@pytest.mark.parametrize("kind", damaged_jpegs())
def test_damaged_jpegs_are_rejected_and_nothing_is_printed(tmp_path, kind, capfd):
    with pytest.raises(BadImage, match="JPEG"):
        decode("damaged.jpg", damaged_jpegs()[kind])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [False, True])
def test_a_dataset_may_keep_damaged_jpegs_and_lists_them(tmp_path, keep, capfd):
    """In shards, subsets and memory too."""
    files = damaged_jpegs() | {"good": encoded("JPEG")}
    for index, content in enumerate(files.values()):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / f"photos/{index}.jpg").write_bytes(content)
    pack(tmp_path / "photos", tmp_path / "shards")
    folder, shards = (Folder(path=str(tmp_path / name), keep_damaged=keep).open() for name in ("photos", "shards"))
    last = len(files) - 1
    for dataset in (
        folder,
        shards,
        pickle.loads(pickle.dumps(shards.subset(range(last + 1)))),
        folder.subset(range(last + 1)),
        None,
    ):
        dataset = dataset or folder.in_memory()
        listed: list[Skipped] = []
        images = [read_or_none(dataset, index, listed) for index in range(len(files))]
        usable = [image is not None for image in images]
        kept = [item for item in listed if item.reason.startswith(USED)]
        assert usable[last]
        assert {item.name for item in listed} == {f"{index}.jpg" for index in range(last)}
        assert len(kept) == sum(usable) - 1 == (last if keep else 0)
        assert not dataset.kept_damage
    assert folder.content_key != Folder(path=str(tmp_path / "photos"), keep_damaged=not keep).open().content_key
    assert capfd.readouterr() == ("", "")


def test_a_damaged_cmyk_jpeg_is_rejected():
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8), "CMYK").save(out, "JPEG")
    assert decode("cmyk.jpg", out.getvalue()).shape == (64, 96, 3)
    with pytest.raises(BadImage, match="JPEG"):
        decode("cmyk.jpg", out.getvalue()[: len(out.getvalue()) // 2] + b"\xff\xd9")


def test_a_jpeg_of_thousands_of_scans_is_rejected_before_it_is_decoded():
    data = encoded("progressive")
    scan = data[data.rindex(b"\xff\xda") : -2]  # the last one refines coefficients, and may be repeated
    with pytest.raises(BadImage, match=r"10\d\d scans"):
        decode("scans.jpg", data[:-2] + scan * 1000 + data[-2:])


def test_data_after_the_image_is_ignored(tmp_path):
    path = tmp_path / "motion.jpg"
    path.write_bytes(encoded("JPEG") + b"\0\0\0\x18ftypmp42" + bytes(200_000))
    assert probe(path) == (96, 64)
    assert decode(path).shape == (64, 96, 3)


def test_decoders_print_nothing_for_broken_content(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's would hide what Pillow logs
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "TIFF with LZW"):
        for byte in (b"\x55", b"\xff", b"\0"):
            data = bytearray(encoded(kind))
            data[len(data) // 2 : len(data) // 2 + 40] = byte * 40
            path = tmp_path / f"broken.{kind}"
            path.write_bytes(data)
            with contextlib.suppress(BadImage):
                decode(path)
    samples = [struct.pack("<HHII", 277, 4, 1, count) for count in (4, 49884)]
    with pytest.raises(BadImage):
        decode("samples.tif", tiff(np.zeros((4, 4, 4), np.uint8), None).replace(*samples))
    out, err = capfd.readouterr()
    assert out + err == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image"),
        (bytes(5000), "not an image"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\0IEND\xaeB`\x82", "truncated, or its header is broken"),
        (b"RIFF\x04\0\0\0WAVEdata", "not a WEBP file"),
    ],
)
def test_not_an_image(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for function in (probe, decode):
        with pytest.raises(BadImage, match=reason):
            function(path)


def test_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent.jpg"):
        with pytest.raises(BadImage):
            probe(path)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def forged(kind: str) -> bytes:
    """Return a small file with a size of 60000 x 60000 in its header."""
    if kind == "PNG":
        return png(60000, 60000)
    data = bytearray(encoded(kind))
    at = {"JPEG": data.find(b"\xff\xc0") + 5, "BMP": 18, "GIF": 6}[kind]
    data[at : at + (8 if kind == "BMP" else 4)] = {
        "JPEG": struct.pack(">HH", 60000, 60000),
        "BMP": struct.pack("<ii", 60000, -60000),
        "GIF": struct.pack("<HH", 60000, 60000),
    }[kind]
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
def test_decompression_bombs_are_rejected_by_their_header(tmp_path, kind, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(forged(kind))
    for decoder in ("_jpeg", "_opencv"):
        monkeypatch.setattr(module, decoder, lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(module, "_pillow", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="too large"):
        decode(path)


def test_100_megapixels_are_accepted(tmp_path):
    assert MAX_PIXELS > 100e6
    path = tmp_path / "large.png"
    path.write_bytes(png(10_000, 10_000))
    assert probe(path) == (10_000, 10_000)  # a valid header without content
    with pytest.raises(BadImage):
        decode(path)
