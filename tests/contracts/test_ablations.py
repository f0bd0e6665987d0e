"""The paper's tables as values: what each configuration changes, the paper's results, and the pages of a study."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_ssl.ablations.page import NO_DISCUSSION, rank_correlation, write_page
from dino_ssl.ablations.study import FAILED, RESULT, STUDY, Result, Study, StudyRun, find_study, read_study
from dino_ssl.ablations.table import METRICS, SCALES, Scale
from dino_ssl.ablations.tables import TABLES, get_table
from dino_ssl.config import differences, edit, from_dict, to_dict
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.models.vit import ViT
from dino_ssl.run import FORMAT, Run
from dino_ssl.state import build_method

ALL = [(table, scale) for table in TABLES.values() for scale in SCALES]


def changed_fields(changes: Any, prefix: str = "") -> list[str]:
    """The dotted fields of changes; a nested value that is replaced as a whole has one name."""
    if not isinstance(changes, Mapping):
        return [prefix]
    nested = [changed_fields(item, f"{prefix}.{name}".lstrip(".")) for name, item in changes.items()]
    return [name for names in nested for name in names]


def run_of(path: str, scale: Scale = "paper") -> Any:
    """`table7/dino`: the Run of that configuration."""
    name, _, configuration = path.partition("/")
    return get_table(name).run(get_table(name).select([configuration])[0], scale)


def paper(path: str, metric: str) -> float:
    """`table7/dino`: the paper's result of that configuration."""
    name, _, configuration = path.partition("/")
    return get_table(name).paper_results(get_table(name).select([configuration])[0])[metric]


# -- configurations ----------------------------------------------------------------------------------------


def test_a_configuration_differs_from_the_base_only_in_its_changes_and_from_the_others() -> None:
    for table, scale in ALL:
        base, seen = table.base(scale), []
        for item in table.configurations:
            run, names = table.run(item, scale, base), changed_fields(item.changes(scale, base))
            differing = [name for name, _, _ in differences(base, run)]
            others = [name for name in differing if not any(name == n or name.startswith(f"{n}.") for n in names)]
            assert not others, f"{table.name}/{item.name} also changes {others}"
            assert run not in seen, f"{table.name}/{item.name} is listed twice"
            seen.append(run)
        assert len({item.name for item in table.configurations}) == len(seen)


def test_every_network_and_method_can_be_built() -> None:
    """Each once, on the meta device; the methods with a tiny network. Their settings can be saved and read."""
    runs = [table.run(item, scale) for table, scale in ALL for item in table.configurations]
    tiny = edit(Run(), backbone=ViT(width=16, depth=1, heads=1, patch=8, image_size=16))
    with torch.device("meta"):
        for backbone in {run.backbone for run in runs}:
            assert backbone.build().embed_dim > 0
        for method in {run.method for run in runs}:
            run = edit(tiny, method=method)
            assert build_method(run).trainable is not None
            assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


def test_the_columns_of_the_tables_are_known() -> None:
    assert len(TABLES) == 18
    for name, table in TABLES.items():
        assert get_table(name) is table
        assert {*table.metrics} <= METRICS.keys()
        for item in table.configurations:
            assert len(item.paper) <= len(table.metrics)
            assert "/" not in item.name


def test_configurations_are_selected_by_name() -> None:
    table = get_table("temperatures")
    assert [item.name for item in table.select(["0.06", "0"])] == ["0", "0.06"]
    assert len(table.select([])) == 6
    with pytest.raises(UserError, match=r"no configuration '0\.05'; did you mean .*'0\.0[468]'"):
        table.select(["0.05"])
    with pytest.raises(UserError, match="did you mean 'table7'"):
        get_table("tabel7")


