"""dino bench: the whole command at a tiny size, its JSON, the words it finds, and the clock behind its parts."""

import json
import re
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_ssl.cli import bench as command
from dino_ssl.cli.bench import EXAMPLES, read
from dino_ssl.config import edit
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.methods import BYOLConfig, SwAVConfig
from dino_ssl.methods.dino import DINOConfig
from dino_ssl.models.vit import ViT
from dino_ssl.optim import Optim
from dino_ssl.presets import memory, resolve
from dino_ssl.profiling import step_time, throughput
from dino_ssl.profiling.profile import Bench, fitting
from dino_ssl.profiling.roofline import bytes_per_step, flops
from dino_ssl.profiling.step_time import StepSpeed, Stopwatch, step_speed
from dino_ssl.profiling.throughput import Rate, matrix_rate, memory_rate
from dino_ssl.run import Run
from dino_ssl.runtime import Machine, Runtime

CPU = Machine(torch.device("cpu"), "a processor", 2, 2**33, "float32", "it has no bfloat16")
CARD = replace(CPU, device=torch.device("cuda", 0), name="a card", cores=16, precision="bfloat16", why="it can")
RUN = Run(
    backbone=ViT(width=48, depth=1, heads=1, patch=8, image_size=32),
    method=DINOConfig(out_dim=32, head_hidden=32, head_bottleneck=16),
    views=MultiCrop(global_size=32, local_size=16, local=2),
    optim=Optim(batch_size=64),
)
STEP = StepSpeed(
    batch=8, times=[0.2, 0.5, 0.1], peak=2**30, spent={"student's forward pass": 0.1, "backward pass, clipping": 0.3}
)
FOUND = Bench(RUN, CPU, 2, Rate(1e12, "512"), Rate(1e10, "copy"), STEP)


def nobody(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0.0)
    monkeypatch.setattr(throughput, "SHAPES", {"cpu": ((64, 32, 16), (128, 32, 16))})
    monkeypatch.setattr(throughput, "BUFFER", {"cpu": 2**16})


@pytest.mark.usefixtures("quick", "tiny_preset")
def test_the_command(dino, photos: Path) -> None:
    line = ("bench", photos, "--preset", "tiny_recipe:run", "--batch", "4", "--steps", "2", "--views.local", "2")
    ran = dino(*line, "--optim.micro-batch", "2", "--json", "-o", "found.json")
    assert ran.code == 0, ran.err
    told = ran.json
    assert told == json.loads(Path("found.json").read_text())
    assert told["run"]["optim"]["batch_size"] == told["step"]["batch"] == 4
    assert told["run"]["optim"]["micro_batch"] == 2
    assert len(told["step"]["times"]) == 2
    by_part = {part.pop("name"): part for part in told["operations"]}
    assert by_part["attention"]["teacher"] == {p.name: p for p in flops(RUN)}["attention"].teacher
    assert told["operations_per_image"] == pytest.approx(sum(part["total"] for part in by_part.values()))
    assert told["operations_per_image"] <= told["operations_as_written"]
    assert told["share"] == pytest.approx(told["step"]["images_per_s"] / told["floor"]["images_per_s"])
    assert told["floor"]["images_per_s"] == min(told["floor"]["by_products"], told["floor"]["by_memory"])
    assert 0 < told["together_images_per_s"] < told["step"]["images_per_s"]
    assert told["data"]["images_per_s_per_worker"] > 0
    assert {"machine", "date", "versions", "rates", "bytes", "advice"} <= told.keys()
    for words in ("last layer", "the floor", "of the floor", "Peak memory", "student's forward pass", "one worker"):
        assert words in ran.err


@pytest.mark.parametrize(("words", "said"), [(("--batch", "0"), "--batch"), (("--preset", "vits61"), "vits16")])
def test_what_cannot_be(dino, words, said: str) -> None:
    ran = dino("bench", *words)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_its_help(dino) -> None:
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
def test_a_line_of_the_pages_is_understood(line: str) -> None:
    words = shlex.split(line)[2:]
    _, options = read(words)
    assert options.folder == ("photos/" if "photos/" in words else "")
    if "--batch" in words:
        assert options.batch == int(words[words.index("--batch") + 1])
    if "vits16" in words:
        assert options.run.backbone == ViT(size="small", patch=16)


def test_without_a_preset_it_is_what_training_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "machine", lambda: CPU)
    assert read([])[1].run.backbone == resolve("small").backbone
    monkeypatch.setattr(command, "machine", lambda: CARD)
    assert read([])[1].run.backbone == resolve("vits16").backbone
    assert read(["--network", "vit_tiny/8"])[1].run.backbone == ViT(size="tiny", patch=8, image_size=224)


