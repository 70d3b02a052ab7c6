# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``LabelledFolder``: images with labels, masks or both, all of them to test on (or to train an adapter on)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import DatasetItem, ImageItem
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode, read_image, read_mask
from pandas import DataFrame
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_fbclip.registration import register_datamodules

Folders = str | Path | Sequence[str | Path] | None


class LabelledFolderDataset(AnomalibDataset):
    """The images of a table made by :func:`make_labelled_samples` or by a data module on this base.

    Args:
        samples: Columns ``image_path, label, label_index, mask_path, split``.
        mask_threshold: A mask's pixel is anomalous above this value, 0..254.
    """

    def __init__(self, samples: DataFrame, mask_threshold: int = 0) -> None:
        super().__init__()
        self.samples = samples
        self.mask_threshold = mask_threshold

    def __getitem__(self, index: int) -> DatasetItem:
        """Image, label and mask; anomalib's own reading knows no other mask threshold than 0."""
        row = self.samples.iloc[index]
        if not self.mask_threshold or not row.mask_path:
            return super().__getitem__(index)
        image = read_image(row.image_path, as_tensor=True)
        grey = torch.from_numpy(read_mask(row.mask_path))
        mask = Mask(grey > self.mask_threshold, dtype=torch.uint8)
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        label = torch.tensor(row.label_index)
        return ImageItem(image=image, gt_mask=mask, gt_label=label, image_path=row.image_path, mask_path=row.mask_path)


def make_labelled_samples(
    root: Path,
    normal: Sequence[Path],
    abnormal: Sequence[Path],
    masks: Sequence[Path] = (),
    mask_suffix: str = "",
    extensions: Sequence[str] = IMG_EXTENSIONS,
    split: Split = Split.TEST,
) -> DataFrame:
    """List the images of some folders; the label of an image is the name of its folder.

    Masks are found by name and not by order, so one that is missing is named instead of shifting all others.

    Args:
        root: All folders lie below it.
        normal: Folders of good images.
        abnormal: Folders of anomalous images.
        masks: Folders of masks: as many as ``abnormal``, or one for all. None: there are no masks.
        mask_suffix: What a mask's name has after the name of its image, such as ``_Segmentation``.
        extensions: Files with other extensions are passed over.
        split: What the images are for.

    Returns:
        Columns ``image_path, label, label_index, mask_path, split``.

    Raises:
        FileNotFoundError: If a folder is missing or empty, a link leads nowhere, or an anomalous image has no mask.
    """
    rows = [
        (path, folder.name, LabelName.NORMAL, "") for folder in normal for path in _pictures(root / folder, extensions)
    ]
    folders = list(masks) if len(masks) != 1 else list(masks) * len(abnormal)
    for index, folder in enumerate(abnormal):
        pictures = _pictures(root / folder, extensions)
        named = {path.stem: path for path in _pictures(root / folders[index], extensions)} if folders else {}
        missing = [path.name for path in pictures if folders and path.stem + mask_suffix not in named]
        if missing:
            msg = (
                f"{len(missing)} images of {str(root / folder)!r} have no mask in {str(root / folders[index])!r}, "
                f"such as {missing[0]}: expected {Path(missing[0]).stem + mask_suffix}.png or another format there."
            )
            raise FileNotFoundError(msg)
        for path in pictures:
            mask = str(named[path.stem + mask_suffix]) if folders else ""
            rows.append((path, folder.name, LabelName.ABNORMAL, mask))
    return samples_from_rows(rows, split)


def samples_from_rows(rows: Sequence[tuple[Path, str, LabelName, str]], split: Split = Split.TEST) -> DataFrame:
    """The table that anomalib's data sets hold, from rows of path, label, label index and mask path."""
    samples = DataFrame(
        [(str(path), label, int(index), mask, split.value) for path, label, index, mask in rows],
        columns=["image_path", "label", "label_index", "mask_path", "split"],
    )
    samples.attrs["task"] = "segmentation" if samples["mask_path"].ne("").any() else "classification"
    return samples


class TestOnlyDataModule(AnomalibDataModule):
    """Base of data sets that are published without a train split: everything is to be tested on.

    Validation is the test split, since there is nothing else to take a threshold from.

    Args:
        root: Folder of the data set.
        category: What the images show; models with prompts for each class, such as WinCLIP, read it.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        val_split_mode: See anomalib's data modules.
        **kwargs: Further arguments of anomalib's data modules.
    """

    def __init__(
        self,
        root: Path | str,
        category: str = "",
        eval_batch_size: int = 32,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        **kwargs: Any,  # noqa: ANN401  # of any type
    ) -> None:
        kwargs.setdefault("train_batch_size", eval_batch_size)
        super().__init__(
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=TestSplitMode.NONE,
            val_split_mode=val_split_mode,
            **kwargs,
        )
        self.root = Path(root).expanduser()
        self.category = category

    def _create_test_split(self) -> None:
        """Keep the images as they are: without normal ones, anomalib would look for some in a train split."""

    def train_dataloader(self) -> DataLoader:
        """The images to train on, where there are some.

        Raises:
            ValueError: If there are none, with what to do instead.
        """
        if hasattr(self, "train_data"):
            return super().train_dataloader()
        msg = (
            f"{self.name} has no train split. Test a zero-shot model on it, or take it as the source of "
            f"AuxiliaryTransfer, which trains on labelled images."
        )
        raise ValueError(msg)


