"""The fast lane: the requests that an `/act` service gets all day, below ASGI.

A request whose head says "one observation in raw bytes for this policy, the action in JSON, please" is received
straight into a row of the batch's own memory and answered with one ready-made write. The lane only takes what it
understands to the last byte; everything else goes, untouched, to uvicorn's own protocol, and so to the routes in
`app.api`.

    heads.py      which requests those are
    doors.py      the policies behind the paths, and their ready-made answers
    protocol.py   one connection
"""
