"""One request's way through the mesh, from the spans that every service wrote."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """A span as the console exporter writes it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    links: frozenset[str]
    attributes: dict[str, Any]
    start: str

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Span":
        """A span from its JSON."""
        resource = raw["resource"]["attributes"]
        return cls(
            service=str(resource.get("service.instance.id", resource.get("service.name", ""))),
            name=raw["name"],
            trace_id=raw["context"]["trace_id"],
            span_id=raw["context"]["span_id"],
            parent_id=raw["parent_id"] or "",
            links=frozenset(link["context"]["span_id"] for link in raw.get("links", ())),
            attributes=raw.get("attributes") or {},
            start=raw["start_time"],
        )


def read_spans(directory: Path) -> list[Span]:
    """All spans below a directory, by time."""
    spans = [Span.parse(raw) for path in sorted(directory.glob("*.jsonl")) for raw in _lines(path)]
    return sorted(spans, key=lambda span: span.start)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # The last line of a process that was killed.
            continue


def way_of(request_id: str, spans: Sequence[Span]) -> list[Span]:
    """The spans of one request: its trace, what is linked to it, and what lies below that.

    A batch belongs to many requests: its span lies in no request's trace and links to the spans
    of all of them.
    """
    traces = {span.trace_id for span in spans if request_id in map(str, span.attributes.values())}
    own = {span.span_id for span in spans if span.trace_id in traces}
    taken = own | {span.span_id for span in spans if span.links & own}
    found = len(own)
    while len(taken) > found:
        found = len(taken)
        taken |= {span.span_id for span in spans if span.parent_id in taken}
    return [span for span in spans if span.span_id in taken]


def summarise(request_id: str, spans: Sequence[Span]) -> dict[str, Any]:
    """The way of one request for --json; ``linked`` says how each span hangs together with it."""
    way = way_of(request_id, spans)
    known = {span.span_id: span for span in way}
    return {
        "request_id": request_id,
        "services": sorted({span.service for span in way}),
        "spans": [
            {
                "service": span.service,
                "name": span.name,
                "parent": known[span.parent_id].name if span.parent_id in known else "",
                "parent_service": known[span.parent_id].service if span.parent_id in known else "",
                "attributes": {
                    name: value
                    for name, value in span.attributes.items()
                    if not name.startswith(("rpc.", "net."))
                },
                "links": sorted({known[link].name for link in span.links if link in known}),
            }
            for span in way
        ],
    }
