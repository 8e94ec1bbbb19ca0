"""actserve, offline: turns a TorchRL policy into a verified artifact in a model store."""
