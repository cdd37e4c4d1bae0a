"""A stand-in for an OpenAI-compatible endpoint on loopback: it judges by a rule, likes a place, and can be told to fail."""

import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

_PARTS = re.compile(
    r"=== (\w+) request\n(.*)\n=== \1 first reply\n(.*)\n=== \1 second reply\n(.*)\n=== \1 end\n", re.DOTALL
)


class Seen(NamedTuple):
    """What the judge was shown."""

    request: str
    first: str
    second: str


def longer(seen: Seen) -> str:
    """The rule of a judge that likes length."""
    a, b = len(seen.first), len(seen.second)
    return "first" if a > b else "second" if b > a else "tie"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # else the client has gone away
            super().handle_error(request, client_address)


class JudgeServer:
    """`with JudgeServer(...) as judge:` answers at `judge.url` until the end.

    `faults` are taken one for each request: "" (none), a status ("500", or "429" with `retry_after`), "drop" (the connection is
    reset), "half" (the body ends in the middle), "page" (HTML), "no json" (broken JSON), "late" (no answer within `late` seconds),
    "nonsense", "parts" (a content that is no text), "cut" (the answer is cut after a first thought), "thinks" (it ends
    while the judge reasons), "surrogate" (half of a character), "echo" (the answer repeats the key), "both" (two verdicts).
    """

    def __init__(
        self,
        rule: Callable[[Seen], str] = longer,
        *,
        biased: Callable[[Seen], bool] = lambda seen: False,
        faults: Iterable[str] = (),
        key: str | None = None,
        delay: float = 0.0,
        retry_after: str = "1",
        late: float = 3.0,
        refused_fields: tuple[str, ...] = (),
    ) -> None:
        self.rule, self.biased, self.key = rule, biased, key
        self.faults = deque(faults)
        self.delay, self.retry_after, self.late, self.refused_fields = delay, retry_after, late, refused_fields
        self.lock = threading.Lock()
        self.asked: list[tuple[float, str, Seen]] = []
        """Time, fault and content of each request that was read."""
        self.answered: Counter[Seen] = Counter()
        """Verdicts that were sent."""
        self.at_once = self.most_at_once = 0
        self.bugs: list[str] = []
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        assert self.bugs == []

    def verdict(self, seen: Seen) -> str:
        return "first" if self.biased(seen) else self.rule(seen)


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if self.path != "/v1/chat/completions":
                return self.error(404, "no such path")
            if judge.key is not None and sent != judge.key:
                return self.error(401, f"Incorrect API key provided: {sent}" if sent else "You have no API key")
            asked = json.loads(body)
            for field in judge.refused_fields:
                if field in asked:
                    other = "max_completion_tokens" if field == "max_tokens" else "its default"
                    return self.error(400, f"Unsupported parameter: '{field}' is not supported. Use {other} instead")
            found = _PARTS.search(asked["messages"][0]["content"])
            if found is None or asked["messages"][0]["role"] != "user" or len(asked["messages"]) != 1:
                judge.bugs.append(body.decode())
                return self.error(400, "this is no comparison")
            seen = Seen(*found.groups()[1:])
            with judge.lock:
                fault = judge.faults.popleft() if judge.faults else ""
                judge.asked.append((time.monotonic(), fault, seen))
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            try:
                time.sleep(judge.late if fault == "late" else judge.delay)
                return self.judged(seen, fault, sent)
            finally:
                with judge.lock:
                    judge.at_once -= 1

        def judged(self, seen: Seen, fault: str, sent: str) -> None:
            if fault.isdigit():
                more = {"Retry-After": judge.retry_after} if fault == "429" else {}
                return self.error(int(fault), "planted", **more)
            if fault == "drop":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return self.connection.close()
            if fault == "page":
                return self.send(200, b"<html>It works!</html>")
            verdict = json.dumps({"better": judge.verdict(seen)})
            said = {
                "nonsense": "Both have their merits.",
                "parts": [{"type": "text", "text": verdict}],
                "cut": 'At first sight {"better": "first"}. But checking the facts, the other',
                "thinks": '<think>At first sight {"better": "first"}',
                "surrogate": f"\ud83d {verdict}",
                "echo": f"I was called with {sent}.",
                "both": '{"better": "first", "better": "second"}',
            }.get(fault, verdict)
            reason = "length" if fault == "cut" else "stop"
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": reason}
            answer = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
            if fault == "no json":
                return self.send(200, answer[: len(answer) // 2])
            if fault == "half":
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer[: len(answer) // 2])
                return self.connection.close()
            self.send(200, answer)
            if not fault:
                with judge.lock:
                    judge.answered[seen] += 1
            return None

        def error(self, status: int, text: str, **headers: str) -> None:
            self.send(status, json.dumps({"error": {"message": text}}).encode(), **headers)

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
