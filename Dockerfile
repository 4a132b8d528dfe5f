# megatron-cp for a cluster. With docker or podman, in the checkout:
#
#   docker build --tag megatron-cp .
#   docker build --tag megatron-cp --build-arg EXTRAS=te .                  # TransformerEngine too, compiled here
#   docker build --tag megatron-cp --build-arg BASE=IMAGE_WITH_TORCH .      # keeps that image's torch
#   apptainer build megatron-cp.sif docker-daemon://megatron-cp:latest
#
# The image has the exact versions of constraints/default.txt, or of CONSTRAINTS; with a base that has torch, none are
# pinned. `python3` in it is the one that has megatron-cp, as `megatron-cp submit --container-image` expects.
ARG BASE=nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04
FROM ${BASE}
ARG EXTRAS=
ARG CONSTRAINTS=default

RUN if ! python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))'; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends git python3-dev python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi

COPY . /opt/megatron-cp/source
RUN python3 -m venv --system-site-packages /opt/megatron-cp/venv \
    && pins=/opt/megatron-cp/source/constraints/$CONSTRAINTS.txt \
    && if python3 -c 'import torch' 2>/dev/null; then pins=/dev/null; fi \
    && /opt/megatron-cp/venv/bin/python -m pip install --no-cache-dir --constraint "$pins" \
        "/opt/megatron-cp/source${EXTRAS:+[$EXTRAS]}"
ENV PATH=/opt/megatron-cp/venv/bin:$PATH

# fails the build where something does not import
RUN megatron-cp --version && megatron-cp list backends
