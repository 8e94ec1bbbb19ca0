"""actserve, online: loads the artifacts of a model store and answers `/act`."""

import os

__version__ = "0.1.0"

# ONNX Runtime would keep a database in the user's folder, for its makers. Read when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
