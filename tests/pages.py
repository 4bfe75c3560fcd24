"""A page of HTML, parsed as a browser would."""

import html.parser

VOID = {"meta", "img", "br", "path", "circle"}


class Page(html.parser.HTMLParser):
    """What a page links to, says and draws; fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.links, self.words, self.shapes, self.headings = [], [], [], []
        self.open, self.heights = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        """Notes links and shapes."""
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag in ("path", "circle"):
            self.shapes.append((tag, values["class"]))
        if tag not in VOID:
            self.open.append(tag)
        self.at_height = values.get("text-anchor") == "end"

    def handle_endtag(self, tag):
        """Checks that it closes what is open."""
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        """Notes words and headings."""
        self.words += data.split()
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "text" and self.at_height:
            self.heights.append(data)
