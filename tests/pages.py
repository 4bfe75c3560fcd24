"""A page of HTML, parsed as a browser would."""

import html.parser
import re

VOID = {"meta", "img", "br", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """What a page links to, says and draws; fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.links, self.words, self.shapes, self.headings = [], [], [], []
        self.open, self.groups, self.heights = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        """Notes links and shapes."""
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag == "g":
            self.groups.append(values.get("class") or self.groups[-1])
        if tag in ("path", "use") and self.groups and "defs" not in self.open:
            self.shapes.append((tag, self.groups[-1]))
        if tag not in VOID:
            self.open.append(tag)
        self.at_height = "text-anchor: end" in (values.get("style") or "")

    def handle_endtag(self, tag):
        """Checks that it closes what is open."""
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag == "g":
            self.groups.pop()

    def handle_data(self, data):
        """Notes words and headings."""
        self.words += data.split()
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "text" and self.at_height:
            self.heights.append(data)


def paths(page, kind):
    """What the lines or bands of a kind draw."""
    start = f'<g class="{kind}"> *(?:<defs> *)?<path (?:id="[^"]*" )?'
    return re.findall(f'{start}d="([^"]*)"', page.source)
