"""Writes the address of the repository into the files of a release: ``python .ci/set_repository.py ADDRESS REVISION``.

``[project.urls]`` of pyproject.toml gets the address, and the links and pictures of README.md become absolute: a
package index shows the README without the files beside it. The workflow of a release runs this in its checkout, where
the address is known; nothing is committed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
URLS = """
[project.urls]
Repository = "{address}"
Documentation = "{documentation}"
Changelog = "{address}/blob/{revision}/CHANGELOG.md"
Issues = "{address}/issues"
"""


def absolute_links(text: str, address: str, revision: str) -> str:
    """Returns Markdown whose links to files are absolute: of a picture to its bytes, of another file to its page."""

    def replace(match: re.Match[str]) -> str:
        is_picture, label, target = match.groups()
        return f"{is_picture}[{label}]({address}/{'raw' if is_picture else 'blob'}/{revision}/{target})"

    return LINK.sub(replace, text)


def project_urls(address: str, revision: str) -> str:
    """Returns the table ``[project.urls]`` for a repository on GitHub."""
    owner, name = address.rstrip("/").split("/")[-2:]
    return URLS.format(address=address, revision=revision, documentation=f"https://{owner.lower()}.github.io/{name}/")


def main(address: str, revision: str, root: Path = ROOT) -> None:
    """Changes README.md and pyproject.toml; an address that is already there is left alone."""
    address = address.rstrip("/")
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(absolute_links(readme.read_text(encoding="utf-8"), address, revision), encoding="utf-8")
    text = project.read_text(encoding="utf-8")
    if "\n[project.urls]\n" not in text:
        project.write_text(text + project_urls(address, revision), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
