# docker build -t fastdisco --build-arg COMMIT="$(git describe --always --dirty --exclude='*')" .
#
# BASE: NVIDIA's PyTorch image of a month (26.04 and later hold a torch that fits), or any Debian or Ubuntu image with
# Python >= 3.10 and pip.  The slim variant, with PyPI's wheels alone: --build-arg BASE=python:3.12-slim
ARG BASE=nvcr.io/nvidia/pytorch:26.09-py3
# hadolint ignore=DL3006
FROM ${BASE}

LABEL org.opencontainers.image.title="fastdisco" \
      org.opencontainers.image.description="DisCo self-supervised distillation of small vision models: DALI, DeepSpeed, Triton" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /workspace/fastdisco
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore

# Triton compiles a small C file for each kernel when it first runs, so a base without a compiler gets one, with C's
# headers; Python's own headers are in every python image.
# hadolint ignore=DL3008
RUN command -v gcc \
    || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }

# Dependencies before the source: a layer that only they can change.  setup.py reads the README and looks for kernels/.
COPY setup.py pyproject.toml ./
COPY fastdisco/__init__.py fastdisco/
COPY docker/install.py docker/
RUN mkdir kernels && touch README.md && python3 docker/install.py

# A user of its own; and since `docker run --user` may bring any other, who is in no password file: folders that all can write to.
ENV TRITON_CACHE_DIR=/home/fastdisco/.cache/triton TORCH_EXTENSIONS_DIR=/home/fastdisco/.cache/torch_extensions
RUN useradd --no-log-init --uid 10001 --create-home fastdisco \
    && mkdir --mode=1777 out /home/fastdisco/.cache "$TRITON_CACHE_DIR" "$TORCH_EXTENSIONS_DIR" \
    && chmod 1777 /home/fastdisco

COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps --editable . && python3 docker/bill.py . && chmod -R a+rX .

ARG COMMIT=
ENV FASTDISCO_COMMIT=${COMMIT}
ARG CREATED=
LABEL org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.created="${CREATED}"

USER 10001
ENV HOME=/home/fastdisco USER=fastdisco
RUN python3 docker/check.py

# What the libraries of the image and this machine's devices can do together; nothing is trained.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m --retries=2 CMD ["fastdisco", "doctor", "--quick"]

# Signals reach every rank, and the container lives until the last one has saved.  NVIDIA's own entry point, which makes
# the CUDA libraries fit an older driver, comes behind it.
ENTRYPOINT ["python3", "/workspace/fastdisco/docker/init.py"]
CMD ["bash"]
