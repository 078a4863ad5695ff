"""Every recipe trains, and the numbers on its page are those of the committed run of its program."""

import importlib
import json
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchjd")

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "examples" / "recipes"
PAGES = ROOT / "docs" / "recipes"
NAMES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "README")
TINY = {"pinn": ["--adam", "2", "--lbfgs", "2"]}


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAMS))
    return importlib.import_module


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_the_page_are_those_of_the_run(name, program):
    run = json.loads((PROGRAMS / "results" / f"{name}.json").read_text())
    page = (PAGES / f"{name}.md").read_text()
    assert program("compare").table(run["runs"]) in page
    assert run["torch"] in (PAGES / "README.md").read_text()
    assert set(run["runs"]) == set(program(name).METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_the_program_is_short_and_runs(name, program, tmp_path, monkeypatch, capsys):
    assert len((PROGRAMS / f"{name}.py").read_text().splitlines()) <= 80
    numbers = []
    for out in (tmp_path / "first.json", tmp_path / "second.json"):
        monkeypatch.setattr("sys.argv", [name, "--out", str(out), *TINY.get(name, ["--steps", "2"])])
        runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")
        numbers.append(json.loads(out.read_text())["runs"])
    assert numbers[0] == numbers[1]
    assert program("compare").table(numbers[0]) in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_the_snippets_are_lines_of_the_program_or_of_contrib(name):
    sources = PROGRAMS / f"{name}.py", *(ROOT / "steer_optim" / "contrib").glob("*.py")
    lines = {line.strip() for path in sources for line in path.read_text().splitlines()}
    for snippet in re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), flags=re.DOTALL):
        assert {line.strip() for line in snippet.splitlines()} <= {*lines, ""}


def test_the_index_has_every_page_and_every_page_its_program():
    assert {path.stem for path in PROGRAMS.glob("*.py")} == {*NAMES, "compare"}
    assert sorted(re.findall(r"\]\((\w+)\.md\)", (PAGES / "README.md").read_text())) == NAMES
    for name in NAMES:
        assert f"../../examples/recipes/{name}.py" in (PAGES / f"{name}.md").read_text()
