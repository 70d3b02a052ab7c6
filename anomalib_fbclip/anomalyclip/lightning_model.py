# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``AnomalyCLIP``: the Lightning module that anomalib's engine, CLI and pipelines run.

AnomalyCLIP: Object-agnostic Prompt Learning for Zero-shot Anomaly Detection (Zhou et al., ICLR 2024,
https://arxiv.org/abs/2310.18961).
"""

from anomalib.models.components import AnomalibModule

from anomalib_fbclip import registration
from anomalib_fbclip.adapted.lightning_model import AdaptedModule

from .loss import AnomalyCLIPLoss
from .torch_model import AnomalyCLIPModel


class AnomalyCLIP(AdaptedModule, AnomalibModule):
    """AnomalyCLIP: object-agnostic prompt learning for zero-shot anomaly detection (ICLR 2024).

    With ``weights``, such as the authors' ``epoch_15.pth``, the model is zero-shot. Without, it trains the prompts on
    the data module's train split; CLIP stays frozen. The paper trains with batches of 8 (the data module's
    ``train_batch_size``) and the seed 111 (``seed=111``).

    Args:
        n_ctx: Learnable context tokens of each prompt.
        prompt_depth: Blocks of the text tower whose input holds learnable tokens; 1: the prompts themselves alone.
            ``None``: 9 of 12, the same share of another tower.
        deep_tokens: Learnable tokens before each of the blocks 2 to ``prompt_depth``.
        local_blocks: How many of the last visual blocks run the local path. ``None``: 19 of 24, the same share of
            another tower.
        focal_gamma: Exponent of the focal loss.
        local_weight: Weight of focal and dice loss.
        learning_rate: Of Adam.
        **kwargs: Arguments of :class:`~anomalib_fbclip.adapted.lightning_model.AdaptedModule` and
            :class:`~anomalib_fbclip.host.clip_module.CLIPModule`: ``backbone``, ``weights``, ``k_shot``, ...

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or the adapter was made for another model.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.

    Example:
        >>> from anomalib_fbclip import AnomalyCLIP
        >>> AnomalyCLIP(backbone="tiny", image_size=64).model.local_blocks
        6
    """

    paper_epochs = 15

    def __init__(
        self,
        n_ctx: int = 12,
        prompt_depth: int | None = None,
        deep_tokens: int = 4,
        local_blocks: int | None = None,
        focal_gamma: float = 2.0,
        local_weight: float = 4.0,
        learning_rate: float = 1e-3,
        **kwargs,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.build(
            AnomalyCLIPModel,
            AnomalyCLIPLoss(focal_gamma, local_weight),
            n_ctx=n_ctx,
            prompt_depth=prompt_depth,
            deep_tokens=deep_tokens,
            local_blocks=local_blocks,
        )


registration.register_models()
