# Both the classic builder and BuildKit read this file.
# A coordinator: no torch, no pip, no compiler, not root, nothing to write. README.md says how to build and run it.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON_IMAGE} AS deps
COPY deploy/docker/venv.sh deploy/docker/requirements.lock /build/
COPY deploy/docker/venv.sh deploy/docker/wheelhouse* /build/wheelhouse/
RUN sh /build/venv.sh deps

FROM deps AS dtrain
ARG WHEEL=dist/dtrain-*.whl
COPY ${WHEEL} /build/dist/
RUN sh /build/venv.sh dtrain

FROM ${PYTHON_IMAGE}
# The base's pip goes, and every way to become root.
RUN command -v tini >/dev/null \
      || { apt-get update -q && apt-get install -qy --no-install-recommends tini && rm -rf /var/lib/apt/lists/* /var/log/*; } \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 dtrain \
    && useradd --uid 10001 --gid 10001 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin dtrain
ENV PATH=/opt/dtrain/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DTRAIN_LISTEN=0.0.0.0:7070 \
    DTRAIN_HEALTH_LISTEN=0.0.0.0:7080
USER 10001:10001
EXPOSE 7070 7080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-m", "dtrain.runtime.probe", "http://127.0.0.1:7080/readyz"]
ENTRYPOINT ["tini", "--", "dtrain"]
CMD ["coordinator"]
# Last, so that all above is cached while dtrain changes.
COPY --from=deps /opt/dtrain /opt/dtrain
COPY --from=dtrain /staged /
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=""
LABEL org.opencontainers.image.title="dtrain coordinator" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
