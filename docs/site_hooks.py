"""The site's hooks: links that leave it, and diagrams, which browsers draw without other hosts."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

LINK = re.compile(r"\[[^\]]*\]\(((?:\.\./)+[^)#\s]+)\)")
# What draws diagrams, of `npm ci --prefix docs`. Without it they stay text: the theme would load
# it from another host.
MERMAID = Path(__file__).parent / "node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js"
SERVED = "assets/javascripts/mermaid.tiny.js"
DIAGRAM = 'class="mermaid"'


def on_files(files, config):
    """Adds what draws diagrams to the site."""
    if MERMAID.exists():
        files.append(File.generated(config, SERVED, abs_src_path=str(MERMAID)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links to files of the repository that are not on the site become their names."""

    def named(link):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        outside = target.startswith("../")
        return f"`{target.removeprefix('../')}`" if outside else link[0]

    return LINK.sub(named, markdown)


def on_page_content(html, page, **_):
    """A page with diagrams loads what draws them, before the theme looks for it."""
    if DIAGRAM not in html:
        return html
    if not MERMAID.exists():
        return html.replace(DIAGRAM, 'class="highlight"')
    return f'{html}<script src="{get_relative_url(SERVED, page.url)}"></script>'
