"""A collector of OTLP, as a process of its own: it takes spans, or it is slow, or it hangs.

Usage: `python collector.py http|grpc live|slow|hung [quiet]`. The first line it prints is its URL,
and then comes one line of JSON for each span.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from gzip import decompress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

SLOW_S = 0.5


def tell(request: Any, mode: str) -> None:
    """Write down what came; or take one's time, or for ever."""
    if mode == "slow":
        time.sleep(SLOW_S)
    while mode == "hung":
        time.sleep(1)
    if "quiet" in sys.argv:
        return
    for resource in request.resource_spans:
        about = {one.key: one.value.string_value for one in resource.resource.attributes}
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            line = {
                "service": about.get("service.name"),
                "name": span.name,
                "trace_id": span.trace_id.hex(),
                "span_id": span.span_id.hex(),
                "parent_id": span.parent_span_id.hex(),
                "failed": span.status.code == 2,
                "ms": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6,
                "attributes": sorted(one.key for one in span.attributes),
            }
            say(json.dumps(line))


def say(line: str) -> None:
    """Tell the parent a line."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class _Receiver(service.TraceServiceServicer):
    def __init__(self, mode: str) -> None:
        self._mode = mode

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        tell(request, self._mode)
        return messages.ExportTraceServiceResponse()


def over_grpc(mode: str) -> None:
    """Serve until killed."""
    server = grpc.server(ThreadPoolExecutor(8))
    service.add_TraceServiceServicer_to_server(_Receiver(mode), server)
    say(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    server.wait_for_termination()


def over_http(mode: str) -> None:
    """Serve until killed."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = decompress(body)
            tell(messages.ExportTraceServiceRequest.FromString(body), mode)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    say(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


class Collector:
    """The process as its parent sees it; `spans` are those that have come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._lines = process.stdout
        self.url = self._lines.readline().strip()
        self.spans: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self._lines:
            self.spans.append(json.loads(line))


@contextmanager
def collector(protocol: str = "http", mode: str = "live") -> Iterator[Collector]:
    """Run one."""
    command = [sys.executable, __file__, protocol, mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        running = Collector(process)
        try:
            yield running
        finally:
            process.kill()
            running.thread.join(5)


if __name__ == "__main__":
    {"http": over_http, "grpc": over_grpc}[sys.argv[1]](sys.argv[2])
