# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Odd and broken files, one table, over every entry point: each works, or ends in one error with file and fix."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from PIL import Image

from anomalib_fbclip import FBCLIP, AuxiliaryTransfer, LabelledFolder, PictureFolder

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 4), dtype=np.uint8)
RGB = Image.fromarray(NOISE[..., :3])


def _save(picture: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _cut(path: Path) -> None:
    RGB.save(path)
    path.write_bytes(path.read_bytes()[:900])


GOOD: dict[str, Callable[[Path], object]] = {
    "grey.png": lambda path: RGB.convert("L").save(path),
    "one_bit.png": lambda path: RGB.convert("1").save(path),
    "grey_alpha.png": lambda path: RGB.convert("LA").save(path),
    "palette.png": lambda path: RGB.convert("P").save(path),
    "cmyk.jpg": lambda path: RGB.convert("CMYK").save(path),
    "rgba.png": lambda path: Image.fromarray(NOISE).save(path),
    "turned.jpg": lambda path: RGB.save(path, exif=_turned()),
    "pixel.png": lambda path: RGB.crop((0, 0, 1, 1)).save(path),
    "wide.png": lambda path: RGB.resize((10000, 10)).save(path),
    "ü ¿長?*\n.png": RGB.save,
    f"{'n' * 251}.png": RGB.save,
    "below/grey.png": lambda path: _save(RGB, path),
}
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut.png": (_cut, "truncated"),
    "empty.png": (Path.touch, "cannot identify"),
    "text.png": (lambda path: path.write_text("no image"), "cannot identify"),
    "folder.png": (Path.mkdir, "directory"),
    "loop.png": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "link.png": (lambda path: path.symlink_to("nowhere.png"), "No such file"),
    "locked.png": (RGB.save, "Permission"),
    "sixteen_bit.png": (lambda path: Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200).save(path), "8 bit"),
    "float.tif": (lambda path: Image.fromarray(NOISE[..., 0] / np.float32(255)).save(path), "8 bit"),
}
LISTED = [name for name in BAD if name not in {"folder.png", "loop.png", "link.png"}]
"""Of these alone a data module's table tells nothing before they are read."""


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read every file: opening one of this name fails as it does for others."""
    opened = Image.open

    def refuse(path, *args, **kwargs):
        if Path(path).name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", refuse)


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., LabelledFolder]:
    """Labelled folders with masks: ``change`` alters the files before the data module looks at them."""

    def make(name: str = "parts", normal: int = 1, abnormal: int = 1, change=None, mask=(40, 60), **kwargs):
        root, noise = tmp_path / name, np.random.default_rng(len(name))
        for kind, number in (("good", normal), ("bad", abnormal)):
            for index in range(number):
                _save(Image.fromarray(noise.integers(0, 255, (40, 60, 3), np.uint8)), root / kind / f"{index}.png")
        for index in range(abnormal):
            # The value 1 of 255 counts as anomalous, as in anomalib.
            _save(Image.fromarray(np.tri(*mask, dtype=np.uint8)), root / "masks" / f"{index}.png")
        if change is not None:
            change(root)
        folders = {
            "normal_dir": "good" if normal else None,
            "abnormal_dir": "bad" if abnormal else None,
            "mask_dir": "masks" if abnormal else None,
        }
        return LabelledFolder(root, **{**folders, **kwargs})

    return make


def test_predict_takes_all_of_them(model, engine, tmp_path, caplog) -> None:
    root = tmp_path / "pictures"
    for name, write in {**GOOD, **{name: write for name, (write, _) in BAD.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name)
    runner = engine()
    batches = runner.predict(model(), dataset=PictureFolder(root))
    assert {str(Path(batch.image_path[0]).relative_to(root)) for batch in batches} == GOOD.keys()
    assert all(torch.isfinite(batch.anomaly_map).all() and 0 <= batch.pred_score <= 1 for batch in batches)
    with (Path(runner.trainer.default_root_dir) / "images" / "predictions.csv").open(newline="") as file:
        rows = {str(Path(row["path"]).relative_to(root)): row for row in csv.DictReader(file)}
    assert rows.keys() == {*GOOD, *BAD}
    for name, (_, why) in BAD.items():
        assert why in rows[name]["error"], name
        assert not rows[name]["score"]
        assert str(root / name) in caplog.text
    # As stored: the mark of a turned camera changes nothing.
    flat = {Path(batch.image_path[0]).name: batch for batch in batches}
    plain = tmp_path / "plain.jpg"
    RGB.save(plain)
    (unmarked,) = engine().predict(model(), data_path=plain)
    assert torch.equal(flat["turned.jpg"].anomaly_map, unmarked.anomaly_map)


@pytest.mark.parametrize("name", LISTED)
def test_train_and_test_name_the_file(name: str, model, engine, parts) -> None:
    write, why = BAD[name]
    message = rf"(?s){name}' cannot be read: .*{why}.*(Remove or repair|convert)"

    def change(root: Path) -> None:
        write(root / "bad" / name)
        shutil.copy(root / "masks/0.png", root / "masks" / f"{Path(name).stem}.png")

    data = parts(change=change)
    with pytest.raises(ValueError, match=message):
        engine().test(model(), datamodule=data)
    # The same data set later, in a prediction, loses only that file.
    assert sum(len(batch) for batch in engine().predict(model(), dataloaders=data.test_dataloader())) == 2
    with pytest.raises(ValueError, match=message):
        engine().fit(model(weights=None), datamodule=AuxiliaryTransfer(source=data, target=parts("target")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "masks/0.png").write_bytes(b"x"), r"mask '.*0\.png' of '.*0\.png' cannot be read"),
        (lambda root: Image.new("L", (1, 40)).save(root / "masks/0.png"), r"mask '.*' of '.*0\.png' is 1 x 40 pixels"),
        (lambda root: (root / "masks/0.png").unlink(), "masks' holds no images"),
        (lambda root: (root / "masks/0.png").rename(root / "masks/1.png"), "1 images of .* have no mask"),
        (lambda root: BAD["link.png"][0](root / "bad/1.png"), r"1 links in '.*bad' lead nowhere, such as 1\.png"),
        (lambda root: BAD["loop.png"][0](root / "masks/1.png"), r"1 links in '.*masks' lead nowhere, such as 1\.png"),
        (lambda root: shutil.rmtree(root / "good"), "good' is no folder"),
        (lambda root: (root / "good/0.png").rename(root / "good/0.txt"), "good' holds no images"),
    ],
)
def test_what_is_missing_is_named(change, message: str, model, engine, parts) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        engine().test(model(), datamodule=parts(change=change))


def test_an_epoch_is_not_lost_by_its_validation(model, engine, parts, tmp_path) -> None:
    target = parts("target", change=lambda root: _cut(root / "good/9.png"))
    with pytest.raises(ValueError, match=r"9\.png' cannot be read"):
        engine(max_epochs=1, num_sanity_val_steps=0).fit(
            model(weights=None),
            datamodule=AuxiliaryTransfer(source=parts(), target=target),
        )
    (path,) = tmp_path.rglob("adapter.safetensors")
    assert FBCLIP("tiny", image_size=56, weights=path).source == "parts"


def test_in_a_worker_too(model, engine, parts) -> None:
    data = parts(change=lambda root: _cut(root / "good/9.png"), num_workers=1)
    with pytest.raises(ValueError, match=r"9\.png' cannot be read: image file is truncated"):
        engine().test(model(), datamodule=data)


@pytest.mark.parametrize(
    ("split", "warning"),
    [
        ({"abnormal": 0}, "normal images only"),
        ({"normal": 0}, "anomalous images only"),
        ({"mask": (60, 40)}, "is 40 x 60, its image 60 x 40"),
        ({"mask": (20, 30)}, None),
        ({"mask_dir": None}, "pixel metrics are missing"),
        ({"change": lambda root: Image.new("L", (60, 40)).save(root / "masks/0.png")}, None),
        ({"change": lambda root: _save(RGB, root / "bad/below/0.png")}, None),
    ],
)
def test_unusual_splits_are_tested_on(split: dict, warning: str | None, model, engine, parts, caplog) -> None:
    (result,) = engine().test(model(metrics="full"), datamodule=parts(**split))
    warned = [record.getMessage() for record in caplog.records if record.name.startswith("anomalib_fbclip")]
    assert (warning in "".join(warned)) if warning else not [text for text in warned if "images only" in text]
    one_class = {"normal", "abnormal"} & split.keys()
    assert np.isnan(result["image_AUROC"]) == bool(one_class)
    assert ("has no masks" in "".join(warned)) == ("mask_dir" in split)
    assert ("pixel_AUROC" in result) == (split.get("abnormal") != 0 and "mask_dir" not in split)


def test_training_on_one_picture_and_on_defects_alone(model, engine, parts) -> None:
    engine(max_epochs=1).train(
        model(weights=None),
        datamodule=AuxiliaryTransfer(source=parts("one", abnormal=0), target=parts()),
    )
    with pytest.raises(ValueError, match="1 anomalous and no normal images: add normal ones"):
        engine().fit(model(weights=None), datamodule=AuxiliaryTransfer(source=parts("bad", normal=0), target=parts()))


def test_normal_pictures_for_memory_and_thresholds(model, engine, tmp_path, caplog) -> None:
    root = tmp_path / "normal"
    _save(RGB, root / "b.png")
    _cut(root / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' cannot be read: .*truncated.*Remove or repair"):
        engine().predict(model(k_shot=1, few_shot_source=root), data_path=root / "b.png")
    BAD["sixteen_bit.png"][0](root / "sixteen_bit.png")
    model().calibrate(root)
    assert f"{root / 'a.png'}: image file is truncated" in caplog.text
    assert "convert it to 8 bit" in caplog.text
    (root / "b.png").unlink()
    with pytest.raises(ValueError, match="holds no image that can be read"):
        model().calibrate(root)


def test_the_command_line_takes_a_folder_with_a_broken_link(adapter: Path, tmp_path: Path) -> None:
    _save(RGB, tmp_path / "in" / "a.png")
    BAD["link.png"][0](tmp_path / "in" / "b.png")
    words = ["--model.backbone", "tiny", "--model.image_size", "56", "--model.weights", str(adapter)]
    data = ["--data", "anomalib_fbclip.PictureFolder", "--data.path", str(tmp_path / "in")]
    AnomalibCLI(["predict", "--model", "FBCLIP", *words, *data, "--default_root_dir", str(tmp_path / "out")])
    (table,) = (tmp_path / "out").rglob("predictions.csv")
    assert "No such file" in table.read_text()


@pytest.mark.parametrize(("name", "error"), [("none", FileNotFoundError), ("empty", ValueError)])
def test_no_pictures(name: str, error: type, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=rf"{name}'.*give an image or a folder"):
        PictureFolder(tmp_path / name)
