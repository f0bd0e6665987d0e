"""The benchmarks of training and of extraction at small sizes: they run, and every version does the same work."""

import contextlib
import io
import json
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import end_to_end
import extraction
import plain
import table
import train_step
import turns
import work
from dino_ssl.data.batch import Batch
from dino_ssl.data.transforms.eval import normalize
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.optim import clip_grad_norm_per_tensor_
from dino_ssl.runtime import Machine, start
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step as our_step

SMALL = ["--views", "2x32+2x16", "--k", "64", "--hidden", "32", "--batch", "4", "--turns", "1"]
ABOUT = {"benchmark", "machine", "precision", "date", "versions", "command", "settings", "rows"}


def run(module: ModuleType, *options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the script writes; its children run in this process, told what they would be told."""

    def here(script: str, versions: Sequence[str], turns: int, arguments: Sequence[str]) -> dict[str, list[dict]]:
        found = {}
        for version in versions:
            monkeypatch.setattr(sys, "argv", [script, "--child", version, *arguments])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                module.main()
            found[version] = [json.loads(out.getvalue().splitlines()[-1])] * turns
        return found

    if hasattr(module, "in_turns"):
        monkeypatch.setattr(module, "in_turns", here)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *options, "--json", str(tmp_path / "found.json")])
    module.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() - {"matrix_rate"} == ABOUT
    assert str(tmp_path) not in json.dumps(found), "no folder of this machine in what is kept"
    return found


@pytest.mark.parametrize("network", ["narrow", "resnet_narrow"])
def test_a_step_is_read_and_every_version_says_the_same_losses(
    network: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--network", network, *SMALL, "--drop-path", "0", "--steps", "2"]
    options += ["--versions", "plain:float32", "dino:float32"]
    options += ["--micro-batch", "3"] if network == "narrow" else []  # a batch norm must see the whole batch
    found = run(train_step, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)
    plain_row, our_row = found["rows"]
    assert plain_row.keys() == our_row.keys() >= {"images_per_s", "ratio", "peak", "seconds", "processor_seconds"}
    assert plain_row["ratio"] == 1
    assert our_row["images_per_s"] > 0
    assert len(our_row["losses"]) == 3
    assert our_row["losses"] == pytest.approx(plain_row["losses"], abs=2e-5)


def test_the_plain_step_is_ours() -> None:
    """Two whole steps, weight by weight: the gradient, the optimizer, the teacher and the center."""
    small = work.Work("narrow", "2x32+2x16", 64, 4, drop_path=0.0, hidden=32)
    settings, views = small.run("float32"), train_step.noise(small)
    peer, rates = small.peer("plain", "float32", torch.device("cpu")), small.rates()
    assert isinstance(peer, plain.PlainDINO)
    crops = [crop for stack in views for crop in normalize(stack)]
    with start("float32") as rt:
        method = build_method(settings)
        begun = {name: value.clone() for name, value in method.state_dict().items()}
        state = State(method, settings.optim.build(method.trainable), rt.scaler())
        for _ in range(2):
            our_step(state, prepare_model(method, rt), Batch(views), work.CLOCK, settings, rt)
            peer.step(crops, rates)
    theirs = {f"student.{name}": value for name, value in peer.student.state_dict().items()}
    theirs |= {f"teacher.{name}": value for name, value in peer.teacher.state_dict().items()}
    moved = 0
    for name, value in theirs.items():
        if name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding, which AdamW blows up
            continue
        ours = method.state_dict()[name]
        went = (ours - begun[name]).norm().item()
        assert (ours - value).norm().item() <= 0.01 * went, name
        moved += went > 0
    assert moved > 40
    torch.testing.assert_close(method.get_buffer("center"), peer.center[0])


def test_clipping_one_by_one_is_ours() -> None:
    one, other = (torch.nn.Linear(4, 3) for _ in range(2))
    for number, (mine, its) in enumerate(zip(one.parameters(), other.parameters(), strict=True)):
        mine.grad = torch.full_like(mine, 0.1 + 5 * number)
        its.grad = mine.grad.clone()
    clip_grad_norm_per_tensor_(one.parameters(), 3.0)
    plain.clip_each(other, 3.0)
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.filterwarnings("ignore")  # its weight norm's
def test_lightly_says_the_same_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    options = ["--network", "resnet_narrow", *SMALL, "--steps", "1", "--versions", "plain:float32", "lightly:float32"]
    found = run(train_step, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)
    # Each of its views passes alone, so that a batch norm sees another batch.
    assert found["rows"][1]["losses"][0] == pytest.approx(found["rows"][0]["losses"][0], abs=0.2)


def test_from_files_to_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--network", "narrow", *SMALL, "--size", "128", "--files", "6", "--steps", "2", "--workers", "0"]
    options += ["--versions", "plain:float32", "dino:float32"]
    found = run(end_to_end, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert [row["version"] for row in found["rows"]] == ["plain:float32", "dino:float32"]
    for row in found["rows"]:
        assert row["images_per_s"] == pytest.approx(2 * 4 / row["seconds"][0])
        assert 0 < row["wait"] < 1
        assert row["losses"][0] < 8


def test_features_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--networks", "narrow", "resnet_narrow", "--pictures", "5", "--files-size", "128", "--size", "56"]
    options += ["--batch", "3", "--workers", "0", "--turns", "1", "--precision", "float32"]
    found = run(extraction, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert [(row["way"], row["version"]) for row in found["rows"][:4]] == [
        ("network", "timm"),
        ("network", "dino"),
        ("files", "timm"),
        ("files", "dino"),
    ]
    for row in found["rows"]:
        assert row["images_per_s"] > 0
        assert row["off"] <= (1e-5 if row["way"] == "network" else 0.05), row
        assert row["cosine"] > 0.999


def test_the_plain_views_are_the_published_ones() -> None:
    from PIL import Image

    crops = plain.pillow_views(MultiCrop(global_size=24, local_size=16, local=3))(Image.new("RGB", (40, 30)))
    assert [tuple(crop.shape) for crop in crops] == [(3, 24, 24)] * 2 + [(3, 16, 16)] * 3


def test_views_are_read_as_they_are_written() -> None:
    assert work.crops_of("2x224+8x96") == MultiCrop()
    assert work.crops_of("2x128+6x64").view_shapes == [(2, 128), (6, 64)]
    assert work.crops_of("2x224").view_shapes == [(2, 224)]
    with pytest.raises(Exception, match="expected views like 2x224"):
        work.crops_of("3x224")


def test_what_is_compared_follows_the_machine() -> None:
    def kinds(device: str, precision: Any) -> list[str]:
        return turns.usual_versions(Machine(torch.device(device), "", 1, 1, precision, ""))

    assert kinds("cpu", "float32") == ["plain:float32", "dino:float32", "lightly:float32"]
    assert {"plain:bfloat16", "dino:bfloat16"} < set(kinds("cpu", "bfloat16"))
    assert {"plain:float16", "dino:bfloat16", "lightly:float16"} < set(kinds("cuda", "bfloat16"))
    assert "dino:float16" in kinds("cuda", "float16")


def test_a_share_of_the_matrix_rate() -> None:
    tiny = work.Work("vit_tiny", "2x224+8x96", 65536, 64, drop_path=0.1)
    rows = [{"version": "plain:float32", "failed": "no memory"}, {"version": "dino:bfloat16", "images_per_s": 100.0}]
    failed, ours = work.with_shares(rows, tiny, rate=1e13)
    assert "rate_share" not in failed
    assert 0.1 < ours["rate_share"] < 0.4  # some 20 GFLOP an image
    assert work.matrix_rate(Machine(torch.device("cpu"), "", 1, 1, "float32", "")) is None


def test_a_version_that_fails_is_said_and_left(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import sys\nif sys.argv[2] == 'plain:float32': sys.exit('no memory left')\nprint('{\"seconds\": 2.0}')\n"
    )
    results = turns.in_turns(str(script), ["plain:float32", "dino:float32"], 2, [])
    assert results["plain:float32"] == [{"failed": "no memory left"}]
    failed, ours = turns.rows(results, dataset=8)
    assert failed == {"version": "plain:float32", "failed": "no memory left"}
    assert ours["images_per_s"] == 4
    assert ours["ratio"] == 1


def test_memory_is_what_the_process_grew_by() -> None:
    memory = turns.Memory(torch.device("cpu"))
    with mmap.mmap(-1, 2**26) as taken:  # not from what this process freed before
        taken.write(b"x" * 2**26)
    assert 60 < memory.peak() / 2**20 < 200


def test_the_page_says_what_its_files_say() -> None:
    assert (table.FOLDER / "README.md").read_text() == table.page(), "run python benchmarks/table.py"


def test_a_line_is_read_or_said_to_be_unread(tmp_path: Path) -> None:
    row = table.Row("a step", "6x", "python x --json ", "x.json", table.against("plain:bfloat16"), {"batch": 32})
    assert table.line(row, tmp_path) == "| a step | 6x | not read yet | | `python x --json x.json` |"
    versions = [
        {"version": "plain:float32", "images_per_s": 1.0, "seconds": [8.0], "peak": 8},
        {"version": "dino:float32", "images_per_s": 4.0, "seconds": [2.0], "peak": 2},
    ]
    found = {"machine": "M", "date": "D", "versions": {"torch": "T"}, "settings": {"batch": 8, "turns": 1}}
    (tmp_path / "x.json").write_text(json.dumps(found | {"rows": versions}))
    assert "not read yet" in table.line(row, tmp_path), "float32 is not what the row asks for"
    versions[0]["version"] = "plain:bfloat16"
    (tmp_path / "x.json").write_text(json.dumps(found | {"rows": versions}))
    line = table.line(row, tmp_path)
    assert "**4.00x** `plain:bfloat16` (4.00 against 1.00 images/s), 0.25 of its memory" in line
    assert "read with batch 8, 1 turn | M; D; torch T |" in line
