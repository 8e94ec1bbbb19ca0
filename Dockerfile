# serve       the service with .onnx artifacts: no compiler, no torch, no emulator
# serve-pt2   the same with torch and .pt2 artifacts beside the .onnx ones
# client      the client that plays games through a service
# demo        a service whose page can play games
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The base of all images: actserve in its own virtual environment. pip compiles no bytecode. The checks below run the
# service, which compiles exactly the modules that serving imports.
FROM ${BASE_IMAGE} AS build
ENV PATH=/opt/actserve/bin:$PATH ORT_DISABLE_TELEMETRY=1
ENV PIP_PYTHON=/opt/actserve/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --without-pip /opt/actserve
WORKDIR /src
COPY .ci/constraints.txt pyproject.toml README.md LICENSE ./
COPY app app
# ONNX Runtime's Python module contains the library, so the separate copy for C++ programs is deleted. Its tools, NumPy's
# Fortran and C tools, and all tests, type stubs, sources and debug symbols are only for development.
RUN pip install --no-compile --constraint constraints.txt . \
 && pip uninstall --yes setuptools \
 && cd /opt/actserve/lib/python3*/site-packages \
 && rm -rf onnxruntime/capi/libonnxruntime.so* \
 && rm -rf onnxruntime/backend onnxruntime/datasets onnxruntime/quantization onnxruntime/tools onnxruntime/transformers \
 && rm -rf numpy/distutils numpy/f2py \
 && find . -type d -name tests -prune -exec rm -rf {} + \
 && find . -regex '.*\.\(a\|h\|pxd\|pyi\|pyx\)' -delete \
 && find . -name '*.cpython-*.so' -exec strip --strip-unneeded {} +

# Check that both policies repeat their golden samples and that the service becomes ready. program.safetensors is only
# needed to build a .pt2, so it is deleted.
FROM build AS build-serve
WORKDIR /srv
COPY models_store models_store
RUN actserve verify pong && actserve verify pong-lstm \
 && rm models_store/*/*/program.safetensors \
 && { actserve serve & } && until python -m actserve.server.healthcheck; do kill -0 $! && sleep 0.5 || exit 1; done && kill $!

# The emulator and PNG, without video. Pillow's fonts, colour profiles and separate image formats are deleted.
FROM build AS build-client
RUN pip install --no-compile --constraint constraints.txt ale-py pillow \
 && cd /opt/actserve/lib/python3*/site-packages \
 && rm -f PIL/_avif.* PIL/_webp.* PIL/_imagingft.* PIL/_imagingcms.* PIL/_imagingtk.* \
 && cd pillow.libs \
 && rm -f libavif-* libwebp* libsharpyuv-* libfreetype-* libharfbuzz-* libbrotli* libpng16-* liblcms2-*
RUN python -c "import actserve.cli.main, actserve.server.app, actserve.cli.tools.play_and_load, actserve.loadtest.generator, PIL.PngImagePlugin, ale_py.roms"

# .pt2 programs are native code. Built here, they belong to root, so the service trusts them.
FROM build AS build-pt2
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-compile --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} \
    ${TORCH} pyelftools
COPY exporters exporters
COPY models_store /srv/models_store
RUN PYTHONPATH=/src/exporters actserve compile pong --store /srv/models_store \
 && PYTHONPATH=/src/exporters actserve compile pong-lstm --store /srv/models_store
WORKDIR /srv
# Tuning results of the build host do not apply to the host that runs the image.
RUN rm -rf /opt/actserve/lib/python3*/site-packages/torch/include models_store/*/*.tuning.json \
 && find /opt/actserve -name __pycache__ -prune -exec rm -rf {} + \
 && actserve verify pong && actserve verify pong-lstm \
 && { actserve serve --runtime pt2 & } && until python -m actserve.server.healthcheck; do kill -0 $! && sleep 0.5 || exit 1; done && kill $!

FROM ${BASE_IMAGE} AS base
RUN useradd --system --uid 10001 --no-create-home actserve && install -d -o actserve /var/lib/actserve
ENV PATH=/opt/actserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /srv
USER 10001

FROM base AS service
EXPOSE 8000
HEALTHCHECK --interval=3s --timeout=3s --retries=40 CMD ["python", "-m", "actserve.server.healthcheck"]
CMD ["actserve", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS client
COPY --from=build-client /opt/actserve /opt/actserve
CMD ["actserve", "play"]

FROM service AS demo
COPY --from=build-client /opt/actserve /opt/actserve
COPY --from=build-serve /srv/models_store models_store

FROM service AS serve-pt2
COPY --from=build-pt2 /opt/actserve /opt/actserve
COPY --from=build-pt2 /srv/models_store models_store

# The last stage is the default of `docker build .`.
FROM service AS serve
COPY --from=build-serve /opt/actserve /opt/actserve
COPY --from=build-serve /srv/models_store models_store
