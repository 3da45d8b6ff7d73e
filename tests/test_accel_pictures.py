"""Pictures become the pixels of timm's transform, and logits become names, without torch."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from swincompress_pl import accel, spec
from swincompress_pl.accel import Preprocess
from swincompress_pl.cli import main
from swincompress_pl.data import Preprocessing
from swincompress_pl.data.dataset import decode_image
from swincompress_pl.pictures import pillow, resize_for

GOLDEN = Path(__file__).parent / "golden" / "0.1"
MEAN = (0.485, 0.456, 0.406)
FRAMING = {"resize": 18, "interpolation": "bicubic"}
NAMES = ("cat", "dog", "owl", "eel")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def timms(height: int, width: int, crop_pct: float, mode: str, interpolation: str, channels: int = 3) -> Any:
    transform = create_transform(
        (channels, height, width), is_training=False, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation,
        mean=MEAN[:channels], std=(0.5,) * channels, normalize=False,
    )  # fmt: skip
    return lambda image: transform(image).permute(1, 2, 0).numpy()


def ours(height: int, width: int, crop_pct: float, mode: str, interpolation: str, channels: int = 3) -> Preprocess:
    return Preprocess(
        height=height, width=width, resize=resize_for(height, width, crop_pct), crop_mode=mode,
        interpolation=interpolation, channels=channels, mean=MEAN[:channels],
    )  # fmt: skip


TRANSFORMS = [
    (160, 160, 0.875, "center", "bicubic"),
    (224, 224, 0.9, "center", "bilinear"),
    (288, 288, 1.0, "center", "bicubic"),
    (96, 128, 0.9, "center", "bicubic"),
    (128, 96, 0.875, "squash", "lanczos"),
    (160, 160, 0.95, "squash", "bicubic"),
    (160, 160, 0.9, "border", "bicubic"),
    (96, 128, 1.0, "border", "bilinear"),
    (64, 64, 0.875, "center", "box"),
    (64, 64, 0.875, "center", "hamming"),
    (64, 64, 0.875, "center", "nearest"),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_pixels_of_real_pictures_are_timms(transform: tuple[Any, ...], imagenet_mini: Path) -> None:
    """Whole JPEGs, which are square, and parts of them of other shapes."""
    files = sorted((imagenet_mini / "train").rglob("*.jpg"))[:20]
    expected, made = timms(*transform), ours(*transform)
    whole = made(files)
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        part = image.crop((0, 0, image.width - 5 * number, 150 + 3 * number))
        assert np.array_equal(whole[number], expected(image))
        assert np.array_equal(made(part)[0], expected(part))


def test_gray_networks_get_timms_gray() -> None:
    for mode in ("center", "squash", "border"):
        transform = (32, 48, 0.9, mode, "bicubic", 1)
        image = noise(70, 50).convert("L")
        pixels = ours(*transform)(image)
        assert pixels.shape == (1, 32, 48, 1)
        assert np.array_equal(pixels[0], timms(*transform)(image))


def test_training_and_the_engine_see_the_same_pixels() -> None:
    fields = {"height": 20, "width": 24, "resize": (30, 28), "crop_mode": "border", "interpolation": "bilinear"}
    image = noise(60, 33)
    of_data = Preprocessing(**fields).image_to_uint8(image)  # type: ignore[arg-type]
    assert np.array_equal(Preprocess(**fields, mean=MEAN)(image)[0], of_data)  # type: ignore[arg-type]


def test_a_source_is_a_path_bytes_an_image_or_a_list(tmp_path: Path) -> None:
    image = noise(20, 20)
    image.save(tmp_path / "a.png")
    made = Preprocess(height=16, width=16, resize=18)
    expected = made(image)
    assert expected.shape == (1, 16, 16, 3)
    assert expected.dtype == np.uint8
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image)):
        assert np.array_equal(made(source), expected)
        assert np.array_equal(made([source, image]), np.concatenate([expected, expected]))
    assert made([]).shape == (0, 16, 16, 3)
    with pytest.raises(TypeError, match=r"picture 1 is ndarray; give a path, .*engine\(pixels\)"):
        made([image, np.zeros((16, 16, 3), np.uint8)])  # type: ignore[list-item]


# Pictures of other kinds


def test_other_modes_become_rgb_as_timm_reads_them() -> None:
    made = Preprocess(height=16, width=16)
    image = noise(16, 16)
    for other in (image.convert("L"), image.convert("CMYK"), image.convert("P"), image.convert("RGBA")):
        assert np.array_equal(made(other)[0], np.asarray(other.convert("RGB"))), other.mode
    for content in (encoded(image.convert("CMYK"), "JPEG"), encoded(image.convert("P")), encoded(image.convert("1"))):
        assert np.array_equal(made(content)[0], np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_palette_with_transparency_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    content = encoded(noise(16, 16).convert("P"), transparency=bytes(range(256)))
    pixels = Preprocess(height=16, width=16)(content)
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match="Palette images with Transparency"):
        of_timm = Image.open(io.BytesIO(content)).convert("RGB")
    assert np.array_equal(pixels[0], np.asarray(of_timm))


def test_16_bit_gray_keeps_its_upper_8_bits() -> None:
    """Pillow's own conversion, and so timm's, makes all above 255 white."""
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pixels = Preprocess(height=16, width=16)(encoded(Image.fromarray(values)))
    assert np.array_equal(pixels[0], np.arange(256).reshape(16, 16, 1).repeat(3, -1))
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"picture 0: the picture has mode '{mode}', whose range .* scale it to 8"):
            Preprocess(height=16, width=16)(Image.new(mode, (16, 16)))


def test_training_reads_pictures_in_the_same_way(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = Preprocess(height=16, width=16)(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(decode_image(tmp_path / "deep.png")), pixels[0])


def test_exif_turns_a_picture_only_if_asked() -> None:
    upright = noise(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    content = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    as_stored, turned = (Preprocess(height=16, width=16, exif=exif) for exif in (False, True))
    assert np.array_equal(as_stored(content), as_stored(upright.transpose(Image.Transpose.ROTATE_90)))
    assert np.array_equal(turned(content), as_stored(upright))
    assert np.array_equal(turned(Image.open(io.BytesIO(content))), as_stored(upright))


def test_damaged_and_absent_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Preprocess(height=16, width=16)
    content = encoded(noise(64, 64), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be decoded as an image \(image file is truncated"):
        made(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match=r"text\.jpg: cannot be decoded as an image \(cannot identify"):
        made(tmp_path / "text.jpg")
    with pytest.raises(ValueError, match=r"10 bytes: cannot be decoded as an image"):
        made(b"no picture")
    with pytest.raises(ValueError, match=r"picture 0: image file is truncated"):
        made(Image.open(tmp_path / "cut.jpg"))
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*gone\.jpg"):
        made(tmp_path / "gone.jpg")

    def refused(*_: Any) -> Any:  # root may read every file
        raise PermissionError(13, "Permission denied", "secret.jpg")

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(PermissionError, match=r"Permission denied: 'secret\.jpg'"):
        made("secret.jpg")


def test_a_picture_that_is_too_small_or_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"picture 0: image of 9 x 20 pixels is smaller .* set Preprocess\.resize to 16"
    ):
        Preprocess(height=16, width=16)(noise(20, 9))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="a picture of 1 x 500 pixels would be resized to 16 x 8000, more than 2000"):
        Preprocess(height=16, width=16, resize=16)(noise(500, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 2}, r"Preprocess\.channels is 2; pictures have 3 \(RGB\) or 1"),
        ({"crop_mode": "border", "resize": 16}, "give Preprocess.mean"),
        ({"mean": (0.5,)}, r"Preprocess\.mean is \(0\.5,\); give 3 numbers"),
        ({"height": True}, "Preprocess.height is True"),
        ({"resize": 8}, "shorter than the crop of 16 x 16"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"height": 16, "width": 16} | fields)


def test_without_pillow_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"read by Pillow, which cannot be imported .*pip install pillow"):
        pillow()


# What an artifact says


@pytest.fixture(scope="module")
def program() -> spec.Program:
    return dataclasses.replace(accel.reference(GOLDEN / "vit.safetensors").program, classes=NAMES)


@pytest.fixture(scope="module")
def artifact(program: spec.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("artifacts") / "vit.safetensors"
    return accel.export(program, file, preprocessing=FRAMING)


def with_input(program: spec.Program, **fields: Any) -> accel.ReferenceEngine:
    return accel.ReferenceEngine(dataclasses.replace(program, input=dataclasses.replace(program.input, **fields)))


def test_an_exported_preprocessing_is_read_back(artifact: Path, program: spec.Program) -> None:
    engine = accel.load(artifact)
    expected = {**program.input.preprocessing, **FRAMING, "height": 16, "width": 16, "crop_mode": "center"}
    assert engine.input.preprocessing == expected
    mean = tuple(program.input.preprocessing["mean"])
    assert Preprocess.of(engine) == Preprocess(height=16, width=16, resize=18, mean=mean)
    assert Preprocess.of(engine, exif=True).exif


def test_whatever_says_it_is_stored_by_our_names(program: spec.Program, tmp_path: Path) -> None:
    mean, std = program.input.preprocessing["mean"], program.input.preprocessing["std"]
    of_timm = {
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "mean": mean,
        "std": std,
        "url": "https://x",
        "pool_size": 7,
    }
    same = Preprocess(height=16, width=16, resize=17, mean=tuple(mean))
    of_data = Preprocessing(height=16, width=16, resize=17, mean=tuple(mean), std=tuple(std))
    for given in (of_timm, same, of_data, of_data.to_dict()):
        engine = accel.load(accel.export(program, tmp_path / "a.safetensors", preprocessing=given))
        assert engine.input.preprocessing == of_data.to_dict()
    unresized = accel.export(program, tmp_path / "a.safetensors", preprocessing={"resize": None, **of_data.to_dict()})
    assert Preprocess.of(accel.load(unresized)).resize == 17


def test_no_resize_is_kept_apart_from_an_unknown_one(program: spec.Program, tmp_path: Path) -> None:
    given = {"resize": None, "interpolation": "bicubic"}
    for compression in (None, "lzma"):
        file = accel.export(program, tmp_path / "a.safetensors", compression, preprocessing=given)
        assert Preprocess.of(accel.load(file)).resize is None
        assert Preprocess.of(accel.reference(file)).resize is None


def test_older_descriptions_are_read(program: spec.Program) -> None:
    stored = {**program.input.preprocessing, "height": 16, "width": 16, **FRAMING}  # before there were crop modes
    assert Preprocess.of(with_input(program, preprocessing=stored)).crop_mode == "center"
    raw = {**program.input.preprocessing, "input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "squash"}
    made = Preprocess.of(with_input(program, preprocessing=raw))
    assert (made.height, made.resize, made.crop_mode, made.interpolation) == (16, 18, "squash", "bicubic")


def test_what_an_artifact_does_not_say_is_named(program: spec.Program) -> None:
    engine = accel.ReferenceEngine(program)
    message = (
        r"resize and interpolation missing\. Give what .*preprocess=\{'resize': 18, 'interpolation': 'bicubic'\}\)"
    )
    with pytest.raises(ValueError, match=message):
        engine.classify(noise(20, 20))
    with pytest.raises(ValueError, match=r"interpolation missing\. .*export\(.*\{'interpolation': 'bicubic'\}\)$"):
        Preprocess.of(with_input(program, preprocessing={**program.input.preprocessing, "resize": 18}))
    assert engine.classify(noise(20, 20), preprocess=FRAMING) == engine.classify(
        noise(20, 20), preprocess=Preprocess(height=16, width=16, resize=18)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": [0.1] * 3, **FRAMING}, r"preprocessing\['mean'\] is \[0\.1, .* was quantized with .* leave it out"),
        ({"std": [0.5], **FRAMING}, r"preprocessing\['std'\] is \[0\.5\]"),
        ({"height": 17, **FRAMING}, r"makes pixels \(17, 16, 3\), and the engine takes \(16, 16, 3\)"),
        ({"resize": 18}, "interpolation missing"),
        ({"crop_pct": 2.0}, "crop_pct is 2.0; give a fraction"),
        ({"crop_pct": "1"}, "crop_pct is '1'; give a fraction"),
        ({"resize": "x", "interpolation": "bicubic"}, "resize is 'x'; give pixels"),
    ],
)
def test_a_preprocessing_that_does_not_fit_is_refused(
    given: dict[str, Any], message: str, program: spec.Program, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        accel.export(program, tmp_path / "a.safetensors", preprocessing=given)
    assert not list(tmp_path.iterdir())


# Classes


def test_predictions_are_the_softmax_of_the_logits(artifact: Path) -> None:
    engine = accel.load(artifact)
    pictures = [noise(30, 20, seed) for seed in range(70)]  # more than are prepared at once
    found = engine.classify(pictures, top=2)
    logits = engine(Preprocess.of(engine)(pictures)).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert [[each.label for each in row] for row in found] == np.argsort(-shares, 1)[:, :2].tolist()
    for row, share in zip(found, shares, strict=True):
        for each in row:
            assert each.name == NAMES[each.label]
            assert each.probability == pytest.approx(share[each.label], rel=1e-9)
    assert engine.classify(pictures[0], top=2) == found[0]
    assert accel.reference(artifact).classify(pictures[:3], top=2) == found[:3]
    assert engine.classify([]) == []
    everything = engine.classify(pictures[0], top=99)
    assert sorted(each.label for each in everything) == [0, 1, 2, 3]
    assert sum(each.probability for each in everything) == pytest.approx(1)


def test_names_are_those_of_the_caller_or_none(artifact: Path, program: spec.Program) -> None:
    picture = noise(20, 20)
    own = accel.load(artifact).classify(picture, top=1, classes=["a", "b", "c", "d"])[0]
    assert own.name == "abcd"[own.label]
    unnamed = accel.ReferenceEngine(dataclasses.replace(program, classes=None))
    assert unnamed.classify(picture, top=1, preprocess=FRAMING)[0].name is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": ["a", "b"]}, ValueError, "classes has 2 names, and the engine has 4 classes"),
        ({"top": 0}, ValueError, "top is 0; give the number of classes to return, at least 1"),
        ({"top": 1.5}, ValueError, "top is 1.5"),
        ({"preprocess": Preprocess(height=8, width=16)}, ValueError, r"makes pixels \(8, 16, 3\)"),
        ({"preprocess": Preprocess(height=16, width=16, channels=1)}, ValueError, r"makes pixels \(16, 16, 1\)"),
        ({"preprocess": 3}, TypeError, "preprocess is int; give an accel.Preprocess"),
    ],
)
def test_arguments_that_do_not_fit(
    artifact: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        accel.load(artifact).classify(noise(20, 20), **options)


def test_events_are_no_pictures() -> None:
    program = accel.reference(GOLDEN / "spikformer.safetensors").program
    taken = dataclasses.replace(program.input, time_steps=2, channels=2)
    with pytest.raises(ValueError, match=r"takes events \(2, .*, 2\), which are no pictures.*engine\(events\)"):
        Preprocess.of(dataclasses.replace(program, input=taken))


WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "timm", "lightning"):
    sys.modules[name] = None
from swincompress_pl import accel
engine = accel.load(sys.argv[1])
print([(each.name, each.probability) for each in engine.classify(sys.argv[2], top=2)])
"""


