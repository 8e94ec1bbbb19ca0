"""The fast path: plain `/act` requests and stream messages, answered below ASGI.

A request takes the fast path if its head asks for nothing but an action in JSON for raw observations of a live policy,
uncompressed or in zstd. Its body is received straight into the memory of the next batch, and its answer is one write.
The same holds for binary messages of a stream. The fast path only takes heads that it understands to the last byte.
Everything else goes unchanged to uvicorn's protocols, which call the routes in `actserve.server.http`.

    acceptor.py            accepts connections in groups
    request_heads.py       decides which requests take the fast path
    endpoints.py           the live policies by path, and their prebuilt answers
    receiver.py            receives a body into the arena or into separate memory
    discard.py             drops the body of a refused request
    http_protocol.py       one HTTP connection
    uvicorn_protocol.py    uvicorn's protocol, which handles all other requests
    websocket_protocol.py  one WebSocket connection
    websocket_frames.py    reads and writes the headers of WebSocket frames
"""
