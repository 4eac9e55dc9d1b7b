"""Links out of the documentation's folder lead to the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\]\(((?:\.\./)+[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return a page with its links to files outside of ``docs`` made absolute."""

    def outside(match: re.Match[str]) -> str:
        folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target == "docs" or target.startswith("docs/"):
            return match[0]
        return f"]({config.repo_url}/blob/main/{target})"

    return _LINK.sub(outside, markdown)
