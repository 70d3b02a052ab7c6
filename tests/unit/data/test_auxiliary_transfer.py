# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Source and target in every form, all their categories, sampling, and what is refused."""

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from anomalib.data import MVTecAD, get_datamodule
from miniatures import mvtec, visa, write

from anomalib_fbclip import AuxiliaryTransfer, LabelledFolder, ProceduralSurfaces
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.clip.build import EMBEDDED
from anomalib_fbclip.data.sets import describe, load_datamodule, shares_source, with_categories


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transfer")
    (root / "visa").mkdir()
    mvtec(root / "MVTecAD", ("bottle", "cable", "grid"))
    visa(root / "visa", ("candle", "pcb1"))
    return {
        "MVTecAD": root / "MVTecAD",
        "Visa": root / "visa",
        "HeadCT": write("HeadCT", root / "HeadCT"),
        "ISIC": write("ISIC", root / "ISIC"),
    }


def _spec(roots: dict[str, Path], name: str, **more: object) -> dict:
    return {"class_path": name, "init_args": {"root": str(roots[name]), **more}}


def test_train_is_the_labelled_test_split_of_all_categories_together(roots: dict[str, Path]) -> None:
    data = AuxiliaryTransfer(
        _spec(roots, "MVTecAD"),
        _spec(roots, "Visa", category="pcb1"),
        source_category=["bottle", "cable", "grid"],
    )
    data.prepare_data()
    data.setup()
    samples = data.train_data.samples
    # Of each category, two good and four anomalous images of its test split.
    assert samples.groupby(samples.image_path.str.split("/").str[-4]).size().to_dict() == {
        "bottle": 6,
        "cable": 6,
        "grid": 6,
    }
    assert (samples["split"] == "test").all()
    assert int(samples["label_index"].sum()) == 12
    assert len(data.test_data) == 4
    assert data.val_data.samples.equals(data.test_data.samples)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.image) == 4
    marked = batch.gt_label.bool()
    assert (batch.image.amin(dim=1)[marked][batch.gt_mask[marked] > 0] > 0.9).all()
    assert data.source_name == "MVTecAD-bottle-cable-grid"


