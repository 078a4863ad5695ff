"""The archives of `make package` hold the package and its papers, and nothing else."""

import re
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import steer_optim

pytestmark = pytest.mark.package
ROOT = Path(__file__).parents[1]
NAME = f"steer_optim-{steer_optim.__version__}"
MODULES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "steer_optim").rglob("*")
    if path.suffix in (".py", ".typed", ".yaml")
}


@pytest.fixture
def wheel():
    with zipfile.ZipFile(ROOT / "dist" / f"{NAME}-py3-none-any.whl") as file:
        yield {name: file.read(name) for name in file.namelist()}


def test_the_wheel_holds_the_package(wheel):
    papers = ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    assert set(wheel) == MODULES | {f"{NAME}.dist-info/{name}" for name in papers}


def test_the_sdist_builds_the_wheel_and_holds_no_tests():
    with tarfile.open(ROOT / "dist" / f"{NAME}.tar.gz") as file:
        names = {member.name.removeprefix(f"{NAME}/") for member in file if member.isfile()}
    papers = "CHANGELOG.md LICENSE MANIFEST.in PKG-INFO README.md pyproject.toml setup.cfg setup.py"
    assert {name for name in names if not name.startswith("steer_optim.egg-info/")} == MODULES | {*papers.split()}


def test_the_page_on_an_index_links_to_no_file_of_the_repository(wheel):
    page = message_from_bytes(wheel[f"{NAME}.dist-info/METADATA"]).get_payload()
    assert "pip install steer_optim" in page
    assert "<sub>" not in page
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_the_extras_of_the_pages_exist(wheel):
    extras = set(message_from_bytes(wheel[f"{NAME}.dist-info/METADATA"]).get_all("Provides-Extra"))
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for names in re.findall(r"steer_optim\[([\w,-]+)\]", page.read_text()):
            assert set(names.split(",")) <= extras, f"{page.name}: {names}"
