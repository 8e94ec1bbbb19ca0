"""actserve, online: loads the artifacts of a model store and answers `/act`."""

__version__ = "0.1.0"
