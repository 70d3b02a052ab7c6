# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FiSeCLIP as one readable pipeline: tokens, text map, filter, matching within the batch, fusion."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.clip.stem import local_width
from anomalib_fbclip.common.functional import (
    Grid,
    are_pixels_checked,
    check_finite,
    full_precision,
    grid_of,
    is_exporting,
    pair,
    relative_layers,
    tokens_to_grid,
    upsample,
)

from .bank import Reference, ReferenceBank, content_keys, first_of_each, tile_keys
from .filtering import abnormal_probability, reference_mask, refine
from .fusion import image_score, normal_limit, to_probability, weigh_by_text
from .matching import (
    mean_of_smallest,
    nearest_distances,
    nearest_distances_literal,
    nearest_of_each_image,
    neighbourhood_average,
    relative_neighbourhoods,
)
from .semantics import CORRELATIONS, restore_semantics
from .text import class_text_features

logger = logging.getLogger(__name__)

MATCHING_LAYERS = (6, 12, 18, 24)
DEFAULT_CLASS = "object"

MEMORY_TILES = 64
"""Tiles that serve as references of a category at most, whatever the size of the images."""


@dataclass
class FiSeStages:
    """Tensors of every stage, for images and for tests. B images, L patches, d joint width.

    Attributes:
        joint: Restored patch tokens in the joint space ``[B, L, d]``.
        class_probability: Probability of "abnormal" of the class token ``[B]``.
        text_map: Probability of "abnormal" of each patch ``[B, L]``.
        refined_map: The same after refinement ``[B, L]``.
        kept: Patches that may serve as references ``[B, L]``.
        num_references: Reference images of each image ``[B]``.
        distances: Matching distances ``[B, L]``; 0 where there is no reference.
        weighted: Distances weighted by the refined text map ``[B, L]``.
        limit: Weighted distance that the map shows as 0.5 ``[B]``; NaN where there is no reference.
        grid_map: Probability of "abnormal", matching and text together ``[B, L]``.
        pred_score: Image score ``[B]``.
    """

    joint: torch.Tensor
    class_probability: torch.Tensor
    text_map: torch.Tensor
    refined_map: torch.Tensor
    kept: torch.Tensor
    num_references: torch.Tensor
    distances: torch.Tensor
    weighted: torch.Tensor
    limit: torch.Tensor
    grid_map: torch.Tensor
    pred_score: torch.Tensor


class References:
    """What images of one kind, wholes or tiles, are matched with.

    Args:
        size: Of the bank.

    Attributes:
        bank: The last ones seen of each category.
        sample: Random ones of the whole run, of each category, in place of batch and bank.
        trusted: Those that are known to be good, beside the others; ``None``: none.
        grid: Rows and columns of the patches; ``None``: nothing was seen.
    """

    def __init__(self, size: int) -> None:
        self.bank = ReferenceBank(size)
        self.sample: dict[str, Reference] = {}
        self.trusted: Reference | None = None
        self.grid: Grid | None = None

    def clear(self) -> None:
        """Forget the images seen; trusted ones stay."""
        self.bank.clear()
        self.sample.clear()

    def of(self, category: str) -> Reference | None:
        """All of a category: of the sample, else of the bank, and trusted ones; ``None``: there are none."""
        found = self.sample.get(category)
        found = self.bank.get(category) if found is None else found
        return self.trusted if found is None else found if self.trusted is None else found + self.trusted

    def check_grid(self, grid: Grid) -> None:
        """Refuse images whose patches are of another number than those before, and keep the number.

        Raises:
            ValueError: If they are.
        """
        if (self.bank or self.sample or self.trusted is not None) and self.grid != grid:
            msg = f"images of {grid} patches after images of {self.grid}: call reset() before images of another size, "
            msg += "or resize all to one (resize='squash')."
            raise ValueError(msg)
        self.grid = grid


