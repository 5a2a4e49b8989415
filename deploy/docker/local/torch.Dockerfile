# A stand-in for a public torch image: CPU torch, numpy and what the examples import, on the local base.
ARG BASE_IMAGE=dtrain-base:local
FROM ${BASE_IMAGE} AS build
COPY wheels /wheels
# Byte code of what is imported only: all of it would be a third of torch again, none of it would cost
# every rank seconds at its start, since a rank cannot keep what it compiles.
RUN python3 "$(echo /wheels/pip-*.whl)/pip" install --no-cache-dir --no-index --find-links /wheels --no-compile \
      --target /usr/local/lib/python3.11/dist-packages --root-user-action=ignore torch numpy scikit-learn \
    && rm -rf /usr/local/lib/python3.11/dist-packages/torch/include \
    && python3 -c 'import torch.distributed, torch.nn.parallel, torch.optim, torch.utils.data, sklearn.datasets'

FROM ${BASE_IMAGE}
COPY --from=build /usr/local/lib/python3.11/dist-packages /usr/local/lib/python3.11/dist-packages
