# The service. CPU by default; for an NVIDIA GPU name an index with a CUDA build of the torch in
# constraints.txt, e.g.
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t ilqr-vae:cuda .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Compiled kernels are kept where the service may write: a volume, see compose.yaml.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NUMBA_CACHE_DIR=/var/cache/ilqr-vae

WORKDIR /app
COPY constraints.txt ./
RUN pip install -c constraints.txt --index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY training ./training
COPY service ./service
COPY clients ./clients
RUN pip install -c constraints.txt ".[engine]"
COPY configs ./configs

RUN useradd --create-home --uid 10001 ilqr \
    && install -d -o ilqr -g ilqr "${NUMBA_CACHE_DIR}" /journal
USER ilqr

# Ready means: warmed up and answering bins. The first start compiles the kernels, for minutes on a slow machine.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/readyz', timeout=2)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["ilqr-vae"]
CMD ["serve", "/models/model.safetensors", "--config", "/app/configs/service.toml", "--log", "json"]
