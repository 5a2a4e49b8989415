# A stand-in for the public SeaweedFS image.
ARG BASE_IMAGE=dtrain-base:local
FROM ${BASE_IMAGE}
COPY bin/ /usr/local/bin/
RUN mkdir -p /data
ENTRYPOINT ["weed"]
