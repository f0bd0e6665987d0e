"""`dino bench`: the command on a tiny run, its JSON and table, and the measurements behind it."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dino_ssl.cli.bench import read
from dino_ssl.cli.help_pages import page_examples
from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig, SwAVConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import resolve
from dino_ssl.profiling import profile, roofline
from dino_ssl.profiling.profile import PARTS, Row, choose_batch_size, measure, profile_step, table
from dino_ssl.profiling.roofline import bytes_per_step, matmul_throughput, memory_bandwidth
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
SPENT = {"student forward and loss": 0.1, "backward": 0.3, "aten::addmm": 0.2, "aten::mm": 0.1}
FLOPS = {"teacher forward": 1e9, "student forward": 3e9, "backward": 6e9}


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, dict[str, Row]]]:
    """Return the profiled run, and rows by name, for known measurements: 40 images/s in a step of eight."""
    order: list[str] = []

    def known(name: str, value: Callable[..., Any]) -> None:
        monkeypatch.setattr(profile, name, lambda *args: order.append(name) or value(*args))

    known("count_flops", lambda *_: FLOPS)
    known("matmul_throughput", lambda *_: (1e12, "512 x 512"))
    known("memory_bandwidth", lambda *_: (1e10, "copy"))
    known("micro_batch", lambda *_: (2, "reason"))
    known("profile_step", lambda *_: (0.2, 2**30, SPENT))

    def measured(
        run: Run = RUN, machine: Machine = CPU, data_seconds: float | None = None, batch_size: int | None = 8
    ) -> tuple[Run, dict[str, Row]]:
        order.clear()
        known("time_loading", lambda *_: data_seconds)
        dataset: Any = None if data_seconds is None else object()
        run, rows = measure(run, machine, dataset, no_progress, batch_size)
        assert order.index("profile_step") < order.index("memory_bandwidth"), "its buffers would count in the peak"
        return run, {row.name.strip(): row for row in rows}

    return measured


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS", 1e-3)
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (16, 32)})
    monkeypatch.setattr(roofline, "BUFFER", {"cpu": 2**16})


@pytest.mark.usefixtures("quick", "tiny_preset")
def test_command_prints_a_table_and_json(dino, photos: Path) -> None:
    words = ("--preset", "tiny_recipe:run", "--optim.batch-size", "4", "--optim.micro-batch", "2")
    ran = dino("bench", photos, *words, "--views.local", "2", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["format"] == 2
    assert shlex.split(result["command"]) == ["dino", "bench", str(photos), *words, "--views.local", "2", "--json"]
    assert (result["run"]["optim"]["batch_size"], result["run"]["optim"]["micro_batch"]) == (4, 2)
    values = {row["name"].strip(): row["value"] for row in result["rows"]}
    assert all(value > 0 for name, value in values.items() if "aten::" not in name)
    assert values["step with data"] < values["training step"]
    for words in ("teacher forward", "of the roofline", "peak memory", "backward", "one worker", "aten::"):
        assert words in ran.err


@pytest.mark.parametrize(
    ("words", "name"), [(("--optim.batch-size", "0"), "--batch-size"), (("--preset", "vits61"), "vits16")]
)
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
        for text in (
            page_examples("bench"),
            *(page.read_text() for page in (Path(__file__).parents[2] / "docs").glob("*.md")),
        )
        for line in re.findall(r"^ *(dino bench.*?)(?:\s{2,}.*)?$", text, re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", LINES)
def test_examples_in_docs_and_help_parse(line: str) -> None:
    words = shlex.split(line)[2:]
    options, batch_size = read(words, CPU)
    assert (batch_size is not None) == ("batch-size" in line)
    assert options.folder == ("photos/" if "photos/" in words else "")
    if "vits16" in words:
        assert options.run.backbone == ViT(size="small", patch=16)


def run_of(*words: str, machine: Machine = GPU) -> Run:
    return read(words, machine)[0].run


def test_default_preset_depends_on_the_device() -> None:
    assert run_of(machine=CPU).backbone == resolve("small").backbone
    assert run_of().backbone == resolve("vits16").backbone
    assert run_of("--network", "vit_tiny/8").backbone == ViT(size="tiny", patch=8, image_size=224)


def test_precision_is_the_one_that_training_uses() -> None:
    assert run_of("--preset", "vits16").precision == "bfloat16"  # float16 in the preset, bfloat16 on this GPU
    assert run_of("--preset", "vits16", machine=CPU).precision == "float32"
    assert run_of("--preset", "small").precision == "float32"  # the preset's
    assert run_of().precision == "bfloat16"
    assert run_of("--preset", "vits16", "--precision", "float16").precision == "float16"


# -- measurements ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "micro_batch"), [(None, 0), (48, 0), (48, "auto")])
def test_batch_size_is_given_or_chosen(batch_size: int | None, micro_batch: Any, profiled) -> None:
    run, rows = profiled(edit(RUN, optim=dict(micro_batch=micro_batch)), batch_size=batch_size)
    assert run.optim.batch_size == (batch_size or choose_batch_size(RUN, CPU, 100.0))
    assert run.optim.micro_batch == (2 if micro_batch else 0)
    assert "decode and augment" not in rows


def test_batch_size_gives_steps_of_two_seconds() -> None:
    assert choose_batch_size(RUN, CPU, 8) == 8  # at half the throughput
    assert choose_batch_size(RUN, CPU, 0.01) == 2
    assert choose_batch_size(RUN, CPU, 1e6) == 64
    assert choose_batch_size(edit(RUN, optim=dict(batch_size=1000)), GPU, 1e6) == 128


@pytest.mark.usefixtures("quick")
def test_throughput_is_the_best_of_all_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timer by which every operation takes one second."""
    times = SimpleNamespace(times=[3.0, 1.0, 2.0])
    monkeypatch.setattr(roofline.Timer, "blocked_autorange", lambda *_, **__: times)
    assert matmul_throughput(CPU.device, "float32") == (2 * 32**3, "32 x 32")
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
    seconds, peak, spent = profile_step(run, Runtime(torch.device("cpu"), "float32"), no_progress)
    operators = {name: spent.pop(name) for name in [*spent] if name.startswith("aten::")}
    assert spent.keys() == {*PARTS.values(), "other"} - missing
    assert all(part > 0 for part in spent.values())
    assert list(operators.values()) == sorted(operators.values(), reverse=True)
    assert 0 < sum(operators.values()) < sum(spent.values())
    assert seconds > 0
    assert peak > 0


