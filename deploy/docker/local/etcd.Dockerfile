# A stand-in for the public etcd image: the distribution's own binaries.
ARG BASE_IMAGE=dtrain-base:local
FROM ${BASE_IMAGE}
COPY bin/ /usr/local/bin/
RUN mkdir -p /var/lib/etcd
EXPOSE 2379 2380
ENTRYPOINT ["etcd"]