class FiSeCLIPModel(nn.Module):
    """FiSeCLIP (ICCV 2025 workshops, arXiv 2507.11003), as far as it is public; see the README beside this file.

    The images of a batch are each other's references, filled up from the last images seen to ``bank_size``; so the
    result of an image depends on its company. :meth:`reset` forgets the images seen.

    Args:
        clip: Frozen backbone.
        feature_layers: Blocks whose tokens are matched, counted from 1. ``None``: 6, 12, 18, 24 for a tower of 24
            blocks, the same relative depths for another.
        class_name: Noun in the prompts. ``None``: the image's category where it is given, else "object".
        correlation: Attention of the restored path: ``qq-kk``, ``qq``, ``kk`` or ``vv``. ``none``: CLIP's own tokens.
            ``auto``: ``qq-kk``, and ``none`` on the embedded backbone, whose patches were trained with masks.
        semantic_blocks: How many of the last blocks the restored path runs through.
        temperature: Divides the cosine of tokens and text.
        refinement: Share of an image's patches, the most similar ones, that the text map is averaged over; 0: none.
        filter_share: Share of each image's patches, those of the highest refined probability, that are no reference;
            at most 0.5. 0: no filter.
        matching: ``False``: the text map alone.
        neighbourhoods: Sides of the neighbourhoods whose tokens are averaged before matching; odd. ``None``: 1, 3, 5 on
            a grid of 37 patches, the same shares of another grid.
        reference_share: Share of the reference images, the nearest ones, that a patch's distance is averaged over.
        bank_size: Reference images that an image gets at least, as soon as so many were seen. 0: the batch alone.
        text_weight: How much the text raises or lowers distances, in [0, 1].
        class_weight: Weight of the class token's text probability in the image score, in [0, 1].
        deviations: Robust standard deviations above the median distance at which the map is 0.5.
        smoothing_sigma: Gaussian smoothing of the returned map, in pixels of the input; 0 switches it off.
        literal: Match pair by pair, in the literal form: slower, the same values up to rounding.

    Raises:
        ValueError: If an argument is out of range; the message names the value.

    Example:
        >>> from anomalib_fbclip.clip import load_clip
        >>> model = FiSeCLIPModel(load_clip("tiny", image_size=64)).eval()
        >>> model(torch.rand(2, 3, 64, 64)).anomaly_map.shape
        torch.Size([2, 64, 64])
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        feature_layers: Sequence[int] | None = None,
        class_name: str | None = None,
        correlation: str = "auto",
        semantic_blocks: int = 1,
        temperature: float = 0.07,
        refinement: float = 0.05,
        filter_share: float = 0.2,
        matching: bool = True,
        neighbourhoods: Sequence[int] | None = None,
        reference_share: float = 0.3,
        bank_size: int = 16,
        text_weight: float = 0.8,
        class_weight: float = 0.3,
        deviations: float = 10.0,
        smoothing_sigma: float = 4.0,
        literal: bool = False,
    ) -> None:
        super().__init__()
        self.clip = clip
        layers = relative_layers(MATCHING_LAYERS, clip.num_layers) if feature_layers is None else feature_layers
        self.feature_layers = clip.check_layers(layers)
        self.class_name = class_name
        if correlation == "auto":
            correlation = "none" if local_width(clip.visual) else "qq-kk"
        self.correlation = correlation
        self.semantic_blocks = semantic_blocks
        self.temperature = temperature
        self.refinement = refinement
        self.filter_share = filter_share
        self.matching = matching
        sizes = relative_neighbourhoods(clip.grid) if neighbourhoods is None else neighbourhoods
        self.neighbourhoods = tuple(int(size) for size in sizes)
        self.reference_share = reference_share
        self.text_weight = text_weight
        self.class_weight = class_weight
        self.deviations = deviations
        self.smoothing_sigma = smoothing_sigma
        self.literal = literal
        _check(self, bank_size)
        self.whole = References(bank_size)
        self.tiles = References(MEMORY_TILES)
        self._text_features: dict[str, torch.Tensor] = {}
        self.warn_alone = True

    @property
    def bank(self) -> ReferenceBank:
        """The last whole images seen."""
        return self.whole.bank

    @property
    def trusted(self) -> Reference | None:
        """Whole images that are known to be good."""
        return self.whole.trusted

    def reset(self) -> None:
        """Forget the images seen: what comes next is another stream. Trusted references stay."""
        self.whole.clear()
        self.tiles.clear()

    def set_sample(
        self,
        images: Sequence[torch.Tensor],
        category: str = DEFAULT_CLASS,
        owners: torch.Tensor | None = None,
        tiles: bool = False,
    ) -> None:
        """Match all images of a category with these, until :meth:`reset`, and no longer with their batch and the bank.

        A random sample of a run makes the result of an image independent of its batch and of the order of the run.

        Args:
            images: Images ``[3, H, W]``, see :meth:`forward`.
            category: See :meth:`forward`.
            owners: See :meth:`analyse`.
            tiles: See :meth:`analyse`; those of the category are matched with these tiles.
        """
        kind = self.tiles if tiles else self.whole
        sample = self._references(images, category, owners, tiles)
        pool = sample if kind.trusted is None else sample + kind.trusted
        kind.sample[category] = self._rate(sample, pool, tiles)

    def set_trusted(
        self,
        images: Sequence[torch.Tensor],
        category: str = DEFAULT_CLASS,
        owners: torch.Tensor | None = None,
        tiles: bool = False,
    ) -> None:
        """Let images that are known to be good be references of all images, with all their patches.

        Args:
            images: Images ``[3, H, W]``, see :meth:`forward`; none: there are no such references any more.
            category: Noun of the prompts.
            owners: See :meth:`analyse`.
            tiles: See :meth:`analyse`.
        """
        kind = self.tiles if tiles else self.whole
        trusted = self._references(images, category, owners, tiles, trusted=True) if len(images) else None
        kind.trusted = None if trusted is None else self._rate(trusted, trusted, tiles)

    def add_tiles(
        self,
        tiles: Sequence[torch.Tensor],
        owners: torch.Tensor | None,
        category: str = DEFAULT_CLASS,
    ) -> None:
        """Let tiles of a batch of images be references of the tiles of the images to come, and of the others of it.

        Without effect where a sample was set.

        Args:
            tiles: Tiles ``[3, h, w]`` of one size; none: there is nothing to add.
            owners: See :meth:`analyse`.
            category: See :meth:`forward`.
        """
        if not len(tiles) or category in self.tiles.sample:
            return
        new = self._references(tiles, category, owners, tiles=True)
        earlier = self.tiles.of(category) if self.bank.size else self.tiles.trusted
        new = self._rate(new, new if earlier is None else new + earlier.without(new.keys), tiles=True)
        if not self.bank.size:
            self.tiles.bank.clear(category)
        self.tiles.bank.add(category, new)

    @torch.no_grad()
    def _references(
        self,
        images: Sequence[torch.Tensor],
        category: str,
        owners: torch.Tensor | None,
        tiles: bool,
        trusted: bool = False,
    ) -> Reference:
        """Images as references, each content once; image by image, as there may be many."""
        parts, kind = [], self.tiles if tiles else self.whole
        grids = {self.clip.grid_of_images(image[None]) for image in images}
        if len(grids) > 1:
            msg = f"Images of {sorted(grids)} patches cannot be matched with each other: give images of one size, or "
            msg += "resize all to one (resize='squash')."
            raise ValueError(msg)
        kind.check_grid(*grids)
        for place, image in enumerate(images):
            patches, joint, _, text_map = self.encode(image[None], [category])
            with full_precision(image.device):
                refined = refine(text_map, joint, self.refinement)
                kept = reference_mask(refined, 0.0 if trusted else self.filter_share)
                owner = None if owners is None else owners[place : place + 1].to(image.device)
                keys = content_keys(image[None])
                if tiles and owner is not None:
                    keys = tile_keys(image[None], owner)
                    # Matching takes directions alone; there may be many tiles.
                    patches = F.normalize(patches.float(), dim=-1).half()
                parts.append(Reference(keys, patches, kept, refined, owners=owner))
        found = parts[0]
        for part in parts[1:]:
            found += part
        return found[first_of_each(found.keys)]

    def _rate(self, images: Reference, pool: Reference, tiles: bool) -> Reference:
        """Weighted distances of references by each other, which the limit of the scale is from."""
        with full_precision(images.patches.device):
            valid = (images.owners[:, None] != pool.owners) & pool.present
            distances = (self._tile_distances if tiles else self._distances)(images, pool, valid)
            weighted = weigh_by_text(distances, images.distances, self.text_weight)
            images.distances = weighted.masked_fill(~valid.any(dim=1)[:, None], torch.nan)
        return images

    def forward(self, images: torch.Tensor, categories: Sequence[str] | None = None) -> InferenceBatch:
        """Score images by each other and by the text.

        Args:
            images: Images ``[B, 3, H, W]`` normalised with CLIP's statistics, H and W multiples of the patch size.
            categories: What each image shows; only images of one category are matched. ``None``: all show the same.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and smoothed ``anomaly_map`` ``[B, H, W]``, both in [0, 1].

        Raises:
            ValueError: If the images are empty, their sides no multiples of the patch size, of another size than those
                in the bank, or hold NaN or infinity; or if there is not one category an image.
        """
        return self.predict(self.analyse(images, categories), images.shape[-2:])

    def predict(self, stages: FiSeStages, size: int | Sequence[int]) -> InferenceBatch:
        """Score and smoothed map ``[B, H, W]`` (one number: a square) of analysed images."""
        grid_map = tokens_to_grid(stages.grid_map, grid_of(stages.grid_map.shape[-1], size))
        anomaly_map = upsample(grid_map, size, self.smoothing_sigma)
        return InferenceBatch(pred_score=stages.pred_score, anomaly_map=anomaly_map)

    @torch.no_grad()
    def analyse(
        self,
        images: torch.Tensor,
        categories: Sequence[str] | None = None,
        owners: torch.Tensor | None = None,
        tiles: bool = False,
    ) -> FiSeStages:
        """The method up to the patch map, with the tensors of every stage; whole images enter the bank.

        Args:
            images: See :meth:`forward`.
            categories: See :meth:`forward`.
            owners: Key of the image that each is from ``[B]``, see :func:`content_keys`: what is from one image is not
                matched with each other. ``None``: each is an image of its own.
            tiles: Match them as tiles of larger images: with the tiles that :meth:`set_sample`, :meth:`add_tiles` and
                :meth:`set_trusted` named, and with nothing else. The tiles of an image are one reference: a patch is as
                far from it as from the nearest of its tiles.
        """
        if categories is not None and len(categories) != len(images):
            msg = f"{len(categories)} categories for {len(images)} images: give one an image, or None."
            raise ValueError(msg)
        patches, joint, class_probability, text_map = self.encode(images, categories)
        # Small numbers are compared from here on: always in float32, whatever the backbone ran in.
        with full_precision(images.device):
            refined = refine(text_map, joint, self.refinement)
            kept = reference_mask(refined, self.filter_share)
            stages = FiSeStages(
                joint=joint,
                class_probability=class_probability,
                text_map=text_map,
                refined_map=refined,
                kept=kept,
                num_references=torch.zeros_like(class_probability, dtype=torch.long),
                distances=torch.zeros_like(refined),
                weighted=torch.zeros_like(refined),
                limit=torch.full_like(class_probability, torch.nan),
                grid_map=refined.clone(),
                pred_score=class_probability,
            )
            # A recorded graph has no memory and must not depend on the images that it was recorded with.
            seen: dict[str, Reference] = {}
            if self.matching and not is_exporting():
                (self.tiles if tiles else self.whole).check_grid(self.clip.grid_of_images(images))
                everything = Reference(content_keys(images), patches, kept, refined, owners=owners)
                names = [DEFAULT_CLASS] * len(images) if categories is None else list(categories)
                for name in dict.fromkeys(names):
                    places = [place for place, other in enumerate(names) if other == name]
                    # Of one category, as nearly always, without a list of places, which would be copied to the device.
                    one = len(places) == len(names)
                    here = slice(None) if one else torch.tensor(places, device=images.device)
                    if tiles:
                        self._match_tiles(name, here, everything, stages)
                    else:
                        seen[name] = self._match(name, here, everything, stages)
            self._check(images, stages, alone=len(seen) > 0)
            for name, batch in seen.items():
                if name not in self.whole.sample:
                    self.bank.add(name, batch)
            stages.pred_score = image_score(class_probability, stages.grid_map, self.class_weight)
        return stages

    @torch.compiler.assume_constant_result  # nothing is trained, and a compiled graph cannot tokenise
    def text_features(self, class_name: str) -> torch.Tensor:
        """Normal and abnormal text feature ``[2, d]``, computed once for each name."""
        if class_name not in self._text_features:
            with full_precision(self.clip.visual.proj.device):
                self._text_features[class_name] = class_text_features(self.clip, class_name)
        features = self._text_features[class_name].to(self.clip.visual.proj.device)
        self._text_features[class_name] = features
        return features

    def encode(
        self,
        images: torch.Tensor,
        categories: Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is known of each image by itself, from one run of the backbone.

        Args:
            images: See :meth:`forward`.
            categories: See :meth:`forward`.

        Returns:
            Patch tokens of the matched blocks ``[B, S, L, D]``; restored patch tokens in the joint space ``[B, L, d]``;
            probability of "abnormal" of the class token ``[B]`` and of each patch ``[B, L]``. The last three: float32.
        """
        visual, depth = self.clip.visual, self.clip.num_layers
        before = depth - self.semantic_blocks
        layers = sorted({*self.feature_layers, before, depth})
        tokens = dict(zip(layers, self.clip.encode_image(images, layers), strict=True))
        patches = torch.stack([tokens[layer][:, 1:] for layer in self.feature_layers], dim=1)
        restored = tokens[depth]
        if self.correlation != "none":
            restored = restore_semantics(visual, tokens[before], self.semantic_blocks, self.correlation)
        joint = self.clip.project(visual.ln_post(restored[:, 1:]))
        class_joint = self.clip.project(visual.ln_post(tokens[depth][:, :1]))
        names = [DEFAULT_CLASS] if categories is None else categories
        text = torch.stack([self.text_features(self.class_name or name) for name in names])  # [1 or B, 2, d]
        with full_precision(images.device):
            joint, class_joint, text = joint.float(), class_joint.float(), text.float()
            class_probability = abnormal_probability(class_joint, text, self.temperature)[:, 0]
            return patches, joint, class_probability, abnormal_probability(joint, text, self.temperature)

    def _match(self, category: str, here: torch.Tensor | slice, images: Reference, stages: FiSeStages) -> Reference:
        """Match the images at places ``here``, all of one category, fill in their rows of ``stages``, return them."""
        batch = images[here]
        pool, sample = batch, self.whole.sample.get(category)
        earlier = self.bank.get(category) if sample is None else sample
        if earlier is not None:
            if sample is None:
                # The newest that are not in this batch, as many as the batch lacks.
                earlier = earlier.without(batch.keys).first(max(0, self.bank.size - len(batch) + 1))
            pool = batch + earlier
        if self.whole.trusted is not None:
            pool = pool + self.whole.trusted  # += would add to the batch
        # An image is no reference of its own double.
        valid = (batch.owners[:, None] != pool.owners) & pool.present
        if sample is not None:
            valid[:, : len(batch)] = False
        distances = self._distances(batch, pool, valid)
        weighted = weigh_by_text(distances, stages.refined_map[here], self.text_weight)
        batch.distances = weighted.masked_fill(~valid.any(dim=1)[:, None], torch.nan)
        known = pool.distances[len(batch) :].masked_fill(~pool.present[len(batch) :, None], torch.nan)
        if sample is None:
            known = torch.cat((batch.distances, known))
        self._put_on_scale(stages, here, distances, weighted, valid, known)
        return batch

    def _match_tiles(self, category: str, here: torch.Tensor | slice, tiles: Reference, stages: FiSeStages) -> None:
        """Match the tiles at places ``here``, all of one category, with those of other images; fill in their rows."""
        pool = self.tiles.of(category)
        if pool is None:
            return
        batch = tiles[here]
        valid = (batch.owners[:, None] != pool.owners) & pool.present
        distances = self._tile_distances(batch, pool, valid)
        weighted = weigh_by_text(distances, stages.refined_map[here], self.text_weight)
        known = pool.distances.masked_fill(~pool.present[:, None], torch.nan)
        self._put_on_scale(stages, here, distances, weighted, valid, known)

    def _put_on_scale(
        self,
        stages: FiSeStages,
        here: torch.Tensor | slice,
        distances: torch.Tensor,
        weighted: torch.Tensor,
        valid: torch.Tensor,
        known: torch.Tensor,
    ) -> None:
        """Fill in the rows of matched images: limit, distances and map.

        Args:
            stages: Stages whose rows are filled in.
            here: Places of the images in them.
            distances: Matching distances ``[B, L]``.
            weighted: Distances weighted by the text ``[B, L]``.
            valid: Which reference counts for which image ``[B, R]``.
            known: Weighted distances that the limit is from ``[P, L]``; NaN where there are none.
        """
        matched = valid.any(dim=1)
        stages.num_references[here] = valid.sum(dim=1)
        # NaN where no image at hand has a distance; then the text's map stays.
        limit = normal_limit(known, self.deviations).where(matched, torch.nan)
        scaled = ~limit.isnan()[:, None]
        stages.limit[here] = limit
        stages.distances[here], stages.weighted[here] = distances * scaled, weighted * scaled
        found = to_probability(weighted, limit[:, None])
        stages.grid_map[here] = found.where(scaled, stages.refined_map[here])

    def _distances(self, batch: Reference, pool: Reference, valid: torch.Tensor) -> torch.Tensor:
        """Matching distances ``[B, L]``: mean over blocks and neighbourhoods."""
        if len(pool) == 1:
            return torch.zeros_like(batch.distances)
        total = torch.zeros_like(batch.distances)
        number, length = len(batch), pool.patches.shape[1]
        match = nearest_distances_literal if self.literal else nearest_distances
        for layer in range(length):
            for size in self.neighbourhoods:
                tokens = neighbourhood_average(pool.patches[:, layer], size, self.whole.grid)
                nearest = match(tokens[:number], batch.kept, tokens[number:], pool.kept[number:])
                total += mean_of_smallest(nearest, valid, self.reference_share)
        return total / (length * len(self.neighbourhoods))

    def _tile_distances(self, tiles: Reference, pool: Reference, valid: torch.Tensor) -> torch.Tensor:
        """Matching distances ``[B, L]`` of tiles to other images, of each the nearest tile."""
        total = torch.zeros_like(tiles.distances)
        length = pool.patches.shape[1]
        match = nearest_distances_literal if self.literal else nearest_distances
        for layer in range(length):
            for size in self.neighbourhoods:
                own, theirs = (
                    neighbourhood_average(some.patches[:, layer], size, self.tiles.grid) for some in (tiles, pool)
                )
                nearest = match(own, tiles.kept, theirs, pool.kept)[:, len(tiles) :]
                total += mean_of_smallest(*nearest_of_each_image(nearest, valid, pool.owners), self.reference_share)
        return total / (length * len(self.neighbourhoods))

    def _check(self, images: torch.Tensor, stages: FiSeStages, alone: bool) -> None:
        """Refuse images that are not finite, warn once of one without references: one copy from the device for both.

        Within :func:`pixels_checked` neither is asked: the Lightning class has looked, and looks at the run's end.

        Args:
            images: See :meth:`forward`.
            stages: Stages of the images.
            alone: Whether an image without references is worth a warning.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or are_pixels_checked():
            return
        finite, matched = torch.stack((images.isfinite().all(), (stages.num_references > 0).all())).tolist()
        if not finite:
            check_finite(images)
        if alone and not matched and self.warn_alone:
            self.warn_alone = False
            logger.warning(
                "An image has no reference (it is the first of its category, and alone in its batch): it is scored by "
                "the text alone. Give batches of two images or more. (Reported once.)",
            )

    def __getstate__(self) -> dict[str, object]:
        """Leave the images seen out of copies: a copy is another stream."""
        kinds = {}
        for name, kind in (("whole", self.whole), ("tiles", self.tiles)):
            kinds[name] = References(kind.bank.size)
            kinds[name].trusted, kinds[name].grid = kind.trusted, kind.grid
        return {**self.__dict__, **kinds, "_text_features": {}}


def _check(model: FiSeCLIPModel, bank_size: int) -> None:
    correlations = ["auto", *CORRELATIONS, "none"]
    sizes = model.neighbourhoods
    checks = (
        (
            "class_name",
            model.class_name,
            model.class_name is None or bool(model.class_name.strip()),
            "give a noun, such as 'bottle', or None",
        ),
        ("correlation", model.correlation, model.correlation in correlations, f"choose one of {correlations}"),
        (
            "semantic_blocks",
            model.semantic_blocks,
            1 <= model.semantic_blocks < model.clip.num_layers,
            f"choose between 1 and {model.clip.num_layers - 1}",
        ),
        ("temperature", model.temperature, model.temperature > 0, "give a positive number (0.07 is usual)"),
        ("refinement", model.refinement, 0 <= model.refinement <= 1, "give a share in [0, 1]"),
        (
            "filter_share",
            model.filter_share,
            0 <= model.filter_share <= 0.5,
            "give a share in [0, 0.5]: at least half of an image's patches must stay",
        ),
        (
            "neighbourhoods",
            list(sizes),
            bool(sizes) and all(size > 0 and size % 2 for size in sizes) and len(set(sizes)) == len(sizes),
            "give distinct odd numbers, such as [1, 3, 5]",
        ),
        ("reference_share", model.reference_share, 0 < model.reference_share <= 1, "give a share in (0, 1]"),
        ("bank_size", bank_size, bank_size >= 0, "give 0 (the batch alone) or more images"),
        ("text_weight", model.text_weight, 0 <= model.text_weight <= 1, "give a weight in [0, 1]"),
        ("class_weight", model.class_weight, 0 <= model.class_weight <= 1, "give a weight in [0, 1]"),
        ("deviations", model.deviations, model.deviations > 0, "give a positive number"),
        (
            "smoothing_sigma",
            model.smoothing_sigma,
            0 <= model.smoothing_sigma <= min(pair(model.clip.image_size)),
            f"give pixels from 0 (no smoothing) to the image size, {model.clip.image_size}",
        ),
    )
    for name, value, good, advice in checks:
        if not good:
            msg = f"{name}={value!r}: {advice}."
            raise ValueError(msg)
