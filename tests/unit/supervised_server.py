"""What the supervisor of a benchmark's stock side sees of SGLang: ranks below a main process that ends with them."""

import argparse
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

_RANK = "import time; time.sleep(600)"


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--tp-size", type=int)
    parser.add_argument("--slow", type=float, default=0.0, help="Seconds until it serves.")
    options, _ = parser.parse_known_args()
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, f"sglang::scheduler_TP{rank}"])
        for rank in range(options.tp_size)
    ]
    time.sleep(options.slow)
    Thread(target=ThreadingHTTPServer(("127.0.0.1", options.port), Health).serve_forever, daemon=True).start()
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    sys.exit(1)  # as SGLang does, though it also ends the others


if __name__ == "__main__":
    main()
