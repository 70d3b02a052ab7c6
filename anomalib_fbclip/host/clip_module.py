# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``CLIPModule``: the base of Lightning modules whose torch model stands on a frozen CLIP."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Transform

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.clip.build import load_clip
from anomalib_fbclip.clip.frozen import CLIP_MEAN, CLIP_STD
from anomalib_fbclip.common.arguments import plain
from anomalib_fbclip.common.functional import pair

from .module import ScoringModule
from .pre_processing import RESIZES, ExactPreProcessor, KeepProportions, TileCanvas, squash, statistics_of
from .tiling import Tiling

PAPER_IMAGE_SIZE = 518


class CLIPModule(ScoringModule):
    """A Lightning module whose ``model`` scores batches of images with a frozen CLIP.

    The constructor of a model passes the arguments of this one on and calls :meth:`build`.

    Args:
        backbone: open_clip model name, or ``"tiny"`` for the small trained backbone inside this package.
        pretrained: Backbone weights: an open_clip tag, a local file (the network is then never touched), or ``None``
            for random ones. Not used by ``"tiny"``.
        pre_trained: The name that anomalib's own models use, so that one benchmark grid holds both: ``False`` is short
            for ``pretrained=None``.
        image_size: Height and width of the input in pixels, multiples of the patch size; one number for a square.
            ``None``: the paper's 518 for patches of 14 pixels, else the size that the backbone was trained with.
        resize: ``"squash"``: every image is resized to ``image_size``, as in the papers. ``"keep"``: an image keeps its
            proportions and gets about as many patches as ``image_size`` has. Images of one batch must then have the
            same proportions: else give batches of one image. ``None``: ``"squash"``, or with ``tiles`` ``"keep"`` for
            the whole image beside them (but with ``k_shot`` ``"squash"``: tiles and whole images share one memory).
        tiles: Side of square tiles in pixels of the original image, which are scored as images of their own, together
            with the whole image: see :class:`~anomalib_fbclip.host.tiling.Tiling`. ``None``: none. Images of one batch
            must then have the same size: else give batches of one image.
        overlap: Share of its side that a tile has in common with the next one, at least, in [0, 0.9]. Only with
            ``tiles``.
        tile_batch_size: Tiles that are scored together. Only with ``tiles``.
        quick_gelu: Activation of a local weights file, see :func:`anomalib_fbclip.clip.load_clip`.
        **kwargs: Arguments of :class:`~anomalib_fbclip.host.module.ScoringModule`.

    Attributes:
        model: The torch model; its ``clip`` is the frozen backbone.
    """

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        pre_trained: bool = True,
        image_size: int | Sequence[int] | None = None,
        resize: str | None = None,
        tiles: int | None = None,
        overlap: float = 0.25,
        tile_batch_size: int = 8,
        quick_gelu: bool | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if resize not in {*RESIZES, None}:
            msg = f"resize={resize!r}: choose one of {list(RESIZES)}, or None."
            raise ValueError(msg)
        if (resize == "keep" or tiles is not None) and not self._own_pre_processor:
            msg = f"resize={resize!r}, tiles={tiles} need this model's own pre-processor: leave pre_processor at True."
            raise ValueError(msg)
        self._resize = resize
        self._tiles: dict[str, Any] = {"tiles": tiles, "overlap": overlap, "tile_batch_size": tile_batch_size}
        self._backbone: dict[str, Any] = {
            "backbone": backbone,
            "pretrained": str(pretrained) if pretrained is not None and pre_trained else None,
            "image_size": plain(image_size),
            "quick_gelu": quick_gelu,
        }

    def build(self, model: type[nn.Module], **arguments: Any) -> None:  # noqa: ANN401  # of any model
        """Load the backbone and build the torch model on it.

        Args:
            model: Class of the torch model.
            **arguments: Its arguments beside the backbone.

        Raises:
            ValueError: If an argument is out of range.
            FileNotFoundError: If a weights file does not exist.
            ConnectionError: If backbone weights are neither on this machine nor to be downloaded.
        """
        # Buffers made in inference mode could not be changed later, parameters not be trained.
        with torch.inference_mode(mode=False):
            clip = self.load_backbone()
            self.tiling = self.tiling_for(clip)
            if self._own_pre_processor:
                self.pre_processor = self.pre_processor_for(clip)
            elif (said := statistics_of(self.pre_processor)) is not None:
                clip.mean, clip.std = said  # a file of weights does not show them
            self.model = model(clip, **arguments)
        self.image_size = clip.image_size

    @property
    def resize(self) -> str:
        """What becomes of the proportions of whole images, ``"squash"`` or ``"keep"``."""
        if self._resize is not None:
            return self._resize
        return "keep" if self._tiles["tiles"] is not None and not getattr(self, "k_shot", 0) else "squash"

    def pre_processor_for(self, clip: FrozenCLIP, image_size: int | tuple[int, int] | None = None) -> PreProcessor:
        """The pre-processor that the arguments name.

        Args:
            clip: Backbone, for its statistics and patches.
            image_size: In place of the backbone's.
        """
        size, tiling = pair(image_size or clip.image_size), self.tiling_for(clip, image_size)
        if tiling is None and self.resize == "squash":
            return self.configure_pre_processor(size, clip.mean, clip.std)
        fit: Transform = KeepProportions(size, clip.patch_size) if tiling is None else TileCanvas(tiling.canvas)
        return ExactPreProcessor(Compose([fit, Normalize(mean=clip.mean, std=clip.std)]))

    def tiling_for(self, clip: FrozenCLIP, image_size: int | tuple[int, int] | None = None) -> Tiling | None:
        """How images are cut into tiles; ``None``: not.

        Args:
            clip: See :meth:`pre_processor_for`.
            image_size: See :meth:`pre_processor_for`.

        Raises:
            ValueError: If the arguments are out of range, or the model's input is no square.
        """
        side = self._tiles["tiles"]
        if side is None:
            return None
        height, width = pair(image_size or clip.image_size)
        if height != width:
            msg = f"image_size={(height, width)} with tiles={side}: tiles are squares, give image_size as one number."
            raise ValueError(msg)
        fit = KeepProportions((height, width), clip.patch_size) if self.resize == "keep" else None
        return Tiling(side, self._tiles["overlap"], height, self._tiles["tile_batch_size"], fit)

    def load_backbone(self) -> FrozenCLIP:
        """The frozen backbone that the arguments name."""
        clip = load_clip(**self._backbone)
        if self._backbone["image_size"] is None and clip.patch_size == 14:
            clip.image_size = PAPER_IMAGE_SIZE
        return clip

    def identity(self) -> dict[str, str]:
        """Name and fingerprint of the frozen backbone."""
        return {"backbone": self.model.clip.name, "fingerprint": self.model.clip.fingerprint()}

    def calibration_settings(self) -> dict[str, Any]:
        """Settings that thresholds hold for."""
        return {
            **super().calibration_settings(),
            "smoothing_sigma": self.model.smoothing_sigma,
            "resize": self.resize,
            "tiles": self._tiles["tiles"],
            **({} if self.tiling is None else {"overlap": self.tiling.overlap}),
        }

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> PreProcessor:
        """Resize (bicubic, to a square, without keeping the aspect ratio) and normalise with CLIP's statistics.

        Args:
            image_size: Height and width in pixels. ``None``: 518 x 518.
            mean: Mean of each colour, that of the backbone.
            std: Standard deviation of each colour, that of the backbone.
        """
        return squash(image_size or (PAPER_IMAGE_SIZE, PAPER_IMAGE_SIZE), mean, std)
