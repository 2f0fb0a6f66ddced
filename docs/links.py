"""A hook of mkdocs: links from a page to files outside docs/ become their paths, which must be there."""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.links")
ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace such links of a page: the repository shows them, a site has nowhere to lead to."""

    def as_path(link: re.Match[str]) -> str:
        text, path = link[1].strip("`"), link[2]
        if not (ROOT / path).exists():
            log.warning("%s: no file '%s'", page.file.src_path, path)
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return OUTSIDE.sub(as_path, markdown)
