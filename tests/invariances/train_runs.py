"""`train_runs.py RUN.json ...`: train the Runs in the files one after the other, in one process group."""

import json
import sys
from pathlib import Path

import torch

from dino_ssl.config import from_dict
from dino_ssl.run import Run
from dino_ssl.runtime import start
from dino_ssl.training import train


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    with start("float32") as rt:
        for path in paths:
            run = from_dict(Run, json.loads(Path(path).read_text()))
            for _ in train(run, rt, run.data.open()):
                pass


if __name__ == "__main__":
    main(sys.argv[1:])
