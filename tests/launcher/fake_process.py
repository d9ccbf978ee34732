"""Stands in for an engine or the proxy in tests of the launcher. Standard library only; run as a file.

    fake_process.py [BEHAVIOUR=VALUE ...] [arguments as an engine or the proxy gets them]

Behaviours: `start_s` delay before it answers; `die_after_s`; `deaf` ignores SIGTERM, like its grandchild;
`grandchild` leaves a process in a session of its own; `dtype` goes into the fingerprint; `fail` exits at once. Who is
asked for `/die` dies.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

behaviour = dict(
    argument.split("=", 1) for argument in sys.argv[1:] if not argument.startswith("-") and "=" in argument
)
behaviour |= dict(argument[9:].split("=", 1) for argument in sys.argv[1:] if argument.startswith("--x-fake."))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/die":
            os._exit(5)
        bodies = {
            "/health": {},
            "/disagg/status": {"fingerprint": {"dtype": behaviour.get("dtype", "float32")}},
            "/ready": {"splitting": True},
        }
        body = json.dumps(bodies.get(self.path, {})).encode()
        self.send_response(200 if self.path in bodies else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if "fail" in behaviour:
    sys.stderr.write("the fake was told to fail\n")
    sys.exit(3)
if "deaf" in behaviour:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "grandchild" in behaviour:
    subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
        start_new_session=True,
    )
if "die_after_s" in behaviour:
    threading.Timer(float(behaviour["die_after_s"]), os._exit, (5,)).start()
sys.stdout.write("the fake has started\n")
sys.stdout.flush()
time.sleep(float(behaviour.get("start_s", "0")))
port = int(sys.argv[sys.argv.index("--port") + 1]) if "--port" in sys.argv else 0
server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
sys.stdout.write("the fake serves\n")
sys.stdout.flush()
server.serve_forever()
