"""Stream counts through a running service with only pyzmq and msgpack.

Usage: python plain_client.py tcp://127.0.0.1:5555 counts.npy   (bins x units, integers)
"""

import sys
import time

import msgpack
import numpy as np
import zmq

WAIT_MS = 5000


def receive(socket: zmq.Socket[bytes], what: str) -> dict[str, object]:
    """Receive and decode a message: its last frame; earlier frames are the topic."""
    if not socket.poll(WAIT_MS):
        raise SystemExit(f"no {what} within {WAIT_MS} ms: is the service running?")
    message = msgpack.unpackb(socket.recv_multipart()[-1])
    if message["type"] == "refused":
        raise SystemExit("{field}: expected {expected}, got {got}".format(**message))
    return message


endpoint, file = sys.argv[1:]
counts = np.load(file).astype("<u2")
context = zmq.Context()
dealer, sub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
dealer.connect(endpoint)
dealer.send(msgpack.packb({"type": "describe"}))
service = receive(dealer, "description")
model = service["manifest"]
sub.connect(service["results"])
sub.subscribe(b"plain\0")
receive(sub, "subscription")  # no result is missed from here on
bin_ns = round(model["bin_width"] * 1e9)
session = {"session": "plain", "epoch": time.time_ns() // 10**9}
request = {"protocol": service["protocol"], "units": model["unit_names"], "bin_width_ns": bin_ns}
dealer.send(msgpack.packb({"type": "open", **session, **request, "deadline_ns": 0}))
while receive(dealer, "answer to open")["type"] != "opened":
    pass
for index, row in enumerate(counts):
    packed = {"dtype": "<u2", "shape": row.shape, "data": row.tobytes()}
    bin_ = {"index": index, "source_ns": time.monotonic_ns(), "counts": packed}
    dealer.send(msgpack.packb({"type": "bin", **session, **bin_}))
    while (result := receive(sub, f"answer to bin {index}"))["type"] != "result":
        pass  # notices
    print(index, result["status"], np.frombuffer(result["kinematics"]["data"]))
dealer.send(msgpack.packb({"type": "close", **session}))
while receive(dealer, "confirmation")["type"] != "closed":
    pass  # credits
