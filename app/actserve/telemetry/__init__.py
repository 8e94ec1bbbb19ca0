"""What the service counts, times and tells of itself. Nothing here is needed to answer a request.

    meters.py    whole numbers, added to once a batch
    counts.py    answers and refusals, by policy, transport and route; and everybody's meters
    call.py      the request that the code is working for, wherever it is
    families.py  metrics as they are added up: over policies, and over worker processes
    shared.py    the file in which worker processes add them up
    logs.py      log lines, for people or as JSON
    traces.py    OpenTelemetry spans, where that is installed and wanted

`actserve.server.metrics` collects and shows it.
"""