class Heard:
    """A terminal that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tables: dict[str, Sequence[Sequence[str]]] = {}

    def print(self, text: str = "", style: str | None = None) -> None:
        self.said.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        assert {len(row) for row in rows} == {len(columns)}
        self.tables[title] = rows

    def progress(self, label: str) -> Any:
        self.said.append(label)
        return nullcontext(nobody)


@pytest.mark.parametrize(
    ("words", "batch"),
    [
        ((), None),
        (("--optim.batch-size", "48"), 48),
        (("--optim.batch-size", "48", "--batch", "3"), 3),
        (("--optim.micro-batch", "auto"), None),
    ],
)
def test_the_batch_is_the_one_asked_for_or_one_that_fits(
    words: tuple[str, ...], batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "matrix_rate", lambda *_: FOUND.products)
    monkeypatch.setattr(throughput, "memory_rate", lambda *_: FOUND.memory)
    monkeypatch.setattr(step_time, "step_speed", lambda run, rt, batch, steps, done: replace(STEP, batch=batch))
    monkeypatch.setattr(memory, "micro_batch", lambda *_: (2, "so it is"))
    given, options = read(["--preset", "vits16", *words])
    fits = fitting(options.run, CPU, FOUND.products.per_second)
    heard: Any = Heard()
    found = command._measure(options.run, options, given, CPU, heard)
    assert found.run.optim.batch_size == found.step.batch == (batch or fits)
    assert found.run.optim.micro_batch == (2 if "auto" in words else 0)
    assert heard.said == [
        "matrix products",
        "training steps",
        "memory",
    ]  # last: its buffers would be in the step's peak
    assert found.reading is None  # no pictures were named


def precision(*words: str, here: Machine = CARD) -> str:
    given, options = read(words)
    return command._for_machine(options.run, given, here).precision


def test_the_precision_is_the_plans() -> None:
    assert precision("--preset", "vits16") == "bfloat16"  # the recipe's float16 is this card's bfloat16
    assert precision("--preset", "vits16", here=CPU) == "float32"
    assert precision("--preset", "small") == "float32"  # as the recipe says
    assert precision() == "bfloat16"
    assert precision("--preset", "vits16", "--precision", "float16") == "float16"


# -- what is measured --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_rates_are_of_the_fastest_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: 64 x 32 x 16 takes a second, 128 x 32 x 16 takes one too."""
    seconds = iter(range(1000))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(seconds)))
    assert matrix_rate(CPU, "float32", nobody)[:2] == (2 * 128 * 32 * 16, "128 x 32 x 16")
    assert memory_rate(CPU, nobody)[:2] == (3 * 2**16, "add")


