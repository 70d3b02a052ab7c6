# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``AFCLIP``: the Lightning module that anomalib's engine, CLI and pipelines run.

AF-CLIP: Zero-Shot Anomaly Detection via Anomaly-Focused CLIP Adaptation (Fang et al., ACM MM 2025,
https://arxiv.org/abs/2507.19949).
"""

from anomalib.models.components import AnomalibModule

from anomalib_fbclip import registration
from anomalib_fbclip.adapted.lightning_model import AdaptedModule

from .loss import AFCLIPLoss
from .torch_model import AFCLIPModel


class AFCLIP(AdaptedModule, AnomalibModule):
    """AF-CLIP: zero-shot anomaly detection via anomaly-focused CLIP adaptation (ACM MM 2025).

    With ``weights``, such as the authors' ``visa_prompt.pt`` with ``visa_adaptor.pt`` beside it, the model is
    zero-shot. Without, it trains prompts and adaptor on the data module's train split; CLIP stays frozen. The paper
    trains with batches of 8 (the data module's ``train_batch_size``) and the seed 122 (``seed=122``). With ``k_shot``
    the paper's own memory of normal images decides together with the text.

    Args:
        n_ctx: Learnable vectors in front of both prompts.
        focal_gamma: Exponent of both focal losses.
        alignment_weight: Weight of the patch alignment loss; 0 switches it off.
        learning_rate: Of Adam.
        **kwargs: Arguments of :class:`~anomalib_fbclip.adapted.lightning_model.AdaptedModule` and
            :class:`~anomalib_fbclip.host.clip_module.CLIPModule`: ``backbone``, ``weights``, ``k_shot``, ...

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or the adapter was made for another model.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.

    Example:
        >>> from anomalib_fbclip import AFCLIP
        >>> AFCLIP(backbone="tiny", image_size=64).model.feature_layers
        (2, 4, 6, 8)
    """

    paper_epochs = 2

    def __init__(
        self,
        n_ctx: int = 12,
        focal_gamma: float = 4.0,
        alignment_weight: float = 1.0,
        learning_rate: float = 1e-4,
        **kwargs,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        loss = AFCLIPLoss(focal_gamma, alignment_weight, literal=bool(self._shared["literal"]))
        self.build(AFCLIPModel, loss, n_ctx=n_ctx)


registration.register_models()
