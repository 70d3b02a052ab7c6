# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Each of the sixteen data sets is read from a miniature of its published layout."""

import csv
from pathlib import Path

import pytest
import yaml
from anomalib.data import AnomalibDataModule, get_datamodule
from miniatures import mask, picture, write
from torch.utils.data import DataLoader

from anomalib_fbclip import DAGM, DTDSynthetic, HeadCT, LabelledFolder
from anomalib_fbclip.data.catalogue import BENCHMARKS, BY_NAME, Benchmark

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
DOCS = Path(__file__).parents[3] / "docs" / "datasets"
SLUGS = {
    "MVTec": "mvtec_ad",
    "VisA": "visa",
    "Real-IAD": "real_iad",
    "DTD": "dtd_synthetic",
    "ClinicDB": "cvc_clinicdb",
    "ColonDB": "cvc_colondb",
}
WITHOUT_MASKS = {"HeadCT", "BrainMRI", "Br35H"}
JPEG_MASKS = {"Kvasir", "Endo", "TN3K"}
WITHOUT_NORMAL = {"ISIC", "ClinicDB", "ColonDB", "Kvasir", "Endo", "TN3K"}


def _config(benchmark: Benchmark) -> dict:
    return yaml.safe_load((CONFIGS / f"{SLUGS.get(benchmark.name, benchmark.name.lower())}.yaml").read_text())


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_config_reads_the_published_layout(benchmark: Benchmark, tmp_path: Path) -> None:
    config = _config(benchmark)
    category = config["init_args"].get("category")
    assert config["class_path"] == benchmark.class_path
    if benchmark.category_names:
        assert config["init_args"] == {**benchmark.init_args, "category": category}
        assert category in benchmark.category_names
    else:
        assert config["init_args"] == benchmark.init_args

    config["init_args"]["root"] = str(write(benchmark.name, tmp_path / "data", (category,)))
    if benchmark.name in JPEG_MASKS:
        # The paper's reading takes the noise of JPEG in; here each mask is to be found as it was drawn.
        config["init_args"]["mask_threshold"] = 127
    datamodule = get_datamodule(config)
    datamodule.prepare_data()
    datamodule.setup()
    samples = datamodule.test_data.samples
    labels = set(samples["label_index"])
    assert labels == ({1} if benchmark.name in WITHOUT_NORMAL else {0, 1})
    assert len(samples) >= 3

    (batch,) = list(datamodule.test_dataloader())
    assert len(batch.image) == len(samples)
    if benchmark.name in WITHOUT_MASKS:
        assert batch.gt_mask is None
    else:
        # What the mask marks is what was drawn bright, so each mask belongs to its image.
        anomalous = batch.gt_label.bool()
        assert (batch.image.amin(dim=1)[anomalous][batch.gt_mask[anomalous] > 0] > 0.6).all()
        assert batch.gt_mask[anomalous].sum(dim=(1, 2)).tolist() == pytest.approx([400] * int(anomalous.sum()), abs=8)
        assert not batch.gt_mask[~anomalous].any()
        assert batch.gt_mask[anomalous].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_each_has_a_page_and_a_row_of_published_results(benchmark: Benchmark) -> None:
    page = (DOCS / f"{SLUGS.get(benchmark.name, benchmark.name.lower())}.md").read_text()
    for part in ("## Download", "## Layout", "## Licence", benchmark.init_args["root"]):
        assert part in page
    table = Path(__file__).parents[3] / "anomalib_fbclip" / "published" / "results.csv"
    with table.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == benchmark.name]
    assert {row["domain"] for row in rows} == {benchmark.domain}
    published = {row["category"] for row in rows} - {"mean"}
    assert published <= set(benchmark.category_names), published - set(benchmark.category_names)


def test_there_are_sixteen() -> None:
    assert len(BY_NAME) == 16
    assert sum(benchmark.domain == "Industrial" for benchmark in BENCHMARKS) == 7


