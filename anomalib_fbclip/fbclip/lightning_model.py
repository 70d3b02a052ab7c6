# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``FBCLIP``: the Lightning module that anomalib's engine, CLI and pipelines run.

FB-CLIP: Fine-Grained Zero-Shot Anomaly Detection with Foreground-Background Disentanglement (Hu et al., CVPR 2026,
https://arxiv.org/abs/2603.19608).
"""

from collections.abc import Sequence
from typing import Any

from anomalib.models.components import AnomalibModule

from anomalib_fbclip import registration
from anomalib_fbclip.adapted.lightning_model import AdaptedModule

from .loss import FBCLIPLoss
from .text_fusion import POOLINGS
from .torch_model import FBCLIPModel


class FBCLIP(AdaptedModule, AnomalibModule):
    """FB-CLIP: fine-grained zero-shot anomaly detection with foreground-background disentanglement (CVPR 2026).

    With ``weights`` the model is zero-shot: ``anomalib train``, ``test`` and ``predict`` need no training, as with
    WinCLIP. Without, it trains prompts, text fusion and foreground-background attention on the data module's train
    split; CLIP stays frozen.

    Args:
        backbone: open_clip model name, or ``"tiny"`` for the small trained backbone inside this package.
        pretrained: Backbone weights: an open_clip tag, a local file, or ``None`` for random ones.
        n_ctx: Learnable context tokens of each prompt.
        text_poolings: Out of ``global``, ``attention``, ``eot`` (paper, Table 3).
        views: Out of ``id``, ``sem``, ``spa`` (paper, Table 4). ``None``: those of the adapter that is embedded
            with the backbone where it has one (``"tiny"``: ``id``, whose page says why), else the paper's three.
        attention: Foreground-background attention on or off (paper, Table 2).
        suppression: Background suppression on or off (paper, Table 2).
        bank: ``half`` or ``full`` tokens behind the background prototype (paper, Table 5).
        causal_text: CLIP's causal text mask. The released weights were trained without it.
        smooth_logits: Up-sample and smooth the logits of the map instead of its probabilities. ``None``: as the adapter
            that is embedded with the backbone where it has one (``"tiny"``: ``True``, whose page says why), else
            ``False``, as in the paper.
        focal_gamma: Exponent of the focal losses.
        dice_weight: Weight of the dice loss.
        scr_weight: Weight of the semantic consistency loss; 0 switches it off (paper, Table 5).
        **kwargs: Arguments of :class:`~anomalib_fbclip.adapted.lightning_model.AdaptedModule` and
            :class:`~anomalib_fbclip.host.clip_module.CLIPModule`: ``weights``, ``image_size``, ``k_shot``, ...

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or the adapter was made for another model.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.

    Example:
        >>> from anomalib_fbclip import FBCLIP
        >>> FBCLIP(backbone="tiny").learning_type
        <LearningType.ZERO_SHOT: 'zero_shot'>
    """

    paper_epochs = 2

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        *,
        n_ctx: int = 12,
        text_poolings: Sequence[str] = tuple(POOLINGS),
        views: Sequence[str] | None = None,
        attention: bool = True,
        suppression: bool = True,
        bank: str = "half",
        causal_text: bool = False,
        smooth_logits: bool | None = None,
        focal_gamma: float = 4.0,
        dice_weight: float = 0.2,
        scr_weight: float = 0.15,
        **kwargs,
    ) -> None:
        super().__init__(backbone=backbone, pretrained=pretrained, **kwargs)
        self.build(
            FBCLIPModel,
            FBCLIPLoss(focal_gamma, dice_weight, scr_weight),
            n_ctx=n_ctx,
            text_poolings=text_poolings,
            views=views,
            attention=attention,
            suppression=suppression,
            bank=bank,
            causal_text=causal_text,
            smooth_logits=smooth_logits,
        )

    def calibration_settings(self) -> dict[str, Any]:
        """Settings that thresholds hold for."""
        return {**super().calibration_settings(), "smooth_logits": self.model.smooth_logits}


registration.register_models()
