"""The floor of a run's step on this machine, what was reached, where the time goes, and what to turn: `dino bench`."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from dino_ssl.config import to_dict
from dino_ssl.models.sync_bn import has_batch_norm
from dino_ssl.presets.plan import Speed
from dino_ssl.profiling.roofline import Part, Roofline, bytes_per_step, flops, meta_method
from dino_ssl.profiling.step_time import StepSpeed
from dino_ssl.profiling.throughput import Rate
from dino_ssl.run import Run
from dino_ssl.runtime import Machine

STEP_SECONDS = 2.0
"""What a step may take where nobody names its batch."""
LARGEST = {"cpu": 64, "card": 128}
"""Pictures in such a step."""
LITTLE = 0.1
"""A part of the time that is not worth a word."""


@dataclass(frozen=True)
class Bench:
    """Everything that was counted and measured."""

    run: Run
    here: Machine
    threads: int
    products: Rate
    memory: Rate
    step: StepSpeed
    reading: float | None = None
    """Seconds in which one worker reads and crops a picture; None where no pictures were given."""

    @property
    def parts(self) -> list[Part]:
        return flops(self.run)

    @property
    def as_written(self) -> float:
        """Operations of one picture as plain code does them."""
        return sum(part.total for part in flops(self.run, as_written=True))

    @property
    def bytes(self) -> dict[str, float]:
        return bytes_per_step(self.run, self.step.batch)

    @property
    def floor(self) -> Roofline:
        return Roofline(sum(part.total for part in self.parts), sum(self.bytes.values()) / self.step.batch)

    @property
    def most(self) -> float:
        """Images/s that no code can pass here."""
        return self.floor.images_per_s(self.products.per_second, self.memory.per_second)

    @property
    def share(self) -> float:
        """The part of the floor that the step reached."""
        return self.step.images_per_s / self.most

    @property
    def together(self) -> float | None:
        """Images/s from files to weights that step and data path promise, one beside the other."""
        if self.reading is None:
            return None
        return 1 / Speed(1 / self.step.images_per_s, self.reading).seconds(self.run, self.here, 1)

    def told(self) -> dict[str, Any]:
        """One JSON object."""
        floor, rates = self.floor, (self.products.per_second, self.memory.per_second)
        return {
            "machine": {
                "name": self.here.name,
                "device": str(self.here.device),
                "cores": self.here.cores,
                "threads": self.threads,
                "memory": self.here.memory,
            },
            "run": to_dict(self.run),
            "rates": {
                "operations_per_s": self.products.per_second,
                "product": self.products.what,
                "processor_had": self.products.had,
                "bytes_per_s": self.memory.per_second,
                "transfer": self.memory.what,
            },
            "operations": [{**part._asdict(), "total": part.total} for part in self.parts],
            "operations_per_image": floor.flops,
            "operations_as_written": self.as_written,
            "bytes": self.bytes,
            "floor": {
                "images_per_s": self.most,
                "by_products": floor.by_products(rates[0]),
                "by_memory": floor.by_memory(rates[1]),
            },
            "step": {**asdict(self.step), "seconds": self.step.seconds, "images_per_s": self.step.images_per_s},
            "share": self.share,
            "data": None if self.reading is None else {"images_per_s_per_worker": 1 / self.reading},
            "together_images_per_s": self.together,
            "advice": self.advice(),
        }

    def advice(self) -> list[str]:
        """What holds the speed back, the most important first, and the knobs that belong to it."""
        return [*self._of_others(), *self._of_data(), *self._of_step(), *self._of_memory()]

    def _of_others(self) -> list[str]:
        if self.products.had > 1 - LITTLE:
            return []
        return [
            f"Others use this machine: this process had {self.products.had:.0%} of its threads' time. Every rate here "
            "is too low, and the shares are uncertain: measure again when it is quiet."
        ]

    def _of_data(self) -> list[str]:
        if self.reading is None:
            return ["Reading and cropping is not measured: name a folder of pictures (or the word scenes)."]
        step, workers = self.step.images_per_s, max(1, self.run.workers)
        data = workers / self.reading
        if self.here.device.type == "cpu":
            share = (self.reading / self.here.cores) / (1 / step + self.reading / self.here.cores)
            if share < LITTLE:
                return [f"Reading and cropping takes {share:.0%} of the time: the step is the bottleneck."]
            return [f"Reading and cropping takes {share:.0%} of the cores' time. {SPARE_READING}"]
        if data >= step:
            return [f"The step is the bottleneck: {workers} workers give {data:.0f} images/s, it takes {step:.0f}."]
        needed = int(step * self.reading) + 1
        return [
            f"Reading and cropping is the bottleneck: {workers} workers give {data:.0f} images/s, the step could take "
            f"{step:.0f}. --workers {needed} would do, of {self.here.cores} cores. {SPARE_READING}"
        ]

    def _of_step(self) -> list[str]:
        name, seconds = max(self.step.spent.items(), key=lambda item: item[1])
        said = [f"The step's largest part is: {name} ({seconds / sum(self.step.spent.values()):.0%})."]
        if self.run.precision == "float32" and self.here.precision != "float32":
            said.append(f"--precision {self.here.precision} is faster: {self.here.why}.")
        floor = self.floor
        if floor.by_memory(self.memory.per_second) < floor.by_products(self.products.per_second):
            said.append("The floor is the memory's: a larger batch (--optim.batch-size) reads the weights less often.")
        if self.run.grad_checkpointing:
            said.append("--recompute does the student's forward pass twice: without it a step is faster, and larger.")
        return said

    def _of_memory(self) -> list[str]:
        if self.step.peak < self.here.memory / 2:
            return []
        splits = self.run.method.supports_grad_accumulation and not has_batch_norm(meta_method(self.run))
        knobs = "--optim.micro-batch auto and --recompute need" if splits else "--recompute needs"
        return [f"Memory is more than half full: {knobs} less of it, and more time."]


SPARE_READING = "--cache memory keeps decoded pictures; `dino data pack` makes a folder that is read in order."


def fitting(run: Run, here: Machine, rate: float) -> int:
    """A batch whose step takes about STEP_SECONDS at half the measured rate: a power of two, at most the recipe's.

    Two at least: a batch norm takes no single picture.
    """
    each = 2 * sum(part.total for part in flops(run, as_written=True)) / rate
    most = min(run.optim.batch_size, LARGEST["cpu" if here.device.type == "cpu" else "card"])
    size = 2
    while 2 * size <= most and 2 * size * each <= STEP_SECONDS:
        size *= 2
    return size


def benched(run: Run) -> str:
    """What is measured, in a line: `ViT-small/16, 2x224 + 8x96, K 65536, float32`."""
    views = " + ".join(f"{n}x{side}" for n, side in run.views.view_shapes)
    return f"{run.backbone.describe()}, {views}, {run.method.summary}, {run.precision}"


def in_batches(run: Run, batch: int) -> Run:
    return replace(run, optim=replace(run.optim, batch_size=batch))
