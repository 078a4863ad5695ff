"""What CONTRIBUTING.md asks of an addition: a test fails for whatever is forgotten."""

import inspect
import re
from pathlib import Path

import properties
import pytest
import test_rule_properties

import steer_optim.contrib
import steer_optim.rules
from benchmarks.parity import CONFIGURATIONS
from steer_optim import reference
from steer_optim.rules import Sum, Weighting
from steer_optim.vlm.distillation import DECOMPOSITIONS, DecomposedDistillation

ROOT = Path(__file__).parents[1]
PACKAGES = (steer_optim.rules, steer_optim.contrib)
FILES = [path for package in PACKAGES for path in sorted(Path(package.__file__).parent.glob("[a-z]*.py"))]
NAMES = [(package, name) for package in PACKAGES for name in package.__all__ if name not in ("Rule", "State")]
RULES = [getattr(package, name) for package, name in NAMES]
MAKE = (ROOT / "Makefile").read_text() + (ROOT / "benchmarks" / "gpu.py").read_text()
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if '"__main__"' in path.read_text()]


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_rules_of_a_file_are_exported(path):
    for name in re.findall(r"^class ([A-Z]\w+)\(", path.read_text(), re.M):
        assert any(name in package.__all__ for package in PACKAGES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_conforms_has_a_twin_and_is_on_the_pages(rule):
    name = rule.__name__
    assert rule in {type(made) for made in properties.RULES.values()}, "properties.RULES: the conformance tests"
    if rule not in (Sum, Weighting):
        assert hasattr(reference, name.lower()), "reference.py: the rule on the gradients themselves"
        assert hasattr(test_rule_properties, f"test_{name.lower()}_is_its_reference")
    pages = [ROOT / "docs" / "guide.md", *(ROOT / "docs" / "recipes").glob("*.md")]
    assert any(f"`{name}(" in page.read_text() for page in pages), "docs/guide.md or a page of docs/recipes"
    assert "Example:" in inspect.getdoc(rule)
    assert name in read("CHANGELOG.md")


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_a_decomposition_is_on_its_page(name):
    assert f"`{name}`" in read("docs/objectives.md")
    assert f"``{name}``" in DecomposedDistillation.__doc__


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_way_to_train_in_several_processes_is_on_the_page_of_parity(name):
    assert f"| {name} |" in read("docs/parity.md"), "python -m benchmarks.parity"


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_has_a_target_and_a_result(path):
    assert re.search(rf"\b{path.stem}\b", MAKE)
    if re.search(rf'common\.write\(\s*"{path.stem}"', path.read_text()):
        assert list((ROOT / "benchmarks" / "results").glob(f"{path.stem}-*.json")), "commit the result of a whole run"