class LabelledFolder(TestOnlyDataModule):
    """Your own images, or any data set in folders, to test on: good ones, defective ones, masks.

    Where anomalib's ``Folder`` trains on the good images and cannot do without them, this takes every image for
    the test; a model that must be trained on good images gets them from ``train_dir``. Without masks the pixel metrics
    are missing. Without good images, or without defective ones, the image metrics are not defined: NaN with
    ``metrics="full"``, zero with anomalib's own; the models of this package warn.

    Args:
        root: Folder that the others lie in.
        normal_dir: Folder of good images, or several. ``None``: there are none.
        abnormal_dir: Folder of defective images, or several, such as one for each type of defect.
        mask_dir: Folder of masks, or as many as ``abnormal_dir``. A mask is found by the name of its image.
            ``None``: there are none.
        mask_suffix: What a mask's name has after the name of its image, such as ``_Segmentation``.
        mask_threshold: A mask's pixel is anomalous above this value, 0..254. 0 is what anomalib and the paper do; masks
            that were saved as JPEG have faint noise around each edge and want 127.
        name: Name in results. ``None``: the name of the root folder.
        category: What the images show; models with prompts for each class, such as WinCLIP, read it.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        train_dir: Folder of good images to train on, or several. ``None``: there is no train split.
        extensions: Extensions of the images to read, such as ``(".png",)``. ``None``: all that anomalib reads.
        train_batch_size: Batch size of training.
        train_augmentations: Applied to the images to train on. ``None``: ``augmentations``.
        val_augmentations: Applied to the images to validate on. ``None``: ``augmentations``.
        test_augmentations: Applied to the images to test on. ``None``: ``augmentations``.
        augmentations: Transform of torchvision for what has none of its own.
        val_split_mode: Where validation images come from: ``same_as_test``, ``from_test``, ``none``; with ``train_dir``
            also ``from_train`` and ``synthetic``.
        val_split_ratio: Share that ``from_test``, ``from_train`` and ``synthetic`` take.
        seed: Of that choice.

    Raises:
        ValueError: If there is neither ``normal_dir`` nor ``abnormal_dir``, the folders do not match, or a validation
            split is to be taken from a train split that is not there.

    Example:
        >>> from anomalib_fbclip import LabelledFolder
        >>> data = LabelledFolder("parts", "good", ["scratch", "dent"], mask_dir="masks")
    """

    def __init__(
        self,
        root: Path | str,
        normal_dir: Folders = None,
        abnormal_dir: Folders = None,
        mask_dir: Folders = None,
        mask_suffix: str = "",
        mask_threshold: int = 0,
        name: str | None = None,
        category: str = "",
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_dir: Folders = None,
        extensions: Sequence[str] | None = None,
        train_batch_size: int = 32,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        self._name = name or Path(root).expanduser().resolve().name
        super().__init__(
            root,
            category,
            eval_batch_size,
            num_workers,
            val_split_mode,
            train_batch_size=train_batch_size,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.train_dirs, self.extensions = _as_paths(train_dir), tuple(extensions or IMG_EXTENSIONS)
        if self.val_split_mode in {ValSplitMode.FROM_TRAIN, ValSplitMode.SYNTHETIC} and not self.train_dirs:
            msg = f"val_split_mode={str(self.val_split_mode.value)!r} takes good images to train on: give train_dir."
            raise ValueError(msg)
        self.normal_dirs, self.abnormal_dirs, self.mask_dirs = map(_as_paths, (normal_dir, abnormal_dir, mask_dir))
        self.mask_suffix = mask_suffix
        self.mask_threshold = mask_threshold
        if not 0 <= mask_threshold <= 254:
            msg = f"mask_threshold={mask_threshold}: give a number from 0 to 254; masks have 8 bit."
            raise ValueError(msg)
        if not self.normal_dirs and not self.abnormal_dirs:
            msg = "normal_dir=None and abnormal_dir=None: name at least one folder below root."
            raise ValueError(msg)
        if len(self.mask_dirs) not in {0, 1, len(self.abnormal_dirs)}:
            msg = f"mask_dir={mask_dir!r} for abnormal_dir={abnormal_dir!r}: give one mask folder, or one for each."
            raise ValueError(msg)

    @property
    def name(self) -> str:
        """Name in results."""
        return self._name

    def _setup(self, _stage: str | None = None) -> None:
        samples = make_labelled_samples(
            self.root,
            self.normal_dirs,
            self.abnormal_dirs,
            self.mask_dirs,
            self.mask_suffix,
            self.extensions,
        )
        self.test_data = LabelledFolderDataset(samples, self.mask_threshold)
        if self.train_dirs:
            samples = make_labelled_samples(
                self.root,
                self.train_dirs,
                abnormal=(),
                extensions=self.extensions,
                split=Split.TRAIN,
            )
            samples.attrs["task"] = self.test_data.samples.attrs["task"]
            self.train_data = LabelledFolderDataset(samples)


def _as_paths(folders: Folders) -> list[Path]:
    if folders is None:
        return []
    return [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]


def _pictures(folder: Path, extensions: Sequence[str] = IMG_EXTENSIONS) -> list[Path]:
    if not folder.is_dir():
        msg = f"{str(folder)!r} is no folder: check root and the names of the folders below it."
        raise FileNotFoundError(msg)
    known = {extension.lower() for extension in extensions}
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in known and not path.is_dir())
    broken = [path for path in paths if not path.exists()]
    if broken:
        msg = f"{len(broken)} links in {str(folder)!r} lead nowhere, such as {broken[0].name}: mend or remove them."
        raise FileNotFoundError(msg)
    if not paths:
        msg = f"{str(folder)!r} holds no images ({', '.join(extensions)})."
        raise FileNotFoundError(msg)
    return paths


register_datamodules()
