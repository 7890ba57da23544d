# syntax=docker/dockerfile:1
FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements requirements
RUN python -m venv /opt/build && python -m venv --without-pip /opt/extproc && \
  /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt
RUN /opt/build/bin/uv pip install --no-cache --python /opt/extproc/bin/python \
  --no-deps --require-hashes --compile-bytecode -r requirements/service.txt
COPY pyproject.toml README.md LICENSE ./
COPY extproc extproc
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . && \
  /opt/build/bin/uv pip install --no-cache --python /opt/extproc/bin/python \
  --no-deps --compile-bytecode /wheels/*.whl

FROM python:3.13-slim
COPY --from=build /opt/extproc /opt/extproc
RUN useradd --system --uid 10001 --no-create-home extproc
USER 10001
ENV PATH=/opt/extproc/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 9002 9090
# The configuration must set server.host and server.admin_host to 0.0.0.0, and keep the port.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9090/healthz', timeout=2)"]
ENTRYPOINT ["extproc"]
CMD ["serve", "--config", "/etc/extproc/extproc.yaml"]