def test_configurations_have_the_papers_settings() -> None:
    assert run_of("table7/no-momentum").method.teacher == "student"
    assert isinstance(run_of("table7/byol").method, BYOLConfig)
    assert run_of("table7/byol").views.view_shapes == [(2, 224)]
    assert run_of("table7/swav").views.view_shapes == [(2, 224), (10, 96)]
    assert run_of("table8/6-local-300").optim.epochs == 300
    assert run_of("table9/128").optim.batch_size == 128
    assert run_of("table9/8").optim.epochs == 50
    assert run_of("table13/dino-resnet").backbone.name == "resnet50"
    assert run_of("table13/moco-v2-resnet").views.view_shapes == [(2, 224)]
    assert run_of("table15/student-sinkhorn").method.targets == "sinkhorn"
    assert run_of("fig5/s5").backbone.build().grid(torch.zeros(1, 3, 225, 225)) == (45, 45)
    assert run_of("head-layers/4-l2").method.head_layers == 3
    plain = run_of("head-layers/3-plain").method
    assert (plain.head_layers, plain.head_bottleneck) == (3, 0)
    warm = run_of("temperatures/0.04-0.07").method
    assert (warm.warmup_teacher_temp, warm.teacher_temp, warm.warmup_teacher_temp_epochs) == (0.04, 0.07, 30)
    assert run_of("crop-scales/0.32").views.global_scale == (0.32, 1.0)
    assert run_of("length/800", "small").optim.epochs == 8 * run_of("length/100", "small").optim.epochs
    assert run_of("attention-heads/16").backbone.build().blocks[0].attn.heads == 16


def test_small_runs_have_the_schedules_of_short_runs() -> None:
    """The learning rate decays to half of its peak, which depends on the batch size; the EMA ends at 0.98."""
    for table in TABLES.values():
        for item in table.configurations:
            run: Any = table.run(item, "small")
            assert run.optim.min_lr == pytest.approx(run.optim.lr * run.optim.batch_size / 256 / 2), item.name
            assert getattr(run.method, "momentum_end", 0.98) == 0.98, item.name


def test_equal_small_configurations_have_equal_learning_rates() -> None:
    rates: dict[str, dict[float, str]] = {}
    for table in TABLES.values():
        for item in table.configurations:
            run = table.run(item, "small")
            others = edit(
                run, optim=dict(lr=1.0, min_lr=0.0, epochs=1, warmup_epochs=0.0), online_eval=dict(every_epochs=1)
            )
            rates.setdefault(json.dumps(to_dict(others)), {})[run.optim.lr] = f"{table.name}/{item.name}"
    assert not [each for each in rates.values() if len(each) > 1]
    tuned = {"dino": 8e-3, "no-momentum": 2e-3, "sinkhorn": 1.6e-2, "no-multi-crop": 4e-3, "mse": 8e-3}
    tuned |= {"predictor": 8e-3, "byol": 8e-3, "moco-v2": 4e-3, "swav": 4e-3}
    assert {name: run_of(f"table7/{name}", "small").optim.lr for name in tuned} == tuned
    assert run_of("table13/moco-v2-resnet", "small").optim.lr == 4e-3


def test_the_learning_rate_of_a_small_configuration_is_relative_to_the_base() -> None:
    table = get_table("table7")
    base = edit(table.base("small"), optim=dict(lr=1e-3, min_lr=1e-4))
    [item] = table.select(["no-momentum"])
    assert table.run(item, "small", base).optim == edit(base.optim, lr=2.5e-4, min_lr=2.5e-5)
    assert table.run(item, "paper", base).optim == base.optim


# -- the paper's results ------------------------------------------------------------------------------------


