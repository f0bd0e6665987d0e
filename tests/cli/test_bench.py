"""`dino bench`: the command on a tiny run, its JSON and table, and the measurements behind it."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_ssl import runtime
from dino_ssl.cli.bench import EXAMPLES, choose_precision, read
from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig, SwAVConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import resolve
from dino_ssl.profiling import profile, throughput
from dino_ssl.profiling.profile import choose_batch_size, measure, summarize, table
from dino_ssl.profiling.roofline import bytes_per_step, count_flops
from dino_ssl.profiling.step_profile import RANGES, profile_step
from dino_ssl.profiling.throughput import Throughput, matmul_throughput, memory_bandwidth
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime

CPU = Machine(torch.device("cpu"), "a processor", 2, 2**33, "float32", "it has no bfloat16")
GPU = replace(CPU, device=torch.device("cuda", 0), name="a GPU", cores=16, precision="bfloat16")
RUN = Run(
    backbone=ViT(width=48, depth=1, heads=1, patch=8, image_size=32),
    method=DINOConfig(out_dim=32, head_hidden=32, head_bottleneck=16),
    views=MultiCrop(global_size=32, local_size=16, local=2),
    optim=Optim(batch_size=64),
)
STEP = {
    "batch_size": 8,
    "times": [0.2, 0.5, 0.1],
    "seconds": 0.2,
    "images_per_s": 40.0,
    "peak_memory": 2**30,
    "parts": {"student forward and loss": 0.1, "backward": 0.3},
    "operators": {"aten::addmm": 0.2, "aten::mm": 0.1},
}


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total


def summary(run: Run = RUN, machine: Machine = CPU, data_seconds: float | None = None) -> dict[str, Any]:
    matmul, memory = Throughput(1e12, "512 x 512 x 512"), Throughput(1e10, "copy")
    return summarize(run, machine, count_flops(run), matmul, memory, STEP, data_seconds)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0.0)
    monkeypatch.setattr(throughput, "SHAPES", {"cpu": ((64, 32, 16), (128, 32, 16))})
    monkeypatch.setattr(throughput, "BUFFER", {"cpu": 2**16})


@pytest.mark.usefixtures("quick", "tiny_preset")
def test_command_prints_a_table_and_json(dino, photos: Path) -> None:
    words = ("--preset", "tiny_recipe:run", "--optim.batch-size", "4", "--optim.micro-batch", "2", "--steps", "2")
    ran = dino("bench", photos, *words, "--views.local", "2", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["format"] == 1
    assert result["run"]["optim"]["batch_size"] == result["step"]["batch_size"] == 4
    assert result["run"]["optim"]["micro_batch"] == 2
    assert len(result["step"]["times"]) == 2
    assert (
        result["flops_per_image"]["attention"]["teacher"] == {p.name: p for p in count_flops(RUN)}["attention"].teacher
    )
    assert 0 < result["data"]["images_per_s_with_step"] < result["step"]["images_per_s"]
    assert result["data"]["images_per_s_per_worker"] > 0
    for words in ("last layer", "of the roofline", "peak memory", "backward", "one worker", "aten::"):
        assert words in ran.err


@pytest.mark.parametrize(("words", "name"), [(("--steps", "0"), "--steps"), (("--preset", "vits61"), "vits16")])
def test_invalid_options_are_errors(dino, words: tuple[str, ...], name: str) -> None:
    ran = dino("bench", *words)
    assert ran.code == 2
    assert name in ran.err
    assert "Traceback" not in ran.err


def test_help_lists_flags_and_examples(dino) -> None:
    ran = dino("bench", "--help")
    assert ran.code == 0
    assert "--optim.micro-batch" in ran.out
    assert "dino bench photos/" in ran.out


LINES = sorted(
    {
        line
        for text in (EXAMPLES, *(page.read_text() for page in (Path(__file__).parents[2] / "docs").glob("*.md")))
        for line in re.findall(r"^ *(dino bench.*?)(?:\s{2,}.*)?$", text, re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", LINES)
def test_examples_in_docs_and_help_parse(line: str) -> None:
    words = shlex.split(line)[2:]
    _, options = read(words)
    assert options.folder == ("photos/" if "photos/" in words else "")
    if "vits16" in words:
        assert options.run.backbone == ViT(size="small", patch=16)


def test_default_preset_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "machine", lambda: CPU)
    assert read([])[1].run.backbone == resolve("small").backbone
    monkeypatch.setattr(runtime, "machine", lambda: GPU)
    assert read([])[1].run.backbone == resolve("vits16").backbone
    assert read(["--network", "vit_tiny/8"])[1].run.backbone == ViT(size="tiny", patch=8, image_size=224)


def precision(*words: str, machine: Machine = GPU) -> str:
    command_line, options = read(words)
    return choose_precision(options.run, command_line, machine).precision


def test_precision_is_the_one_that_training_uses() -> None:
    assert precision("--preset", "vits16") == "bfloat16"  # float16 in the preset, bfloat16 on this GPU
    assert precision("--preset", "vits16", machine=CPU) == "float32"
    assert precision("--preset", "small") == "float32"  # the preset's
    assert precision() == "bfloat16"
    assert precision("--preset", "vits16", "--precision", "float16") == "float16"


# -- measurements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(None, 0), (48, 0), (48, "auto")])
def test_batch_size_is_given_or_chosen(
    batch_size: int | None, micro_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    monkeypatch.setattr(profile, "matmul_throughput", lambda *_: Throughput(1e9, ""))
    monkeypatch.setattr(profile, "memory_bandwidth", lambda *_: order.append("memory") or Throughput(1e9, ""))
    monkeypatch.setattr(profile, "micro_batch", lambda *_: (2, "reason"))

    def profile_step(run: Run, *_: Any) -> dict[str, Any]:
        order.append("step")
        return STEP | {"batch_size": run.optim.batch_size}

    monkeypatch.setattr(profile, "profile_step", profile_step)
    run = edit(RUN, optim=dict(micro_batch=micro_batch))
    result = measure(run, CPU, None, no_progress, batch_size=batch_size, steps=1)
    seconds = sum(part.total for part in count_flops(RUN)) / 1e9
    assert result["run"]["optim"]["batch_size"] == (batch_size or choose_batch_size(RUN, CPU, seconds))
    assert result["run"]["optim"]["micro_batch"] == (2 if micro_batch else 0)
    assert order == ["step", "memory"], "the buffers would count in the peak memory of the step"
    assert result["data"] is None


def test_batch_size_gives_steps_of_two_seconds() -> None:
    assert choose_batch_size(RUN, CPU, 1 / 8) == 8  # at half the throughput
    assert choose_batch_size(RUN, CPU, 100.0) == 2
    assert choose_batch_size(RUN, CPU, 1e-6) == 64
    assert choose_batch_size(edit(RUN, optim=dict(batch_size=1000)), GPU, 1e-6) == 128


@pytest.mark.usefixtures("quick")
def test_throughput_is_the_best_of_all_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which every operation takes one second."""
    seconds = iter(range(1000))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(seconds)))
    assert matmul_throughput(CPU.device, "float32") == (2 * 128 * 32 * 16, "128 x 32 x 16")
    assert memory_bandwidth(CPU.device, 2**33) == (3 * 2**16, "add")


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({}, set()),
        ({"optim": {"micro_batch": 2}}, set()),
        ({"method": DINOConfig(out_dim=32, head_hidden=32, targets="sinkhorn")}, set()),
        ({"method": BYOLConfig(head_dim=16, head_hidden=32)}, set()),
        ({"method": SwAVConfig(out_dim=16, head_hidden=32)}, {"teacher forward"}),
    ],
)
def test_parts_sum_to_the_step(change: dict, missing: set[str]) -> None:
    run = edit(edit(RUN, optim=dict(batch_size=4)), **change)
    step = profile_step(run, Runtime(torch.device("cpu"), "float32"), 1, no_progress)
    assert step["parts"].keys() == {*RANGES.values(), "other"} - missing
    assert all(seconds > 0 for seconds in step["parts"].values())
    assert list(step["operators"].values()) == sorted(step["operators"].values(), reverse=True)
    assert 0 < sum(step["operators"].values()) < sum(step["parts"].values())
    assert (step["batch_size"], len(step["times"])) == (4, 1)
    assert step["images_per_s"] == 4 / step["seconds"]


