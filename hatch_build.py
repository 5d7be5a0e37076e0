"""What a package index shows: the README and the project's addresses, from one setting.

``repository`` under ``[tool.hatch.metadata.hooks.custom]`` in ``pyproject.toml`` is the public
address of the repository, https://forge.example/owner/gradwatch say. A package index shows the
README without the repository around it, so relative links become absolute ones. While the setting
is empty there is nothing to link to: links to files become their text, and pictures with their
captions are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CODE = re.compile(r"(```.*?```)", re.DOTALL)
RELATIVE = r"(?!https?:|#)([^)]+)"
PICTURE = re.compile(rf"!\[([^\]]*)\]\({RELATIVE}\)")
CAPTIONED_PICTURE = re.compile(rf"{PICTURE.pattern}\n*(?:\*[^*]+\*\n+)?")
LINK = re.compile(rf"(?<!!)\[([^\]]+)\]\({RELATIVE}\)")


class RepositoryHook(MetadataHookInterface):
    """Fills in ``readme`` and ``urls``, which ``[project]`` lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds both fields."""
        repository = self.config["repository"].rstrip("/")
        version = f"v{metadata['version']}"  # the tag of the release, see CONTRIBUTING.md
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(text, repository, version),
        }
        metadata["urls"] = project_urls(repository, version)


def long_description(text: str, repository: str, version: str) -> str:
    """Makes the relative links and pictures of a page absolute, or takes them out.

    Args:
        text: Markdown. Its code blocks are left alone.
        repository: Address of the repository, without a slash at its end; "" if it has none.
        version: Tag that the links lead to.

    Returns:
        Markdown without a relative link.
    """
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):  # every other part is a code block
        if repository:
            parts[i] = PICTURE.sub(rf"![\1]({repository}/raw/{version}/\2)", parts[i])
            parts[i] = LINK.sub(rf"[\1]({repository}/blob/{version}/\2)", parts[i])
        else:
            parts[i] = LINK.sub(r"\1", CAPTIONED_PICTURE.sub("", parts[i]))
    return "".join(parts)


def project_urls(repository: str, version: str) -> dict[str, str]:
    """Lists the addresses of the project; none without a repository."""
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{version}/docs",
        "Changelog": f"{repository}/blob/{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
