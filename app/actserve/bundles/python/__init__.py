"""The bundle for Python without actserve: one file that needs numpy and onnxruntime alone."""
