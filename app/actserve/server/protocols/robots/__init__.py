"""Robots' wires: the protocols of openpi, vla-eval, json-numpy and GR00T.

Each wire is one module. `RobotEpisode` is common to all: it maps names, decodes images, checks arrays, and acts through
the admission. `socket` serves a WebSocket. `packed_socket` is for those with msgpack: the fast path takes their steps,
and a `layout` spares it most of the unpacking.
"""
