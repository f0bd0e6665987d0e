"""The tables of the paper as values: what each row changes, what the paper says of it, and the page that tells both."""

import json
from pathlib import Path

import pytest
import torch

from dino_ssl.ablations.markdown import NOTHING, write_study_text
from dino_ssl.ablations.page import write_study_page
from dino_ssl.ablations.results import FAILED, RESULT, SAME, Result, Study, find_study, read_study
from dino_ssl.ablations.table import SCALES, Scale, Table, named
from dino_ssl.ablations.tables import HOMES, table, tables
from dino_ssl.config import differences, edit, from_dict, to_dict
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.errors import UserError
from dino_ssl.methods.byol import BYOLConfig
from dino_ssl.models.vit import ViT
from dino_ssl.run import Run
from dino_ssl.state import build_method

EVERY = [(one, scale) for one in tables() for scale in SCALES]
IDS = [f"{one.name}-{scale}" for one, scale in EVERY]


def paper(where: str, figure: str) -> float:
    """`table7/dino`: the paper's figure of that row."""
    name, _, row = where.partition("/")
    return table(name).row(row).paper[figure]


# -- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "scale"), EVERY, ids=IDS)
def test_every_row_differs_from_the_base_just_in_what_it_names(one: Table, scale: Scale) -> None:
    base = one.base(scale)
    for row in one.rows:
        names = named(row.changes(scale, base))
        found = [name for name, _, _ in differences(base, one.run(row, scale))]
        strays = [name for name in found if not any(name == n or name.startswith(f"{n}.") for n in names)]
        assert not strays, f"{row.name} changes {strays} too"


@pytest.mark.parametrize(("one", "scale"), EVERY, ids=IDS)
def test_no_two_rows_are_the_same_run(one: Table, scale: Scale) -> None:
    runs = [json.dumps(to_dict(one.run(row, scale)), sort_keys=True) for row in one.rows]
    assert len(set(runs)) == len(runs)
    assert len({row.name for row in one.rows}) == len(one.rows)


@pytest.mark.parametrize(("one", "scale"), EVERY, ids=IDS)
def test_every_row_can_be_saved_and_read(one: Table, scale: Scale) -> None:
    for row in one.rows:
        run = one.run(row, scale)
        assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


def test_every_rows_network_and_every_rows_method_can_be_built() -> None:
    """Each once, the methods on a tiny network: many tables share them. Only shapes: there are no weights on `meta`."""
    runs = [one.run(row, scale) for one, scale in EVERY for row in one.rows]
    tiny = edit(Run(), backbone=ViT(width=16, depth=1, heads=1, patch=8, image_size=16))
    with torch.device("meta"):
        for backbone in {run.backbone for run in runs}:
            assert backbone.build().embed_dim > 0
        for method in {run.method for run in runs}:
            assert build_method(edit(tiny, method=method)).trainable is not None


@pytest.mark.parametrize("one", tables(), ids=lambda one: one.name)
def test_a_table_says_what_it_is_and_its_rows_carry_its_figures(one: Table) -> None:
    assert table(one.name) is one
    assert one.title
    assert one.protocol
    assert one.shows
    known = {figure.name for figure in one.figures}
    for row in one.rows:
        assert set(row.paper) <= known
        assert "/" not in row.name


def test_rows_are_found_by_name_and_by_number() -> None:
    one = table("temperatures")
    assert one.row("0.04") is one.row("3")
    assert [row.name for row in one.select(["0.06", "1"])] == ["0", "0.06"]
    with pytest.raises(UserError, match=r"no row '0\.05'; did you mean .*'0\.0[468]'"):
        one.row("0.05")
    with pytest.raises(UserError, match="did you mean 'table7'"):
        table("tabel7")


def test_a_row_says_the_settings_that_the_paper_names() -> None:
    def run(where: str, scale: Scale = "paper") -> Run:
        name, _, row = where.partition("/")
        return table(name).run(table(name).row(row), scale)

    assert run("table7/no-momentum").method.teacher == "student"
    assert isinstance(run("table7/byol").method, BYOLConfig)
    assert run("table7/byol").views.view_shapes == [(2, 224)]
    assert run("table7/swav").views.view_shapes == [(2, 224), (10, 96)]
    assert run("table8/6-local-300").optim.epochs == 300
    assert run("table9/128").optim.batch_size == 128
    assert run("table9/8").optim.epochs == 50
    assert run("table13/dino-resnet").backbone.name == "resnet50"
    assert run("table13/moco-v2-resnet").views.view_shapes == [(2, 224)]
    assert run("table15/student-sinkhorn").method.targets == "sinkhorn"
    assert run("fig5/s5").backbone.build().grid(torch.zeros(1, 3, 225, 225)) == (45, 45)
    assert run("head-layers/4-l2").method.head_layers == 3
    assert (run("head-layers/3-plain").method.head_layers, run("head-layers/3-plain").method.head_bottleneck) == (3, 0)
    warm = run("temperatures/0.04-0.07").method
    assert (warm.warmup_teacher_temp, warm.teacher_temp, warm.warmup_teacher_temp_epochs) == (0.04, 0.07, 30)
    assert run("crop-scales/0.32").views.global_scale == (0.32, 1.0)
    assert run("length/800", "small").optim.epochs == 8 * run("length/100", "small").optim.epochs
    assert run("attention-heads/16").backbone.build().blocks[0].attn.heads == 16


