"""The files of a release: the address of the repository in the metadata and in the README."""

import importlib.util
import re
import shutil
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / ".ci" / "set_repository.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the sdist leaves out .ci")
ADDRESS = "https://github.com/Owner/jaxlstm"


@pytest.fixture
def release(tmp_path):
    """Returns a folder with the two files of a release, after the script ran twice, and the script."""
    spec = importlib.util.spec_from_file_location("set_repository", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for _ in range(2):
        script.main(ADDRESS + "/", "v0.1.0", tmp_path)
    return tmp_path, script


def test_release_readme_has_absolute_links_to_files_that_exist(release):
    folder, script = release
    text = (folder / "README.md").read_text(encoding="utf-8")
    original = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.LINK.search(text) is None
    targets = re.findall(rf"{ADDRESS}/(raw|blob)/v0\.1\.0/([^)#]+)", text)
    assert len(targets) == len(script.LINK.findall(original)) > 10
    assert all((ROOT / path).is_file() for _, path in targets)
    assert {path.suffix for kind, path in ((kind, Path(path)) for kind, path in targets) if kind == "raw"} <= {
        ".png",
        ".svg",
    }
    code = re.compile(r"```.*?```", re.DOTALL)
    assert code.findall(text) == code.findall(original)


def test_release_project_has_addresses(release):
    urls = tomllib.loads((release[0] / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls == {
        "Repository": ADDRESS,
        "Documentation": "https://owner.github.io/jaxlstm/",
        "Changelog": f"{ADDRESS}/blob/v0.1.0/CHANGELOG.md",
        "Issues": f"{ADDRESS}/issues",
    }
