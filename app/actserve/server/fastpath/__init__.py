"""The fast lane: the requests that an `/act` service gets all day, below ASGI.

A request whose head says "raw observations for this policy, as they are or in zstd, the action in JSON, please" is
received straight into the batch's own memory and answered with one ready-made write; a stream's binary messages
likewise. The lane only takes what it understands to the last byte; everything else goes, untouched, to uvicorn's own
protocols, and so to the routes in `actserve.server.http`.

    accepting.py  connections, as they come
    heads.py      which requests those are
    doors.py      the policies behind the paths, and their ready-made answers
    receiver.py   from the socket to where the batch is read from
    discard.py    what is refused, from the socket to nowhere
    protocol.py   one HTTP connection
    inner.py      uvicorn's protocol, which has the rest
    stream.py     one WebSocket connection
    frames.py     the heads of WebSocket frames
"""
