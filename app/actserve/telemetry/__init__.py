"""Counters, logs and traces of the service. Requests do not depend on them.

    meters.py       histograms of runtime calls, updated once per batch
    counts.py       answers and refusals, by policy, transport and route; and all meters
    call.py         the current request, for logs and traces
    families.py     metrics that can be summed over policies and worker processes
    counts_file.py  the file in which worker processes share their metrics
    logs.py         log lines, for people or as JSON
    traces.py       OpenTelemetry spans, if installed and configured

`actserve.server.metrics` collects and publishes them.
"""