REPEATED = (
    ("linear", 76.1, "table7/dino table8/10-local-300 table13/dino-vit table14/dino table15/momentum-centering"),
    ("20-NN", 72.8, "table7/dino table13/dino-vit fig5/s16 fig6/momentum length/300 attention-heads/6"),
    ("linear", 0.1, "table7/no-momentum table15/student-centering table14/byol-no-predictor"),
    ("20-NN", 0.1, "table7/no-momentum fig6/student fig6/previous-step"),
    ("linear", 76.0, "table7/sinkhorn table15/momentum-sinkhorn"),
    ("linear", 72.5, "table7/no-multi-crop table8/0-local-300 table14/no-multi-crop multi-crop/dino"),
    ("20-NN", 67.9, "table7/no-multi-crop multi-crop/dino"),
    ("linear", 62.4, "table7/mse table14/mse"),
    ("linear", 75.6, "table7/predictor table14/predictor"),
    ("linear", 71.4, "table7/byol table13/byol-vit table14/byol multi-crop/byol"),
    ("20-NN", 66.6, "table7/byol table13/byol-vit multi-crop/byol fig6/previous-epoch"),
    ("linear", 64.8, "table14/byol-crops multi-crop/byol-crops"),
    ("linear", 71.6, "table7/moco-v2 table13/moco-v2-vit multi-crop/moco-v2"),
    ("20-NN", 62.0, "table7/moco-v2 table13/moco-v2-vit multi-crop/moco-v2"),
    ("linear", 73.4, "table14/moco-v2-crops multi-crop/moco-v2-crops"),
    ("linear", 71.8, "table7/swav table13/swav-vit table15/student-sinkhorn multi-crop/swav-crops"),
    ("20-NN", 64.7, "table7/swav table13/swav-vit multi-crop/swav-crops"),
    ("linear", 75.9, "table8/6-local-300 multi-crop/dino-crops"),
    (
        "20-NN",
        69.7,
        "head-norm/no-norm prototypes/65536 center-momentum/0.9 temperatures/0.04-0.07 crop-scales/0.24",
    ),
    ("20-NN", 69.3, "head-layers/4-l2 prototypes/4096"),
    ("throughput", 1007, "fig5/s16 attention-heads/6"),
)
"""(metric, result, configurations) that the paper lists in several of its tables."""


def test_the_papers_results_agree_between_its_tables() -> None:
    for metric, value, paths in REPEATED:
        assert {path: paper(path, metric) for path in paths.split()} == dict.fromkeys(paths.split(), value)


def test_contradictory_results_of_the_paper_are_both_kept() -> None:
    assert (paper("table7/moco-v2", "linear"), paper("table14/moco-v2", "linear")) == (71.6, 71.4)
    assert paper("table7/mse", "20-NN") == paper("table14/mse-no-multi-crop", "linear") == 52.6
    assert (paper("length/100", "20-NN"), paper("prototypes/65536", "20-NN")) == (70.9, 69.7)


# -- a study and its pages ---------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Fig. 7 with one configuration of three seeds, one that failed, and one that was not run."""
    table = get_table("fig7")
    base = edit(table.base("small"), data=Scenes(count=40))
    data = {"images": 40, "classes": 4, "fingerprint": "abcd", "val_fraction": 0.1}
    study = Study(tmp_path / "fig7" / "small", table, "small", base, data)
    study.write()
    both, sharpening = table.configurations[0], table.configurations[1]
    for seed, knn in enumerate((40.0, 44.0, 45.0)):
        folder = StudyRun(study, both, seed).folder
        run = edit(table.run(both, "small", base), seed=seed, out=str(folder))
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"format": FORMAT, "run": to_dict(run)}))
        lines = [{"step": s, "epoch": s / 4, "teacher_entropy": 5.0 + seed, "kl": 1.0, "loss": 6.0} for s in (2, 4)]
        lines.append({"step": 4, "epoch": 1.0, "eval": "knn", "20-NN": knn})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = Result(
            values={
                "20-NN": knn,
                "entropy": 80.0,
                "kl": 1.0,
                "hours": 0.1,
                "memory": 1.0,
                "images": 160,
                "images/s": 9.0,
            },
            references={"raw_pixels": {"20-NN": 30.0}},
            machine="a CPU",
            versions={"torch": "2"},
        )
        (folder / RESULT).write_text(json.dumps(to_dict(result)))
    failed = StudyRun(study, sharpening, 0).folder
    failed.mkdir(parents=True)
    (failed / FAILED).write_text(json.dumps({"error": "The loss is <nan>."}))
    loaded = read_study(study.folder)
    assert loaded is not None
    return loaded


