# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FiSeCLIP written down literally and slowly: every image, patch, reference and head in a loop, in double precision."""

import math

import torch

PARTS = {"qq-kk": "qk", "qq": "q", "kk": "k", "vv": "v"}


def unit(vector):
    return vector / vector.norm()


def layer_norm(tokens, norm):
    mean = tokens.mean(-1, keepdim=True)
    variance = ((tokens - mean) ** 2).mean(-1, keepdim=True)
    return (tokens - mean) / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def correlation_attention(attention, tokens, correlation):
    """One image's tokens [N, D]."""
    width = tokens.shape[1]
    heads, head = attention.num_heads, tokens.shape[1] // attention.num_heads
    weight, bias = attention.in_proj_weight.double(), attention.in_proj_bias.double()
    parts = {name: tokens @ weight[i * width :][:width].T + bias[i * width :][:width] for i, name in enumerate("qkv")}
    out = torch.zeros_like(tokens)
    for number in range(heads):
        columns = slice(number * head, (number + 1) * head)
        for name in PARTS[correlation]:
            x = parts[name][:, columns]
            attend = (x @ x.T / math.sqrt(head)).softmax(dim=1)
            out[:, columns] += attend @ parts["v"][:, columns] / len(PARTS[correlation])
    return out @ attention.out_proj.weight.double().T + attention.out_proj.bias.double()


def restored(visual, tokens, blocks, correlation):
    *earlier, last = visual.transformer.resblocks[-blocks:]
    for block in earlier:
        tokens = tokens + correlation_attention(block.attn, layer_norm(tokens, block.ln_1), correlation)
        tokens = tokens + block.mlp(layer_norm(tokens, block.ln_2).float()).double()
    return correlation_attention(last.attn, layer_norm(tokens, last.ln_1), correlation)


def abnormal(vector, text, temperature):
    good, bad = (math.exp(float(unit(vector) @ feature) / temperature) for feature in text)
    return bad / (good + bad)


def averaged(patches, size):
    """One image's unit tokens [L, D], each the mean over its neighbours inside the grid."""
    grid = math.isqrt(len(patches))
    out = []
    for row in range(grid):
        for column in range(grid):
            around = [
                unit(patches[y * grid + x])
                for y in range(row - size // 2, row + size // 2 + 1)
                for x in range(column - size // 2, column + size // 2 + 1)
                if 0 <= y < grid and 0 <= x < grid
            ]
            out.append(unit(torch.stack(around).mean(0)))
    return torch.stack(out)


def image_side(model, image, text):
    """What one image tells before matching: patches of each block, refined map, kept places, class probability."""
    depth = model.clip.num_layers
    tokens = {
        n: t[0].double() for n, t in enumerate(model.clip.encode_image(image[None], range(1, depth + 1)), start=1)
    }
    visual = model.clip.visual
    own = tokens[depth]
    patches = own
    if model.correlation != "none":
        patches = restored(visual, tokens[depth - model.semantic_blocks], model.semantic_blocks, model.correlation)
    joint = layer_norm(patches[1:], visual.ln_post) @ visual.proj.double()
    class_joint = layer_norm(own[:1], visual.ln_post)[0] @ visual.proj.double()
    text_map = [abnormal(patch, text, model.temperature) for patch in joint]
    count = max(1, round(model.refinement * len(joint)))
    refined = []
    for patch in joint:
        order = sorted(range(len(joint)), key=lambda other: -float(unit(patch) @ unit(joint[other])))
        refined.append(sum(text_map[other] for other in order[:count]) / count)
    order = sorted(range(len(joint)), key=lambda place: -refined[place])
    kept = sorted(order[int(model.filter_share * len(joint)) :])
    matched = {layer: tokens[layer][1:] for layer in model.feature_layers}
    return matched, refined, kept, abnormal(class_joint, text, model.temperature)


def matching_distances(model, query, references):
    """Distance of each patch of one image, given what is known of it and of its references."""
    length = len(query[1])
    total = torch.zeros(length, dtype=torch.float64)
    for layer in model.feature_layers:
        for size in model.neighbourhoods:
            own = averaged(query[0][layer], size)
            others = [averaged(reference[0][layer], size)[reference[2]] for reference in references]
            for place in range(length):
                nearest = sorted(min((1 - float(own[place] @ other)) / 2 for other in kept) for kept in others)
                count = max(1, math.ceil(round(model.reference_share * len(nearest), 6)))
                total[place] += sum(nearest[:count]) / count
    return total / len(model.feature_layers) / len(model.neighbourhoods)


def forward(model, images, text):
    """Scores [B] and patch maps [B, L] of a batch without any bank."""
    text = text.double()
    known = [image_side(model, image, text) for image in images]
    weighted = []
    for index, query in enumerate(known):
        distances = matching_distances(model, query, known[:index] + known[index + 1 :])
        factor = 1 + model.text_weight * (2 * torch.tensor(query[1], dtype=torch.float64) - 1)
        weighted.append(distances * factor)
    weighted = torch.stack(weighted)

    def median(values):  # the lower one of two
        ordered = sorted(values.flatten().tolist())
        return ordered[(len(ordered) - 1) // 2]

    centre = median(weighted)
    limit = max(1e-3, centre + model.deviations * 1.4826 * median((weighted - centre).abs()))
    grid_map = torch.tensor([[(d / limit) ** 4 / (1 + (d / limit) ** 4) for d in row] for row in weighted.tolist()])
    class_probability = torch.tensor([one[3] for one in known])
    score = model.class_weight * class_probability + (1 - model.class_weight) * grid_map.amax(1)
    return score, grid_map
