"""The study on VGS: it runs, and every number of its page comes from its table."""

import re
from pathlib import Path

import pytest
import torch

for needed in ("sklearn", "scipy", "tokenizers", "tqdm", "transformers", "matplotlib"):
    pytest.importorskip(needed)

from studies.vgs import __main__ as study  # noqa: E402
from studies.vgs import capacity, grid, report, shapes, table, train  # noqa: E402

ROOT = Path(__file__).parents[1]
TINY = ["--steps=2", "--batch-size=4", "--teacher-size=16", "--student-size=16", "--teacher-steps=1"]
TINY += ["--reader-steps=1", "--eye-steps=1", "--examined=8", "--observations=1", "--decile-batches=1"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    shapes.polygons.cache_clear()  # ten megabytes, which tests of memory would find in this process


class Here:
    """An executor that does at once, in this process, what it is asked for."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        done = grid.Future()
        done.set_result(function(*arguments))
        return done


def test_runs_become_rows_and_rows_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "CHECKPOINTS", 1)
    monkeypatch.setattr(grid, "ProcessPoolExecutor", Here)
    runs, docs = tmp_path / "runs.csv", tmp_path / "docs"
    tables = [f"--runs={runs}", f"--curves={tmp_path / 'curves.json.gz'}"]
    command = ["run", "--task=shapes", "--methods", "standard", "vgs,refresh_every=2", "--seeds", "0", "1"]
    command += [*TINY, *tables, f"--cache={tmp_path / 'cache'}"]
    assert study.main(command) == 0
    rows = table.read(runs)
    assert sorted({(row["method"], row["seed"]) for row in rows}) == sorted(
        (method, seed) for method in ("standard", "vgs,refresh_every=2") for seed in "01"
    )
    before = runs.read_text()
    assert study.main(command) == 0
    assert "4 runs, 4 of them found" in capsys.readouterr().out
    assert runs.read_text() == before

    assert study.main(["report", *tables, f"--docs={docs}"]) == 0
    (setting,) = table.settings(rows)
    page = (docs / "evidence.md").read_text()
    assert "| `vgs,refresh_every=2` | 2 | " in page
    assert setting.difference("vgs,refresh_every=2", "answer").show(scale=100, sign=True) in page
    assert "--seeds 0 1 --steps 2 --batch-size 4" in page
    framed = page.replace("# Evidence", "# Evidence\n\nProse.") + "\nVerdicts.\n"
    (docs / "evidence.md").write_text(framed)
    report.write(runs, tmp_path / "curves.json.gz", docs)
    assert (docs / "evidence.md").read_text() == framed


def test_the_experiment_on_capacity_is_complete():
    there = {tuple(row[name] for name in table.KEY) for row in table.read()}
    assert {place.key for place in capacity.places()} <= there


def test_the_numbers_of_the_pages_are_those_of_the_table():
    settings, rows = report.split(table.read())
    bodies = report.pages(settings, rows)
    for name, body in bodies.items():
        page = (ROOT / "docs" / name).read_text()
        assert f"{report.BEGIN}\n\n{body}\n\n{report.END}" in page, "make the report again"
    tables = "".join(bodies.values())
    for name in ("docs/evidence.md", "docs/how-to-choose.md", "README.md", "examples/README.md"):
        prose = (ROOT / name).read_text().replace("\N{MINUS SIGN}", "-")
        for shown in re.findall(r"[+-]\d+\.\d ± \d+\.\d", prose):
            assert shown in tables, f"{name}: {shown}"
    images = {file.stem for file in (ROOT / "docs" / "images").glob("evidence-*.png")}
    assert images == set(report.drawn(settings, table.curves(), rows))
