"""Benchmarks of training and feature extraction at small sizes: they run, and all versions compute the same."""

import contextlib
import io
import json
import mmap
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import common
import data
import end_to_end
import extraction
import gpu
import learning_rates
import measurements
import plain
import table
import train_step
import workload
from dino_ssl.ablations.study import RESULT, Result, StudyRun
from dino_ssl.config import edit, to_dict
from dino_ssl.data.batch import Batch
from dino_ssl.data.folder import Folder
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.files import write_json
from dino_ssl.optim import clip_grad_norm_per_tensor_
from dino_ssl.preprocessing import normalize
from dino_ssl.presets.small import small
from dino_ssl.runtime import Machine, start
from dino_ssl.state import State, build_method, prepare_model
from dino_ssl.training import train_step as dino_step

SMALL = ["--views", "2x32+2x16", "--k", "64", "--hidden", "32", "--batch", "4", "--turns", "1"]
DESCRIPTION = {"benchmark", "machine", "default precision", "date", "versions", "command", "settings", "rows"}


def run(module: ModuleType, *options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return the JSON of a script, whose child processes run in this process instead."""

    def in_process(script: str, versions: Sequence[str], turns: int, arguments: Sequence[str]) -> dict[str, list[dict]]:
        results = {}
        for version in versions:
            monkeypatch.setattr(sys, "argv", [script, "--child", version, *arguments])
            with contextlib.redirect_stdout(io.StringIO()) as out:
                module.main()
            results[version] = [json.loads(out.getvalue().splitlines()[-1])] * turns
        return results

    monkeypatch.setattr(workload, "run_in_turns", in_process)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *options, "--json", str(tmp_path / "result.json")])
    module.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() - {"matmul_flops_per_s"} == DESCRIPTION
    assert str(tmp_path) not in json.dumps(result), "no absolute path"
    return result


@pytest.mark.parametrize("network", ["narrow", "resnet_narrow"])
def test_plain_and_our_step_have_equal_losses(network: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--network", network, *SMALL, "--drop-path", "0", "--steps", "2"]
    options += ["--versions", "plain:float32", "dino:float32"]
    options += ["--micro-batch", "3"] if network == "narrow" else []  # batch norm needs the whole batch
    plain_row, dino_row = run(train_step, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)["rows"]
    assert plain_row.keys() == dino_row.keys() >= {"images_per_s", "ratio", "peak", "seconds", "cpu_seconds"}
    assert plain_row["ratio"] == 1
    assert dino_row["images_per_s"] > 0
    assert len(dino_row["losses"]) == 3
    assert dino_row["losses"] == pytest.approx(plain_row["losses"], abs=2e-5)


def test_plain_and_our_step_update_all_weights_equally() -> None:
    """Two steps: gradients, optimizer, teacher and center."""
    small = workload.Workload("narrow", "2x32+2x16", 64, 4, drop_path=0.0, hidden=32)
    settings, views = small.run("float32"), train_step.random_views(small)
    baseline, step_settings = small.baseline("plain", "float32", torch.device("cpu")), small.step_settings()
    assert isinstance(baseline, plain.PlainDINO)
    crops = [crop for stack in views for crop in normalize(stack)]
    with start("float32") as rt:
        method = build_method(settings)
        initial = {name: value.clone() for name, value in method.state_dict().items()}
        state = State(method, settings.optim.build(method.trainable), rt.scaler())
        for _ in range(2):
            dino_step(state, prepare_model(method, rt), Batch(views), workload.CLOCK, settings, rt)
            baseline.step(crops, step_settings)
    expected = {f"student.{name}": value for name, value in baseline.student.state_dict().items()}
    expected |= {f"teacher.{name}": value for name, value in baseline.teacher.state_dict().items()}
    changed = 0
    for name, value in expected.items():
        if name.endswith("qkv.bias"):  # the gradient of the keys' bias is rounding error, which AdamW amplifies
            continue
        weights = method.state_dict()[name]
        change = (weights - initial[name]).norm().item()
        assert (weights - value).norm().item() <= 0.01 * change, name
        changed += change > 0
    assert changed > 40
    torch.testing.assert_close(method.get_buffer("center"), baseline.center[0])


def test_plain_clipping_equals_ours() -> None:
    ours, baseline = (torch.nn.Linear(4, 3) for _ in range(2))
    for number, (parameter, other) in enumerate(zip(ours.parameters(), baseline.parameters(), strict=True)):
        parameter.grad = torch.full_like(parameter, 0.1 + 5 * number)
        other.grad = parameter.grad.clone()
    clip_grad_norm_per_tensor_(ours.parameters(), 3.0)
    plain.clip_each(baseline, 3.0)
    for parameter, other in zip(ours.parameters(), baseline.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.filterwarnings("ignore")  # of lightly's weight norm
def test_lightly_has_a_similar_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    options = ["--network", "resnet_narrow", *SMALL, "--steps", "1", "--versions", "plain:float32", "lightly:float32"]
    rows = run(train_step, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)["rows"]
    # Each view is a separate forward pass there, so that batch norm has other statistics.
    assert rows[1]["losses"][0] == pytest.approx(rows[0]["losses"][0], abs=0.2)


def test_end_to_end_trains_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--network", "narrow", *SMALL, "--size", "128", "--files", "6", "--steps", "2", "--workers", "0"]
    options += ["--versions", "plain:float32", "dino:float32"]
    rows = run(end_to_end, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)["rows"]
    assert [row["version"] for row in rows] == ["plain:float32", "dino:float32"]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2 * 4 / row["seconds"][0])
        assert 0 < row["wait"] < 1
        assert row["losses"][0] < 8


def test_the_loader_alone_trains_nothing(tmp_path: Path) -> None:
    tiny = workload.Workload("narrow", "2x32+2x16", 64, 2, drop_path=0.0, hidden=32)
    entry = end_to_end.child("loader", tiny, common.write_images(tmp_path, 4, 32, 32), 2, 0)
    assert entry["seconds"] > 0
    assert "losses" not in entry
    rows = common.summarize({"loader": [entry]}, 4)
    assert workload.with_matmul_share(rows, tiny, 1e12) == rows


def test_extraction_and_timm_give_equal_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--networks", "narrow", "resnet_narrow", "--images", "5", "--files-size", "128", "--size", "56"]
    options += ["--batch", "3", "--workers", "0", "--turns", "1", "--precision", "float32"]
    rows = run(extraction, *options, monkeypatch=monkeypatch, tmp_path=tmp_path)["rows"]
    assert [(row["input"], row["version"]) for row in rows[:4]] == [
        ("memory", "timm"),
        ("memory", "dino"),
        ("files", "timm"),
        ("files", "dino"),
    ]
    for row in rows:
        assert row["images_per_s"] > 0
        assert row["max_error"] <= (1e-5 if row["input"] == "memory" else 0.05), row
        assert row["cosine"] > 0.999


def test_data_benchmark_compares_all_transforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["128", "--files", "2", "--rounds", "1", "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr(sys, "argv", ["data.py", *options])
    threads = torch.get_num_threads()
    data.main()
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "result.json").read_text())["rows"]["128"]["results"]
    assert results["pillow + torchvision"]["ratio"] == 1
    assert results["dino"]["images_per_s"] > 0


def test_plain_views_have_the_sizes_of_ours() -> None:
    from PIL import Image

    crops = plain.pillow_views(MultiCrop(global_size=24, local_size=16, local=3))(Image.new("RGB", (40, 30)))
    assert [tuple(crop.shape) for crop in crops] == [(3, 24, 24)] * 2 + [(3, 16, 16)] * 3


def test_views_are_parsed() -> None:
    assert workload.parse_views("2x224+8x96") == MultiCrop()
    assert workload.parse_views("2x128+6x64").view_shapes == [(2, 128), (6, 64)]
    assert workload.parse_views("2x224").view_shapes == [(2, 224)]
    with pytest.raises(Exception, match="expected views like 2x224"):
        workload.parse_views("3x224")


def test_default_versions_depend_on_the_machine() -> None:
    def versions(device: str, precision: Any) -> list[str]:
        return workload.default_versions(Machine(torch.device(device), "", 1, 1, precision, ""))

    assert versions("cpu", "float32") == ["plain:float32", "dino:float32", "lightly:float32"]
    assert {"plain:bfloat16", "dino:bfloat16"} < set(versions("cpu", "bfloat16"))
    assert {"plain:float16", "dino:bfloat16", "lightly:float16"} < set(versions("cuda", "bfloat16"))
    assert "dino:float16" in versions("cuda", "float16")


def test_share_of_matmul_throughput() -> None:
    tiny = workload.Workload("vit_tiny", "2x224+8x96", 65536, 64, drop_path=0.1)
    rows = [
        {"version": "plain:float32", "failed": "out of memory"},
        {"version": "dino:bfloat16", "images_per_s": 100.0},
    ]
    failed, dino = workload.with_matmul_share(rows, tiny, flops_per_s=1e13)
    assert "matmul_share" not in failed
    assert 0.1 < dino["matmul_share"] < 0.4  # some 20 GFLOPs per image


def test_failed_version_is_reported_once(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import sys\nif sys.argv[2] == 'plain:float32': sys.exit('out of memory')\nprint('{\"seconds\": 2.0}')\n"
    )
    results = common.run_in_turns(str(script), ["plain:float32", "dino:float32"], 2, [])
    assert results["plain:float32"] == [{"failed": "out of memory"}]
    failed, dino = common.summarize(results, num_images=8)
    assert failed == {"version": "plain:float32", "failed": "out of memory"}
    assert dino["images_per_s"] == 4
    assert dino["ratio"] == 1


def test_memory_is_the_growth_of_the_process() -> None:
    memory = common.Memory(torch.device("cpu"))
    with mmap.mmap(-1, 2**26) as block:  # not memory that this process freed before
        block.write(b"x" * 2**26)
    assert 60 < memory.peak() / 2**20 < 200


def test_page_equals_its_files() -> None:
    assert (table.FOLDER / "README.md").read_text() == table.page(), "run python benchmarks/table.py"


def test_row_without_its_versions_is_not_measured(tmp_path: Path) -> None:
    read = measurements.against("plain:bfloat16", target=6)
    row = table.Row("a step", "6x", "python x --json ", "x.json", read, {"batch": 32})
    assert table.line(row, tmp_path) == "| a step | 6x | | not measured | | `python x --json x.json` |"
    versions = [
        {"version": "plain:float32", "images_per_s": 1.0, "seconds": [8.0], "peak": 8},
        {"version": "dino:float32", "images_per_s": 4.0, "seconds": [2.0], "peak": 2},
    ]
    result = {"machine": "M", "date": "D", "command": "C", "versions": {"torch": "T"}}
    result["settings"] = {"batch": 8, "turns": 1}
    (tmp_path / "x.json").write_text(json.dumps(result | {"rows": versions}))
    assert "not measured" in table.line(row, tmp_path), "the row needs bfloat16"
    versions[0]["version"] = "plain:bfloat16"
    (tmp_path / "x.json").write_text(json.dumps(result | {"rows": versions}))
    line = table.line(row, tmp_path)
    assert "**4.00x** (4.00 to 4.00, n 1) `plain:bfloat16` (4.00 against 1.00 images/s), 0.25 of its memory" in line
    assert "measured with batch 8, 1 turn | M; D; torch T | `C` |" in line
    assert line.startswith("| a step | 6x | **no** |")


def test_learning_rates_are_tuned_per_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second command trains the run that failed before; the validation set of the table has no part in it."""
    trained: list[StudyRun] = []

    def train(runs: Sequence[StudyRun], linear: bool, processes: int, terminal: object) -> tuple[None, int]:
        for run in runs:
            trained.append(run)
            accuracy = 1000 * run.run.optim.lr + run.seed
            run.folder.mkdir(parents=True, exist_ok=True)
            if accuracy != 5 or trained.count(run) == 2:
                write_json(run.folder / RESULT, to_dict(Result(values={"20-NN": accuracy})))
        return None, 0

    monkeypatch.setattr(learning_rates, "run_parallel", train)
    words = ["fig7", "simple-scenes", "--rates", "0.001", "0.004", "--only", "both", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--out", str(tmp_path), "--json", str(tmp_path / "rates.json")])
    for code, last in ((1, None), (0, 5)):
        assert learning_rates.main() == code
        result = json.loads((tmp_path / "rates.json").read_text())
        assert result["20-NN"] == {"both": {"0.001": [1, 2], "0.004": [4, last]}}
        assert str(tmp_path) not in json.dumps(result), "no absolute path"
    assert len(trained) == 5
    assert {run.run.online_eval.val_fraction for run in trained} == {learning_rates.HELD_OUT}
    assert all(run.run.val is None for run in trained)
    assert all(run.run.optim.min_lr == pytest.approx(run.run.optim.lr / 8) for run in trained), "half of the peak"
    words = ["table7", "simple-scenes", "--rates", "0.006", "--only", "no-momentum", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--json", str(tmp_path / "table7.json")])
    assert learning_rates.main() == 0
    assert trained[-1].run.optim.lr == pytest.approx(0.006), "not the rate that the table has chosen"


def test_a_learning_rate_that_the_table_sets_is_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["table13", "simple-scenes", "--rates", "0.001", "--only", "dino-resnet", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit, match="dino-resnet: the table sets its learning rate itself"):
        learning_rates.main()


def test_faster_is_met_if_every_turn_was() -> None:
    base, row = {"seconds": [1.0, 1.0, 1.0]}, {"seconds": [0.5, 0.5, 1.1]}
    assert measurements.reaches(row, base, 2)
    assert not measurements.reaches(row, base, 1)
    assert measurements.Measurement("", {"speed": True, "memory": False}).verdict == "**not** memory"
    assert measurements.Measurement("", {"speed": True}).verdict == "yes"


def test_gpu_parity_compares_gradients_and_detects_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu.parity_run(None, tiny=True)
    assert gpu.parity(run, "float32", ("loss_from_bottleneck", "forward_views"))["passed"]
    in_bfloat16 = gpu.parity(run, "bfloat16", ("forward_views",))
    assert in_bfloat16["passed"]
    assert 1e-4 < in_bfloat16["reference"] < 0.05
    packed = gpu.kernels.optimized()["forward_views"]
    wrong = {"forward_views": lambda backbone, views: 1.1 * packed(backbone, views)}
    monkeypatch.setattr(gpu.kernels, "optimized", lambda: wrong)
    assert not gpu.parity(run, "float32", ("forward_views",))["passed"]


def test_gpu_script_takes_a_step_that_the_scaler_skips() -> None:
    assert gpu.skipped_step(tiny=True) == dict.fromkeys(
        ["weights_equal", "state_finite", "scale_halved", "passed"], True
    )


def test_gpu_script_saves_every_version_and_the_page_reads_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, network = tmp_path / "gpu.json", workload.Workload("narrow", "2x32", 64, 4, drop_path=0.0)
    results, saved = gpu.Measurements(gpu.argparse.Namespace(minutes=1, json=path)), []
    results.flops_per_s = 1e12
    entries = {
        "plain:float16": {"seconds": 2.0, "step_seconds": [2.0, 4.0, 2.0], "peak": 8},
        "lightly:float16": {"failed": "out of memory"},
        "dino:bfloat16": {"seconds": 1.0, "step_seconds": [1.0, 1.0, 0.5], "peak": 2},
    }

    def child(script: str, version: str, arguments: list[str], seconds: float) -> dict:
        saved.append(json.loads(path.read_text())["measurements"] if path.exists() else {})
        assert arguments[-2:] == ["--steps", "5"]
        assert 0 < seconds <= 60
        return dict(entries[version])

    monkeypatch.setattr(gpu, "run_child", child)
    results.compare("step", "train_step.py", list(entries), network, steps=5)
    assert [len(each["step"]["rows"]) for each in saved[1:]] == [1, 2]  # saved before the next one starts
    results.record("20-NN", {"curves": [{"curve": [{"accuracy": 85.0, "images": 1000, "minutes": 8.0}]}]})
    read = measurements.against("plain:float16", target=2, share=0.5)
    row = table.Row("a step", "2x", "python x --json ", "gpu.json", read, {"k": 65536, "batch": 4}, part="step")
    line = table.line(row, tmp_path)
    assert "**4.00x** (2.00 to 4.00, n 3) `plain:float16` (4.00 against 2.00 images/s)" in line
    assert "measured with k 64 |" in line
    assert line.startswith("| a step | 2x | **not** the matmul throughput |")
    curve = table.Row("training", "84 %", "python x --json ", "gpu.json", measurements.accuracy(84), part="20-NN")
    assert table.line(curve, tmp_path).startswith("| training | 84 % | yes | **85.0 %** (one seed)")
    absent = replace(row, part="absent")
    assert "not measured" in table.line(absent, tmp_path)


def test_gpu_script_measures_and_trains_in_miniature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The order of the measurements and their arguments; parity and the processes of their own are tested elsewhere."""
    path, versions = tmp_path / "gpu.json", []

    def child(script: str, version: str, arguments: list[str], seconds: float) -> dict:
        versions.append(version)
        if version == "loader":
            assert len(list(Path(arguments[arguments.index("--folder") + 1]).iterdir())) == 16
        return {"seconds": 2.0, "peak": 1} | ({"step_seconds": [1.0, 3.0]} if script == "train_step.py" else {})

    monkeypatch.setattr(gpu, "run_child", child)
    monkeypatch.setattr(gpu, "parity", lambda run, precision, names: 1 / 0)
    monkeypatch.setattr(gpu, "matmul_throughput", lambda device, precision: (1e12, "2 x 2"))
    gpu.measure(gpu.argparse.Namespace(minutes=5, json=path, tiny=True))
    kept = json.loads(path.read_text())["measurements"]
    assert kept["parity bfloat16: loss"] == {"failed": "ZeroDivisionError: division by zero"}
    assert versions == ["plain:float32", "dino:float32", "loader", *versions[:2], "dino:float32", "compiled:float32"]
    assert kept["JPEG files, data path alone"] == {"images_per_s": 4}
    assert [row["images_per_s"] for row in kept["from JPEG files"]["rows"]] == [4, 4]
    assert kept["from JPEG files"]["settings"] | {"steps": 2, "workers": 1} == kept["from JPEG files"]["settings"]

    monkeypatch.setattr(gpu, "plan", lambda *_, **options: edit(small(), out=str(tmp_path), data=Folder(path="x")))
    points = [{"accuracy": float(number), "images": number, "minutes": 1.0} for number in range(2)]
    monkeypatch.setattr(gpu, "train_and_evaluate", lambda *_: iter(points))
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        common.write_images(tmp_path / name, 2, 32, 32)
    gpu.train(gpu.argparse.Namespace(minutes=5, json=path, recipe="small", data=tmp_path))
    trained = json.loads(path.read_text())["measurements"]["20-NN of small"]
    assert trained["planned_minutes"] == 4
    assert trained["curves"][0]["curve"] == points


def test_a_version_that_hangs_or_is_killed_has_failed(tmp_path: Path) -> None:
    folder = f"{tmp_path}/x.py"
    scripts = {
        "time.sleep(60)": "not finished after 0 s",
        "raise SystemExit(3)": "exit code 3",
        "os.kill(os.getpid(), 9)": "killed by signal 9",
        f"sys.exit('no file {folder}')": "no file x.py",
    }
    for code, error in scripts.items():
        (tmp_path / "x.py").write_text(f"import os, sys, time\n{code}")
        seconds = 0.4 if "sleep" in code else 30
        assert common.run_child(folder, "dino:float32", [], seconds) == {"failed": error}


def test_gpu_script_saves_errors_and_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    results = gpu.Measurements(gpu.argparse.Namespace(minutes=1, json=path))
    results.add("broken", lambda: 1 / 0)
    results.add("short", lambda: 1)
    results.deadline -= 50
    results.add("late", lambda: 1)
    kept = json.loads(path.read_text())["measurements"]
    assert kept["broken"] == {"failed": "ZeroDivisionError: division by zero"}
    assert kept["late"] == {"failed": "not measured: 10 s left"}
    assert kept["short"] == 1
    late = workload.Workload("narrow", "2x32", 64, 4, drop_path=0.0)
    results.compare("late step", "train_step.py", ["dino:float32"], late, steps=5)
    assert json.loads(path.read_text())["measurements"]["late step"]["rows"][0]["failed"].startswith("not measured")
