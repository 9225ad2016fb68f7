"""The page's table of contents, from its own headings."""

from __future__ import annotations

import re

from markupsafe import Markup

_HEADING = re.compile('<h2 id="([^"]+)">(.*?)</h2>')


def with_contents(body: str) -> Markup:
    """Rendered sections with links to their headings before them.

    What a user's text says of headings is escaped by then, and found by nobody.
    """
    links = "".join(
        f'<li><a href="#{place}">{title}</a></li>' for place, title in _HEADING.findall(body)
    )
    return Markup(f'<nav class="contents" aria-label="Contents"><ul>{links}</ul></nav>{body}')
