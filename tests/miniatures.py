# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Miniatures of the sixteen data sets, each in the layout that it is published in.

A good image is grey noise; an anomalous one has a bright square, which its mask marks.
"""

import csv
import json
import zlib
from pathlib import Path

import cv2
import numpy as np
from anomalib.data import Folder
from anomalib.data.datasets.image.visa import CATEGORIES as VISA_CATEGORIES

SIDE = 64


def picture(path: Path, defect: bool = False) -> Path:
    """Write an image; each path has its own noise."""
    generator = np.random.default_rng(zlib.crc32(str(path).encode()))
    image = generator.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    if defect:
        image[20:40, 24:44] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def mask(path: Path) -> Path:
    image = np.zeros((SIDE, SIDE), dtype=np.uint8)
    image[20:40, 24:44] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def mvtec_layout(root: Path, category: str, mask_suffix: str = "_mask", defects: tuple[str, ...] = ("bad",)) -> None:
    for number in range(2):
        picture(root / category / "train" / "good" / f"{number:03d}.png")
        picture(root / category / "test" / "good" / f"{number:03d}.png")
    for kind in defects:
        for number in range(2):
            picture(root / category / "test" / kind / f"{number:03d}.png", defect=True)
            mask(root / category / "ground_truth" / kind / f"{number:03d}{mask_suffix}.png")


def mvtec(root: Path, categories: tuple[str, ...]) -> None:
    for category in categories:
        mvtec_layout(root, category, defects=("broken", "contamination"))


def visa(root: Path, categories: tuple[str, ...]) -> None:
    """The download: images in Data/Images, the split in a CSV file, from which anomalib copies its own layout."""
    rows = []
    for category in categories:
        data = Path(category) / "Data"
        for number in range(4):
            path = data / "Images" / "Normal" / f"{number:04d}.JPG"
            picture(root / path)
            rows.append((category, "train" if number < 2 else "test", "normal", path, ""))
        for number in range(2):
            path = data / "Images" / "Anomaly" / f"{number:03d}.JPG"
            picture(root / path, defect=True)
            marked = mask(root / data / "Masks" / "Anomaly" / f"{number:03d}.png").relative_to(root)
            rows.append((category, "test", "anomaly", path, marked))
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    # anomalib takes the folder for the download only if the rest of it is there, too.
    for category in VISA_CATEGORIES:
        (root / category).mkdir(exist_ok=True)


def mpdd(root: Path, categories: tuple[str, ...]) -> None:
    for category in categories:
        mvtec_layout(root, category, defects=("hole", "scratches"))


def btad(root: Path, categories: tuple[str, ...]) -> None:
    for category in categories:
        for number in range(2):
            picture(root / category / "train" / "ok" / f"{number:04d}.bmp")
            picture(root / category / "test" / "ok" / f"{number:04d}.bmp")
            picture(root / category / "test" / "ko" / f"{number:04d}.bmp", defect=True)
            mask(root / category / "ground_truth" / "ko" / f"{number:04d}.png")


def dagm(root: Path, categories: tuple[str, ...]) -> None:
    for category in categories:
        for split in ("Train", "Test"):
            folder = root / category / split
            for number in range(1, 5):
                picture(folder / f"{number:04d}.PNG", defect=number > 2)
            for number in (3, 4):
                mask(folder / "Label" / f"{number:04d}_label.PNG")
            (folder / "Label" / "Labels.txt").write_text("1\n")


def dtd(root: Path, categories: tuple[str, ...]) -> None:
    for category in categories:
        mvtec_layout(root, category, mask_suffix="_mask")


def real_iad(root: Path, categories: tuple[str, ...], resolution: str = "1024") -> None:
    for category in categories:
        folder = root / f"realiad_{resolution}" / category
        splits: dict[str, list[dict]] = {"train": [], "test": []}
        for number in range(4):
            path = picture(folder / "OK" / "S0001" / f"{category}_{number:04d}_OK_C1.jpg").relative_to(folder)
            entry = {"image_path": str(path), "mask_path": None, "anomaly_class": "OK"}
            splits["train" if number < 2 else "test"].append(entry)
        for number in range(2):
            name = Path("NG") / "AK" / "S0001" / f"{category}_{number:04d}_NG_AK_C1"
            picture(folder / name.with_suffix(".jpg"), defect=True)
            mask(folder / name.with_suffix(".png"))
            splits["test"].append({
                "image_path": str(name.with_suffix(".jpg")),
                "mask_path": str(name.with_suffix(".png")),
                "anomaly_class": "AK",
            })
        listing = root / "realiad_jsons" / "realiad_jsons" / f"{category}.json"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps(splits))


def head_ct(root: Path) -> None:
    for number in range(4):
        picture(root / "head_ct" / "head_ct" / f"{number:03d}.png", defect=number < 2)
    (root / "labels.csv").write_text("id, hemorrhage\n0, 1\n1, 1\n2, 0\n3, 0\n")


def yes_no(root: Path) -> None:
    for number in range(2):
        picture(root / "no" / f"no {number}.jpg")
        picture(root / "yes" / f"Y{number}.JPG", defect=True)


def segmented(root: Path, images: str, masks: str, suffix: str = ".png", mask_name: str = "{}.png") -> None:
    for number in range(3):
        picture(root / images / f"x{number}{suffix}", defect=True)
        mask(root / masks / mask_name.format(f"x{number}"))


def write(name: str, root: Path, categories: tuple[str, ...] = ()) -> Path:
    """Write the miniature of a data set of the catalogue.

    Args:
        name: As in the catalogue.
        root: Folder to write to.
        categories: Those to write, where the data set has some.
    """
    with_categories = {
        "MVTec": mvtec,
        "VisA": visa,
        "MPDD": mpdd,
        "BTAD": btad,
        "DAGM": dagm,
        "DTD": dtd,
        "Real-IAD": real_iad,
    }
    root.mkdir(parents=True, exist_ok=True)
    if name in with_categories:
        with_categories[name](root, categories)
    elif name == "HeadCT":
        head_ct(root)
    elif name in {"BrainMRI", "Br35H"}:
        yes_no(root)
    elif name == "ISIC":
        folders = ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth")
        segmented(root, *folders, ".jpg", "{}_Segmentation.png")
    elif name == "ClinicDB":
        segmented(root, "Original", "Ground Truth", ".tif", "{}.tif")
    elif name == "TN3K":
        segmented(root, "test-image", "test-mask", ".jpg", "{}.jpg")
    else:
        suffix = ".png" if name == "ColonDB" else ".jpg"
        segmented(root, "images", "masks", suffix, "{}" + suffix)
    return root


def good_and_bad(root: Path, height: int, width: int, rows: slice, across: int, step: int) -> Path:
    """Four good and four bad images of a size, with masks; the defect of image n begins at column ``step * n``."""
    for folder in ("good", "bad", "masks"):
        (root / folder).mkdir()
    random = np.random.default_rng(0)
    for index in range(8):
        image = random.integers(90, 130, (height, width, 3), dtype=np.uint8)
        if index % 2:
            mask = np.zeros((height, width), np.uint8)
            mask[rows, step * index : step * index + across] = 255
            image[mask > 0] = 250
            cv2.imwrite(str(root / "masks" / f"{index}.png"), mask)
        cv2.imwrite(str(root / ("bad" if index % 2 else "good") / f"{index}.png"), image)
    return root


def good_and_bad_folder(root: Path, batch: int = 2) -> Folder:
    """anomalib's data module of such images."""
    named = {"normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks", "normal_test_dir": "good"}
    sizes = {"train_batch_size": batch, "eval_batch_size": batch, "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder(name="miniature", root=root, **named, **sizes)
