"""`/v2`: the Open Inference Protocol, with Triton's extensions that make sense here.

https://github.com/kserve/open-inference-protocol and Triton's "protocol extensions": binary tensor data, sequences,
model repository (its index), model configuration, parameters, statistics. A model is a policy.
"""

from actserve.server.protocols import Protocol
from actserve.server.protocols.oip.fast_infer import infer_resources
from actserve.server.protocols.oip.routes import router

__all__ = ["infer_resources", "protocol", "router"]

protocol = Protocol("Open Inference Protocol", routers=[router], resources=infer_resources)