# -- the result --------------------------------------------------------------------------------------------


def test_roofline_is_the_smaller_bound() -> None:
    result, flops = summary(), sum(part.total for part in count_flops(RUN))
    bound = result["roofline"]
    assert bound["compute_images_per_s"] == 1e12 / flops
    assert bound["memory_images_per_s"] == 1e10 * 8 / sum(bytes_per_step(RUN, 8).values())
    assert bound["images_per_s"] == min(bound["compute_images_per_s"], bound["memory_images_per_s"])
    assert result["step"]["roofline_share"] == 40 / bound["images_per_s"]


def test_cpu_shares_its_cores_and_gpu_overlaps() -> None:
    shared = summary(data_seconds=0.1)["data"]
    assert shared["images_per_s_per_worker"] == 10
    assert shared["images_per_s_with_step"] == pytest.approx(1 / (0.2 / 8 + 0.1 / 2))  # two cores
    overlapped = summary(replace(RUN, workers=4), GPU, 0.2)["data"]
    assert overlapped["images_per_s_with_step"] == pytest.approx(20)  # four workers
    assert overlapped["wait"] == pytest.approx(0.5)
    assert summary(replace(RUN, workers=4), GPU, 0.01)["data"]["wait"] == pytest.approx(0)


def test_table_shows_all_measurements() -> None:
    rows = {name: (value, note) for name, value, note in table(summary(resolve("vits16"), data_seconds=0.1))}
    assert rows["matmul throughput"] == ("1000.0 GFLOP/s", "512 x 512 x 512")
    assert rows["memory bandwidth"] == ("10.0 GB/s", "copy")
    assert rows["FLOPs per image"][0] == "101.733 G"
    assert rows["  block MLP"] == ("61.573 G", "60.5%")
    bound = float(rows["compute bound"][0].split()[0])
    assert rows["training step"] == ("40.00 images/s", f"{40 / bound:.1%} of the roofline")
    assert rows["  backward"] == ("300.0 ms", "75.0%")
    assert rows["  aten::addmm"] == ("200.0 ms", "50.0%")
    assert rows["peak memory"][0] == "1.00 GiB"
    assert rows["decode and augment"] == ("10.00 images/s", "one worker")
    assert rows["step with data"] == (f"{1 / (1 / 40 + 0.1 / 2):.2f} images/s", "67% waiting for data")
