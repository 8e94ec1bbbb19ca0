ARG BASE_IMAGE=python:3.11-slim-bookworm

# What both images run, in a virtual environment of its own; no compiler, no torch.
FROM ${BASE_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/actserve
WORKDIR /src
COPY .ci/constraints.txt pyproject.toml README.md LICENSE ./
COPY app app
RUN /opt/actserve/bin/pip install --constraint constraints.txt . \
 && /opt/actserve/bin/pip uninstall --yes pip setuptools

FROM build AS build-client
RUN python3 -m venv --upgrade-deps /tmp/pip 2>/dev/null || python3 -m venv /tmp/pip
RUN /tmp/pip/bin/pip --python /opt/actserve/bin/python install --constraint constraints.txt ".[play]"

FROM ${BASE_IMAGE} AS base
RUN useradd --system --uid 10001 --no-create-home actserve
ENV PATH=/opt/actserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv
USER actserve

# The service: the shipped .onnx artifacts in ONNX Runtime.
FROM base AS serve
COPY --from=build /opt/actserve /opt/actserve
COPY models_store models_store
EXPOSE 8000
HEALTHCHECK --interval=2s --timeout=3s --retries=30 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["actserve", "serve", "--host", "0.0.0.0", "--port", "8000"]

# The client: ALE and nothing else of a training stack.
FROM base AS client
COPY --from=build-client /opt/actserve /opt/actserve
CMD ["actserve", "play", "--url", "http://service:8000"]
