# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Captions and prompts in CLIP's language, and the words that the cut vocabulary must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import FAMILIES, OBJECTS

if TYPE_CHECKING:
    import numpy as np

CONTEXT_LENGTH = 12
"""Places ``X`` before an FB-CLIP prompt."""
FBCLIP_PROMPTS = tuple(f"{'X ' * CONTEXT_LENGTH}object {state} defect." for state in ("without", "with"))
PLAIN_PROMPTS = ("object without defect.", "object with defect.")

NORMAL_STATES = (
    *("{}", "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect"),
    *("{} without damage", "normal {}", "good {}", "clean {}", "intact {}", "{} without anomaly"),
)
ANOMALOUS_STATES = (
    *("damaged {}", "{} with flaw", "{} with defect", "{} with damage", "defective {}", "broken {}", "abnormal {}"),
    *("faulty {}", "bad {}", "{} with anomaly", "{} with a defect"),
)
TEMPLATES = (
    *("{}.", "{}", "a photo of a {}.", "a photo of the {}.", "a cropped photo of the {}.", "a cropped photo of a {}."),
    *(
        "a close-up photo of a {}.",
        "a close-up photo of the {}.",
        "a bright photo of a {}.",
        "a bright photo of the {}.",
    ),
    *(
        "a dark photo of the {}.",
        "a dark photo of a {}.",
        "a jpeg corrupted photo of the {}.",
        "a blurry photo of a {}.",
    ),
    *(
        "a jpeg corrupted photo of a {}.",
        "a blurry photo of the {}.",
        "a photo of a small {}.",
        "a photo of the small {}.",
    ),
    *("a photo of a large {}.", "a photo of the large {}.", "a photo of the {} for visual inspection."),
    *("a photo of a {} for visual inspection.", "a photo of the {} for anomaly detection."),
    *("a photo of a {} for anomaly detection.", "an image of a {}.", "an image of a {}.", "this is a photo of a {}."),
    *(
        "there is a {} in the scene.",
        "a photo of one {}.",
        "a low resolution photo of a {}.",
        "a black and white photo of a {}.",
    ),
)
NOUNS = (
    *("object", "surface", "part", "product", "item", "material", "texture", "sample", "component", "piece", "thing"),
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal", "nut", "pill", "screw", "tile"),
    *("toothbrush", "transistor", "wood", "zipper", "candle", "cashew", "chewing", "gum", "fryum", "macaroni", "board"),
    *("wafer", "fabric", "steel", "plate", "plastic", "glass", "rubber", "paper", "paint", "coating", "ceramic"),
    *("concrete", "stone", "marble", "granite", "fibre", "cloth", "textile", "yarn", "foil", "film", "sheet", "panel"),
    *("strip", "rail", "road", "wall", "floor", "pipe", "tube", "ring", "gear", "bolt", "washer", "bearing", "disc"),
    *("wheel", "blade", "brake", "casting", "weld", "solder", "chip", "circuit", "wire", "connector", "battery"),
    *("cell", "solar", "module", "lens", "mirror", "screen", "phone", "car", "body", "door", "label", "box", "bag"),
    *("can", "cup", "cap", "lid", "jar", "food", "fruit", "apple", "potato", "bread", "cookie", "rice", "bean", "seed"),
    *("leaf", "egg", "meat", "brain", "liver", "skin", "retina", "chest", "tissue", "tooth", "bone", "toy", "brick"),
    *("button", "key", "coin", "pen", "spoon", "knife", "tool", "spring", "magnet", "magnetic", "commutator"),
    *("aluminum", "copper", "brass", "iron", "gold", "silver", "gravel", "sand", "foam", "sponge", "net", "mesh"),
    *("rope", "belt", "tyre", "tire", "shoe", "shirt", "jacket", "hat"),
)
FAMILY_NAMES = {name: name.replace("_", " ") for name in FAMILIES} | {
    "plain": "plain painted plate",
    "dots": "dotted pattern",
}
FAMILY_NAMES |= {
    "stripes": "striped pattern",
    "plaid": "plaid cloth",
    "cap": "bottle cap",
    "hammered": "hammered metal",
}
FAMILY_NAMES |= {
    "mesh": "wire mesh",
    "fabric": "woven fabric",
    "corrugated": "corrugated sheet",
    "tiles": "ceramic tiles",
}
FAMILY_NAMES |= {"ground_metal": "metal", "rolled_metal": "steel", "rough_surface": "rough material"}
KIND_NAMES = {name: name.replace("_", " ") for name in KINDS} | {"worn": "worn spot"}
EXTRA_WORDS = (
    "red green blue yellow white black grey gray brown bright dark light shiny matte rough smooth wet dry old new "
    "hole cut bent dirty dirt dust oil rust corrosion burn bump dent chip spot mark line thread missing wrong colour "
    "color misplaced scratched cracked stained dented contaminated torn poke squeeze print fold knot glue liquid "
    "thick thin no not of on in and or is has it top side industrial manufacturing quality inspection image picture "
    "texture close up left right center edge"
)


def caption(family: str, kind: str, rng: np.random.Generator) -> str:
    """Describe an image, as in ``a photo of a brushed metal surface with a scratch.``.

    Args:
        family: One of ``FAMILIES``.
        kind: One of ``KINDS``, or ``good``.
        rng: Source of randomness; chooses among the wordings.
    """
    thing = FAMILY_NAMES[family] if family in OBJECTS or rng.random() < 0.3 else f"{FAMILY_NAMES[family]} surface"
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    if kind == "good":
        return template.format(NORMAL_STATES[rng.integers(len(NORMAL_STATES))].format(thing))
    if rng.random() < 0.15:
        return template.format(ANOMALOUS_STATES[rng.integers(len(ANOMALOUS_STATES))].format(thing))
    return template.format(f"{thing} with a {KIND_NAMES[kind]}")


def kind_captions() -> list[str]:
    """One sentence per outcome: good first, then every kind in the order of ``KINDS``."""
    return [
        "a photo of a surface without defect.",
        *(f"a photo of a surface with a {KIND_NAMES[kind]}." for kind in KINDS),
    ]


def prompt_pair(rng: np.random.Generator) -> tuple[str, str]:
    """A random (normal, anomalous) pair in the wording of a compositional prompt ensemble, about a random thing."""
    noun = "object" if rng.random() < 0.3 else " ".join(rng.choice(NOUNS, int(rng.integers(1, 3))))
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    normal, anomalous = rng.integers(len(NORMAL_STATES)), rng.integers(len(ANOMALOUS_STATES))
    return template.format(NORMAL_STATES[normal].format(noun)), template.format(
        ANOMALOUS_STATES[anomalous].format(noun),
    )


def vocabulary_texts() -> list[str]:
    """Texts that together hold every word any caption or prompt above can use."""
    names = [*FAMILY_NAMES.values(), *KIND_NAMES.values(), *NOUNS, EXTRA_WORDS, "surface a an the with without"]
    states = [state.format("object") for state in (*NORMAL_STATES, *ANOMALOUS_STATES)]
    return [*names, *states, *(text.format("object") for text in TEMPLATES), *FBCLIP_PROMPTS, *PLAIN_PROMPTS]
