"""GR00T's protocol over ZeroMQ: a REQ client, msgpack maps with arrays as .npy. Off unless `gr00t_port` is set.

The module `server`, which imports zmq, is imported only if the protocol is on.
"""

from __future__ import annotations

from actserve.server.protocols.ports import protocol_with_port

protocol = protocol_with_port(
    "GR00T",
    "GR00T's protocol",
    "gr00t",
    "actserve.server.protocols.robots.gr00t.server:serving",
    lambda settings: (settings.gr00t_host, settings.gr00t_port),
)