def test_every_form_of_source_and_target(roots: dict[str, Path]) -> None:
    instance = MVTecAD(roots["MVTecAD"], category="cable")
    by_config = {"data": {"class_path": "AuxiliaryTransfer", "init_args": {}}}
    by_config["data"]["init_args"] = {
        "source": _spec(roots, "MVTecAD", category="cable"),
        "target": _spec(roots, "Visa", category="candle"),
    }
    for data in (
        AuxiliaryTransfer(instance, _spec(roots, "Visa", category="candle")),
        get_datamodule(by_config),
    ):
        data.prepare_data()
        data.setup()
        assert len(data.train_data) == 6
        assert data.category == "MVTecAD-cable_to_Visa-candle"
    # By its class, or as the paper's tables write it; all categories where the data set lists them.
    data = AuxiliaryTransfer("MVTecAD", "VisA", source_category="all", target_category="all")
    assert (len(data.sources), len(data.targets)) == (15, 12)
    assert data.category == "MVTecAD-all_to_Visa-all"
    assert describe(with_categories(load_datamodule("Kolektor"), "all")) == "Kolektor"
    for wrong in ("MVTek", {"init_args": {}}):
        with pytest.raises(ValueError, match=r"MVTek|class_path"):
            load_datamodule(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "fair"}, "'fair'"),
        ({"source_category": ["bottle", "botle"]}, r"'botle'.*bottle"),
        ({"target_category": []}, r"category=\[\]"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuxiliaryTransfer("MVTecAD", "Visa", **arguments)


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(_self: MVTecAD) -> None:
        raise URLError(OSError("Name or service not known"))

    monkeypatch.setattr(MVTecAD, "prepare_data", no_network)
    data = AuxiliaryTransfer(MVTecAD(tmp_path / "nowhere"), None)
    with pytest.raises(ConnectionError, match=r"MVTecAD is not in '.*nowhere'.*docs/datasets"):
        data.prepare_data()


def test_balanced_sampling_evens_out_the_labels(roots: dict[str, Path]) -> None:
    share = {}
    for sampling in ("plain", "balanced"):
        data = AuxiliaryTransfer(
            _spec(roots, "MVTecAD"),
            _spec(roots, "Visa", category="candle"),
            source_category=["bottle", "cable"],
            sampling=sampling,
        )
        data.prepare_data()
        data.setup()
        torch.manual_seed(0)
        labels = torch.cat([batch.gt_label for _ in range(8) for batch in data.train_dataloader()])
        assert len(labels) == 8 * 12
        share[sampling] = float(labels.float().mean())
    assert share["plain"] == pytest.approx(2 / 3)
    assert share["balanced"] == pytest.approx(0.5, abs=0.12)


def test_targets_without_masks_or_without_good_pictures(roots: dict[str, Path]) -> None:
    isic = LabelledFolder(
        roots["ISIC"],
        abnormal_dir="ISBI2016_ISIC_Part1_Test_Data",
        mask_dir="ISBI2016_ISIC_Part1_Test_GroundTruth",
        mask_suffix="_Segmentation",
    )
    for target, masks, labels in ((_spec(roots, "HeadCT"), False, {0, 1}), (isic, True, {1})):
        data = AuxiliaryTransfer(_spec(roots, "MVTecAD", category="grid"), target)
        data.prepare_data()
        data.setup()
        batch = next(iter(data.test_dataloader()))
        assert (batch.gt_mask is not None) == masks
        assert set(batch.gt_label.tolist()) == labels
        # Nothing of the source was moved to the target to make up for what it lacks.
        assert len(data.train_data) == 6


def test_overlap_is_refused(roots: dict[str, Path], tmp_path: Path) -> None:
    source = _spec(roots, "MVTecAD")
    with pytest.raises(ValueError, match=r"share 6 images, such as .*cable"):
        AuxiliaryTransfer(source, source, ["bottle", "cable"], ["cable", "grid"]).setup()

    copied = tmp_path / "elsewhere"
    for number, path in enumerate(sorted((roots["MVTecAD"] / "bottle" / "test" / "broken").glob("*.png"))):
        copied.mkdir(exist_ok=True)
        shutil.copy(path, copied / f"renamed{number}.png")
    with pytest.raises(ValueError, match=r"share 2 images, such as .*renamed0"):
        AuxiliaryTransfer(source, LabelledFolder(tmp_path, abnormal_dir="elsewhere"), ["bottle", "cable"]).setup()

    # Other images of the same category are refused as well; other categories are not.
    mvtec(tmp_path / "again", ("bottle", "screw"))
    again = {"class_path": "MVTecAD", "init_args": {"root": str(tmp_path / "again")}}
    with pytest.raises(ValueError, match="both MVTecAD, category 'bottle'"):
        AuxiliaryTransfer(source, again, "bottle", "bottle").setup()
    AuxiliaryTransfer(source, again, "bottle", "screw").setup()


@pytest.mark.parametrize(
    ("source", "category", "same"),
    [
        ("MVTecAD-all", "bottle", True),
        ("MVTecAD-cable-bottle", "bottle", True),
        ("MVTecAD-cable", "bottle", False),
        ("MVTecAD", "bottle", True),
        ("mvtec", "bottle", True),
        ("visa", "bottle", False),
        ("Visa-all", "bottle", False),
        ("MVTecAD2-bottle", "bottle", False),
        (None, "bottle", False),
    ],
)
def test_an_adapters_own_source_is_recognised(source: str | None, category: str, same: bool) -> None:
    assert shares_source(source, [MVTecAD("x", category=category)]) is same


def test_a_group_of_families_holds_its_families(tmp_path: Path) -> None:
    fabric, wood = (ProceduralSurfaces(category=category, root=tmp_path) for category in ("fabric", "wood"))
    shipped = adapters.read(EMBEDDED["tiny"] / "fbclip.safetensors")[1]["source"]
    for source in (shipped, "ProceduralSurfaces-train", "ProceduralSurfaces-fabric+foam"):
        assert shares_source(source, [fabric])
        assert not shares_source(source, [wood])
    small = {"root": tmp_path, "image_size": 56, "num_train": 1, "num_test": 2}
    source = ProceduralSurfaces(category=["fabric", "foam"], **small)
    with pytest.raises(ValueError, match="both ProceduralSurfaces, category 'fabric'"):
        AuxiliaryTransfer(source, ProceduralSurfaces(category="fabric", **small, seed=1)).setup()
