# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Large images scored in tiles."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch, PredictDataset
from anomalib.data.utils import read_image
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import good_and_bad, good_and_bad_folder
from models import ADAPTED, CLASSES
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

from anomalib_fbclip import FBCLIP, FiSeCLIP
from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.fiseclip.torch_model import MEMORY_TILES
from anomalib_fbclip.host.prediction_index import read_table
from anomalib_fbclip.host.tiling import WHOLE, Place, Tiling, blend_weights

HEIGHT, WIDTH = 90, 150
TILES = {"backbone": "tiny", "image_size": 40, "tiles": 60, "tile_batch_size": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four good and four bad images of 90 x 150 pixels, with masks."""
    return good_and_bad(tmp_path_factory.mktemp("large"), HEIGHT, WIDTH, slice(40, 48), across=8, step=15)


def brightness(images, _=()):
    """A model for the tests of what is around it: the map is the image."""
    return InferenceBatch(pred_score=images.mean(dim=(1, 2, 3)), anomaly_map=images.mean(dim=1))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(8, 300),
    width=st.integers(8, 300),
    side=st.integers(8, 120),
    size=st.integers(8, 64),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_tiles_cover_an_image_and_join_without_seams(height, width, side, size, overlap):
    tiling = Tiling(side, overlap, size, 8)
    canvas = tiling.canvas(height, width)
    assert max(canvas) <= max(height, width)  # nothing is enlarged
    cut, rows, columns = tiling.places(*canvas)
    assert cut <= min(size, side)
    for starts, length in ((rows, canvas[0]), (columns, canvas[1])):
        assert (starts[0], starts[-1] + cut) == (0, length)
        steps = np.diff(starts)
        assert (steps <= np.ceil(max(1, cut * (1 - overlap)))).all()
        weights = blend_weights(starts, cut, length)
        assert_close(weights.sum(dim=0), torch.ones(length))
    if len(rows) * len(columns) < 400:
        constant = tiling(brightness, torch.full((1, 3, *canvas), 0.3)).anomaly_map
        assert constant.shape == (1, *canvas)
        assert (constant - 0.3).abs().max() < 1e-6


def test_a_recorded_graph_joins_the_same():
    tiling = Tiling(60, 0.25, 40, 4)
    images = torch.rand(2, 3, *tiling.canvas(HEIGHT, WIDTH))
    places = tiling.places(*images.shape[-2:])
    for one, other in zip(
        tiling.blend(brightness, images, *places),
        tiling._blend_at_once(brightness, images, *places),
        strict=True,
    ):
        assert_close(one, other, rtol=0, atol=1e-6)


def test_tiles_of_the_models_own_size_are_cut_as_they_are():
    tiling = Tiling(40, 0.25, 40, 3)
    images = torch.rand(1, 3, HEIGHT, WIDTH)
    side, rows, columns = tiling.places(HEIGHT, WIDTH)
    assert (tiling.canvas(HEIGHT, WIDTH), side) == ((HEIGHT, WIDTH), 40)
    seen = []

    def model(tiles, _):
        seen.append(tiles)
        return brightness(tiles)

    blended = tiling.blend(model, images, side, rows, columns)[1]
    assert_close(blended, images.mean(dim=1), rtol=0, atol=1e-6)
    assert max(len(tiles) for tiles in seen) == 3
    assert torch.equal(torch.cat(seen)[1], images[0, :, :40, columns[1] : columns[1] + 40])


def test_each_argument_changes_something():
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    maps = []
    for arguments in ({"tiles": None}, {}, {"tiles": 45}, {"overlap": 0.5}, {"resize": "squash"}):
        with torch.no_grad():
            maps.append(FBCLIP(**{**TILES, **arguments}).eval()(images).anomaly_map)
    assert [tuple(each.shape[-2:]) for each in maps] == [(40, 40), (60, 100), (80, 133), (60, 100), (60, 100)]
    for other in (maps[3], maps[4]):
        assert not torch.allclose(maps[1], other, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_tests_predicts_and_resumes_in_tiles(name, images, engine, tmp_path):
    model = CLASSES[name](metrics="full", **TILES)
    runner = engine()
    results = runner.test(model, datamodule=good_and_bad_folder(images))[0]
    assert all(np.isfinite(value) for value in results.values())
    found = engine().predict(model, data_path=images / "bad")
    assert {tuple(batch.anomaly_map.shape[-2:]) for batch in found} == {(60, 100)}
    runner.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CLASSES[name].load_from_checkpoint(tmp_path / "a.ckpt")
    assert engine().test(loaded, datamodule=good_and_bad_folder(images))[0] == pytest.approx(results, abs=1e-5)


def test_tiles_without_the_region_are_left_out():
    tiling = Tiling(40, 0.25, 40, 8)
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    region = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    region[0, 70:, 125:] = True
    region[1, 70:, :20] = True
    scored = []

    def model(tiles, _=()):
        scored.append(len(tiles))
        return InferenceBatch(pred_score=tiles[:, 0, 0, 0], anomaly_map=tiles.mean(dim=1))

    every = tiling(model, images).anomaly_map
    assert sum(scored) == 2 + 2 * 3 * 5
    scored.clear()
    found = tiling(model, images, region=region)
    side, rows, columns = tiling.places(HEIGHT, WIDTH)
    touched = [(rows[-1], column) for column in columns if column < 20 or column + side > 125]
    assert sum(scored) == 2 + 2 * len(touched) < 2 + 2 * 5
    assert_close(found.anomaly_map[region], every[region])
    # The corner pixel is the score, and each image has one tile at least that shows the region of the other alone.
    for number, keep in enumerate((lambda column: column + side > 125, lambda column: column < 20)):
        own = [images[number, 0, row, column] for row, column in touched if keep(column)]
        whole = tiling.whole(images)[number, 0, 0, 0]
        assert found.pred_score[number] == torch.stack([whole, *own]).max()
    one = tiling.pieces(images[:1], 64, region=region[:1])
    assert len(one) == 1 + sum(column + side > 125 for column in columns)


@pytest.mark.parametrize(("name", "crop"), [("FBCLIP", False), ("FiSeCLIP", True)])
def test_a_region_holds_in_tiles(name, crop, images, engine, tmp_path):
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[25:85, 30:110] = True
    Image.fromarray(inside).save(tmp_path / "region.png")
    found, thresholds = [], []
    for number in range(2):
        folder = tmp_path / str(number)
        for kind in ("good", "bad"):
            (folder / kind).mkdir(parents=True)
            for file in sorted((images / kind).iterdir()):
                values = np.asarray(Image.open(file))
                changed = np.where(inside[..., None], values, values // 2 + 90 * number)
                Image.fromarray(changed).save(folder / kind / file.name)
        model = CLASSES[name](
            **TILES,
            region=tmp_path / "region.png",
            crop_to_region=crop,
            normal_source=folder / "good",
            **({"k_shot": 2, "few_shot_source": folder / "good"} if name in ADAPTED else {}),
        )
        runner = engine(default_root_dir=folder / "results")
        found.append(runner.predict(model, data_path=folder / "bad"))
        thresholds.append(model.thresholds)
    assert_close(*(torch.cat([batch.anomaly_map for batch in batches]) for batches in found), atol=1e-4, rtol=0)
    assert_close(*(torch.cat([batch.pred_score for batch in batches]) for batches in found), atol=1e-4, rtol=0)
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-4)
    maps = torch.cat([batch.anomaly_map for batch in found[0]])
    shown = model.regions.inside((60, 100), [None])[0]
    assert maps.shape[1:] == (60, 100)
    assert not maps[:, ~shown].any()
    assert maps[:, shown].amin() >= 0
    # What is marked lies inside, in pixels of the image; a least area takes it away.
    loose = {**TILES, "region": tmp_path / "region.png", "crop_to_region": crop, "threshold": 0.5}
    plain = torch.cat([
        batch.anomaly_map for batch in engine().predict(CLASSES[name](**loose), data_path=images / "bad")
    ])
    loose["threshold"] = float(plain[:, shown].quantile(0.9))
    runner = engine()
    runner.predict(CLASSES[name](**loose), data_path=images / "bad")
    rows = read_table(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv")
    components = [one for row in rows for one in json.loads(row["components"])]
    assert components
    for left, top, right, bottom in (one["box"] for one in components):
        assert (left >= 28, top >= 23, right <= 112, bottom <= 87) == (True,) * 4
    least = max(one["area"] for one in components) + 1
    batches = engine().predict(CLASSES[name](**loose, min_area=least), data_path=images / "bad")
    assert not any(batch.pred_mask.any() for batch in batches)
    # Masks of a test have the size of its maps.
    results = engine().test(CLASSES[name](**loose, metrics="full"), datamodule=good_and_bad_folder(images))[0]
    assert all(np.isfinite(value) for value in results.values())


def maps_of(model, images, run, size=1):
    return torch.cat([batch.anomaly_map for batch in run().predict(model, dataloaders=loader(images, size))])


def loader(folder, size):
    data = PredictDataset(folder)
    return DataLoader(data, batch_size=size, collate_fn=data.collate_fn)


def test_fiseclip_matches_tiles_with_tiles_of_other_images(images, engine, tmp_path):
    text, alone = (FiSeCLIP(**TILES, threshold=0.5, matching=matching) for matching in (False, True))
    first = next((images / "bad").iterdir())
    # Nothing else to match with: neither the other tiles nor the whole are references.
    assert_close(maps_of(alone, first, engine), maps_of(text, first, engine))
    shuffled = FiSeCLIP(**TILES, threshold=0.5)
    expected = maps_of(shuffled, images / "bad", engine)
    assert_close(maps_of(shuffled, images / "bad", engine, size=2), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, maps_of(text, images / "bad", engine), atol=1e-2)
    for change in ({"bank_size": 1}, {"shuffle": False}):
        other = FiSeCLIP(**TILES, threshold=0.5, **change)
        assert not torch.allclose(maps_of(other, images / "bad", engine), expected, atol=1e-3)
    good = FiSeCLIP(**TILES, reference_source=images / "good", normal_source=images / "good")
    exported = torch.load(engine().export(good, "torch", export_root=tmp_path), weights_only=False)["model"]
    assert good.thresholds["origin"] == "normal pictures"
    assert (len(good.model.trusted), len(good.model.tiles.trusted)) == (4, 24)
    raw = torch.as_tensor(read_image(first, as_tensor=True))[None]
    with torch.no_grad():
        found = good.eval()(raw).anomaly_map
        assert_close(exported(raw).anomaly_map, found)
        assert not torch.allclose(alone.eval()(raw).anomaly_map, found, atol=1e-2)


def test_fiseclip_keeps_no_more_tiles_of_larger_images():
    model = FiSeCLIP(**{**TILES, "image_size": 16, "tiles": 8, "overlap": 0.0}).eval()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(1, 3, 24, 32))
    assert len(model.model.tiles.bank) == MEMORY_TILES
    assert len(model.model.bank) == 16
    # Four of the twelve tiles of each image, of other images others.
    assert len(model.model.tiles.bank.get("object").owners.unique()) == 16


@pytest.mark.parametrize("name", ADAPTED)
def test_the_tiles_of_normal_images_are_remembered(name, images, tmp_path):
    few = CLASSES[name](k_shot=2, few_shot_source=images / "good", normal_source=str(images / "good"), **TILES)
    line = few.save_line(tmp_path / "line.safetensors")
    memory = few.model.memory
    # A whole image and its tiles, 2 x 3 of them, for each of the two images.
    assert (memory.num_images, memory.tokens.shape[1]) == (2, 14)
    assert memory.others(0) == list(range(7, 14))
    metadata = adapter_file.read(line)[1]
    assert (metadata["k_shot"], metadata["tiles"], len(set(metadata["memory_names"]))) == (2, 60, 2)
    again = CLASSES[name](backbone="tiny", weights=line).eval()
    assert (again.k_shot, again.tiling, again.thresholds) == (2, few.tiling, few.thresholds)
    raw = torch.rand(1, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        assert torch.equal(again(raw).anomaly_map, few.eval()(raw).anomaly_map)
    for tiles in (None, 45):
        other = CLASSES[name](backbone="tiny", weights=line, few_shot_source=images / "good", k_shot=2, tiles=tiles)
        assert other.thresholds["origin"] == "fixed" or tiles is None


@pytest.mark.parametrize("name", ADAPTED)
def test_a_radius_compares_tiles_with_the_same_tile(name, images, tmp_path, monkeypatch):
    near = {"k_shot": 2, "few_shot_source": images / "good", "memory_radius": 1, "normal_source": images / "good"}
    few = CLASSES[name](**near, **TILES)
    line = few.save_line(tmp_path / "line.safetensors")
    memory = few.model.memory
    assert memory.places == 2 * (WHOLE, *(Place(number, 2, 3) for number in range(1, 7)))
    again = CLASSES[name](backbone="tiny", weights=line).eval()
    assert (again.model.memory.places, again.thresholds) == (memory.places, few.thresholds)
    raw = torch.rand(2, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        found = few.eval()(raw).anomaly_map
        assert torch.equal(again(raw).anomaly_map, found)
        # The way by hand: each tile by a memory of this tile alone.
        canvas = few.pre_processor(raw)
        side, rows, columns = few.tiling.places(*canvas.shape[-2:])
        tiles = few.tiling.cut(canvas, list(itertools.product(rows, columns)), side)
        together = few.model(tiles, places=memory.places[1:7]).anomaly_map
        for number, own in enumerate(tiles.split(2)):
            few.model.memory = copy.deepcopy(memory)
            few.model.memory.tokens, few.model.memory.places = memory.tokens[:, [1 + number, 8 + number]], ()
            assert_close(few.model(own).anomaly_map, together[2 * number : 2 * number + 2])
    raw = [torch.rand(3, *size) for size in ((60, 100), (100, 60))]
    files = sorted((images / "good").iterdir())[:2]
    with pytest.raises(ValueError, match="2 x 3 and 3 x 2 tiles"):
        few.remember(raw, files)
    monkeypatch.setattr("anomalib_fbclip.adapted.lightning_model.PLACED_TILES", 13)
    with pytest.raises(ValueError, match="the 2 normal images have 14 tiles together"):
        few.remember(raw[:1] * 2, files)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(20, 90), width=st.integers(20, 90), side=st.integers(8, 60), seed=st.integers(0, 99))
def test_what_is_drawn_to_train_on_shows_the_defect(height, width, side, seed):
    torch.manual_seed(seed)
    tiling = Tiling(side, 0.25, 16, 4)
    canvas = tiling.canvas(height, width)
    masks = torch.zeros(6, *canvas)
    for mask in masks[:4]:
        mask[int(torch.randint(canvas[0], ())), int(torch.randint(canvas[1], ()))] = 1
    images = masks[:, None].expand(-1, 3, -1, -1)
    tiles, shown = tiling.draw(images, masks)
    assert (tiles.shape, shown.shape) == ((6, 3, 16, 16), (6, 16, 16))
    assert shown.amax(dim=(1, 2)).tolist() == [1, 1, 1, 1, 0, 0]
    whole = tiling.draw(torch.ones(40, 3, *canvas), torch.zeros(40, *canvas))[0]
    assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("anomalous", [True, False])
def test_training_draws_tiles(anomalous, images, engine):
    model = FBCLIP(**{**TILES, "weights": None, "learning_rate": 1e-2, "resize": "squash"})
    seen = []
    model.model.score, score = (
        (lambda batch, tokens=None: seen.append(batch) or score(batch, tokens)),
        model.model.score,
    )
    before = {key: value.clone() for key, value in model.model.trained_state_dict().items()}
    data = good_and_bad_folder(images)
    if anomalous:
        data.setup()
        data.train_data.samples = data.test_data.samples
    engine(max_epochs=2, limit_val_batches=0).fit(model, datamodule=data)
    assert {tuple(batch.shape[1:]) for batch in seen} == {(3, 40, 40)}
    assert any(not torch.equal(before[key], value) for key, value in model.model.trained_state_dict().items())


@pytest.mark.parametrize("name", ["FBCLIP", "FiSeCLIP"])  # the graphs of the others differ in nothing that matters here
def test_exports_of_tiles(name, images, engine, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    light = {"weights": None, "feature_layers": [1]} if name in ADAPTED else {"matching": False}
    if name == "FBCLIP":
        inside = np.zeros((HEIGHT, WIDTH), bool)
        inside[10:80, 40:145] = True
        Image.fromarray(inside).save(tmp_path / "region.png")
        light |= {"views": ["id"], "attention": False, "region": tmp_path / "region.png", "crop_to_region": True}
        light |= {"k_shot": 2, "few_shot_source": images / "good", "memory_radius": 1}
    model = CLASSES[name](**TILES, **light).eval()
    if name == "FBCLIP":
        model.fill_memory()
    raw = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(raw)
        loaded = torch.load(engine().export(model, "torch", export_root=tmp_path), weights_only=False)["model"]
        assert_close(loaded(raw).anomaly_map, expected.anomaly_map)
        if name == "FBCLIP":
            with pytest.raises(ValueError, match="give images of one size, or memory_radius=None"):
                loaded(torch.rand(1, 3, 70, 60))
        else:
            assert loaded(torch.rand(1, 3, 70, 60)).anomaly_map.shape[-2:] == (47, 40)
    with pytest.raises(ValueError, match="give input_size"):
        model.to_onnx(tmp_path)
    path = engine().export(model, "onnx", export_root=tmp_path, input_size=(HEIGHT, WIDTH))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: raw.numpy()}), strict=True))
    result = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(raw.numpy())
    for key in ("pred_score", "anomaly_map"):
        wanted = getattr(expected, key).flatten()
        assert_close(torch.tensor(found[key]).flatten(), wanted, rtol=0, atol=1e-4)
        assert_close(torch.tensor(result[key]).flatten(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tiles": 0}, "tiles=0: give the side"),
        ({"overlap": 0.95}, "overlap=0.95"),
        ({"tile_batch_size": 0}, "tile_batch_size=0"),
        ({"image_size": [40, 48]}, "tiles are squares"),
        ({"pre_processor": False}, "own pre-processor"),
        ({"resize": "keep", "k_shot": 1, "few_shot_source": "good"}, "share one memory"),
    ],
)
def test_what_cannot_be_is_said(arguments, text):
    with pytest.raises(ValueError, match=text):
        FBCLIP(**{**TILES, **arguments})