def test_a_study_is_read_with_the_spread_over_its_seeds(study: Study) -> None:
    spread = study.spread(study.table.configurations[0], "20-NN")
    assert spread is not None
    assert (spread.mean, spread.low, spread.high, spread.n) == (43.0, 40.0, 45.0, 3)
    assert spread.deviation == pytest.approx(2.6457513)
    assert [run.state for run in study.runs()] == ["done", "done", "done", "failed"]


def test_a_study_without_commands_is_read(study: Study) -> None:
    content = json.loads((study.folder / STUDY).read_text())
    del content["commands"]
    (study.folder / STUDY).write_text(json.dumps(content))
    assert read_study(study.folder) == study


def test_the_page_has_all_results_and_keeps_the_discussion(study: Study) -> None:
    page = write_page(study)
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    results = "| 80.0 (80.0 to 80.0, n 3) | – | 1.00 (1.00 to 1.00, n 3) | – | 43.0 (40.0 to 45.0, n 3) | – |"
    assert f"| centering and sharpening {results}" in text
    assert "| centering only: no sharpening | – | 100.0 | – | 0 | – | – |" in text
    for part in (
        "The loss is <nan>.",
        "Not run: centering only",
        "raw pixels 30.0 %",
        "Total: 18 min for 3 runs on a CPU, float32; torch 2.",
        "| centering only: no sharpening | method.sharpening False |",
        "| centering and sharpening, seed 2 | done | 6 min | 160 |",
    ):
        assert part in text
    page.write_text(text.replace(NO_DISCUSSION, "At this scale KL does not fall to 0.").replace("43.0", "99.9"))
    write_page(study, page.parent)
    again = page.read_text()
    assert "At this scale KL does not fall to 0." in again
    assert "99.9" not in again


def test_a_result_with_its_curves_needs_no_other_file_of_the_run(study: Study) -> None:
    run = study.runs()[0]
    result = json.loads((run.folder / RESULT).read_text())
    expected = {name: run.line(name) for name in ("loss", "20-NN", "entropy")}
    (run.folder / RESULT).write_text(json.dumps(result | {"curves": expected, "date": "2026-01-31"}))
    for name in ("metrics.jsonl", "run.json"):
        (run.folder / name).unlink()
    for name, (epochs, values) in expected.items():
        assert [list(part) for part in run.line(name)] == [epochs, values]
        assert values
    assert "torch 2; trained on 2026-01-31." in write_page(study).read_text()


def test_the_rank_correlation_is_that_of_mean_ranks() -> None:
    assert rank_correlation([1, 5, 9], [0.1, 0.2, 7]) == pytest.approx(1)
    assert rank_correlation([1, 5, 9], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert rank_correlation([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(3 / 10**0.5)  # ranks 1, 2.5, 2.5, 4
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_the_page_has_the_rank_correlation_with_the_paper(tmp_path: Path) -> None:
    table = get_table("table7")
    data = {"images": 40, "classes": 4, "fingerprint": "abcd", "val_fraction": 0.1}
    study = Study(tmp_path, table, "small", table.base("small"), data)
    cost = {"hours": 0.1, "memory": 1.0, "images": 160, "images/s": 9.0}
    for item, knn in zip(table.select(["dino", "no-momentum", "mse", "byol"]), (40.0, 20.0, 30.0, 35.0), strict=True):
        folder = StudyRun(study, item, 0).folder
        folder.mkdir(parents=True)
        (folder / RESULT).write_text(json.dumps(to_dict(Result(values={"20-NN": knn, **cost}))))
    assert "with the paper: 20-NN 1.00, 4 configurations." in write_page(study).read_text()


def test_a_missing_study_is_an_error_with_the_command(study: Study, tmp_path: Path) -> None:
    assert find_study("fig7", tmp_path).folder == study.folder
    with pytest.raises(UserError, match="dino ablate table7"):
        find_study("table7", tmp_path)
    with pytest.raises(UserError, match="did you mean 'fig7'"):
        find_study("figg7", tmp_path)
