"""Checks the files of a built wheel and sdist: ``python .ci/check_distribution.py DIST [--release TAG]``.

Runs in a checkout with git. With ``--release`` the version must be the one of the tag, and the metadata have the
address of the repository and no link to a file beside the README.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from set_repository import LINK

ROOT = Path(__file__).parent.parent
LICENSES = {"LICENSE", "jaxlstm/diagnostics/web/uPlot.LICENSE"}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt"} | {f"licenses/{name}" for name in LICENSES}
MAX_BYTES = 4 << 20  # of either file


def tracked_files() -> set[str]:
    """Returns the files of the commit and of the index."""
    return set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def compare(name: str, actual: set[str], expected: set[str]) -> None:
    """Ends the program with the difference, if there is one."""
    if actual != expected:
        sys.exit(f"{name}: missing {sorted(expected - actual)}, unexpected {sorted(actual - expected)}")


def check_wheel(path: Path, version: str, tracked: set[str]) -> None:
    """Checks that a wheel has the package, its metadata and nothing else."""
    names = set(zipfile.ZipFile(path).namelist())
    package = {name for name in tracked if name.startswith("jaxlstm/")}
    compare(path.name, names, package | {f"jaxlstm-{version}.dist-info/{name}" for name in METADATA})


def check_sdist(path: Path, version: str, tracked: set[str]) -> None:
    """Checks that an sdist has the tracked files that it should have, its metadata and nothing else."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    hidden = {name for name in tracked if name.startswith(".") and name != ".gitignore"}
    compare(path.name, names, (tracked - hidden) | {"PKG-INFO"})


def check_version(version: str) -> None:
    """Checks that citation and changelog name the version."""
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if citation is None or citation[1] != version:
        sys.exit(f"CITATION.cff: expected version: {version}, got {citation and citation[1]}")
    if f"## {version}" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        sys.exit(f"CHANGELOG.md: no section ## {version}")


def check_release(wheel: Path, version: str, tag: str) -> None:
    """Checks the tag, the date in the changelog, and addresses in the metadata, whose text is the README."""
    if tag != f"v{version}":
        sys.exit(f"expected the tag v{version}, got {tag}")
    if re.search(rf"^## {re.escape(version)}.*unreleased", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M):
        sys.exit(f"CHANGELOG.md: the section {version} needs the date of its release")
    metadata = zipfile.ZipFile(wheel).read(f"jaxlstm-{version}.dist-info/METADATA").decode()
    if "\nProject-URL: Repository, https://" not in metadata:
        sys.exit(f"{wheel.name}: the metadata name no repository; see RELEASING.md")
    if relative := LINK.search(metadata):
        sys.exit(f"{wheel.name}: the README has the relative link {relative[0]}; see RELEASING.md")


def main(folder: str, tag: str | None = None) -> None:
    """Checks the one wheel and the one sdist of a folder."""
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    tracked = tracked_files()
    check_wheel(wheel, version, tracked)
    check_sdist(sdist, version, tracked)
    check_version(version)
    if tag is not None:
        check_release(wheel, version, tag)
    for path in (wheel, sdist):
        if path.stat().st_size > MAX_BYTES:
            sys.exit(f"{path.name}: {path.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}")
        print(f"{path.name}: {path.stat().st_size:,} bytes, complete")


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if argument != "--release"))
