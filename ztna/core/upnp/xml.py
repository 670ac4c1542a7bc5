"""Small XML documents from strangers, by the standard library's expat.

No document type, so no entities but the five that XML itself has, and nothing is fetched; UTF-8
alone, as UDA 1.1 section 2.3 has it; bounded in bytes, elements and depth. Prefixes of namespaces
are cut off: names alone count.
"""

from collections.abc import Iterator
from xml.parsers import expat

import attrs

from ztna.core.ports import Buffer
from ztna.errors import RemoteProtocolError

# Our choices. A gateway's description has some 150 elements, nine levels deep.
MAX_DOCUMENT = 65_536
MAX_ELEMENTS = 2_000
MAX_DEPTH = 20


@attrs.define
class Element:
    """name: without its prefix. text: what stands directly inside, without blanks around."""

    name: str
    children: "list[Element]" = attrs.Factory(list)
    text: str = ""

    def all(self, name: str) -> "Iterator[Element]":
        """Every element of this name, this one too, in the document's order."""
        if self.name == name:
            yield self
        for child in self.children:
            yield from child.all(name)

    def first(self, name: str) -> "Element | None":
        """The first of those."""
        return next(self.all(name), None)

    def value(self, name: str) -> str:
        """The text of the first of those; empty if there is none."""
        found = self.first(name)
        return "" if found is None else found.text


@attrs.define
class _Builder:
    """What expat tells, as it reads."""

    open: list[Element] = attrs.Factory(list)
    root: Element | None = None
    elements: int = 0

    def start(self, name: str, _attributes: object) -> None:
        self.elements += 1
        if self.elements > MAX_ELEMENTS or len(self.open) >= MAX_DEPTH:
            raise RemoteProtocolError(
                f"XML of more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels"
            )
        element = Element(name.rpartition(":")[2])
        if self.open:
            self.open[-1].children.append(element)
        else:
            self.root = element
        self.open.append(element)

    def end(self, _name: str) -> None:
        element = self.open.pop()
        element.text = element.text.strip()

    def text(self, data: str) -> None:
        self.open[-1].text += data

    def refuse(self, *_: object) -> None:
        raise RemoteProtocolError("XML with a document type: none is needed, and it may harm")


def parse_xml_untrusted(data: Buffer) -> Element:
    """The root of a document. Raises RemoteProtocolError."""
    if len(data) > MAX_DOCUMENT:
        raise RemoteProtocolError(f"XML of more than {MAX_DOCUMENT} bytes")
    builder = _Builder()
    parser = expat.ParserCreate(encoding="UTF-8")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = builder.refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    try:
        # Some gateways send a zero at the end.
        parser.Parse(bytes(data).rstrip(b"\0"), True)
    except expat.ExpatError as error:
        raise RemoteProtocolError(f"broken XML: {expat.ErrorString(error.code)}") from error
    assert builder.root is not None, "expat takes no document without an element"
    return builder.root
