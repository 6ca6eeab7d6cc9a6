"""An OpenAI-compatible endpoint on this machine."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def says(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


class Endpoint:
    """Answers with the given (status, body, headers...), one after the other, the last for ever."""

    def __init__(self):
        self.replies, self.requests, self.sleep = [], [], 0.0
        turn = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                time.sleep(outer.sleep)
                with turn:
                    status, text, *headers = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                try:
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the caller has not waited

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