@pytest.mark.usefixtures("quick")
def test_what_others_took_is_told_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks of our own: two threads, and a second of the processor in each second that passes: half of two."""
    seconds = iter(range(1000))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(throughput.time, "process_time", lambda: float(next(seconds)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert matrix_rate(CPU, "float32", nobody).had == pytest.approx(0.5, abs=0.1)


def test_a_part_inside_another_is_counted_once() -> None:
    watch = Stopwatch(torch.device("cpu"))
    began = time.perf_counter()
    with watch("outer"):
        time.sleep(0.01)
        with watch("inner"):
            time.sleep(0.02)
        time.sleep(0.01)
    whole = time.perf_counter() - began
    assert watch.spent["inner"] >= 0.02
    assert watch.spent["outer"] >= 0.02
    assert sum(watch.spent.values()) == pytest.approx(whole, abs=0.002)


@pytest.mark.parametrize(
    ("change", "without"),
    [
        ({}, {"forward pass"}),
        ({"optim": {"micro_batch": 2}}, {"forward pass"}),
        ({"method": DINOConfig(out_dim=32, head_hidden=32, targets="sinkhorn")}, {"forward pass"}),
        ({"method": BYOLConfig(head_dim=16, head_hidden=32)}, {"forward pass"}),
        (
            {"method": SwAVConfig(out_dim=16, head_hidden=32)},
            {"student's forward pass", "teacher's forward pass"},
        ),
    ],
)
def test_every_part_of_a_step_is_found(change: dict, without: set[str]) -> None:
    found = step_speed(edit(RUN, **change), Runtime(torch.device("cpu"), "float32"), 4, 1, nobody)
    assert list(found.spent) == [name for name in step_time.ORDER if name not in without]
    assert all(seconds > 0 for seconds in found.spent.values())
    assert found.batch == 4
    assert len(found.times) == 1


# -- what is said ------------------------------------------------------------------------------------------


def test_the_share_by_hand() -> None:
    each = sum(part.total for part in flops(RUN))
    assert FOUND.step.images_per_s == 8 / 0.2  # of the median step
    assert FOUND.most == min(1e12 / each, 1e10 / (sum(bytes_per_step(RUN, 8).values()) / 8))
    assert FOUND.share == FOUND.step.images_per_s / FOUND.most
    assert FOUND.together is None
    assert replace(FOUND, reading=0.1).together == pytest.approx(1 / (0.2 / 8 + 0.1 / 2))  # two cores, all shared
    on_card = replace(FOUND, here=CARD, run=replace(RUN, workers=4), reading=0.2)
    assert on_card.together == pytest.approx(20)  # 4 workers; the card could take 40


def test_what_is_told_is_what_was_measured() -> None:
    told = replace(FOUND, reading=0.1, products=Rate(1e12, "512", 0.4)).told()
    each = sum(part.total for part in flops(RUN))
    assert told["rates"] == {
        "operations_per_s": 1e12,
        "product": "512",
        "processor_had": 0.4,
        "bytes_per_s": 1e10,
        "transfer": "copy",
    }
    assert told["machine"] == {"name": "a processor", "device": "cpu", "cores": 2, "threads": 2, "memory": 2**33}
    assert told["floor"]["by_products"] == 1e12 / each
    assert told["floor"]["by_memory"] == 1e10 * 8 / sum(told["bytes"].values())
    assert told["floor"]["images_per_s"] == FOUND.most
    assert (told["step"]["seconds"], told["step"]["images_per_s"], told["step"]["peak"]) == (0.2, 40, 2**30)
    assert told["data"] == {"images_per_s_per_worker": 10}
    assert told["bytes"] == bytes_per_step(RUN, 8)


def test_the_tables_add_up() -> None:
    heard: Any = Heard()
    command.show(replace(FOUND, run=resolve("vits16"), reading=0.1), heard)
    counted, traffic, speeds, spent = heard.tables.values()
    *parts, everything = [[float(cell.rstrip("%")) for cell in row[1:]] for row in counted]
    for teacher, student, backward, total, share in (*parts, everything):
        assert teacher + student + backward == pytest.approx(total, abs=0.002)
        assert share == pytest.approx(100 * total / everything[3], abs=0.06)
    assert np.sum(parts, axis=0) == pytest.approx(everything, abs=0.3)
    *parts, everything = [[float(cell) for cell in row[1:]] for row in traffic]
    for whole, each in (*parts, everything):
        assert whole == pytest.approx(8 * each, abs=0.1)  # pictures
    assert np.sum(parts, axis=0) == pytest.approx(everything, abs=0.3)
    by_name = dict(speeds)
    references = float(by_name["matrix products alone"]), float(by_name["memory alone"])
    assert float(by_name["the floor: no code passes"]) == min(references) < max(references)
    share = 40 / min(references)
    assert by_name["reached by the step"] == f"40.00  ({share:.1%} of the floor)"
    assert by_name["reading and cropping, one worker"] == "10.00"
    assert by_name["both together, expected"] == f"{1 / (1 / 40 + 0.1 / 2):.2f}"
    assert any("1000.0 GFLOP/s (512), 10.0 GB/s (copy)" in title for title in heard.tables)
    assert spent == [["student's forward pass", "100.0", "25.0%"], ["backward pass, clipping", "300.0", "75.0%"]]
    assert "Peak memory 1.00 GiB\n" in heard.said


def said(found: Bench) -> str:
    return "\n".join(found.advice())


def test_the_bottleneck_is_named() -> None:
    assert "name a folder" in said(FOUND)
    assert "backward pass, clipping (75%)" in said(FOUND)
    on_card = replace(FOUND, here=CARD, run=replace(RUN, workers=4), reading=0.2)
    assert "4 workers give 20 images/s, the step could take 40. --workers 9" in said(on_card)
    assert "The step is the bottleneck" in said(replace(on_card, reading=0.01))
    assert "67% of the cores' time" in said(replace(FOUND, reading=0.1))
    assert "the step is the bottleneck" in said(replace(FOUND, reading=0.0001))
    assert "17% of the cores' time" in said(replace(FOUND, reading=0.01))


def test_knobs_are_named_where_they_help() -> None:
    assert "--precision" not in said(FOUND)
    assert "--precision bfloat16 is faster: it can" in said(replace(FOUND, here=CARD))
    assert "larger batch" not in said(replace(FOUND, memory=Rate(1e15, "copy")))
    assert "larger batch" in said(replace(FOUND, memory=Rate(1e6, "copy")))
    assert "micro-batch" not in said(FOUND)
    full = replace(FOUND, step=replace(STEP, peak=2**32))  # a half
    assert "--optim.micro-batch auto and --recompute" in said(full)
    for change in (dict(method=SwAVConfig()), dict(method=dict(head_norm="batch"))):  # their batches stay whole
        alone = said(replace(full, run=edit(RUN, **change)))
        assert "--recompute needs" in alone
        assert "micro-batch" not in alone
    assert "Others use this machine" not in said(FOUND)
    assert "had 40% of" in said(replace(FOUND, products=Rate(1e12, "512", 0.4)))


def test_a_batch_is_as_large_as_its_seconds() -> None:
    each = sum(part.total for part in flops(RUN, as_written=True))
    assert fitting(RUN, CPU, 8 * each) == 8  # two seconds at half of it: eight pictures
    assert fitting(RUN, CPU, each / 100) == 2
    assert fitting(RUN, CPU, 1e6 * each) == 64
    assert fitting(edit(RUN, optim=dict(batch_size=1000)), CARD, 1e6 * each) == 128
