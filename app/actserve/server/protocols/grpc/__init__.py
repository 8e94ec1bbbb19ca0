"""`inference.GRPCInferenceService`: the Open Inference Protocol over gRPC. Off unless `grpc_port` is set.

tritonclient has the message classes and stubs; `protocols.oip` handles the requests. The module `server`, which imports
grpc and tritonclient, is imported only if the server is on.
"""

from __future__ import annotations

from actserve.server.protocols.ports import protocol_with_port

protocol = protocol_with_port(
    "Open Inference Protocol over gRPC",
    "gRPC",
    "grpc",
    "actserve.server.protocols.grpc.server:serving",
    lambda settings: (settings.grpc_host, settings.grpc_port),
)
