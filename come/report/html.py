"""A report as one HTML file, with its figures inside."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em; }
th, td { padding: 0.3em 0.7em; border-bottom: 1px solid #ccc; }
code { overflow-wrap: anywhere; }
img { max-width: 100%; }
"""


def html_report(markdown: str, folder: Path) -> str:
    """Renders a report; its images in `folder` are embedded, so the file is self-contained."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'src="([^"]+\.png)"', lambda found: f'src="{_embedded(folder, found[1])}"', body)
    title = html.escape(markdown.partition("\n")[0].lstrip("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n{body}</html>\n"
    )


def _embedded(folder: Path, name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}"
