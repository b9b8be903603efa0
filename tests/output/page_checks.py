"""What every page has to keep: no request, images that open, nothing of the user's that is read as HTML."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page and collects its elements, its text and whatever does not fit together."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.wrong = "", [], []
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for kind, attributes in self.elements if kind == tag]


def checked(text: str) -> Page:
    """The page, which is whole and needs nothing but itself."""
    page = Page(text)
    assert page.wrong == []
    assert "url(" not in text
    assert "@import" not in text
    assert page.all("link") == page.all("iframe") == page.all("object") == []
    assert len(page.all("script")) == 1
    for kind, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (kind, name)
            if name in ("src", "srcset", "poster", "action", "data", "href"):
                assert value.startswith(("data:image/", "#")), (kind, name, value[:60])
    for image in page.all("img"):
        opened = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        opened.load()
        assert min(opened.size) > 0
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page
