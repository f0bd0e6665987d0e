"""The paper's tables as values: what each configuration changes, the paper's results, and the pages of a study."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_ssl.ablations.markdown import NO_DISCUSSION, write_study_markdown
from dino_ssl.ablations.page import write_study_page
from dino_ssl.ablations.results import FAILED, RESULT, SAME, Result, Study, find_study, read_study
from dino_ssl.ablations.table import CURVES, METRICS, SCALES, Scale, Table
from dino_ssl.ablations.tables import TABLES, get_table
from dino_ssl.config import differences, edit, from_dict, to_dict
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.models.vit import ViT
from dino_ssl.run import FORMAT, Run
from dino_ssl.state import build_method

ALL = [(table, scale) for table in TABLES.values() for scale in SCALES]
IDS = [f"{table.name}-{scale}" for table, scale in ALL]


def changed_fields(changes: Any, prefix: str = "") -> list[str]:
    """The dotted fields of changes; a nested value that is replaced as a whole has one name."""
    if not isinstance(changes, Mapping):
        return [prefix]
    nested = [changed_fields(item, f"{prefix}.{name}".lstrip(".")) for name, item in changes.items()]
    return [name for names in nested for name in names]


def run_of(path: str, scale: Scale = "paper") -> Any:
    """`table7/dino`: the Run of that configuration."""
    name, _, configuration = path.partition("/")
    table = get_table(name)
    return table.run(table.configuration(configuration), scale)


def paper(path: str, metric: str) -> float:
    """`table7/dino`: the paper's result of that configuration."""
    name, _, configuration = path.partition("/")
    return get_table(name).configuration(configuration).paper[metric]


# -- configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "scale"), ALL, ids=IDS)
def test_a_configuration_differs_from_the_base_only_in_its_changes(table: Table, scale: Scale) -> None:
    base = table.base(scale)
    for item in table.configurations:
        names = changed_fields(item.changes(scale, base))
        differing = [name for name, _, _ in differences(base, table.run(item, scale))]
        others = [name for name in differing if not any(name == n or name.startswith(f"{n}.") for n in names)]
        assert not others, f"{item.name} also changes {others}"


@pytest.mark.parametrize(("table", "scale"), ALL, ids=IDS)
def test_all_configurations_of_a_table_differ(table: Table, scale: Scale) -> None:
    runs = [json.dumps(to_dict(table.run(item, scale)), sort_keys=True) for item in table.configurations]
    assert len(set(runs)) == len(runs)
    assert len({item.name for item in table.configurations}) == len(runs)


@pytest.mark.parametrize(("table", "scale"), ALL, ids=IDS)
def test_every_run_can_be_saved_and_read(table: Table, scale: Scale) -> None:
    for item in table.configurations:
        run = table.run(item, scale)
        assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


def test_every_network_and_method_can_be_built() -> None:
    """Each once, on the meta device; the methods with a tiny network."""
    runs = [table.run(item, scale) for table, scale in ALL for item in table.configurations]
    tiny = edit(Run(), backbone=ViT(width=16, depth=1, heads=1, patch=8, image_size=16))
    with torch.device("meta"):
        for backbone in {run.backbone for run in runs}:
            assert backbone.build().embed_dim > 0
        for method in {run.method for run in runs}:
            assert build_method(edit(tiny, method=method)).trainable is not None


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_a_table_is_described_and_the_papers_results_are_of_its_metrics(table: Table) -> None:
    assert get_table(table.name) is table
    assert table.title
    assert table.protocol
    assert table.conclusion
    assert {*table.metrics} <= METRICS.keys()
    assert {*table.curves} <= CURVES.keys()
    for item in table.configurations:
        assert set(item.paper) <= {*table.metrics}
        assert "/" not in item.name


def test_configurations_are_selected_by_name_and_by_number() -> None:
    table = get_table("temperatures")
    assert table.configuration("0.04") is table.configuration("3")
    assert [item.name for item in table.select(["0.06", "1"])] == ["0", "0.06"]
    with pytest.raises(UserError, match=r"no configuration '0\.05'; did you mean .*'0\.0[468]'"):
        table.configuration("0.05")
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


# -- the paper's results ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value", "paths"),
    [
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
    ],
)
def test_the_papers_results_agree_between_its_tables(metric: str, value: float, paths: str) -> None:
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
        folder = study.study_run(both, seed).folder
        run = edit(table.run(both, "small", base), seed=seed, out=str(folder))
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"format": FORMAT, "run": to_dict(run)}))
        lines = [{"step": s, "epoch": s / 4, "teacher_entropy": 5.0 + seed, "kl": 1.0, "loss": 6.0} for s in (2, 4)]
        lines.append({"step": 4, "epoch": 1.0, "eval": "knn", "20-NN": knn})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = Result(
            values={"20-NN": knn, "entropy": 80.0, "kl": 1.0},
            references={"raw_pixels": {"20-NN": 30.0}},
            seconds=600.0,
            memory=2**30,
            images_seen=160,
            prototypes=1024,
            machine="<a CPU>",
            versions={"torch": "2"},
        )
        (folder / RESULT).write_text(json.dumps(to_dict(result)))
    failed = study.study_run(sharpening, 0).folder
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
    changed = [name for name, _, _ in study.differences(study.table.configuration("centering"))]
    assert changed == ["method.sharpening"]


def test_the_page_has_our_results_the_papers_and_the_missing_runs(study: Study) -> None:
    text = write_study_page(study).read_text()
    assert "43.0" in text
    assert "40.0 to 45.0, n 3" in text
    assert "The loss is &lt;nan&gt;." in text
    assert "Not run: centering only" in text
    assert "raw pixels 30.0 %" in text
    assert "&lt;a CPU&gt;" in text
    assert "ln K 6.93" in text
    assert '<td class="paper">100.0</td>' in text
    assert "method.sharpening False (base True)" in text
    assert "http" not in text.replace("http-equiv", ""), "the page must not load anything"


def test_markdown_keeps_the_discussion(study: Study, tmp_path: Path) -> None:
    page, image = write_study_markdown(study, tmp_path / "docs")
    assert image.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "| centering and sharpening | 80.0 (80.0 to 80.0, n 3) | – |" in text
    page.write_text(text.replace(NO_DISCUSSION, "At this scale KL does not fall to 0.").replace("43.0", "99.9"))
    write_study_markdown(study, tmp_path / "docs")
    again = page.read_text()
    assert "At this scale KL does not fall to 0." in again
    assert "99.9" not in again


def test_an_identical_run_of_another_table_counts(study: Study) -> None:
    run = study.study_run(study.table.configuration("centering"), 0)
    run.folder.mkdir(parents=True)
    (run.folder / SAME).write_text(json.dumps({"folder": "../../both/seed1"}))
    assert (run.state, run.is_shared) == ("done", True)
    assert run.result is not None
    assert run.result.values["20-NN"] == 44.0
    (study.folder / "both/seed1" / RESULT).unlink()  # removed: the run must be done here
    assert (run.state, run.is_shared) == ("not run", False)


def test_a_missing_study_is_an_error_with_the_command(study: Study, tmp_path: Path) -> None:
    assert find_study("fig7", tmp_path).folder == study.folder
    with pytest.raises(UserError, match="dino ablate table7"):
        find_study("table7", tmp_path)
    with pytest.raises(UserError, match="did you mean 'fig7'"):
        find_study("figg7", tmp_path)
