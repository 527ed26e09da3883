# The service. CPU by default; for an NVIDIA GPU:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t ilqr-vae:cuda .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NUMBA_CACHE_DIR=/tmp/numba

WORKDIR /app
RUN pip install --index-url "${TORCH_INDEX}" "torch>=2.6"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY training ./training
COPY service ./service
COPY clients ./clients
RUN pip install ".[engine]"
COPY configs ./configs

RUN useradd --create-home --uid 10001 ilqr
USER ilqr

# Ready means: warmed up and answering bins.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9464/readyz', timeout=2)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["ilqr-vae"]
CMD ["serve", "/models/model.safetensors", "--config", "/app/configs/service.toml", "--log", "json"]
