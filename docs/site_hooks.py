# SPDX-License-Identifier: Apache-2.0
"""What the site builder does beside rendering docs: it takes in the READMEs of the plugins, and turns links to sources.

In the repository a link may lead to any file. The site has pages only: a link to a README that is taken in leads to its
page, one to another file outside of docs becomes the file's path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```|^    .*?$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def taken_in() -> dict[Path, str]:
    """READMEs outside of docs that become pages, with their places on the site."""
    found = {file: f"{file.parent.relative_to(ROOT).as_posix()}.md" for file in ROOT.glob("plugins/*/*/README.md")}
    return {**found, ROOT / "compat/README.md": "compat.md", ROOT / "benchmarks/README.md": "benchmarks.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the READMEs."""
    for file, uri in taken_in().items():
        files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page that lead out of docs."""
    places = taken_in()
    here = page.file.src_uri
    source = next((file for file, uri in places.items() if uri == here), DOCS / here)

    def turned(link: re.Match[str]) -> str:
        target, anchor = link["target"], link["anchor"] or ""
        if "://" in target:
            return link[0]
        file = Path(os.path.normpath(source.parent / target))
        if not file.exists():
            return link[0]  # the builder says that it leads nowhere
        if file.is_relative_to(DOCS) and file.suffix == ".md":
            uri = file.relative_to(DOCS).as_posix()
        elif file in places:
            uri = places[file]
        else:
            path = file.relative_to(ROOT).as_posix()
            return f"`{path}`" if link["text"] in path else f"{link['text']} (`{path}`)"
        return f"[{link['text']}]({os.path.relpath(uri, Path(here).parent)}{anchor})"

    parts = _CODE.split(markdown)
    return "".join(part if _CODE.fullmatch(part) else _LINK.sub(turned, part) for part in parts)
