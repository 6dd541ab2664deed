"""MkDocs hook: Markdown files and pictures from outside docs/ become part of the site.

Links lead there: from page to page they are the same in the repository, where people read the
sources, and on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent.parent


def pages() -> dict[str, str]:
    """Where each published file, by its path in the repository, is on the site."""
    found = {
        "README.md": "index.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
    }
    for path in sorted(ROOT.glob("bench/reports/*.md")) + sorted(ROOT.glob("bench/reports/*.png")):
        found[path.relative_to(ROOT).as_posix()] = f"reports/{path.name}"
    for path in sorted(ROOT.glob("kernels/*/README.md")):
        found[path.relative_to(ROOT).as_posix()] = f"kernels/{path.parent.name}.md"
    for path in sorted(ROOT.glob("fastl2o/zoo/*.md")):
        found[path.relative_to(ROOT).as_posix()] = f"zoo/{path.name}"
    for path in sorted(ROOT.glob("docs/**/*.md")):
        found[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "docs").as_posix()
    return found


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the files from outside docs/; those that are not in the navigation are linked."""
    for source, target in {**pages(), "LICENSE": "LICENSE"}.items():
        if not source.startswith("docs/"):
            files.append(
                File.generated(
                    config,
                    target,
                    abs_src_path=str(ROOT / source),
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    published = pages()
    here = page.file.src_uri
    source = next(path for path, target in published.items() if target == here)

    def rewritten(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if linked not in published:
            return match[0]
        return f"]({posixpath.relpath(published[linked], posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#:\s]+\.(?:md|png))(#[^)\s]*)?\)", rewritten, markdown)
