# syntax=docker/dockerfile:1
# Two images of one file:
#
#     docker build -t sameroute .                             # GPUs: CUDA 13.0, Transformer Engine, SGLang's kernels, DeepEP
#     docker build -t sameroute:cpu --build-arg DEVICE=cpu .  # no GPU: the quickstart, and what the tests run
#     docker build --build-arg APEX=1 .                       # and NVIDIA apex's fused kernels, from source
#
#     docker run --rm sameroute:cpu                           # the quickstart
#     docker run --rm --gpus all --ipc host --ulimit memlock=-1 -v "$PWD:/workspace" sameroute train configs/NAME.yaml
#
# Python packages are those of requirements.lock and requirements-gpu.lock. torch, CUDA's libraries, NCCL and cuDNN are
# among them; of the base image the GPU image uses the compiler, which SGLang's and DeepGEMM's kernels need at run time.
# scripts/image_steps.py runs the steps of the CPU image where there is no Docker: `make test-image`.
ARG DEVICE=gpu

FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04@sha256:ae7f650405a3964972dacfa889273bf8e3fbe9709899afd187da01c4cdff3105 AS base-gpu
# Python 3.12 is Ubuntu 24.04's own. libibverbs and librdmacm: RDMA for NCCL and DeepEP. iproute2: scripts/slurm.
# bubblewrap: the sandbox of programs that models write.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv bubblewrap build-essential cmake \
        git ibverbs-providers iproute2 libibverbs1 libnuma1 librdmacm1 tini \
    && rm -rf /var/lib/apt/lists/*

FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c AS base-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap build-essential iproute2 libnuma1 tini \
    && rm -rf /var/lib/apt/lists/*

# What both images have before their packages: uv, and an empty virtual environment.
# hadolint ignore=DL3006
FROM base-${DEVICE} AS environment
ENV VIRTUAL_ENV=/opt/venv UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/opt/venv/bin:/opt/uv/bin:$PATH
RUN python3.12 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9 \
    && uv venv --python python3.12 /opt/venv
WORKDIR /opt/sameroute
COPY pyproject.toml requirements.lock requirements-gpu.lock ./

FROM environment AS packages-cpu
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install -r pyproject.toml --constraint requirements.lock

FROM environment AS packages-gpu
# Of which GPUs kernels are compiled for: 9.0 H100 and H200, 10.0 B200.
ARG TORCH_CUDA_ARCH_LIST="9.0;10.0"
ARG NVTE_CUDA_ARCHS="90;100"
ARG MAX_JOBS=8
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install -r pyproject.toml --constraint requirements-gpu.lock
# Transformer Engine's part for torch is compiled against the torch that is there. Its expert parallelism over NCCL, which
# Megatron-Core does not use, wants the headers of torch's NCCL, and the compiler finds the base image's (NVTE_WITH_NCCL_EP).
RUN --mount=type=cache,target=/var/cache/uv \
    uv pip install pybind11==3.0.1 \
    && NVTE_FRAMEWORK=pytorch NVTE_WITH_NCCL_EP=0 uv pip install -r pyproject.toml --extra gpu --constraint requirements-gpu.lock \
        --no-build-isolation-package transformer-engine-torch
# apex is optional: Transformer Engine has fused Adam, norms and gradient accumulation of its own.
ARG APEX=0
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN --mount=type=cache,target=/var/cache/uv \
    if [ "$APEX" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=$MAX_JOBS \
            uv pip install --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@$APEX_COMMIT"; \
    fi

# hadolint ignore=DL3006
FROM packages-${DEVICE} AS packages

# hadolint ignore=DL3006
FROM base-${DEVICE} AS image
RUN groupadd --gid 10001 sameroute \
    && useradd --uid 10001 --gid sameroute --create-home sameroute \
    && mkdir -p /workspace \
    && chown sameroute:sameroute /workspace
COPY --from=packages /opt/uv /opt/uv
COPY --from=packages /opt/venv /opt/venv
COPY . /opt/sameroute
# Transformer Engine looks for cuDNN where CUDNN_PATH says before it finds the base image's: torch has loaded this one.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/opt/uv/bin:$PATH HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 \
    CUDNN_PATH=/opt/venv/lib/python3.12/site-packages/nvidia/cudnn
WORKDIR /opt/sameroute
RUN uv pip install --no-cache --no-deps --no-build-isolation --editable . \
    && ln -s /opt/sameroute/configs /workspace/configs
USER 10001:10001
WORKDIR /workspace
# The command works, and where the image is of GPUs, torch sees one.
HEALTHCHECK --interval=60s --timeout=60s --start-period=30s --retries=3 \
    CMD ["python", "/opt/sameroute/scripts/image_health.py"]
ENTRYPOINT ["tini", "--", "sameroute"]
CMD ["train", "configs/quickstart.yaml"]