def test_a_jpeg_is_classified_without_torch(artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.jpg"
    noise(40, 30).save(file)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(artifact), str(file)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    expected = accel.load(artifact).classify(file, top=2)
    assert ran.stdout.strip() == str([(each.name, each.probability) for each in expected])


# The command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: object) -> tuple[int, str, str]:
        code = main(["classify", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_the_command_prints_a_table_or_json(artifact: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    files = [tmp_path / "a.jpg", tmp_path / "b.png"]
    for number, file in enumerate(files):
        noise(40, 30, number).save(file)
    code, out, _ = run(artifact, *files, "--top", 2)
    expected = accel.load(artifact).classify(files, top=2)
    assert code == 0
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert cells == [
        [str(file), str(each.name), f"{each.probability:.2%}"]
        for file, row in zip(files, expected, strict=True)
        for each in row
    ]
    code, out, _ = run(artifact, *files, "--top", 2, "--json", "--threads", 1)
    assert code == 0
    assert json.loads(out) == [
        {"picture": str(file), "predictions": [dataclasses.asdict(each) for each in row]}
        for file, row in zip(files, expected, strict=True)
    ]


def test_the_command_says_what_is_wrong(artifact: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    noise(40, 30).save(tmp_path / "a.jpg")
    code, _, err = run(artifact, tmp_path / "gone.jpg")
    assert code == 2
    assert "gone.jpg" in err
    code, _, err = run(GOLDEN / "vit.safetensors", tmp_path / "a.jpg")
    assert code == 2
    assert "does not say how a picture becomes pixels" in err
