"""What the package promises about its own shape."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steer_optim
import steer_optim.rules
import steer_optim.vlm

PACKAGE = Path(steer_optim.__file__).parent
ROOT = Path(__file__).parents[1]


def test_the_root_exports_these_names_and_no_others():
    assert steer_optim.__all__ == [
        "PCD",
        "VGS",
        "Geometry",
        "GradVac",
        "PCGrad",
        "Steer",
        "SteeredOptimizer",
        "Steering",
        "Sum",
        "Weighting",
        "measure",
    ]


def test_the_version_is_that_of_the_newest_release_in_the_changelog():
    releases = re.findall(r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert steer_optim.__version__ == releases[0]
    # One place says it: setuptools reads it there, and make package looks for archives of this version.
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version = \"", pyproject, re.M)
    assert 'version = { attr = "steer_optim.__version__" }' in pyproject


@pytest.mark.parametrize(
    "module", [steer_optim, steer_optim.rules, steer_optim.vlm], ids=lambda module: module.__name__
)
def test_exports_exist(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


def test_importing_the_package_imports_no_optional_dependency():
    optional = ["matplotlib", "transformers", "torchjd", "sklearn", "accelerate", "lightning", "trl", "peft"]
    code = (
        "import sys, steer_optim\n"
        "assert 'steer_optim.vlm' not in sys.modules, 'the root imports vlm'\n"
        "import steer_optim.vlm, steer_optim.monitor, steer_optim.plots, steer_optim.checkpoint\n"
        "import steer_optim.callbacks, steer_optim.survey\n"
        f"print(*(name for name in {optional} if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not found.strip()


# Losses flow down this line to ``.grad``, and no module imports one further down.
LINE = (
    "capture",
    "holding",
    "products",
    "gramian",
    "rules",
    "memory",
    "agreement",
    "step",
    "combining",
    "joined",
    "processes",
    "steering",
    "facade",
    "optimizer",
)
# Nothing on the line imports these.
ASIDE = {"__init__", "reference", "monitor", "survey", "plots", "checkpoint", "callbacks"}


def imports(path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "steer_optim":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steer_optim."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("steer_optim.")}
    return found


def test_no_module_imports_one_further_down_the_line():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*LINE, *ASIDE} - {"rules"}
    for place, name in enumerate(LINE):
        paths = PACKAGE.glob("rules/*.py") if name == "rules" else [PACKAGE / f"{name}.py"]
        for path in paths:
            allowed = {*LINE[:place], *(["rules"] if name == "rules" else [])}
            assert imports(path) <= allowed, f"{path.name} imports {imports(path) - allowed}"


# What is known of families; the algebra of heads; from terms to components; prompts and responses; all of it together.
VLM = ("families", "heads", "rows", "topk", "divergences", "engine", "gate", "distillation", "prompts", "forward")
VLM += ("rollout", "check", "analysis", "data", "trainer", "examination", "advice", "train")


def test_no_module_of_vlm_imports_one_further_down_its_line():
    assert {path.stem for path in (PACKAGE / "vlm").glob("*.py")} == {*VLM, "__init__"}
    for place, name in enumerate(VLM):
        found = set(
            re.findall(r"^from steer_optim\.vlm\.(\w+) import", (PACKAGE / "vlm" / f"{name}.py").read_text(), re.M)
        )
        assert found <= {*VLM[:place]}, f"{name}.py imports {found - {*VLM[:place]}}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_has_a_header(path):
    assert path.read_text().startswith('"""'), "a module says in its header what it is about"
