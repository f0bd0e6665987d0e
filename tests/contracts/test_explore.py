"""The server of `dino explore`: who may read and change what, and what the page is told."""

import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from dino_ssl.cli import main
from dino_ssl.data.folder import Folder
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.explore import app as app_module
from dino_ssl.explore import explorer as explorer_module
from dino_ssl.explore.app import create_app
from dino_ssl.explore.explorer import Explorer, folder_counts
from dino_ssl.explore.jobs import Jobs
from dino_ssl.explore.results import COMPUTATIONS
from dino_ssl.explore.selections import Conflict, Selections, as_csv, export_folders
from dino_ssl.explore.server import Server, listen
from dino_ssl.models.vit import ViT
from dino_ssl.progress import no_progress
from dino_ssl.search.index import Index
from dino_ssl.viz.attention import attention_maps

PORT, TOKEN = 8123, "correct-token"
HOSTILE = '<img src=x onerror="alert(1)">.jpg'
COUNT = 12


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Twelve images in two class folders, one with a hostile name, and a small network."""
    root = tmp_path_factory.mktemp("explore")
    scenes = Scenes(count=COUNT, size=64, classes=4).open()
    for i in range(COUNT):
        name = HOSTILE if i == 0 else f"image {i}.png"
        (root / "photos" / "ab"[i % 2] / "deep").mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.read(i)[: 48 + 16 * (i % 2)]).save(root / "photos" / "ab"[i % 2] / "deep" / name)
    torch.manual_seed(0)
    network = ViT(width=48, depth=2, heads=3, patch=8, image_size=32).build().eval()
    return Index.build(network, str(root / "photos"), path=root / "photos.idx")


def client_of(index: Index, **options) -> TestClient:
    """Return a client that has opened the printed address."""
    app = create_app(Explorer(index, **options), token=TOKEN, port=PORT)
    client = TestClient(app, base_url=f"http://127.0.0.1:{PORT}")
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


@pytest.fixture
def client(index: Index) -> Iterator[TestClient]:
    yield client_of(index)
    (index.folder / "selections.json").unlink(missing_ok=True)


@pytest.fixture
def stranger(index: Index) -> TestClient:
    """A client without the token."""
    return TestClient(create_app(Explorer(index), token=TOKEN, port=PORT), base_url=f"http://127.0.0.1:{PORT}")


# -- access


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/api/index", "/api/image/0", "/nothing"])
def test_every_request_needs_the_token(stranger: TestClient, path: str) -> None:
    for url in (path, f"{path}?token=wrong", f"{path}?token={TOKEN}&token=wrong"):
        assert stranger.get(url).status_code == 401
    assert stranger.post("/api/job", json={}).status_code == 401
    assert stranger.get("/api/index", headers={"cookie": "dino-8123=wrong"}).status_code == 401
    assert stranger.get(f"/api/index?token={TOKEN}").status_code == 401  # only the page itself, once


def test_the_address_sets_a_cookie_that_scripts_and_other_sites_cannot_use(stranger: TestClient) -> None:
    cookie = stranger.get(f"/?token={TOKEN}").headers["set-cookie"]
    assert {part.strip() for part in cookie.split(";")} == {
        f"dino-{PORT}={TOKEN}",
        "HttpOnly",
        "SameSite=Strict",
        "Path=/",
    }
    assert stranger.get("/api/index").status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8123", "127.0.0.1:80", "127.0.0.1", "localhost:8124", ""])
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/api/index", headers={"host": host}).status_code == 403
    assert client.get(f"/?token={TOKEN}", headers={"host": host}).status_code == 403


def test_another_origin_is_refused(client: TestClient) -> None:
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "http://localhost:8123", "null"):
        assert client.get("/api/index", headers={"origin": origin}).status_code == 403
    for site in ("cross-site", "same-site"):  # an image or a script of another page, of another port as well
        assert client.get("/api/image/0", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get(f"/?token={TOKEN}", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link
    own = {"origin": f"http://127.0.0.1:{PORT}", "sec-fetch-site": "same-origin"}
    assert client.get("/api/index", headers=own).status_code == 200


@pytest.mark.parametrize("path", ["/", "/static/main.js", "/api/index", "/api/image/0", "/nothing", "/api/image/99"])
def test_every_answer_has_the_headers(client: TestClient, stranger: TestClient, path: str) -> None:
    for sender in (client, stranger):
        headers = sender.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (app_module.STATIC / "index.html").read_text()
    assert "<style" not in page
    assert " style=" not in page
    assert not re.search(r"\son\w+=", page)
    assert all("src=" in tag for tag in page.split("<script")[1:])
    scripts = "".join(path.read_text() for path in app_module.STATIC.glob("*.js"))
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://"):
        assert forbidden not in scripts.replace('"http://www.w3.org/2000/svg"', "")


@pytest.mark.parametrize(
    "path",
    [
        "/api/image/../index.json", "/api/image/..%2f..%2fphotos", "/api/image/%2fetc%2fpasswd", "/api/image/12",
        "/api/image/-1", "/api/image/1e0", "/api/image/٣", "/api/thumbnail/99", "/static/../app.py",
        "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/api/mask/0", "/api/result/clusters", "/api/selections/x/csv",
    ],
)  # fmt: skip
def test_what_is_no_image_of_the_index_is_not_found(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_images_are_sent_as_new_jpegs(client: TestClient, index: Index) -> None:
    for path, side in (("/api/image/0", 64), ("/api/thumbnail/0", 64)):
        answer = client.get(path)
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).width == side


def test_read_only_refuses_every_change(index: Index, tmp_path: Path) -> None:
    client = client_of(index, read_only=True, export=tmp_path)
    change = {"operation": "create", "selection": "a", "version": 0}
    assert client.post("/api/selections", json=change).status_code == 403
    assert client.post("/api/export", json={"how": "copy"}).status_code == 403
    assert client.get("/api/selections").json() == {"version": 0, "selections": []}
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/selections", "no json"), ("/api/selections", "[]"), ("/api/selections", "{}"),
        ("/api/job", '{"kind": "x"}'), ("/api/job", '{"kind": {}}'), ("/api/job", "{}"),
        ("/api/selections", '{"operation": "create", "selection": "a", "version": "0"}'),
        ("/api/selections", '{"operation": "add", "selection": "a", "version": 0, "rows": [99]}'),
        ("/api/selections", '{"operation": "add", "selection": "a", "version": 0, "rows": [true]}'),
        ("/api/selections", '{"operation": "format", "selection": "a", "version": 0}'),
        ("/api/nearest-patches", '{"source": "0", "patch": 9999, "rows": [1]}'), ("/api/export", '{"how": "copy"}'),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused_with_a_reason(client: TestClient, path: str, body: str) -> None:
    answer = client.post(path, content=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]


# -- states of the index


def test_another_index_in_the_same_folder_has_another_version(index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "photos.idx"

    def version() -> str:
        return client_of(Index(folder)).get("/api/index").json()["version"]

    shutil.copytree(index.folder, folder)  # with the times of the files
    first, info = version(), folder / "index.json"
    assert first == version()  # of another start of the server
    times = (info.stat().st_atime_ns, info.stat().st_mtime_ns)
    os.utime(info, ns=(times[0], times[1] + 1))
    assert version() != first
    info.write_text(info.read_text().replace(index.store.info.checkpoint["hash"], "other weights"))
    os.utime(info, ns=times)
    assert version() != first


def test_a_page_of_another_version_is_refused(client: TestClient, index: Index) -> None:
    version = client.get("/api/index").json()["version"]
    change = {"operation": "create", "selection": "a", "version": 0}
    for other in ("0123456789ab", ""):
        headers = {"x-index-version": other}
        for answer in (
            client.post("/api/selections", json=change, headers=headers),
            client.get("/api/items?rows=[1]", headers=headers),
            client.get(f"/api/image/1?v={other}"),  # which the browser would keep under the other version
            client.get(f"/api/thumbnail/1?v={other}"),
        ):
            assert answer.status_code == 409
            assert answer.json()["version"] == version
            assert "another state" in answer.json()["error"]
            assert answer.headers["cache-control"] == "no-store"
    assert client.get("/api/selections", headers={"x-index-version": version}).json()["selections"] == []
    assert client.get(f"/api/image/1?v={version}").status_code == 200


# -- uploads


def png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_an_uploaded_image_is_searched(client: TestClient, index: Index) -> None:
    source = client.post("/api/upload", content=png(index.read(3))).json()["source"]
    found = client.get(f"/api/search?source={source}&k=5").json()
    assert found["rows"][0] == 3
    assert found["similarity"][0] == pytest.approx(1, abs=2e-3)
    assert client.get(f"/api/image/{source}").status_code == 200


def test_uploads_are_limited(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytearray(png(np.zeros((8, 8, 3), np.uint8)))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # 10 gigabytes of pixels in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    answer = client.post("/api/upload", content=bytes(bomb))
    assert answer.status_code == 400
    assert "60000x60000" in answer.json()["error"]
    assert client.post("/api/upload", content=b"<svg onload=alert(1)>").status_code == 400
    monkeypatch.setattr(app_module, "MAX_UPLOAD_BYTES", 1000)
    for content in (b"x" * 1001, iter([b"x" * 600] * 2)):  # with a length, and in parts without one
        assert client.post("/api/upload", content=content).status_code == 413


# -- search, filters, patches


def rows_of(client: TestClient, **query: str) -> list[int]:
    return np.frombuffer(client.get("/api/rows", params=query).content, "<u4").tolist()


def test_filters(client: TestClient, index: Index) -> None:
    names = list(index.items.names)
    assert rows_of(client) == list(range(COUNT))
    assert rows_of(client, label="b") == [row for row, name in enumerate(names) if name.startswith("b/")]
    assert rows_of(client, folder="a/deep") == [row for row, name in enumerate(names) if name.startswith("a/deep/")]
    assert rows_of(client, name="IMAGE 1") == [row for row, name in enumerate(names) if "image 1" in name]
    assert rows_of(client, name="b deep 11") == [names.index("b/deep/image 11.png")]
    assert rows_of(client, name="ONERROR=") == [names.index(f"a/deep/{HOSTILE}")]
    assert rows_of(client, folder="a/dee") == []
    about = client.get("/api/index").json()
    assert about["labels"] == [{"name": "a", "count": 6}, {"name": "b", "count": 6}]
    assert [folder["name"] for folder in about["folders"]] == ["a", "a/deep", "b", "b/deep"]


def test_folders_of_many_are_those_of_the_upper_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer_module, "MAX_FOLDERS", 3)
    counts = folder_counts(["a/x/1", "a/y/1", "a/y/2", "b/1", "0"])
    assert counts == [{"name": "a", "count": 3}, {"name": "a/y", "count": 2}, {"name": "b", "count": 1}]


def test_searches_are_those_of_the_index(client: TestClient, index: Index) -> None:
    def search(**query: object) -> list[int]:
        return client.get("/api/search", params=query).json()["rows"]

    assert search(source=5, k=4) == [hit.row for hit in index.search(5, 5)][1:]  # without the image itself
    width, height = int(index.items.widths[5]), int(index.items.heights[5])
    part = (width // 4, height // 4, width // 2, height // 2)
    region = dict(x=0.25, y=0.25, w=0.5, h=0.5)
    assert search(source=5, k=4, **region) == [hit.row for hit in index.search(5, 4, region=part)]
    assert set(search(source=5, label="a")) == set(rows_of(client, label="a")) - {5}
    assert client.get("/api/search", params={"source": 99}).status_code == 404


@pytest.mark.parametrize("x", ["inf", "-inf", "nan", "1e300", "x", ""])
def test_a_region_of_other_numbers_is_refused(client: TestClient, x: str) -> None:
    answer = client.get("/api/search", params={"source": 5, "x": x, "y": 0, "w": 0.5, "h": 0.5})
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_attention_and_similarity_of_a_patch(client: TestClient, index: Index) -> None:
    layout = client.get("/api/patches/1").json()
    maps = attention_maps(index.backbone, index.read(1), ["cls"], layer=0, size=64)[0]
    assert layout == {"rows": maps.heads.shape[1], "columns": maps.heads.shape[2], "layers": 2, "heads": 3}
    sent = np.frombuffer(client.get("/api/attention/1?layer=0&patch=-1").content, "<f4").reshape(maps.heads.shape)
    np.testing.assert_allclose(sent, maps.heads, atol=1e-3)
    similarity = np.frombuffer(client.get("/api/similarity/1?patch=7").content, "<f4")
    assert similarity.argmax() == 7
    assert similarity[7] == pytest.approx(1, abs=2e-3)
    nearest = client.post("/api/nearest-patches", json={"source": "1", "patch": 7, "rows": [1, 2]}).json()
    x, y, *_ = nearest[0]["box"]
    assert (round(x * layout["columns"]), round(y * layout["rows"])) == (7 % layout["columns"], 7 // layout["columns"])
    assert nearest[1]["similarity"] < 1
    colors = Image.open(io.BytesIO(client.get("/api/colors/1").content))
    assert colors.size == (layout["columns"], layout["rows"])
    for query in ("layer=5&patch=0", "layer=0&patch=9999", "layer=0&patch=x"):
        assert client.get(f"/api/attention/1?{query}").status_code == 400


def test_masks(index: Index, tmp_path: Path) -> None:
    client, names = client_of(index, masks=tmp_path), list(index.items.names)
    labels = np.zeros(index.read(0).shape[:2], np.uint8)
    labels[:10, :10] = 7
    for row, mask in ((0, labels), (1, labels[:5])):
        path = (tmp_path / names[row]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    (tmp_path / names[2]).with_suffix(".png").symlink_to("/etc/hostname")
    drawn = np.asarray(Image.open(io.BytesIO(client.get("/api/mask/0").content)))
    np.testing.assert_array_equal(drawn[..., 3] == 255, labels == 7)
    wrong = client.get("/api/mask/1")
    assert wrong.status_code == 400
    assert "64 x 5 pixels" in wrong.json()["error"]
    assert client.get("/api/mask/2").status_code == 404
    row = {"image": names[1], "stem": Path(names[0]).with_suffix("")}  # images may differ by their suffix only
    (tmp_path / "segments.jsonl").write_text(json.dumps(row, default=str) + "\n")
    assert client.get("/api/mask/1").content == client.get("/api/mask/0").content


# -- selections


def test_changes_of_two_tabs_are_merged_or_refused(client: TestClient) -> None:
    def change(operation: str, version: int, selection: str = "cats", **data: object):
        data = {"operation": operation, "selection": selection, "version": version, **data}
        return client.post("/api/selections", json=data)

    assert change("create", 0).json() == {"version": 1}
    assert change("add", 1, rows=[4, 2]).json() == {"version": 2}
    assert change("add", 1, rows=[7, 2]).json() == {"version": 3}  # a tab that has not seen version 2
    assert change("remove", 1, rows=[4]).json() == {"version": 4}
    assert client.get("/api/selections").json()["selections"] == [{"name": "cats", "rows": [2, 7], "missing": 0}]
    assert change("delete", 3).status_code == 409
    assert change("rename", 3, to="dogs").status_code == 409
    assert change("rename", 4, to=" dogs ").json() == {"version": 5}
    assert change("add", 4, rows=[1]).status_code == 409  # to the old name
    assert change("create", 5, selection="DOGS").status_code == 400
    assert change("delete", 5, selection="dogs").json() == {"version": 6}


@pytest.mark.parametrize(
    "name", ["", "  ", "a/b", "..", ".hidden", "a\\b", "x" * 81, "ä" * 130, "a\nb", "a\u202eb", "\ud800"]
)
def test_names_that_cannot_be_folders_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="Expected a name"):
        Selections(tmp_path).change("create", name, version=0)


def test_a_name_that_cannot_be_encoded_leaves_the_selections_readable(client: TestClient) -> None:
    body = r'{"operation": "create", "selection": "\ud800", "version": 0}'
    assert client.post("/api/selections", content=body).status_code == 400
    assert client.get("/api/selections").json() == {"version": 0, "selections": []}


def test_two_servers_lose_no_change(tmp_path: Path) -> None:
    """Each has its own object; every change reads the file again under the lock."""
    Selections(tmp_path).change("create", "a", version=0)

    def add(worker: int) -> None:
        own = Selections(tmp_path)
        for i in range(10):
            own.change("add", "a", version=0, images=[f"{worker}-{i}"])

    threads = [threading.Thread(target=add, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = Selections(tmp_path).read()
    assert (state.version, len(state.names["a"])) == (41, 40)


def test_a_damaged_file_of_selections_is_not_replaced(tmp_path: Path) -> None:
    selections = Selections(tmp_path)
    selections.path.write_text("{broken")
    with pytest.raises(UserError, match="damaged"):
        selections.change("create", "a", version=0)
    assert selections.path.read_text() == "{broken"
    selections.path.write_text('{"format": 9, "version": 1, "selections": {}}')
    with pytest.raises(UserError, match="format 9"):
        selections.read()
    selections.path.unlink()
    with pytest.raises(Conflict):
        selections.change("delete", "a", version=3)


def test_a_selection_is_exported_as_csv_json_and_class_folders(
    index: Index, tmp_path: Path, client: TestClient
) -> None:
    row, out = list(index.items.names).index(f"a/deep/{HOSTILE}"), tmp_path / "out"
    client = client_of(index, export=out)
    for version, (operation, name, rows) in enumerate(
        [
            *[("create", name, []) for name in ("ä b", "other", "Remove")],
            *[("add", "ä b", [row, 1]), ("add", "other", [2]), ("add", "Remove", [3])],
        ]
    ):
        data = {"operation": operation, "selection": name, "version": version, "rows": rows}
        assert client.post("/api/selections", json=data).status_code == 200
    answer = client.get("/api/selections/ä b/csv")
    assert answer.headers["content-disposition"] == 'attachment; filename="selection.csv"'
    header, first, _ = answer.text.splitlines()
    assert header == "name,label,width,height"
    assert first == '"a/deep/<img src=x onerror=""alert(1)"">.jpg",a,64,48'
    assert json.loads(client.get("/api/selections/ä b/json").text)[0]["name"] == f"a/deep/{HOSTILE}"
    assert client.post("/api/export", json={"how": "copy"}).json() == {"written": 3, "kept": 0, "missing": 0}
    file = out / "ä b" / "a" / "deep" / HOSTILE
    assert file.read_bytes() == index.path_of(row).read_bytes()  # type: ignore[union-attr]
    file.write_text("changed")
    assert client.post("/api/export", json={"how": "link"}).json() == {"written": 0, "kept": 3, "missing": 0}
    assert file.read_text() == "changed"
    assert Folder(path=str(out)).open().classes == ["other", "ä b"]


def test_a_name_in_a_csv_file_is_no_formula() -> None:
    rows = [{"name": "=2.jpg", "label": "@a", "width": 64}, {"name": "a=b.jpg", "label": None, "width": 48}]
    assert as_csv(rows).splitlines() == ["name,label,width", "'=2.jpg,'@a,64", "a=b.jpg,,48"]


def test_links_lead_to_the_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("image")
    out, files = tmp_path / "out", {"x/a.jpg": tmp_path / "a.jpg", "../b.jpg": tmp_path / "a.jpg", "c.jpg": None}
    assert export_folders(out, {"s": files}, "link") == (1, 0, 2)
    assert (out / "s/x/a.jpg").is_symlink()
    assert (out / "s/x/a.jpg").read_text() == "image"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "out"]


# -- long computations


def wait(jobs: Jobs, state: str) -> dict:
    for _ in range(500):
        if jobs.state["state"] == state:
            return jobs.state
        threading.Event().wait(0.01)
    raise AssertionError(jobs.state)


def test_a_job_reports_its_progress_and_can_be_cancelled() -> None:
    jobs, proceed = Jobs(), threading.Event()

    def work(start) -> str:
        with start("counting") as progress:
            progress(1, 3)
            proceed.wait(5)
            progress(2, 3)
        return "result"

    jobs.start("clusters", work)
    with pytest.raises(UserError, match=r"^Wait for the computation of the clusters to end, or cancel it\.$"):
        jobs.start("map", work)
    while jobs.state["done"] < 1:
        pass
    running = {"kind": "clusters", "state": "running", "step": "counting", "done": 1, "total": 3}
    assert jobs.state == {**running, "message": "", "results": []}
    jobs.cancel()
    proceed.set()
    wait(jobs, "cancelled")
    assert jobs.results == {}
    jobs.start("clusters", work)
    wait(jobs, "done")
    assert jobs.results == {"clusters": "result"}

    def fail(start) -> None:
        raise UserError("The index is empty.")

    jobs.start("map", fail)
    assert wait(jobs, "failed")["message"] == "The index is empty."


def test_results_of_the_computations(index: Index) -> None:
    found = {kind: compute(index, {"k": 3}, no_progress) for kind, compute in COMPUTATIONS.items()}
    sizes = [group["size"] for group in found["clusters"].page["groups"]]
    assert sum(sizes) == COUNT
    assert [len(rows) for rows in found["clusters"].arrays.values()] == sizes
    names = index.items.names
    for group in found["duplicates"].page["groups"]:
        assert group["keep"] in group["rows"]
    groupings, arrays = found["map"].page["groupings"], found["map"].arrays
    assert [grouping["name"] for grouping in groupings] == ["label", "cluster"]
    labels = [groupings[0]["groups"][code] for code in arrays["label"]]
    assert labels == [names[row].split("/")[0] for row in arrays["rows"]]
    assert arrays["x"].shape == arrays["y"].shape == arrays["cluster"].shape == (COUNT,)
    json.dumps([result.page for result in found.values()])


# -- the server


def test_a_taken_port_is_skipped() -> None:
    with listen(20_000) as first, listen(first.getsockname()[1]) as second:
        assert first.getsockname()[0] == "127.0.0.1"
        assert second.getsockname()[1] > first.getsockname()[1]
        with socket.create_connection(second.getsockname()):
            pass


def test_the_command_prints_the_address(
    index: Index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Server, "serve", lambda self: self.listener.close())
    with listen(20_000) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", str(index.folder), "--port", str(port)]) == 0
    text = capsys.readouterr().out
    assert f"Port {port} is taken: using {port + 1}." in text
    assert re.search(rf"http://127.0.0.1:{port + 1}/\?token=[\w-]{{40,}}\n", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must be at least 1"),
        (["--masks", "missing"], "There is no folder missing. Expected --masks"),
        (["--export", __file__], "Expected --export to be a folder"),
    ],
)
def test_wrong_options_are_refused(
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(Server, "serve", lambda self: self.listener.close())
    assert main(["explore", str(index.folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(
    index: Index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["explore", str(index.folder)]) == 2
    assert capsys.readouterr().err == 'dino: This needs uvicorn: pip install "dino-ssl[explore]".\n'


def test_answers_are_not_delayed() -> None:
    """asyncio sets TCP_NODELAY if the socket has its protocol; an answer would wait 40 ms for the last ACK."""
    with listen(18_400) as listener:
        assert listener.proto == socket.IPPROTO_TCP