def test_labelled_folder_takes_defect_types_and_masks_by_name(tmp_path: Path) -> None:
    for kind in ("scratch", "dent"):
        for number in range(2):
            picture(tmp_path / kind / f"{number}.png", defect=True)
            mask(tmp_path / "masks" / kind / f"{number}.png")
    picture(tmp_path / "good" / "0.png")
    mask(tmp_path / "masks" / "scratch" / "unused.png")
    data = LabelledFolder(tmp_path, "good", ["scratch", "dent"], ["masks/scratch", "masks/dent"], category="part")
    data.setup()
    samples = data.test_data.samples
    assert sorted(samples["label"]) == ["dent", "dent", "good", "scratch", "scratch"]
    assert data.name == tmp_path.name
    assert data.category == "part"
    for row in samples[samples["label_index"] == 1].itertuples():
        assert Path(row.mask_path) == tmp_path / "masks" / row.label / Path(row.image_path).name
    with pytest.raises(ValueError, match="no train split"):
        data.train_dataloader()

    (tmp_path / "masks" / "dent" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images of .*dent.* such as 1\.png"):
        LabelledFolder(tmp_path, "good", ["scratch", "dent"], ["masks/scratch", "masks/dent"]).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one folder"),
        ({"abnormal_dir": ["a", "b", "c"], "mask_dir": ["m", "n"]}, r"\['m', 'n'\]"),
        ({"normal_dir": "empty", "mask_threshold": 255}, "mask_threshold=255"),
        ({"normal_dir": "empty", "val_split_mode": "synthetic"}, "'synthetic'.*give train_dir"),
        ({"normal_dir": "missing"}, "missing.* is no folder"),
        ({"normal_dir": "empty"}, "empty.* holds no images"),
    ],
)
def test_labelled_folder_says_what_is_wrong(arguments: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LabelledFolder(tmp_path, **arguments).setup()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    for kind in ("train", "good", "scratch"):
        for number in range(8):
            picture(root / kind / f"{number}.png")
            if kind == "scratch":
                mask(root / "masks" / f"{number}.png")
    picture(root / "good" / "8.bmp")
    return root


def _parts(root: Path, **arguments) -> LabelledFolder:
    # Through the parser that the command line and from_config use: it takes no argument that is not declared.
    (root / "data.yaml").write_text(
        yaml.safe_dump(
            {
                "class_path": "LabelledFolder",
                "init_args": {
                    "root": str(root),
                    "normal_dir": "good",
                    "abnormal_dir": "scratch",
                    "mask_dir": "masks",
                    "train_dir": "train",
                    "train_batch_size": 4,
                    "eval_batch_size": 4,
                    "extensions": [".PNG"],
                    **arguments,
                },
            },
        ),
    )
    data = AnomalibDataModule.from_config(root / "data.yaml", **{"data.num_workers": 0})
    data.setup()
    return data


def _paths(data: LabelledFolder, split: str) -> list[str]:
    return getattr(data, f"{split}_data").samples["image_path"].tolist()


RESIZE = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [256, 256]}}


def test_labelled_folder_does_what_anomalibs_own_tests_ask_of_a_data_module(parts: Path) -> None:
    data = _parts(parts, augmentations=RESIZE)
    for split in ("train", "val", "test"):
        loader = getattr(data, f"{split}_dataloader")()
        assert isinstance(loader, DataLoader)
        batch = next(iter(loader))
        assert batch.image.shape == (4, 3, 256, 256)
        assert batch.gt_label.shape == (4,)
        if split != "train":
            assert batch.gt_mask.shape == (4, 256, 256)
    assert _paths(data, "val") == _paths(data, "test")
    assert len(_paths(data, "test")) == 16
    assert not {*_paths(data, "test")} & {*_paths(data, "train")}


def test_labelled_folder_splits_and_transforms_as_anomalibs_data_modules(parts: Path) -> None:
    splits = [_parts(parts, val_split_mode="from_test", val_split_ratio=0.25, seed=seed) for seed in (1, 1, 2)]
    for data in splits:
        assert {*_paths(data, "val")} | {*_paths(data, "test")} == {*_paths(_parts(parts), "test")}
        assert (len(_paths(data, "val")), len(_paths(data, "test"))) == (4, 12)
    assert _paths(splits[0], "val") == _paths(splits[1], "val") != _paths(splits[2], "val")
    data = _parts(parts, val_split_mode="from_train")
    assert {Path(path).parent.name for path in _paths(data, "val") + _paths(data, "train")} == {"train"}
    data = _parts(parts, test_augmentations=RESIZE, train_batch_size=2, extensions=None)
    assert [len(next(iter(data.train_dataloader())).image), len(_paths(data, "test"))] == [2, 17]
    sizes = [getattr(data, f"{split}_data")[0].image.shape[-1] for split in ("train", "val", "test")]
    assert sizes[0] == sizes[1] < sizes[2] == 256
    for split in ("train", "val"):
        data = _parts(parts, **{f"{split}_augmentations": RESIZE})
        assert getattr(data, f"{split}_data")[0].image.shape[-1] == 256


def test_thin_modules_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'Class11'"):
        DAGM(tmp_path, category="Class11")
    with pytest.raises(FileNotFoundError, match="Class2"):
        DAGM(tmp_path, category="Class2").setup()
    with pytest.raises(ValueError, match="'Woven_2'"):
        DTDSynthetic(tmp_path, category="Woven_2")
    with pytest.raises(FileNotFoundError, match="Woven_104"):
        DTDSynthetic(tmp_path, category="Woven_104").prepare_data()
    with pytest.raises(FileNotFoundError, match=r"labels\.csv"):
        HeadCT(tmp_path).setup()
    (tmp_path / "labels.csv").write_text("id, hemorrhage\n7, 1\n")
    with pytest.raises(FileNotFoundError, match=r"image 7.*007\.png"):
        HeadCT(tmp_path).setup()


def test_dagm_trains_on_good_pictures_alone(tmp_path: Path) -> None:
    data = DAGM(write("DAGM", tmp_path / "d", ("Class3",)), category="Class3")
    data.setup()
    assert set(data.train_data.samples["label_index"]) == {0}
    assert len(data.train_data) == 2
    assert len(data.test_data) == 4
