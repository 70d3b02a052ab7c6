# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``ProceduralSurfaces``: an anomalib data module that needs no download, only a seed."""

from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_fbclip.data.procedural import resolve
from anomalib_fbclip.data.procedural.cache import GOOD, MASKS, CacheSpec, write_family
from anomalib_fbclip.registration import register_datamodules


class ProceduralSurfacesDataset(AnomalibDataset):
    """One split of the written images.

    Args:
        folders: One folder a family, as :func:`~anomalib_fbclip.data.procedural.cache.write_family` returns them.
        split: ``train`` or ``test``.
        augmentations: Applied to image and mask. Defaults to ``None``.
    """

    def __init__(self, folders: list[Path], split: str | Split, augmentations: Transform | None = None) -> None:
        super().__init__(augmentations=augmentations)
        self.split = Split(split)
        self.samples = make_samples(folders, self.split)


def make_samples(folders: list[Path], split: Split) -> DataFrame:
    """List the images of one split.

    Args:
        folders: One folder a family.
        split: ``train`` or ``test``.

    Returns:
        Columns ``path, split, label, category, image_path, label_index, mask_path``; the mask path of a good image
        is empty.

    Raises:
        FileNotFoundError: If the folders hold no image of this split.
    """
    rows = []
    for folder in folders:
        for image in sorted((folder / split.value).glob("*/*.png")):
            label = image.parent.name
            mask = folder / MASKS[split.value] / label / image.name
            rows.append({
                "path": str(folder),
                "split": split.value,
                "label": label,
                "category": folder.name,
                "image_path": str(image),
                "label_index": int(LabelName.NORMAL if label == GOOD else LabelName.ABNORMAL),
                "mask_path": "" if label == GOOD else str(mask),
            })
    if not rows:
        msg = f"No {split.value} images in {[str(folder) for folder in folders]}. Remove the folders to have them made."
        raise FileNotFoundError(msg)
    samples = DataFrame(rows)
    samples.attrs["task"] = "segmentation"
    return samples


class ProceduralSurfaces(AnomalibDataModule):
    """Surfaces and objects with exact defect masks, drawn from a seed and cached as PNG files.

    The train split is normal only, unless ``train_anomalous``; the test split is half normal, half defective, all kinds
    of defect in turn. Images of one family do not depend on which other families are asked for.

    Args:
        root: Cache folder. ``None`` uses anomalib's folder for datasets.
        category: A family, a group (``train``, ``test``, ``all``), or a list of families. ``test`` are the families
            that the embedded backbone has never seen, see
            :data:`~anomalib_fbclip.data.procedural.families.TEST_ONLY_FAMILIES`.
        image_size: Side of the square images in pixels, at least 32, or the pair that ``get_datamodule`` makes
            of it.
        num_train: Train images a family, at least 1.
        num_test: Test images a family, at least 2.
        train_anomalous: Whether every second train image has a defect, with its mask: what FB-CLIP's adapter is
            trained on.
        variation: Strength of the normal variation (light, gloss, borders, marks), 0..1. 0.5 is an inspection station:
            one part, one camera, changing light; 1 adds cast shadows, labels and edges as of free hand-held images.
        train_batch_size: Batch size of the train loader.
        eval_batch_size: Batch size of the validation and test loaders.
        num_workers: Worker processes of the loaders.
        train_augmentations: For training images.
        val_augmentations: For validation images.
        test_augmentations: For test images.
        augmentations: For every stage that has none of its own.
        test_split_mode: Defaults to ``from_dir``: the test images as they are.
        test_split_ratio: Share used by other test split modes.
        val_split_mode: Defaults to ``same_as_test``.
        val_split_ratio: Share used by other validation split modes.
        seed: Seed of the images and of anomalib's splits; not negative.
        views: Images of each part, from several sides and under several lights, with something before the part in most
            of them; a defect is in sight in some. ``num_train`` and ``num_test`` count parts then. ``group_by="data"``
            of our models groups the views. 1: one image of each.

    Attributes:
        group_by: Pattern of a part in the paths; ``None`` with one view.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> datamodule = ProceduralSurfaces(category="wood", image_size=112)
        >>> datamodule.prepare_data()
        >>> datamodule.setup()
        >>> next(iter(datamodule.test_dataloader())).image.shape
        torch.Size([32, 3, 112, 112])
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/ProceduralSurfaces",
        category: str | list[str] = "wood",
        image_size: int | tuple[int, int] = 224,
        num_train: int = 40,
        num_test: int = 40,
        train_anomalous: bool = False,
        variation: float = 0.5,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int = 0,
        views: int = 1,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(resolve_dataset_root(root, "ProceduralSurfaces"))
        self.families = resolve(category)
        self.category = category if isinstance(category, str) else "+".join(category)
        if not isinstance(image_size, int):
            if len(set(image_size)) != 1:
                msg = f"image_size={tuple(image_size)} is not square: give one number."
                raise ValueError(msg)
            image_size = image_size[0]
        self.spec = CacheSpec(image_size, num_train, num_test, train_anomalous, variation, seed, views)
        self.group_by = r"([^/\\]+_\d{4})_view\d+" if views > 1 else None

    def prepare_data(self) -> None:
        """Draw and write the families that the cache does not hold yet."""
        for family in self.families:
            write_family(self.root, family, self.spec)

    def _setup(self, _stage: str | None = None) -> None:
        """List the images; draws them first where ``prepare_data`` was not called."""
        folders = [write_family(self.root, family, self.spec) for family in self.families]
        self.train_data = ProceduralSurfacesDataset(folders, Split.TRAIN)
        self.test_data = ProceduralSurfacesDataset(folders, Split.TEST)
        for subset in (self.train_data, self.test_data):
            subset.category = self.category


register_datamodules()