# -- the paper's figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "value", "places"),
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
def test_the_papers_figures_agree_between_its_tables(figure: str, value: float, places: str) -> None:
    assert {place: paper(place, figure) for place in places.split()} == dict.fromkeys(places.split(), value)


def test_where_the_paper_contradicts_itself_both_figures_stand() -> None:
    assert (paper("table7/moco-v2", "linear"), paper("table14/moco-v2", "linear")) == (71.6, 71.4)
    assert paper("table7/mse", "20-NN") == paper("table14/mse-no-multi-crop", "linear") == 52.6
    assert (paper("length/100", "20-NN"), paper("prototypes/65536", "20-NN")) == (70.9, 69.7)


# -- a study and its pages ---------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Fig. 7 with one row of three seeds, one that failed, one that was not run."""
    one = table("fig7")
    base = edit(one.base("small"), data=Scenes(count=40))
    data = {"images": 40, "classes": 4, "fingerprint": "abcd", "val_fraction": 0.1}
    made = Study(tmp_path / "fig7" / "small", one, "small", base, data)
    made.write()
    both, sharpening = one.rows[0], one.rows[1]
    for seed, knn in enumerate((40.0, 44.0, 45.0)):
        cell = made.cell(both, seed)
        run = edit(one.run(both, "small", base), seed=seed, out=str(cell.folder))
        cell.folder.mkdir(parents=True)
        (cell.folder / "run.json").write_text(json.dumps({"run": to_dict(run)}))
        lines = [{"step": s, "epoch": s / 4, "teacher_entropy": 5.0 + seed, "kl": 1.0, "loss": 6.0} for s in (2, 4)]
        lines.append({"step": 4, "epoch": 1.0, "eval": "knn", "20-NN": knn})
        (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = Result(
            values={"20-NN": knn, "entropy": 80.0, "kl": 1.0},
            references={"raw_pixels": {"20-NN": 30.0}},
            seconds=600.0,
            memory=2**30,
            dataset=160,
            prototypes=1024,
            machine="<a processor>",
            versions={"torch": "2"},
        )
        (cell.folder / RESULT).write_text(json.dumps(to_dict(result)))
    broken = made.cell(sharpening, 0)
    broken.folder.mkdir(parents=True)
    (broken.folder / FAILED).write_text(json.dumps({"error": "The loss <stopped> being a number."}))
    found = read_study(made.folder)
    assert found is not None
    return found


def test_a_study_reads_back_with_the_spread_over_its_seeds(study: Study) -> None:
    spread = study.spread(study.table.rows[0], "20-NN")
    assert spread is not None
    assert (spread.mean, spread.low, spread.high, spread.n) == (43.0, 40.0, 45.0, 3)
    assert spread.deviation == pytest.approx(2.6457513)
    assert [cell.state for row in study.table.rows for cell in study.cells(row)] == ["done", "done", "done", "failed"]
    changed = [name for name, _, _ in study.settings(study.table.row("centering"))]
    assert changed == ["method.sharpening"]


def test_the_page_tells_ours_beside_the_papers_and_what_is_missing(study: Study) -> None:
    text = write_study_page(study).read_text()
    assert "43.0" in text
    assert "40.0 to 45.0, n 3" in text
    assert "The loss &lt;stopped&gt; being a number." in text
    assert "Not run: centering alone" in text
    assert "raw pixels 30.0 %" in text
    assert "&lt;a processor&gt;" in text
    assert "ln K 6.93" in text
    assert '<td class="paper">100.0</td>' in text
    assert "method.sharpening False (base True)" in text
    assert "http" not in text.replace("http-equiv", ""), "the page fetches nothing"


def test_markdown_keeps_what_a_person_wrote(study: Study, tmp_path: Path) -> None:
    page, image = write_study_text(study, tmp_path / "docs")
    assert image.read_bytes().startswith(b"\x89PNG")
    first = page.read_text()
    assert "| centering and sharpening | 80.0 (80.0 to 80.0, n 3) | – |" in first
    page.write_text(first.replace(NOTHING, "At this scale KL does not go to 0.").replace("43.0", "99.9"))
    write_study_text(study, tmp_path / "docs")
    again = page.read_text()
    assert "At this scale KL does not go to 0." in again
    assert "99.9" not in again


def test_a_run_that_another_table_has_counts_here_too(study: Study) -> None:
    here = study.cell(study.table.row("centering"), 0)
    here.folder.mkdir(parents=True)
    (here.folder / SAME).write_text(json.dumps({"folder": "../../both/seed1"}))
    assert (here.state, here.shared) == ("done", True)
    assert here.result is not None
    assert here.result.values["20-NN"] == 44.0
    (study.folder / "both/seed1" / RESULT).unlink()  # taken away: to be run here after all
    assert (here.state, here.shared) == ("not run", False)


def test_what_was_not_run_is_said_with_the_command(study: Study, tmp_path: Path) -> None:
    assert find_study("fig7", tmp_path).folder == study.folder
    with pytest.raises(UserError, match="dino ablate table7"):
        find_study("table7", tmp_path)
    with pytest.raises(UserError, match="did you mean 'fig7'"):
        find_study("figg7", tmp_path)
    assert set(HOMES) >= {"table7", "fig6"}
