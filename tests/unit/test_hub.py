# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Sharing and fetching adapters, against a hub that this test runs on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import constants

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.adapted import hub, sharing
from anomalib_fbclip.commands.cli import main
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel


class Hub(BaseHTTPRequestHandler):
    """The few routes that creating a repository, uploading small files and downloading need."""

    files: dict[str, bytes]
    created: list[dict]

    def log_message(self, *args):
        pass

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self._answer(401, b'{"error": "Invalid username or password."}')
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._json({"url": f"http://{self.headers['Host']}/owner/name", "id": "owner/name"})
        elif self.path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif self.path.endswith("/commit/main"):
            for line in filter(None, body.splitlines()):
                item = json.loads(line)
                if item["key"] == "file":
                    name = f"/owner/name/resolve/main/{item['value']['path']}"
                    self.files[name] = base64.b64decode(item["value"]["content"])
            self._json({
                "commitUrl": f"http://{self.headers['Host']}/owner/name/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            })
        else:
            self._answer(404)

    def do_GET(self):
        content = self.files.get(self.path)
        if content is None:
            code = {"secret": "RepoNotFound", "gated": "GatedRepo"}.get(self.path.split("/")[2], "EntryNotFound")
            self._answer({"RepoNotFound": 401, "GatedRepo": 403}.get(code, 404), X_Error_Code=code)
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._answer(200, content, ETag=etag, X_Repo_Commit="1" * 40)

    def do_HEAD(self):
        self.do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    handler = type("Handler", (Hub,), {"files": {}, "created": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield handler
        running.shutdown()


@pytest.fixture
def adapter(small_clip, tmp_path):
    torch.manual_seed(0)
    model = FBCLIPModel(small_clip(), feature_layers=(1, 3), n_ctx=3).eval()
    thresholds = {
        "image": 0.25,
        "pixel": 0.75,
        "origin": "normal pictures",
        "pictures": 20,
        "false_alarm_rate": 0.05,
        "expected_rate": 1 / 21,
        "interval": [0.001, 0.168],
    }
    path = adapters.save(model, tmp_path / "wood.safetensors", source="Surfaces|train", epoch=2, thresholds=thresholds)
    return model, path


def test_share_and_fetch_again(server, adapter, small_clip, tmp_path, capsys):
    model, path = adapter
    results = tmp_path / "results.csv"
    results.write_text("category,image_AUROC\nwood,0.912\n")
    assert main(["share", str(path), "owner/name", "--results", str(results), "--license", "mit", "--private"]) == 0
    place = capsys.readouterr().out.strip()
    assert place == "hf://owner/name/wood.safetensors"
    # Older clients say "private", newer ones a "visibility".
    assert server.created[0].get("private") or server.created[0].get("visibility") == "private"

    other = FBCLIPModel(small_clip(), feature_layers=(1, 3), n_ctx=3).eval()
    assert other.load_adapter(place)["epoch"] == 2
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(images).anomaly_map, model(images).anomaly_map)

    card = server.files["/owner/name/resolve/main/README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["library_name"]) == ("mit", "anomalib")
    assert f"--model.weights {place}" in card
    assert "| wood | 0.912 |" in card
    assert "| Trained on | Surfaces\\|train |" in card
    assert "from 20 normal images at a wanted false-alarm rate of 0.05" in card
    assert "from 0.001 to 0.168" in card
    assert adapters.read(path)[1]["sha256"] in card

    assert sharing.share(path, "owner/name", results={"pixel_AUPRO": 0.87654}) == place
    assert not server.created[1].get("private")
    assert server.created[1].get("visibility") != "private"
    card = server.files["/owner/name/resolve/main/README.md"].decode()
    assert "| pixel_AUPRO | 0.8765 |" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])
    results.write_text("only a heading\n")
    with pytest.raises(ValueError, match="heading and rows"):
        sharing.share(path, "owner/name", results=results)


def test_a_model_shares_itself_and_is_loaded_as_its_card_says(server):
    model = FBCLIP(backbone="tiny", weights=None, seed=3, threshold=0.3)
    place = model.push_to_hub("owner/name", results={"image_AUROC": 0.9}, private=True, license_name="mit")
    assert place == "hf://owner/name/adapter.safetensors"
    assert server.created[0].get("private") or server.created[0].get("visibility") == "private"
    card = server.files["/owner/name/resolve/main/README.md"].decode()
    assert f"--model.backbone tiny --model.image_size {model.image_size} --model.weights {place}" in card
    assert "| image_AUROC | 0.9 |" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    again = FBCLIP(backbone="tiny", image_size=model.image_size, weights=place)
    assert torch.equal(again.model.prompts.normal_context, model.model.prompts.normal_context)
    assert again.thresholds["image"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("hf://owner/name/nothing.safetensors", "check the name of the file on the repository's page."),
        ("hf://owner/secret/a.safetensors", "with a token that may read owner/secret."),
        ("hf://owner/gated/a.safetensors", "accept the conditions on the repository's page"),
        ("hf://owner/na me/a.safetensors", "letters, digits"),
    ],
)
@pytest.mark.usefixtures("server")
def test_what_cannot_be_fetched_ends_in_what_to_do(place, advice):
    with pytest.raises(hub.HubError) as caught:
        hub.download(place)
    assert advice in str(caught.value)
    assert str(caught.value).startswith("hub repository")


@pytest.mark.usefixtures("server")
def test_no_network_no_login_no_address(adapter, monkeypatch, capsys):
    _, path = adapter
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["share", str(path), "owner/name"]) == 1
    assert capsys.readouterr().err.endswith("with a token that may write to owner/name.\n")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's five further attempts
    with pytest.raises(hub.HubError, match=r"check the network and HF_ENDPOINT, or copy the file"):
        hub.download("hf://owner/name/a.safetensors")
    for place in ("hf://owner/name", "hf://owner//a.safetensors"):
        with pytest.raises(ValueError, match="write hf://owner/repo/file"):
            hub.download(place)


def test_a_revision_is_asked_for(server):
    server.files["/owner/name/resolve/v1.0/a.safetensors"] = b"content"
    assert hub.download("hf://owner/name@v1.0/a.safetensors").read_bytes() == b"content"
