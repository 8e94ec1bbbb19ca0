"""The fast path: requests for actions and stream messages, answered below ASGI.

A request takes the fast path if its head is understood to the last byte, and names an observation of a live policy in
some encoding, with or without state, and how to encode the answer. The body of raw observations is received straight
into the memory of the next batch; other bodies are decoded into it. The answer is one write. The same holds for binary
messages of streams and robots. Everything else goes unchanged to uvicorn's protocols, which call the routes in
`actserve.server.http`.

    acceptor.py            accepts connections in groups
    fast_path.py           the live policies by path, and the open connections
    request_heads.py       decides which requests take the fast path
    codec.py               the interface of what reads the requests of one kind and writes their answers
    act_codec.py           the codec of `/act`; the Open Inference Protocol has one of its own
    endpoint.py            one live policy, as the codecs use it
    receiver.py            receives a body into the arena or into separate memory
    discard.py             drops the body of a refused request
    session_step.py        one step of a session
    http_protocol.py       one HTTP connection
    uvicorn_protocol.py    uvicorn's protocol, which handles all other requests
    websocket_protocol.py  one WebSocket connection, and the steps of its episode
    websocket_frames.py    reads and writes the headers of WebSocket frames
"""
