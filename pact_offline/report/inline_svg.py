"""SVG files of matplotlib as parts of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from markupsafe import Markup

TITLE = "title:"  # begins the id of a group whose rest is its title


def inline(svg: str, colours: Mapping[str, str], attributes: Mapping[str, str]) -> Markup:
    """The SVG without ids, fonts and a size of its own, so that many can stand on one page.

    Args:
        svg: a file of matplotlib, with text as text.
        colours: by `#rrggbb`, what stands for it in the page.
        attributes: of the whole.
    """
    root = ElementTree.fromstring(svg)
    for one in root.iter():
        one.tag = one.tag.rpartition("}")[2]
        one.attrib = {key.rpartition("}")[2]: value for key, value in one.attrib.items()}
        one.tail = None
    shapes = {f"#{one.get('id')}": one for one in root.iter("path")}
    for parent in list(root.iter()):
        for child in parent.findall("defs"):
            parent.remove(child)
    for one in root.iter():
        _clean(one, shapes, colours)
    root.attrib = {"viewBox": root.get("viewBox", ""), **attributes}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(
    one: ElementTree.Element,
    shapes: Mapping[str, ElementTree.Element],
    colours: Mapping[str, str],
) -> None:
    given, identity = one.attrib, one.attrib.pop("id", "")
    given.pop("clip-path", None)
    if one.tag == "use":
        shape = shapes[given.pop("href")]
        one.tag = "path"
        given["transform"] = f"translate({given.pop('x')} {given.pop('y')})"
        given["d"] = shape.get("d", "")
        given["style"] = f"{given.get('style', '')}; {shape.get('style', '')}"
    if one.tag not in ("text", "title"):
        one.text = None
    if "d" in given:
        given["d"] = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(given["d"].split()))
    if "style" in given:
        style = re.sub(r"font-family:[^;]*;? ?", "", given["style"])
        given["style"] = re.sub("#[0-9a-f]{6}", lambda code: colours[code[0]], style)
    if identity.startswith(TITLE):
        title = ElementTree.Element("title")
        title.text = identity.removeprefix(TITLE)
        one.insert(0, title)