# -- the result --------------------------------------------------------------------------------------------


def test_roofline_is_the_smaller_bound(profiled) -> None:
    _, rows = profiled()
    moved = sum(bytes_per_step(RUN, 8).values()) / 8
    assert rows["compute bound"].value == pytest.approx(1e12 / 1e10)
    assert rows["memory bound"].value == pytest.approx(1e10 / moved)
    assert rows["training step"] == ("training step", 40.0, "images/s", "40.0% of the roofline")


def test_cpu_shares_its_cores_and_gpu_overlaps(profiled) -> None:
    _, shared = profiled(data_seconds=0.1)
    assert shared["decode and augment"].value == pytest.approx(10)
    assert shared["step with data"].value == pytest.approx(1 / (0.2 / 8 + 0.1 / 2))  # two cores
    _, overlapped = profiled(replace(RUN, workers=4), GPU, 0.2)
    assert overlapped["step with data"].value == pytest.approx(20)  # four workers
    assert overlapped["step with data"].note == "50% waiting for data"
    assert profiled(replace(RUN, workers=4), GPU, 0.01)[1]["step with data"].note == "0% waiting for data"


def test_table_shows_values_units_and_shares(profiled) -> None:
    rows = {name: (value, note) for name, value, note in table([*profiled(data_seconds=0.1)[1].values()])}
    assert rows["matmul throughput"] == ("1,000.00 GFLOP/s", "512 x 512")
    assert rows["FLOPs per image"][0] == "10.00 GFLOP"
    assert rows["  student forward"] == ("3 GFLOP", "30.0%")
    assert rows["  backward"] == ("300.00 ms", "75.0%")
    assert rows["  aten::addmm"] == ("200.00 ms", "50.0%")
    assert rows["peak memory"][0] == "1 GiB"
    assert rows["step with data"] == ("13.33 images/s", "67% waiting for data")
