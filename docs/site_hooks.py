"""The site's hook: links to files of the repository that are not on the site become their names."""

import posixpath
import re

LINK = re.compile(r"\[[^\]]*\]\(((?:\.\./)+[^)#\s]+)\)")


def on_page_markdown(markdown, page, **_):
    """Called by mkdocs for each page."""

    def named(link):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link[1]))
        outside = target.startswith("../")
        return f"`{target.removeprefix('../')}`" if outside else link[0]

    return LINK.sub(named, markdown)
