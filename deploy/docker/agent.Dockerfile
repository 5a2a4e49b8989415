# Both the classic builder and BuildKit read this file.
# An agent on any base that holds Python >= 3.11 and torch. The base's packages stay as they are.
ARG TORCH_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime@sha256:6acf597eeb8e376a96580dde4952f37cc017fef732bb40bfc73f28f25e3f64b4
FROM ${TORCH_IMAGE} AS deps
USER root
COPY deploy/docker/venv.sh deploy/docker/requirements.lock /build/
COPY deploy/docker/venv.sh deploy/docker/wheelhouse* /build/wheelhouse/
RUN sh /build/venv.sh deps --system-site-packages

FROM deps AS dtrain
ARG WHEEL=dist/dtrain-*.whl
COPY ${WHEEL} /build/dist/
RUN sh /build/venv.sh dtrain && /opt/dtrain/bin/python -c 'import torch, dtrain.trainer'

FROM ${TORCH_IMAGE}
USER root
# torch asks for the user's name and home: both exist.
RUN command -v tini >/dev/null \
      || { apt-get update -q && apt-get install -qy --no-install-recommends tini && rm -rf /var/lib/apt/lists/* /var/log/*; } \
    && groupadd --gid 10001 dtrain \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/dtrain --no-create-home --shell /usr/sbin/nologin dtrain \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/dtrain \
    && install -d /workspace
ENV PATH=/opt/dtrain/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DTRAIN_LISTEN=0.0.0.0:7071 \
    DTRAIN_HEALTH_LISTEN=0.0.0.0:7081 \
    DTRAIN_DATA_DIR=/var/lib/dtrain
WORKDIR /workspace
VOLUME /var/lib/dtrain
USER 10001:10001
EXPOSE 7071 7081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "dtrain.runtime.probe", "http://127.0.0.1:7081/livez"]
ENTRYPOINT ["tini", "--", "dtrain"]
CMD ["agent"]
# Last, so that all above is cached while dtrain changes.
COPY --from=deps /opt/dtrain /opt/dtrain
COPY --from=dtrain /staged /
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=""
LABEL org.opencontainers.image.title="dtrain agent" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
