"""`on_ranks.py FOLDER`: train FOLDER/*.json, evaluate FOLDER/evals, and run `dino train`, in one process group.

One pair of processes does all of it, because each takes seconds to import torch.
"""

import json
import sys
from pathlib import Path

import all_evals
import torch
from tiny import RUN, dataset_of, edit

from dino_ssl import cli, distributed
from dino_ssl.config import from_dict
from dino_ssl.run import Run
from dino_ssl.runtime import start
from dino_ssl.training import train


def preset() -> Run:
    """Return the settings of `dino train`, which are for two ranks."""
    return edit(RUN, optim=dict(batch_size=18, warmup_epochs=0), online_eval=dict(every_epochs=1))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with start("float32") as rt:
        for file in sorted(folder.glob("*.json")):
            run = from_dict(Run, json.loads(file.read_text()))
            for _ in train(run, rt, dataset_of(run.data)):
                pass
        evals = folder / "evals"
        (evals / f"rank{distributed.rank()}.json").write_text(json.dumps(all_evals.evaluate_all(evals)))
        line = ("--preset", "on_ranks:preset", "--optim.epochs", "1", "--out", f"{folder / 'command'}")
        assert cli.main(["train", f"{evals / 'train'}", *line]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
